package conformance

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

func streamChecks() []check {
	return []check{
		{name: "stream/shards", expect: "two streams of one manager have sequence numbers and audiences of their own", run: twoShards},
		{name: "stream/superseded", expect: "once a newer stream of the same instance_id and shard is open, the older one ends with ABORTED and hands over nothing more; a hello that comes late ends with ABORTED", users: 1, run: superseded},
		{name: "stream/beside", expect: "streams of other instances, of other shards and without an instance_id go on side by side", run: sideBySide},
		{name: "stream/anew", expect: "a stream that broke leaves nothing behind: the next one starts with seq 1 and no audiences", run: anew},
		{name: "stream/reads-on", expect: "the node reads frames while the manager reads no acks", run: readsOn},
	}
}

func twoShards(ctx context.Context, t *tester) error {
	first, second := t.helloOf(), t.helloOf()
	second.ManagerId = first.GetManagerId()
	first.Shards, second.Shards, second.Shard = 2, 2, 1
	var links []*link
	for _, hello := range []*pubsub.Hello{first, second} {
		l, err := t.open(ctx, hello)
		if err != nil {
			return err
		}
		defer l.close()
		links = append(links, l)
	}
	users := t.strangers(3, 0)
	for round := range 3 {
		for i, l := range links {
			content, _ := t.content()
			d := &pubsub.Delivery{Content: content, UserIds: users[:1+i]}
			want := users[:1+i]
			if t.audiences > 0 {
				d = &pubsub.Delivery{Content: content, Audience: &pubsub.Audience{Id: 1, Version: 1}}
				if round == 0 {
					d.Audience.RoomId, d.Audience.Join = t.cfg.Room, want
				}
			}
			if err := l.accounted(ctx, l.frame(d), 0, want...); err != nil {
				return fmt.Errorf("shard %d: %w", i, err)
			}
		}
	}
	return nil
}

// hellos are the hellos of one process for one shard, one after the other.
func (t *tester) hellos(instance string, shard uint32) func(attempt uint64) *pubsub.Hello {
	return func(attempt uint64) *pubsub.Hello {
		hello := t.helloOf()
		hello.Shard, hello.Shards = shard, shard+1
		hello.InstanceId, hello.Attempt = instance, attempt
		return hello
	}
}

func superseded(ctx context.Context, t *tester) error {
	hello := t.hellos(rand.Text(), 0)
	user := t.cfg.Users[0]
	old, err := t.open(ctx, hello(2))
	if err != nil {
		return err
	}
	defer old.close()
	d, _ := t.to(user)
	if _, err := old.ask(ctx, d); err != nil {
		return err
	}
	young, err := t.open(ctx, hello(3))
	if err != nil {
		return fmt.Errorf("the newer stream: %w", err)
	}
	defer young.close()
	d, token := t.to(user)
	seq, err := old.deliver(d)
	if err != nil {
		return err
	}
	err = old.ends(ctx, codes.Aborted)
	old.mu.Lock()
	delivered := old.acked[seq].delivered
	old.mu.Unlock()
	switch {
	case delivered > 0:
		return errors.New("it says that it has delivered what came on the older stream")
	case err != nil:
		return fmt.Errorf("the older stream: %w", err)
	}
	if late, err := t.open(ctx, hello(1)); status.Code(err) != codes.Aborted {
		if err == nil {
			late.close()
			err = errors.New("it is answered")
		}
		return fmt.Errorf("a hello with a lower attempt: %w", err)
	}
	d, _ = t.to(user)
	o, err := young.ask(ctx, d)
	if err == nil {
		err = o.is(1)
	}
	if err != nil {
		return fmt.Errorf("the newer stream: %w", err)
	}
	return t.nobody(ctx, token, user)
}

func sideBySide(ctx context.Context, t *tester) error {
	one := rand.Text()
	bare := t.helloOf()
	var links []*link
	for _, hello := range []*pubsub.Hello{t.hellos(one, 0)(1), t.hellos(one, 1)(1), t.hellos(rand.Text(), 0)(1), bare, bare} {
		l, err := t.open(ctx, hello)
		if err != nil {
			return err
		}
		defer l.close()
		links = append(links, l)
	}
	for _, l := range links {
		d, _ := t.to(t.cfg.Absent)
		o, err := l.ask(ctx, d)
		if err == nil {
			err = o.is(0, t.cfg.Absent)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func anew(ctx context.Context, t *tester) error {
	hello := t.helloOf()
	for range 2 {
		l, err := t.open(ctx, hello)
		if err != nil {
			return err
		}
		content, _ := t.content()
		d := &pubsub.Delivery{Content: content, UserIds: []string{t.cfg.Absent}}
		if t.audiences > 0 {
			d = &pubsub.Delivery{Content: content, Audience: &pubsub.Audience{Id: 1, Version: 1, RoomId: t.cfg.Room, Join: []string{t.cfg.Absent}}}
		}
		f := l.frame(d)
		l.members(1, 1)
		err = l.write(f)
		if err == nil {
			err = l.all(ctx)
		}
		l.close()
		if err != nil {
			return err
		}
	}
	if t.audiences == 0 {
		return nil
	}
	l, err := t.open(ctx, hello)
	if err != nil {
		return err
	}
	defer l.close()
	content, _ := t.content()
	if err := l.write(&pubsub.DeliverRequest{FirstSeq: 1, Deliveries: []*pubsub.Delivery{{Content: content, Audience: &pubsub.Audience{Id: 1, Version: 1}, ExceptUserIds: []string{t.cfg.Absent}}}}); err != nil {
		return err
	}
	if err := l.ends(ctx, codes.FailedPrecondition); err != nil {
		return fmt.Errorf("an audience of the stream before is still there: %w", err)
	}
	return nil
}

// What readsOn sends: more than flow control lets wait in either direction, and less
// missed ids than a node has to keep.
const (
	unreadMisses   = 800 << 10
	unreadContents = 6 << 20
	unreadFrames   = 100
)

// readsOn writes frames through a stream that it does not read. Each of them is missed
// by users with long ids, so the acks fill whatever the manager's side lets wait.
func readsOn(ctx context.Context, t *tester) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second+t.cfg.Within)
	defer cancel()
	stream, err := t.api.Deliver(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&pubsub.DeliverRequest{Hello: t.helloOf()}); err != nil {
		return err
	}
	users := t.strangers(unreadMisses/unreadFrames/200, 200)
	payload := []byte(strings.Repeat("x", unreadContents/unreadFrames))
	for i := range uint64(unreadFrames) {
		err := stream.Send(&pubsub.DeliverRequest{FirstSeq: i + 1, Deliveries: []*pubsub.Delivery{{Content: &pubsub.MessageContent{Data: payload}, UserIds: users}}})
		if ctx.Err() != nil {
			return fmt.Errorf("it has stopped reading after %d of %d frames", i, unreadFrames)
		}
		if err != nil {
			break // Recv has the reason
		}
	}
	for acked := uint64(0); acked < unreadFrames; {
		f, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("after %d of %d acks: %w", acked, unreadFrames, err)
		}
		for _, r := range f.GetAcks() {
			acked += uint64(len(r.GetDelivered()))
		}
	}
	return nil
}
