package conformance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// The bounds of a frame in each direction.
const (
	maxManagerFrame = 16 << 20
	maxNodeFrame    = 1 << 20
)

// link is the manager's side of one Deliver stream. Its reader looks at every frame
// and keeps what the node has said.
type link struct {
	// Static after open.
	t      *tester
	stream grpc.BidiStreamingClient[pubsub.DeliverRequest, pubsub.DeliverResponse]
	cancel context.CancelFunc
	done   chan struct{} // closed when the reader has ended
	hello  *pubsub.HelloReply

	// Owned by the check.
	next uint64 // seq of the next delivery

	mu sync.Mutex
	// Guarded by mu.
	changed chan struct{} // closed and replaced with every frame
	owed    map[uint64]*pubsub.Delivery
	size    map[uint64]int // users of each delivery; -1: everybody
	acked   map[uint64]outcome
	online  uint32
	beat    uint64 // the last one that was answered
	drained bool
	awaited map[uint64]*awaited // deliveries with pending users, and what receipts have said
	asked   []*pubsub.Catchup
	taken   map[uint64]uint64 // by gate
	nudged  map[uint64]bool
	closed  map[uint64]uint32 // connections, by the token of a disconnect
	wrong   error             // the first rule that the node broke
	ended   bool
	end     error // nil for OK
}

// outcome is what the node said of one delivery.
type outcome struct {
	delivered       uint32
	notHere, failed []string
	failedUsers     uint32
	refused         bool
	duplicates      uint32
	pending         uint32
	reused          []string
	filtered        uint32
	leftOut         []string // of filtered, by name
}

// awaited is a delivery with pending users.
type awaited struct {
	users, acked, unacked int
	final                 bool
}

// helloOf is the usual hello of a manager that nobody else is.
func (t *tester) helloOf() *pubsub.Hello {
	return &pubsub.Hello{ProtocolVersion: 1, ManagerId: fmt.Sprintf("%s-%d", t.manager, t.managers.Add(1)), Shards: 1}
}

// open opens a stream with a hello, nil for the usual one. Where the node ends it
// instead, the error is its status.
func (t *tester) open(ctx context.Context, hello *pubsub.Hello) (*link, error) {
	if hello == nil {
		hello = t.helloOf()
	}
	l, err := t.dial(ctx)
	if err != nil {
		return nil, err
	}
	if err := l.write(&pubsub.DeliverRequest{Hello: hello}); err != nil {
		l.close()
		return nil, err
	}
	err = l.until(ctx, "the reply to hello", func() bool { return l.hello != nil })
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// dial opens a stream on which nothing has been said.
func (t *tester) dial(ctx context.Context) (*link, error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := t.api.Deliver(ctx)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("open a stream: %w", err)
	}
	l := &link{
		t: t, stream: stream, cancel: cancel, done: make(chan struct{}), next: 1, changed: make(chan struct{}),
		owed: make(map[uint64]*pubsub.Delivery), size: make(map[uint64]int), acked: make(map[uint64]outcome),
		awaited: make(map[uint64]*awaited), taken: make(map[uint64]uint64), nudged: make(map[uint64]bool), closed: make(map[uint64]uint32),
	}
	go l.readLoop()
	return l, nil
}

// close breaks the stream and waits for its reader.
func (l *link) close() {
	l.cancel()
	<-l.done
}

// write sends a frame as it is. That the node has ended the stream shows in what is
// awaited next.
func (l *link) write(f *pubsub.DeliverRequest) error {
	if err := l.stream.Send(f); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("send a frame: %w", err)
	}
	return nil
}

// deliver sends deliveries in one frame, and tells the seq of the first.
func (l *link) deliver(deliveries ...*pubsub.Delivery) (first uint64, err error) {
	f := l.frame(deliveries...)
	return f.GetFirstSeq(), l.write(f)
}

// frame is the next frame with deliveries, whose acks are owed from now on.
func (l *link) frame(deliveries ...*pubsub.Delivery) *pubsub.DeliverRequest {
	f := &pubsub.DeliverRequest{FirstSeq: l.next, Deliveries: deliveries}
	l.mu.Lock()
	for _, d := range deliveries {
		l.owed[l.next], l.size[l.next] = d, len(d.GetUserIds())
		if d.GetEverybody() || d.GetScope() != "" {
			l.size[l.next] = -1
		}
		l.next++
	}
	l.mu.Unlock()
	return f
}

// members says how many users a delivery to an audience is for.
func (l *link) members(seq uint64, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.size[seq] = n
}

