package conformance

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

func lastingChecks() []check {
	return []check{
		{name: "lasting/unnamed", expect: "of a feature of lasting delivery that the node does not name it says nothing, and options of it change nothing", users: 1, run: unnamed},
		{name: "lasting/dedupe", expect: "a message id reaches a connection once, through whichever stream it comes: the user is delivered and a duplicate; with another payload_hash the user is reused", users: 1, run: dedupe},
		{name: "lasting/receipts", expect: "users who are pending are settled by receipts behind their ack, each once, the last one final within ack_timeout_ms", users: 1, run: receipts},
		{name: "lasting/expiry", expect: "a message whose time is left is shown, and one whose time is over is failed", users: 1, run: expiry},
		{name: "lasting/collapse", expect: "of messages with one collapse_key the last one is shown", users: 1, clients: true, run: collapse},
		{name: "lasting/replay", expect: "a manager that offers replay is asked for what is stored; it is shown before what is new, then said to be taken, and goes behind its gate only", users: 1, run: replay},
		{name: "lasting/nudge", expect: "a nudge is answered at once, and has the store read again", users: 1, run: nudged},
		{name: "lasting/replay-fails", expect: "after a replay that fails the node goes on with what is new, and asks again with another gate", users: 1, run: replayFails},
	}
}

// every is the features of lasting delivery that are checked.
var every = []pubsub.Feature{ //nolint:gochecknoglobals // a constant
	pubsub.Feature_FEATURE_DEDUPE, pubsub.Feature_FEATURE_CLIENT_ACK, pubsub.Feature_FEATURE_EXPIRY,
	pubsub.Feature_FEATURE_COLLAPSE, pubsub.Feature_FEATURE_REPLAY,
}

func (l *link) has(f pubsub.Feature) bool { return slices.Contains(l.hello.GetFeatures(), f) }

func at(list []uint32, i int) uint32 {
	if i < len(list) {
		return list[i]
	}
	return 0
}

// settleLasting looks at what an ack says of lasting delivery. mu is held, as in takeLasting.
func (l *link) settleLasting(seq uint64, d *pubsub.Delivery, o *outcome) {
	switch {
	case (o.duplicates > 0 || len(o.reused) > 0) && !l.has(pubsub.Feature_FEATURE_DEDUPE):
		l.fault("seq %d has duplicates or reused users, and the node does not name FEATURE_DEDUPE", seq)
	case (o.duplicates > 0 || len(o.reused) > 0) && d.GetMessageId() == "":
		l.fault("seq %d has duplicates or reused users, and no message_id", seq)
	case o.pending > 0 && !l.has(pubsub.Feature_FEATURE_CLIENT_ACK):
		l.fault("seq %d has pending users, and the node does not name FEATURE_CLIENT_ACK", seq)
	case o.pending > 0 && (!d.GetWantAck() || len(d.GetUserIds()) == 0 && d.GetAudience() == nil):
		l.fault("seq %d has pending users, and wants no ack of users", seq)
	case o.duplicates > o.delivered, o.pending > o.delivered:
		l.fault("seq %d: %d duplicates and %d pending users of %d delivered", seq, o.duplicates, o.pending, o.delivered)
	}
	if o.pending > 0 {
		l.awaited[seq] = &awaited{users: int(o.pending)}
	}
}

// takeLasting looks at what a frame says of lasting delivery beside acks.
func (l *link) takeLasting(f *pubsub.DeliverResponse) {
	for _, r := range f.GetReceipts() {
		a := l.awaited[r.GetSeq()]
		switch {
		case a == nil:
			l.fault("a receipt of seq %d, of which no ack has said that users are pending", r.GetSeq())
			continue
		case a.final:
			l.fault("a receipt of seq %d behind the final one", r.GetSeq())
		}
		a.acked += int(r.GetAcked())
		a.unacked += len(r.GetUnacked())
		a.final = r.GetFinal()
		if sum := a.acked + a.unacked; sum > a.users || a.final && sum < a.users {
			l.fault("the receipts of seq %d settle %d users (final: %t), and %d are pending", r.GetSeq(), sum, a.final, a.users)
		}
	}
	if len(f.GetCatchups())+len(f.GetReplayTaken())+len(f.GetNudgesTaken()) > 0 && !l.has(pubsub.Feature_FEATURE_REPLAY) {
		l.fault("a catchup, replay_taken or nudges_taken, and the node does not name FEATURE_REPLAY")
	}
	for _, c := range f.GetCatchups() {
		if c.GetGate() == 0 || slices.ContainsFunc(l.asked, func(before *pubsub.Catchup) bool { return before.GetGate() == c.GetGate() }) {
			l.fault("a catchup with the gate %d, which is 0 or was used before", c.GetGate())
		}
		l.asked = append(l.asked, c)
	}
	for _, t := range f.GetReplayTaken() {
		if t.GetSeq() < l.taken[t.GetGate()] {
			l.fault("gate %d: taken up to %d after %d", t.GetGate(), t.GetSeq(), l.taken[t.GetGate()])
		}
		l.taken[t.GetGate()] = t.GetSeq()
	}
	for _, token := range f.GetNudgesTaken() {
		l.nudged[token] = true
	}
}

