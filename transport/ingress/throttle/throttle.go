package throttle

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/push-manager/push-manager/engine"
)

// ErrBusy refuses a call that would be one of too many at a time.
var ErrBusy = fmt.Errorf("%w: too many calls at a time", engine.ErrOverloaded)

const (
	// windowTime is half of the longest time for which a call counts. What has no answer after that
	// waits for a node that is slow or far away, and must keep nobody out. Our own part takes
	// as long only of a call that comes to a crowd of many.
	windowTime = 25 * time.Millisecond
	// maxHold is for how long a connection waits, if few do. Every tick one that has waited for longer
	// is read, and one more of each hundred: HTTP/2 has more to say than calls, and the keepalive of
	// either side must not take the connection for dead.
	maxHold = 250 * time.Millisecond
	tick    = 10 * time.Millisecond
	// readSize is how much of a connection is read at a time while there is a crowd, so that its next
	// calls can be kept waiting. It holds dozens of the usual size. With a half or twice of it the
	// rate is the same.
	readSize = 8 << 10
	// helloSize is how much is read at a time until the client has said hello. What comes with it
	// waits like all other calls.
	helloSize = 128
	// forgetPriority is for how long one call speaks for the others on its connection.
	forgetPriority = time.Second
)

// Config of a Throttle. All fields are required but where it is said.
type Config struct {
	Calls                 int           // that count at a time, for each core
	Timeout               time.Duration // of a hello, the head of a frame, and a block of headers
	HalfOpen              int           // connections of a network that have not said hello
	Connections           int           // that have, in all; 0: no bound
	ConnectionsPerNetwork int           // that have, of a network; 0: no bound
	// Opened makes the Session of a connection that its credentials have let in. nil: it has none.
	Opened   func(credentials.AuthInfo) any
	Metrics  *metrics.Set
	Logger   *slog.Logger
	Panicked func(where string, v any) // is told of a panic
}

// Throttle keeps the unary calls that are worked on at a time to some hundreds. More of them are
// not answered sooner: each has a stack, a stream of gRPC and a push, and too many push each other
// out of the caches, until a push costs half as much again. What is not read costs a few bytes,
// and its client, whose calls under way are bounded, keeps back what follows.
//
// Calls are refused, the lowest priority first, only where their connection is read for others of a
// higher one.
type Throttle struct {
	// Static.
	cfg   Config
	limit int64 // calls
	cores int64
	began time.Time
	conns *connections
	told  *metrics.Counter

	windows atomic.Pointer[windows]
	waiting atomic.Int64 // connections
	closed  atomic.Bool  // written with the lock held

	mu    sync.Mutex // guards what follows, and what Conn says
	lines [4]line    // by rank of the priority
	timer *time.Timer
}

// windows are the present one and the one before.
type windows struct {
	ends        time.Duration // since the Throttle began
	now, before *window
}

// window counts what has begun in windowTime and is not over.
type window struct {
	calls atomic.Int64
	reads atomic.Int64 // connections that have been let in and are not back for more
}

func (w *windows) calls() int64 { return w.now.calls.Load() + w.before.calls.Load() }
func (w *windows) reads() int64 { return w.now.reads.Load() + w.before.reads.Load() }

// New makes a Throttle.
func New(cfg Config) *Throttle {
	cores := int64(runtime.GOMAXPROCS(0))
	t := &Throttle{cfg: cfg, limit: int64(cfg.Calls) * cores, cores: cores, began: time.Now(), conns: newConnections(&cfg)}
	t.told = cfg.Metrics.GetOrCreateCounter("push_manager_api_connections_told_total")
	t.windows.Store(&windows{ends: windowTime, now: new(window), before: new(window)})
	t.timer = time.AfterFunc(time.Hour, t.tick)
	t.timer.Stop()
	cfg.Metrics.GetOrCreateGauge("push_manager_api_worked", func() float64 { return float64(t.windowsAt(t.now()).calls()) })
	cfg.Metrics.GetOrCreateGauge("push_manager_api_connections_waiting", func() float64 { return float64(t.waiting.Load()) })
	return t
}

// Close lets everybody in and refuses nobody, for good.
func (t *Throttle) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed.Store(true)
	t.letInLocked()
	t.timer.Stop()
}

