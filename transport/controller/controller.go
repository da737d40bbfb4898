package controller

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/pause"
	"github.com/push-manager/push-manager/internal/plain"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Changes is who is told by the change stream; *route.Directory has it.
type Changes interface {
	Invalidate(rooms, users []string)
	Moved(moves []route.Move)
	InvalidateAll()
	Vouch(until time.Time)
}

var (
	_ route.Source  = (*Controller)(nil)
	_ route.Renewed = (*Controller)(nil)
	_ Changes       = (*route.Directory)(nil)
)

// Controller is the deployment's Controller, or several replicas of it.
type Controller struct {
	// Static after New.
	cfg    Config
	log    *slog.Logger
	made   time.Time
	m      *handles
	conn   *grpc.ClientConn
	client pubsub.ControllerServiceClient
	codec  codec
	budget budget
	wg     sync.WaitGroup

	// Written by Start, under once.
	once sync.Once
	stop context.CancelFunc

	watchedBefore bool // owned by watchLoop

	noBatch  optional // GetUserNodes
	noFollow optional // FollowRoutes
	noWatch  optional // WatchRoutes
	noPages  optional // ListMembers
	// What the revisions of the change stream count in, "" while it has none. An answer from
	// another store says nothing about them.
	store atomic.Pointer[string]
	// In nanoseconds since made: until when the change stream vouches for answers, and
	// up to when each change is known to have been applied, 0 before it is.
	vouched, proved atomic.Int64
	// When the Controller last answered anything; nil before the first time.
	contact atomic.Pointer[time.Time]
	// What went wrong since; nil for nothing.
	trouble atomic.Pointer[string]
	// When a connection or the change stream was last made anew; nil before that.
	renewed atomic.Pointer[time.Time]
}

// New makes a Controller. Look-ups work at once; Start adds the change stream and
// the watch over the connection.
func New(cfg Config) (*Controller, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("controller: %w", err)
	}
	cfg = cfg.withDefaults()
	c := &Controller{cfg: cfg, log: cfg.Logger, made: time.Now(), codec: newCodec()}
	conn, err := cfg.dial(grpc.WithStatsHandler(connections{c}))
	if err != nil {
		return nil, fmt.Errorf("controller %q: %w", cfg.Address, err)
	}
	c.conn, c.client = conn, pubsub.NewControllerServiceClient(conn)
	c.store.Store(new(string))
	c.budget.fill()
	c.m = newHandles(c, cfg.Metrics)
	return c, nil
}

// Start connects, and opens the change stream for changes; nil does without one.
func (c *Controller) Start(changes Changes) {
	c.once.Do(func() {
		ctx, cancel := context.WithCancel(context.Background())
		c.stop = cancel
		c.wg.Go(func() { c.contactLoop(ctx) })
		if changes != nil {
			c.wg.Go(func() { c.watchLoop(ctx, changes) })
		}
	})
}

// Close ends the change stream and the connection. Look-ups under way fail.
func (c *Controller) Close() error {
	c.once.Do(func() { c.stop = func() {} }) // never started
	c.stop()
	err := c.conn.Close()
	c.wg.Wait()
	if status.Code(err) == codes.Canceled { // closed before
		return nil
	}
	return err
}

// Watched tells whether the change stream vouches for answers now.
func (c *Controller) Watched() bool { return int64(time.Since(c.made)) < c.vouched.Load() }

// watchAge is how long ago every change was known to have been applied, 0 with a
// Controller that has no FollowRoutes.
func (c *Controller) watchAge() time.Duration {
	proved := c.proved.Load()
	if proved == 0 || c.noFollow.missing() {
		return 0
	}
	return time.Since(c.made) - time.Duration(proved)
}

// Renewed is when a connection or the change stream was last made anew: whoever answers
// since then may just have started. It is the zero time before that.
func (c *Controller) Renewed() time.Time {
	if at := c.renewed.Load(); at != nil {
		return *at
	}
	return time.Time{}
}

func (c *Controller) renew() {
	now := time.Now()
	c.renewed.Store(&now)
}

// connections hears of each new connection before its first call.
type connections struct{ c *Controller }

func (h connections) HandleConn(_ context.Context, s stats.ConnStats) {
	if _, begun := s.(*stats.ConnBegin); begun && h.c.contact.Load() != nil {
		h.c.renew()
	}
}
func (connections) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (connections) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (connections) HandleRPC(context.Context, stats.RPCStats)                         {}

// Healthy tells whether the Controller can be asked: there is a connection, and a sign
// of life not longer ago than three Config.ContactInterval.
func (c *Controller) Healthy() bool {
	last := c.contact.Load()
	return last != nil && c.conn.GetState() == connectivity.Ready && time.Since(*last) <= 3*c.cfg.ContactInterval
}

// Away is how long nothing has come from the Controller, 0 while it can be asked, and in
// one line what went wrong last, "" while nothing has. Before its first answer ever,
// contacted is false and the time is that since New.
func (c *Controller) Away() (away time.Duration, contacted bool, trouble string) {
	last := c.contact.Load()
	if last != nil && c.Healthy() {
		return 0, true, ""
	}
	if text := c.trouble.Load(); text != nil {
		trouble = *text
	}
	if last == nil {
		return time.Since(c.made), false, trouble
	}
	return time.Since(*last), true, trouble
}