// ask sends one delivery and waits for its ack.
func (l *link) ask(ctx context.Context, d *pubsub.Delivery) (outcome, error) {
	seq, err := l.deliver(d)
	if err != nil {
		return outcome{}, err
	}
	return l.outcome(ctx, seq)
}

// accounted sends a frame with one delivery to an audience or a list, and demands what is said of it.
func (l *link) accounted(ctx context.Context, f *pubsub.DeliverRequest, here int, notHere ...string) error {
	l.members(f.GetFirstSeq(), here+len(notHere))
	if err := l.write(f); err != nil {
		return err
	}
	o, err := l.outcome(ctx, f.GetFirstSeq())
	if err != nil {
		return err
	}
	return o.is(here, notHere...)
}

// outcome waits for the ack of a delivery.
func (l *link) outcome(ctx context.Context, seq uint64) (outcome, error) {
	err := l.until(ctx, fmt.Sprintf("the ack of seq %d", seq), func() bool { _, ok := l.acked[seq]; return ok })
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.acked[seq], err
}

// all waits until every delivery is acknowledged.
func (l *link) all(ctx context.Context) error {
	return l.until(ctx, "the acks of all deliveries", func() bool { return len(l.acked) >= int(l.next-1) })
}

// fence waits for the answer to a heartbeat: whatever the node did before it has shown.
func (l *link) fence(ctx context.Context) error {
	if err := l.write(&pubsub.DeliverRequest{Heartbeat: 1}); err != nil {
		return err
	}
	return l.until(ctx, "the answer to the heartbeat", func() bool { return l.beat == 1 })
}

// until waits for what the node has to say. An end of the stream, and a rule that it
// breaks meanwhile, are errors.
func (l *link) until(ctx context.Context, what string, ok func() bool) error {
	return l.within(ctx, l.t.cfg.Within, what, ok)
}

// within is until with a time of its own.
func (l *link) within(ctx context.Context, patience time.Duration, what string, ok func() bool) error {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		l.mu.Lock()
		yes, wrong, ended, end, changed := ok(), l.wrong, l.ended, l.end, l.changed
		l.mu.Unlock()
		switch {
		case wrong != nil:
			return wrong
		case yes:
			return nil
		case ended && end == nil:
			return fmt.Errorf("the node ended the stream with OK instead of %s", what)
		case ended:
			return fmt.Errorf("the node ended the stream instead of %s: %w", what, end)
		}
		select {
		case <-changed:
		case <-timer.C:
			return fmt.Errorf("%s did not come within %v", what, patience)
		case <-ctx.Done():
			return fmt.Errorf("%s did not come: %w", what, context.Cause(ctx))
		}
	}
}

// ends waits until the node has ended the stream, with a code.
func (l *link) ends(ctx context.Context, want codes.Code) error {
	timer := time.NewTimer(l.t.cfg.Within)
	defer timer.Stop()
	for {
		l.mu.Lock()
		wrong, ended, end, changed := l.wrong, l.ended, l.end, l.changed
		l.mu.Unlock()
		switch {
		case wrong != nil:
			return wrong
		case ended && status.Code(end) == want:
			return nil
		case ended:
			return fmt.Errorf("the stream ended with %v (%s) instead of %v", status.Code(end), status.Convert(end).Message(), want)
		}
		select {
		case <-changed:
		case <-timer.C:
			return fmt.Errorf("the node did not end the stream within %v", l.t.cfg.Within)
		case <-ctx.Done():
			return fmt.Errorf("the node did not end the stream: %w", context.Cause(ctx))
		}
	}
}