// lastingLink opens a stream that offers every feature, to a node that names f.
func (t *tester) lastingLink(ctx context.Context, f pubsub.Feature) (*link, error) {
	hello := t.helloOf()
	hello.Features = every
	l, err := t.open(ctx, hello)
	if err != nil {
		return nil, err
	}
	if !l.has(f) {
		l.close()
		return nil, &skipped{fmt.Sprintf("the node does not do it (features has no %v)", f)}
	}
	return l, nil
}

// named is a message with an id of its own.
func (t *tester) named(user string) (*pubsub.Delivery, string) {
	d, token := t.to(user)
	d.MessageId, d.Sender, d.PayloadHash = rand.Text(), "conformance", 1
	return d, token
}

// unnamed leaves it to takeLasting and settleLasting to notice.
func unnamed(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	user := t.cfg.Users[0]
	d, token := t.named(user)
	if !l.has(pubsub.Feature_FEATURE_CLIENT_ACK) {
		d.WantAck, d.AckTimeoutMs = true, 1000
	}
	if !l.has(pubsub.Feature_FEATURE_COLLAPSE) {
		d.CollapseKey = "conformance"
	}
	want := 1
	if !l.has(pubsub.Feature_FEATURE_DEDUPE) {
		want = 2
	}
	for range 2 {
		f := l.frame(d)
		if !l.has(pubsub.Feature_FEATURE_REPLAY) {
			f.Nudges, f.ReplayEnds = []*pubsub.Nudge{{UserId: user, Token: 1}}, []*pubsub.ReplayEnd{{Gate: 1}}
		}
		if err := l.write(f); err != nil {
			return err
		}
		o, err := l.outcome(ctx, f.GetFirstSeq())
		if err == nil {
			err = o.is(1)
		}
		if err != nil {
			return err
		}
	}
	if err := l.fence(ctx); err != nil || t.cfg.Client == nil {
		return err
	}
	if err := t.nobody(ctx, "no message", user); err != nil { // whatever was before has arrived
		return err
	}
	if n := t.arrived.count(user, token); n != want {
		return fmt.Errorf("the message reached user %q %d times instead of %d", user, n, want)
	}
	return nil
}

func dedupe(ctx context.Context, t *tester) error {
	user := t.cfg.Users[0]
	d, token := t.named(user)
	content, other := t.content()
	theirs, second := t.content() // clients know a message by its id and its content
	for _, c := range []struct {
		what        string
		sender      string
		hash        uint32
		content     *pubsub.MessageContent
		dups, reuse int
	}{
		{"the first time", "conformance", 1, d.GetContent(), 0, 0},
		{"again", "conformance", 1, d.GetContent(), 1, 0},
		{"with another payload_hash", "conformance", 2, content, 0, 1},
		{"of another sender", "somebody else", 1, theirs, 0, 0},
	} {
		l, err := t.lastingLink(ctx, pubsub.Feature_FEATURE_DEDUPE) // each on a stream of its own
		if err != nil {
			return err
		}
		defer l.close()
		o, err := l.ask(ctx, &pubsub.Delivery{Content: c.content, UserIds: []string{user}, MessageId: d.GetMessageId(), Sender: c.sender, PayloadHash: c.hash})
		switch {
		case err != nil:
			return fmt.Errorf("%s: %w", c.what, err)
		case int(o.delivered) != 1-c.reuse || int(o.duplicates) != c.dups || len(o.reused) != c.reuse || len(o.failed) > 0:
			return fmt.Errorf("%s: delivered %d, duplicates %d, reused %s, failed %s instead of %d, %d and %d reused",
				c.what, o.delivered, o.duplicates, some(o.reused), some(o.failed), 1-c.reuse, c.dups, c.reuse)
		}
	}
	if err := t.nobody(ctx, other, user); err != nil || t.cfg.Client == nil {
		return err
	}
	if n, m := t.arrived.count(user, token), t.arrived.count(user, second); n != 1 || m != 1 {
		return fmt.Errorf("it reached user %q %d times, and that of another sender %d times, instead of once each", user, n, m)
	}
	return nil
}