// contactLoop keeps the connection up, probes anew what was UNIMPLEMENTED when it
// is made anew, and asks for a sign of life when none has come by itself.
func (c *Controller) contactLoop(ctx context.Context) {
	up := false
	for ctx.Err() == nil {
		state := c.conn.GetState()
		if state == connectivity.Shutdown {
			return
		}
		if state == connectivity.Idle {
			c.conn.Connect()
		}
		if ready := state == connectivity.Ready; ready != up {
			up = ready
			c.onState(ctx, state)
		}
		if state == connectivity.TransientFailure {
			c.ping(ctx) // it fails at once, and says why there is no connection
		}
		waitCtx, cancel := context.WithTimeout(ctx, c.cfg.ContactInterval)
		changed := c.conn.WaitForStateChange(waitCtx, state)
		cancel()
		if !changed && state == connectivity.Ready {
			c.ping(ctx)
		}
	}
}

// onState notes that the connection is there, or no more.
func (c *Controller) onState(ctx context.Context, state connectivity.State) {
	if state != connectivity.Ready {
		c.log.Warn("lost the controller", "address", c.cfg.Address, "state", state.String())
		return
	}
	c.noBatch.forget()
	c.noFollow.forget()
	c.noWatch.forget()
	c.noPages.forget()
	c.log.Info("connected to the controller", "address", c.cfg.Address)
	c.ping(ctx)
}

// ping asks for a sign of life unless there was one lately. Any answer will do, an
// old Controller has no health service.
func (c *Controller) ping(ctx context.Context) {
	if last := c.contact.Load(); last != nil && time.Since(*last) < c.cfg.ContactInterval/2 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.ContactInterval)
	defer cancel()
	_, err := grpc_health_v1.NewHealthClient(c.conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	c.touch(err)
}

// touch notes that the Controller answered, if err says so, and else what went wrong.
func (c *Controller) touch(err error) {
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded: // gRPC's own, in all likelihood
		text := plain.Line(status.Convert(err).Message(), mostTrouble)
		c.trouble.Store(&text)
	case codes.Canceled: // we did not wait
	default:
		c.heard()
	}
}

// heard notes that the Controller has said something.
func (c *Controller) heard() {
	now := time.Now()
	c.contact.Store(&now)
	c.trouble.Store(nil)
}

// mostTrouble bounds what is kept of an error's text, which the Controller may have written.
const mostTrouble = 256

// call runs one look-up with at most one retry.
func (c *Controller) call(ctx context.Context, once func(context.Context) error) error {
	ctx = withTrace(ctx)
	c.budget.earn()
	err := once(ctx)
	c.touch(err)
	if err == nil || !again(err) || ctx.Err() != nil || !c.budget.spend() {
		return err
	}
	if !pause.For(ctx, pause.Jitter(retryPause)) {
		return err
	}
	c.m.retries.Inc()
	retryErr := once(ctx)
	c.touch(retryErr)
	if retryErr != nil {
		return fmt.Errorf("%w (again after %v)", retryErr, status.Code(err))
	}
	return nil
}

// retryPause is short: the caller has 300 ms in all and wants to hear of a
// Controller that refuses within 50.
const retryPause = 10 * time.Millisecond

// again tells whether a second attempt may succeed where the first did not. All
// look-ups are reads.
func again(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.Aborted, codes.Internal, codes.Unknown:
		return true
	default:
		return false
	}
}

// withTrace hands the caller's trace on when it is sampled, at no cost when not.
func withTrace(ctx context.Context) context.Context {
	if !trace.SpanContextFromContext(ctx).IsSampled() {
		return ctx
	}
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	pairs := make([]string, 0, 2*len(carrier))
	for key, value := range carrier {
		pairs = append(pairs, key, value)
	}
	return metadata.AppendToOutgoingContext(ctx, pairs...)
}

// budget holds what retries may spend, in tenths of a retry: each look-up earns
// one, each retry costs ten, so retries stay below a tenth of the look-ups.
type budget struct{ tenths atomic.Int64 }

const (
	budgetFull = 100 // ten retries in a burst
	retryCost  = 10
)

func (b *budget) fill() { b.tenths.Store(budgetFull) }

func (b *budget) earn() {
	if b.tenths.Load() < budgetFull {
		b.tenths.Add(1)
	}
}

func (b *budget) spend() bool {
	if b.tenths.Add(-retryCost) < 0 {
		b.tenths.Add(retryCost)
		return false
	}
	return true
}

// optional remembers that a method is UNIMPLEMENTED.
type optional struct {
	until  atomic.Pointer[time.Time]
	logged atomic.Bool
}

// missing tells whether there is no point in asking now.
func (o *optional) missing() bool {
	until := o.until.Load()
	return until != nil && time.Now().Before(*until)
}

// note remembers, and tells whether it is the first time ever.
func (o *optional) note(d time.Duration) (first bool) {
	until := time.Now().Add(d)
	o.until.Store(&until)
	return !o.logged.Swap(true)
}

func (o *optional) forget() { o.until.Store(nil) }
