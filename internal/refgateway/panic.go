package refgateway

import (
	"context"
	"log/slog"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// stackBytes of a panic are logged.
const stackBytes = 4 << 10

// caught is deferred by every goroutine that reads what comes from outside. What a client
// or a peer brings about by a mistake of ours ends its connection or call, and nothing
// else.
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
		g.cfg.Logger.Error("panic caught", slog.String("goroutine", where),
			slog.Any("panic", v), slog.String("stack", string(stack[:min(len(stack), stackBytes)])))
	}
	then()
}

var errPanic = status.Error(codes.Internal, "internal error of the node")

// guardUnary and guardStream are for the services beside the node's, which guards itself.
func (g *Gateway) guardUnary(ctx context.Context, in any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (out any, err error) {
	defer g.caught(info.FullMethod, func() { err = errPanic })
	return next(ctx, in)
}

func (g *Gateway) guardStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	defer g.caught(info.FullMethod, func() { err = errPanic })
	return next(srv, stream)
}
