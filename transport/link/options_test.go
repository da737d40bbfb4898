package link

import (
	"bytes"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// lasting are the features of lasting delivery that a link offers where there is a store.
var lasting = []pubsub.Feature{
	pubsub.Feature_FEATURE_DEDUPE, pubsub.Feature_FEATURE_CLIENT_ACK, pubsub.Feature_FEATURE_EXPIRY,
	pubsub.Feature_FEATURE_COLLAPSE, pubsub.Feature_FEATURE_REPLAY,
}

// placed is a Spool in whose logs every message stands at the same place.
type placed engine.Place

func (placed) Append(_ *engine.Stored, users []string, _ time.Time, done func([]engine.Spooled)) {
	done(make([]engine.Spooled, len(users)))
}

func (p placed) AppendLog(_ *engine.Stored, _ time.Time, done func(engine.Place, error)) {
	done(engine.Place(p), nil)
}

// delivery is what a link gets of a push. The end of the test drops it.
func (w *world) delivery(t interface {
	Fatal(...any)
}, p *engine.Push) *engine.Delivery {
	return w.deliveryAt(t, p, engine.Place{Epoch: 1, Partition: 2, Seq: 3})
}

// deliveryAt is delivery with a place in the log, for a push that is written into one.
func (w *world) deliveryAt(t interface {
	Fatal(...any)
}, p *engine.Push, at engine.Place) *engine.Delivery {
	k := &keeper{make(chan *engine.Delivery, 1)}
	e, err := engine.New(engine.Config{Shards: w.shards, Directory: w.dir, Network: k, Spool: placed(at)})
	if err != nil {
		t.Fatal(err)
	}
	f := &pending{p: p, done: make(chan struct{})}
	if err := e.Start(p, f); err != nil {
		t.Fatal(err)
	}
	d := <-k.sent
	w.t.Cleanup(func() {
		d.Drop(engine.DropUnreachable)
		<-f.done
	})
	return d
}

// What options add is what generated code writes, for every set of features, and nothing for a node without the feature.
// A delivery without options has nothing of it: its bytes are those of the fields that there always were.
func TestOptionsAreEncodedForNodesWithTheFeature(t *testing.T) {
	w := newWorld(t, Config{Replayer: &replayer{}})
	w.room("r", "A", "u1", "u2", "u3")
	now := time.Now()
	rapid.Check(t, func(t *rapid.T) {
		var can []pubsub.Feature
		for _, x := range append(lasting, pubsub.Feature_FEATURE_ROOM_LOG) {
			if rapid.Bool().Draw(t, x.String()) {
				can = append(can, x)
			}
		}
		p := w.toUser("u1", "x")
		if rapid.Bool().Draw(t, "room") {
			p = w.toRoom("r", "x", "u2")
		}
		if rapid.Bool().Draw(t, "options") {
			p.Arrived = now
			p.Options = &engine.Options{
				MessageID:   rapid.StringMatching(`[a-z]{0,3}`).Draw(t, "id"),
				Sender:      rapid.StringMatching(`[a-z]{0,3}`).Draw(t, "sender"),
				PayloadHash: rapid.Uint32Min(1).Draw(t, "hash"),
				TTL:         time.Duration(rapid.IntRange(0, 1<<20).Draw(t, "ttl")) * time.Millisecond,
				ClientAck:   rapid.Bool().Draw(t, "ack"),
				AckTimeout:  time.Duration(rapid.IntRange(0, 60_000).Draw(t, "timeout")) * time.Millisecond,
				CollapseKey: rapid.StringMatching(`[a-z]{0,3}`).Draw(t, "key"),
			}
			if p.Kind == engine.ToRoom && rapid.Bool().Draw(t, "store") {
				p.Options.Store, p.Options.TTL = true, max(p.Options.TTL, time.Minute)
			}
		}
		at := engine.Place{Epoch: rapid.Uint64().Draw(t, "epoch"), Partition: rapid.Uint32().Draw(t, "partition"), Seq: rapid.Uint64Min(1).Draw(t, "seq")}
		d := w.deliveryAt(t, p, at)
		want := &pubsub.Delivery{Content: &pubsub.MessageContent{Data: []byte("x")}}
		if p.Kind == engine.ToRoom {
			want.Audience = &pubsub.Audience{Id: 1, Version: 1, RoomId: "r", Join: []string{"u1", "u2", "u3"}}
			want.ExceptUserIds = []string{"u2"}
		} else {
			want.UserIds = []string{"u1"}
		}
		has := featuresOf(can).has
		if o := p.Options; o != nil {
			if has(pubsub.Feature_FEATURE_DEDUPE) && o.MessageID != "" {
				want.MessageId, want.PayloadHash, want.Sender = o.MessageID, o.PayloadHash, o.Sender
			}
			if has(pubsub.Feature_FEATURE_EXPIRY) {
				want.TtlMs = uint32(o.TTL.Milliseconds())
			}
			if has(pubsub.Feature_FEATURE_CLIENT_ACK) && o.ClientAck {
				want.WantAck, want.AckTimeoutMs = true, uint32(max(d.AckBy().Sub(now).Milliseconds(), 1))
			}
			if has(pubsub.Feature_FEATURE_COLLAPSE) {
				want.CollapseKey = o.CollapseKey
			}
			if has(pubsub.Feature_FEATURE_ROOM_LOG) && o.Store {
				want.Log = &pubsub.LogPosition{Epoch: at.Epoch, Partition: at.Partition, Seq: at.Seq, ExcludeUserIds: []string{"u2"}}
			}
		}
		var more extras
		if o := d.Options(); o != nil {
			var why engine.Reason
			if more, why = extrasOf(d, o, featuresOf(can), now); why != engine.Sent {
				t.Fatal(why)
			}
		}
		auds := newAudiences(1000, w.set.meters)
		to := auds.address(d)
		got := more.append(appendDelivery(nil, d, &to, sizeDelivery(d, &to)+more.size()))
		frame, err := proto.MarshalOptions{Deterministic: true}.Marshal(&pubsub.DeliverRequest{Deliveries: []*pubsub.Delivery{want}})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, frame) {
			var f pubsub.DeliverRequest
			err := proto.Unmarshal(got, &f)
			t.Fatalf("%v, %v\nwant %v", &f, err, want)
		}
	})
}