func (t *Throttle) now() time.Duration { return time.Since(t.began) }

// windowsAt is those of a time. However long the one before it was not asked for, it goes on by one:
// time in which the process did not run ends no call.
func (t *Throttle) windowsAt(at time.Duration) *windows {
	w := t.windows.Load()
	if at < w.ends {
		return w
	}
	t.windows.CompareAndSwap(w, &windows{ends: at + windowTime, now: new(window), before: w.now})
	return t.windows.Load()
}

// crowded tells whether it is worth while to look closer. It may be out of date.
func (t *Throttle) crowded() bool {
	return (t.windows.Load().calls() >= t.limit/2 || t.waiting.Load() > 0) && !t.closed.Load()
}

// Call is a unary call from when its headers have been read, and the context by which its handler
// finds it. The handler owes it an End.
type Call struct {
	context.Context //nolint:containedctx // It is one itself.

	Conn   *Conn
	Header metadata.MD // not to be changed
	Began  time.Time

	held   time.Duration // for so long it was kept waiting before, at the least
	window *window
}

type callKey struct{}

// Tap counts a call in, and returns its context. It is for gRPC's tap. A call that does not come
// to its handler is forgotten after two windows.
func (t *Throttle) Tap(ctx context.Context, header metadata.MD) context.Context {
	c := ConnOf(ctx)
	if c == nil {
		return ctx
	}
	call := &Call{Context: ctx, Conn: c, Header: header, Began: time.Now()}
	if !c.opaque {
		call.held = c.held
	}
	call.window = t.windowsAt(call.Began.Sub(t.began)).now
	call.window.calls.Add(1)
	return call
}

// Value implements context.Context.
func (c *Call) Value(key any) any {
	if _, ours := key.(callKey); ours {
		return c
	}
	return c.Context.Value(key)
}

// CallOf is the call of a handler's context, nil if no Tap has seen it.
func CallOf(ctx context.Context) *Call {
	call, _ := ctx.Value(callKey{}).(*Call)
	return call
}

// Admit tells the priority of a call, and whether it is taken. Below critical it is not when its
// caller has given up while we kept it waiting: gRPC counts the time that a caller grants from when
// it has read the call. And it is not when twice Config.Calls count (low priority), three times as
// many (normal) or four times (high). So many there are only when connections that are read for
// critical calls bring others. The error is ErrBusy.
func (c *Call) Admit(ctx context.Context, p engine.Priority) error {
	t := c.Conn.throttle
	c.Conn.note(p, c.Began.Sub(t.began))
	if w := t.windows.Load().now; w != c.window { // until here it has waited for a core
		c.window.calls.Add(-1)
		w.calls.Add(1)
		c.window = w
	}
	if p >= engine.Critical || t.closed.Load() {
		return nil
	}
	if d, bounded := ctx.Deadline(); bounded && d.Sub(c.Began) < c.held {
		return ErrBusy
	}
	if t.windows.Load().calls() > t.limit*int64(2+p.Rank()) {
		return ErrBusy
	}
	return nil
}

// End counts a call out, which may make room for a connection.
func (c *Call) End() {
	c.window.calls.Add(-1)
	c.Conn.throttle.letIn()
}

// Credentials are those given, with connections that are throttled.
func (t *Throttle) Credentials(of credentials.TransportCredentials) credentials.TransportCredentials {
	return &throttledCredentials{of, t}
}

// AuthInfo is what the credentials know of a connection, and the connection.
type AuthInfo struct {
	credentials.AuthInfo
	Conn *Conn
}

// GetCommonAuthInfo tells the level of security, which gRPC asks for by this method.
func (i AuthInfo) GetCommonAuthInfo() credentials.CommonAuthInfo {
	if info, ok := i.AuthInfo.(interface {
		GetCommonAuthInfo() credentials.CommonAuthInfo
	}); ok {
		return info.GetCommonAuthInfo()
	}
	return credentials.CommonAuthInfo{}
}

// ConnOf is the connection that a call came on, nil if it is none of ours.
func ConnOf(ctx context.Context) *Conn {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(AuthInfo); ok {
			return info.Conn
		}
	}
	return nil
}
