package gateway

import (
	"log/slog"
	"runtime/debug"
	"time"
)

// stackBytes of a panic are logged.
const stackBytes = 4 << 10

// caught is deferred by every goroutine that works for a client. What a client has
// brought about by a mistake of ours ends its connection, and nothing else.
func (g *Gateway) caught(where string, then func()) {
	v := recover()
	if v == nil {
		return
	}
	g.count.panics.Inc()
	// Who has found the way to it may go it often: one line a second.
	now, last := int64(time.Since(g.began)), g.panicLogged.Load()
	if (last == 0 || now-last >= int64(time.Second)) && g.panicLogged.CompareAndSwap(last, max(now, 1)) {
		stack := debug.Stack()
		g.cfg.Logger.Error("panic for a client, its connection is closed", slog.String("goroutine", where),
			slog.Any("panic", v), slog.String("stack", string(stack[:min(len(stack), stackBytes)])))
	}
	then()
}
