package client

import (
	"context"
	"hash/maphash"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/codes"
)

// StreamConfig bounds a Stream. The zero value is a good one.
type StreamConfig struct {
	// MaxOpen is how many pushes may be without an answer. Further ones wait in Send. 0 means 1024, which is what Push-Manager takes
	// from one call by default.
	MaxOpen int
	// MaxBytes is how many bytes they may have. 0 means 8 MiB.
	MaxBytes int
	// Lanes is the number of calls that the Stream is made of. Each goes to the next instance in turn. A user or a room always has
	// the same one. 0 means 1. MaxOpen and MaxBytes are for each.
	Lanes int
}

func (c StreamConfig) withDefaults() StreamConfig {
	if c.MaxOpen <= 0 {
		c.MaxOpen = 1024
	}
	if c.MaxBytes <= 0 {
		c.MaxBytes = 8 << 20
	}
	if c.Lanes <= 0 {
		c.Lanes = 1
	}
	return c
}

// Stream pushes many messages over few long calls. What is sent while the connection is busy goes out together.
//
// Pushes to one user, or to one room, go out in the order of Send, and arrive in it. So a push that was refused is repeated
// only if no later push to the same target has gone out meanwhile. Lists of users and broadcasts have no order against others if there
// are several Lanes.
//
// When a call breaks, or owes answers and brings none for 15 s, the Stream opens another one. Pushes without an answer are repeated if Push-Manager said that it did not take them, or
// if they have a MessageID; otherwise they end as unknown. An unknown push may still arrive behind later ones. So may one with a MessageID, if
// its first try was refused and the refusal was lost when the call broke.
type Stream struct {
	// Static after its start.
	c     *Client
	lanes []*lane
	seed  maphash.Seed
	stop  context.CancelFunc
	work  sync.WaitGroup
}

// Stream starts a Stream, which Close ends. It opens its calls with the first push.
func (c *Client) Stream(cfg StreamConfig) *Stream {
	cfg = cfg.withDefaults()
	ctx, stop := context.WithCancel(context.Background())
	s := &Stream{c: c, seed: maphash.MakeSeed(), stop: stop, lanes: make([]*lane, cfg.Lanes)}
	for i := range s.lanes {
		l := newLane(c, cfg)
		s.lanes[i] = l
		s.work.Go(func() { l.run(ctx) })
		s.work.Go(func() { l.sweepLoop(ctx) })
	}
	return s
}

// Pending is a push that a Stream has taken.
type Pending struct {
	// Static after Send.
	target   Target
	body     []byte // its field of a PushStreamRequest
	weight   int64  // in lane.room
	deadline time.Time
	span     trace.Span
	done     chan struct{}

	// Guarded by lane.mu until it is settled.
	id      uint64
	key     *key // nil: it has no order
	message uint64
	alone   bool // it goes in a message of its own
	due     time.Time
	tries   tries

	// Written before done is closed.
	result Result
	err    error
}

// Done is closed when the push has ended.
func (p *Pending) Done() <-chan struct{} { return p.done }

// Wait waits for the end of the push. Without one before the end of ctx, its error is unknown, and the push goes on.
func (p *Pending) Wait(ctx context.Context) (Result, error) {
	select {
	case <-p.done:
		return p.result, p.err
	default:
	}
	select {
	case <-p.done:
		return p.result, p.err
	case <-ctx.Done():
		return Result{}, errorOf(ctx.Err(), true)
	}
}

// Push is Send and Wait.
func (s *Stream) Push(ctx context.Context, to Target, m Message, options ...PushOption) (Result, error) {
	p, err := s.Send(ctx, to, m, options...)
	if err != nil {
		return Result{}, err
	}
	return p.Wait(ctx)
}

// Send takes a push. It waits while MaxOpen or MaxBytes are reached, and for nothing else; an error means that the push was not
// taken. The deadline of ctx is that of the push. Without one it is that of [WithTimeout] and a second for the answer. If ctx is
// cancelled after Send, the push goes on.
func (s *Stream) Send(ctx context.Context, to Target, m Message, options ...PushOption) (*Pending, error) {
	request, o, err := newRequest(to, m, options)
	if err != nil {
		return nil, err
	}
	body, err := encode(to.kind, request)
	if err != nil {
		return nil, invalid("message", err.Error())
	}
	l := s.lanes[0]
	if len(s.lanes) > 1 && to.ordered() {
		l = s.lanes[maphash.String(s.seed, to.id)%uint64(len(s.lanes))]
	}
	weight := min(max(int64(len(body)), l.unit), l.size)
	if err := l.room.Acquire(ctx, weight); err != nil {
		e := errorOf(err, false)
		e.Message = "no room in the stream: " + e.Message
		return nil, e
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(s.c.cfg.timeout + time.Second)
	}
	_, span := s.c.cfg.tracer.Start(ctx, to.kind.method(), trace.WithSpanKind(trace.SpanKindClient)) //nolint:spancheck // ended with the push
	p := &Pending{target: to, body: body, weight: weight, deadline: deadline, span: span, done: make(chan struct{}), tries: s.c.newTries(to, o.MessageID)}
	if !l.enqueue(p) {
		l.room.Release(weight)
		closed := &Error{Code: codes.Canceled, Message: ErrClosed.Error(), NotSent: true, cause: ErrClosed}
		endSpan(span, nil, closed)
		return nil, closed //nolint:spancheck // endSpan has
	}
	return p, nil
}

// Close takes no more pushes, waits for the end of those that were taken, and ends the Stream. If ctx ends first, what was sent is unknown.
// It may be called again.
func (s *Stream) Close(ctx context.Context) error {
	for _, l := range s.lanes {
		l.close()
	}
	var err error
	for _, l := range s.lanes {
		select {
		case <-l.idle:
			continue
		default:
		}
		select {
		case <-l.idle:
		case <-ctx.Done():
			err = ctx.Err()
			s.stop()
		}
	}
	// The calls end by themselves now, unless a server does not care.
	timer := time.AfterFunc(time.Second, s.stop)
	s.work.Wait()
	timer.Stop()
	s.stop()
	return err
}