func (l *link) readLoop() {
	defer close(l.done)
	for first := true; ; first = false {
		f, err := l.stream.Recv()
		l.mu.Lock()
		switch {
		case err != nil:
			l.ended = true
			if !errors.Is(err, io.EOF) {
				l.end = err
			}
			if status.Code(err) == codes.ResourceExhausted && l.hello != nil && l.wrong == nil {
				l.wrong = fmt.Errorf("a frame of the node that cannot be read, which may have at most %d bytes: %s", maxNodeFrame, status.Convert(err).Message())
			}
		case first:
			if l.hello = f.GetHello(); l.hello == nil || len(f.GetAcks())+len(f.GetMisses()) > 0 || f.GetHeartbeat() != 0 || f.GetDrain() {
				l.fault("the first frame of the node must have hello and nothing else")
			}
			l.online = max(f.GetOnlineUsers(), f.GetHello().GetOnlineUsers())
		default:
			l.take(f)
		}
		close(l.changed)
		l.changed = make(chan struct{})
		l.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// fault notes the first rule that the node broke. mu is held, as in take and settle.
func (l *link) fault(format string, args ...any) {
	if l.wrong == nil {
		l.wrong = fmt.Errorf(format, args...)
	}
}

// take looks at one frame of the node.
func (l *link) take(f *pubsub.DeliverResponse) {
	if f.GetHello() != nil {
		l.fault("a second hello of the node")
	}
	if f.GetHeartbeat() != 0 || f.GetOnlineUsers() != 0 {
		l.online = f.GetOnlineUsers()
	}
	misses := make(map[uint64]*pubsub.Miss)
	for _, m := range f.GetMisses() {
		if misses[m.GetSeq()] != nil {
			l.fault("two misses for seq %d", m.GetSeq())
		}
		misses[m.GetSeq()] = m
	}
	for _, r := range f.GetAcks() {
		for i, n := range r.GetDelivered() {
			seq := r.GetFirst() + uint64(i)
			l.settle(seq, n, at(r.GetDuplicates(), i), at(r.GetPending(), i), at(r.GetFiltered(), i), misses[seq])
			delete(misses, seq)
		}
		for what, list := range map[string][]uint32{"duplicates": r.GetDuplicates(), "pending": r.GetPending(), "filtered": r.GetFiltered()} {
			if len(list) > 0 && len(list) != len(r.GetDelivered()) {
				l.fault("%d entries of %s beside %d of delivered", len(list), what, len(r.GetDelivered()))
			}
		}
	}
	for seq := range misses {
		l.fault("the miss of seq %d is not in the frame of its ack", seq)
	}
	l.takeLasting(f)
	if len(f.GetDisconnected()) > 0 && !l.has(pubsub.Feature_FEATURE_DISCONNECT) {
		l.fault("disconnected, and the node does not name FEATURE_DISCONNECT")
	}
	for _, d := range f.GetDisconnected() {
		if _, twice := l.closed[d.GetToken()]; twice || d.GetToken() == 0 {
			l.fault("disconnected with the token %d, which is 0 or was answered before", d.GetToken())
		}
		if d.GetFailed() {
			l.fault("disconnected with failed, which is for a node that could not do it")
		}
		l.closed[d.GetToken()] = d.GetConnections()
	}
	if f.GetHeartbeat() != 0 {
		l.beat = f.GetHeartbeat()
	}
	l.drained = l.drained || f.GetDrain()
}

// settle looks at the ack of one delivery.
func (l *link) settle(seq uint64, delivered, duplicates, pending, filtered uint32, m *pubsub.Miss) {
	d, ok := l.owed[seq]
	if !ok {
		l.fault("an ack of seq %d, which is not outstanding", seq)
		return
	}
	delete(l.owed, seq)
	o := outcome{delivered, m.GetNotHere(), m.GetFailed(), m.GetFailedUsers(), m.GetRefused(), duplicates, pending, m.GetReused(), filtered, m.GetFiltered()}
	l.acked[seq] = o
	l.settleLasting(seq, d, &o)
	switch {
	case (filtered > 0 || len(o.leftOut) > 0) && len(d.GetFilter()) == 0:
		l.fault("seq %d has filtered users, and no filter", seq)
	case (filtered > 0 || len(o.leftOut) > 0) && !l.has(pubsub.Feature_FEATURE_FILTER):
		l.fault("seq %d has filtered users, and the node does not name FEATURE_FILTER", seq)
	case d.GetNameFiltered() && len(o.leftOut) != int(filtered), !d.GetNameFiltered() && len(o.leftOut) > 0:
		l.fault("seq %d has %d filtered users, and the miss names %d (name_filtered: %t)", seq, filtered, len(o.leftOut), d.GetNameFiltered())
	}
	named := len(o.notHere) + len(o.failed) + len(o.reused)
	switch size := l.size[seq]; {
	case o.refused:
		if delivered != 0 {
			l.fault("seq %d is refused and has a count of %d", seq, delivered)
		}
	case size < 0:
		if all := delivered + o.failedUsers + filtered; all > l.online {
			l.fault("seq %d, to everybody, counts %d users, and the node has said that %d are online", seq, all, l.online)
		}
	case int(delivered)+int(filtered)+named != size:
		l.fault("seq %d is for %d users: %d delivered, %d filtered and %d named in a miss of the same frame do not add up", seq, size, delivered, filtered, named)
	}
	if users := d.GetUserIds(); len(users) > 0 {
		asked := make(map[string]bool, len(users))
		for _, u := range users {
			asked[u] = true
		}
		for _, u := range slices.Concat(o.notHere, o.failed, o.reused, o.leftOut) {
			if !asked[u] {
				l.fault("seq %d: the miss names %q, who was not asked for or is named twice", seq, u)
			}
			asked[u] = false
		}
	}
}