func receipts(ctx context.Context, t *tester) error {
	l, err := t.lastingLink(ctx, pubsub.Feature_FEATURE_CLIENT_ACK)
	if err != nil {
		return err
	}
	defer l.close()
	timeout := t.cfg.Within / 2
	for range 3 {
		d, _ := t.named(t.cfg.Users[0])
		d.UserIds = append(d.UserIds, t.cfg.Absent)
		d.WantAck, d.AckTimeoutMs = true, uint32(timeout.Milliseconds())
		o, err := l.ask(ctx, d)
		if err == nil {
			err = o.is(1, t.cfg.Absent)
		}
		if err != nil {
			return err
		}
	}
	// Within counts from here: as long again as the clients have.
	return l.until(ctx, "the final receipt of each delivery with pending users", func() bool {
		for _, a := range l.awaited {
			if !a.final {
				return false
			}
		}
		return true
	})
}

func expiry(ctx context.Context, t *tester) error {
	l, err := t.lastingLink(ctx, pubsub.Feature_FEATURE_EXPIRY)
	if err != nil {
		return err
	}
	defer l.close()
	user := t.cfg.Users[0]
	d, token := t.named(user)
	d.TtlMs = 600_000
	o, err := l.ask(ctx, d)
	if err == nil {
		err = o.is(1)
	}
	if err != nil {
		return fmt.Errorf("with ten minutes left: %w", err)
	}
	if t.cfg.Client != nil {
		if err := t.arrived.until(ctx, user, token); err != nil {
			return err
		}
	}
	d, _ = t.named(user)
	d.TtlMs = 1
	switch o, err = l.ask(ctx, d); {
	case err != nil:
		return err
	case o.refused || len(o.notHere) > 0:
		return fmt.Errorf("with 1 ms left: not_here %s, refused %t instead of delivered or failed", some(o.notHere), o.refused)
	}
	return nil
}

func collapse(ctx context.Context, t *tester) error {
	l, err := t.lastingLink(ctx, pubsub.Feature_FEATURE_COLLAPSE)
	if err != nil {
		return err
	}
	defer l.close()
	user := t.cfg.Users[0]
	var frame []*pubsub.Delivery
	last := ""
	for range 100 {
		d, token := t.named(user)
		d.CollapseKey = "conformance"
		frame, last = append(frame, d), token
	}
	if _, err := l.deliver(frame...); err != nil {
		return err
	}
	if err := l.all(ctx); err != nil {
		return err
	}
	return t.arrived.until(ctx, user, last)
}

// catchup waits until the node has asked for a user whose gates were not answered yet.
func (l *link) catchup(ctx context.Context, user string, after int) (*pubsub.Catchup, error) {
	var c *pubsub.Catchup
	// A node asks slowly for those who were here before the manager.
	err := l.within(ctx, 10*time.Second+l.t.cfg.Within, fmt.Sprintf("a catchup for user %q", user), func() bool {
		for _, asked := range l.asked[min(after, len(l.asked)):] {
			if asked.GetUserId() == user {
				c = asked
				return true
			}
		}
		return false
	})
	if err != nil {
		err = fmt.Errorf("%w (it may have asked another manager that has a store: try the node without one)", err)
	}
	return c, err
}

func (l *link) endReplay(c *pubsub.Catchup, failure string) error {
	return l.write(&pubsub.DeliverRequest{ReplayEnds: []*pubsub.ReplayEnd{{Gate: c.GetGate(), Seq: 99, Error: failure}}})
}

// endAll ends whatever else was asked, so that nobody stays behind a gate.
func (l *link) endAll() error {
	l.mu.Lock()
	asked := slices.Clone(l.asked)
	l.mu.Unlock()
	for _, c := range asked {
		if err := l.endReplay(c, ""); err != nil {
			return err
		}
	}
	return nil
}

func (l *link) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.asked)
}