// What is left of the time to live is what the node hears; less than a millisecond is one, and nothing is nothing to send.
func TestTimeToLiveIsWhatIsLeft(t *testing.T) {
	w := newWorld(t, Config{})
	w.room("r", "A", "u1")
	p := w.toUser("u1", "x")
	p.Arrived, p.Options = time.Now(), &engine.Options{TTL: time.Minute}
	d := w.delivery(t, p)
	all := featuresOf(lasting)
	for passed, want := range map[time.Duration]uint64{
		0: 60_000, time.Second: 59_000, 1500 * time.Microsecond: 59_998, time.Minute - time.Microsecond: 1, -90 * 24 * time.Hour: 1<<32 - 1,
	} {
		if x, why := extrasOf(d, p.Options, all, p.Arrived.Add(passed)); why != engine.Sent || x.ttl != want {
			t.Errorf("after %v: %d, %v", passed, x.ttl, why)
		}
	}
	for _, passed := range []time.Duration{time.Minute, time.Hour} {
		if _, why := extrasOf(d, p.Options, all, p.Arrived.Add(passed)); why != engine.DropExpired {
			t.Errorf("after %v: %v", passed, why)
		}
	}
}

// A message waits in a queue until it expires, and not until its push ends; what is written is for the node to mind.
func TestMessagesExpireInTheQueue(t *testing.T) {
	for name, n := range map[string]*fakeNode{"with Deliver": {id: "A"}, "without Deliver": unaryNode("A")} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, Config{QueueAge: time.Hour, DialTimeout: time.Hour, AckTimeout: 2 * time.Second})
				n.gate = make(chan struct{})
				w.start("a:1", n)
				w.register("A", "a:1")
				w.room("r", "A", "u1", "u2")
				expiring := func(ttl time.Duration) *pending {
					p := w.toUser("u1", ttl.String())
					p.Options = &engine.Options{TTL: ttl}
					return w.begin(p)
				}
				begun := time.Now()
				short, long := expiring(500*time.Millisecond), expiring(3*time.Second)
				if r := w.end(short); r.Failed != 1 || time.Since(begun) > 600*time.Millisecond || reasons(r) != "failed: "+engine.DropExpired.String() {
					t.Errorf("after %v: %+v", time.Since(begun), r)
				}
				close(n.gate)
				if r := w.end(long); r.Delivered != 1 {
					t.Errorf("%+v", r)
				}
				if got := n.received(t); len(got) != 1 || got[0] != "u1 3s" {
					t.Errorf("arrived: %q", got)
				}
			})
		})
	}
}

func TestAcknowledgementsMayComeAfterTheTimeToLive(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{AckTimeout: 2 * time.Second})
		n := &fakeNode{id: "A", answer: func(seq uint64, users []string, _ string, r *pubsub.DeliverResponse) {
			time.Sleep(time.Second)
			r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{uint32(len(users))}})
		}}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		p := w.toUser("u1", "x")
		p.Options = &engine.Options{TTL: 200 * time.Millisecond}
		if r := w.do(p); r.Delivered != 1 {
			t.Errorf("%+v", r)
		}
		synctest.Wait()
	})
}