func replay(ctx context.Context, t *tester) error {
	l, err := t.lastingLink(ctx, pubsub.Feature_FEATURE_REPLAY)
	if err != nil {
		return err
	}
	defer l.close()
	user := t.cfg.Users[0]
	if _, err := l.catchup(ctx, user, 0); err != nil { // with an open gate, since it is late
		return err
	}
	if err := l.endAll(); err != nil {
		return err
	}
	n := l.count()
	if err := l.write(&pubsub.DeliverRequest{Nudges: []*pubsub.Nudge{{UserId: user, Seq: 1, Token: 1}}}); err != nil {
		return err
	}
	c, err := l.catchup(ctx, user, n)
	if err != nil {
		return err
	}
	live, liveToken := t.named(user)
	if o, err := l.ask(ctx, live); err != nil {
		return err
	} else if err := o.is(1); err != nil {
		return fmt.Errorf("a direct message while the gate is closed: %w", err)
	}
	var tokens []string
	for seq := uint64(1); seq <= 3; seq++ {
		d, token := t.named(user)
		d.Replay = &pubsub.ReplayPlace{Gate: c.GetGate(), Seq: seq, After: seq - 1}
		o, err := l.ask(ctx, d)
		if err == nil {
			err = o.is(1)
		}
		if err != nil {
			return fmt.Errorf("message %d out of the store: %w", seq, err)
		}
		tokens = append(tokens, token)
	}
	stray, strayToken := t.named(user)
	stray.Replay = &pubsub.ReplayPlace{Gate: 1 << 60, Seq: 1}
	if o, err := l.ask(ctx, stray); err != nil {
		return err
	} else if o.delivered > 0 {
		return errors.New("a message for a gate that nobody has asked for is delivered")
	}
	// A client that acknowledges does so when it is told to, so it may take longer than an ack.
	if err := l.within(ctx, 10*time.Second+t.cfg.Within, "replay_taken up to 3", func() bool { return l.taken[c.GetGate()] == 3 }); err != nil {
		return err
	}
	if err := l.endReplay(c, ""); err != nil {
		return err
	}
	if t.cfg.Client == nil {
		return nil
	}
	if err := t.arrived.until(ctx, user, liveToken); err != nil {
		return err
	}
	if err := t.arrived.inOrder(user, append(tokens, liveToken)); err != nil {
		return err
	}
	if err := l.endAll(); err != nil {
		return err
	}
	return t.nobody(ctx, strayToken, user)
}

func nudged(ctx context.Context, t *tester) error {
	l, err := t.lastingLink(ctx, pubsub.Feature_FEATURE_REPLAY)
	if err != nil {
		return err
	}
	defer l.close()
	user := t.cfg.Users[0]
	if _, err := l.catchup(ctx, user, 0); err != nil {
		return err
	}
	if err := l.endAll(); err != nil {
		return err
	}
	n := l.count()
	for token, nudgedUser := range map[uint64]string{7: t.cfg.Absent, 8: user} {
		if err := l.write(&pubsub.DeliverRequest{Nudges: []*pubsub.Nudge{{UserId: nudgedUser, Seq: 1, Token: token}}}); err != nil {
			return err
		}
		if err := l.until(ctx, fmt.Sprintf("the answer to a nudge for user %q", nudgedUser), func() bool { return l.nudged[token] }); err != nil {
			return err
		}
	}
	if _, err := l.catchup(ctx, user, n); err != nil {
		return fmt.Errorf("after the nudge: %w", err)
	}
	return l.endAll()
}

func replayFails(ctx context.Context, t *tester) error {
	l, err := t.lastingLink(ctx, pubsub.Feature_FEATURE_REPLAY)
	if err != nil {
		return err
	}
	defer l.close()
	user := t.cfg.Users[0]
	c, err := l.catchup(ctx, user, 0)
	if err != nil {
		return err
	}
	d, token := t.named(user)
	if _, err := l.ask(ctx, d); err != nil {
		return err
	}
	n := l.count()
	if err := l.endReplay(c, "store: not reachable"); err != nil {
		return err
	}
	if t.cfg.Client != nil {
		if err := t.arrived.until(ctx, user, token); err != nil {
			return err
		}
	}
	if _, err := l.catchup(ctx, user, n); err != nil {
		return fmt.Errorf("after a replay that failed: %w", err)
	}
	return l.endAll()
}
