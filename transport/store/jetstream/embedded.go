package jetstream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// syncInterval is how often an embedded server writes to the disk what it has acknowledged.
const syncInterval = time.Second

// serverOptions are those of an embedded server: it listens nowhere, and leaves signals alone.
func serverOptions(cfg *Config) *server.Options {
	return &server.Options{
		ServerName: "push-manager",
		DontListen: true,
		NoSigs:     true,
		MaxPayload: int32(cfg.MaxMessageBytes),
		MaxPending: max(int64(cfg.MaxMessageBytes), server.MAX_PENDING_SIZE),

		JetStream:          true,
		StoreDir:           cfg.Dir,
		JetStreamMaxMemory: 16 << 20, // of streams in memory, which we have none of
		// What streams may reserve. Theirs are shares of MaxBytes, and what a smaller one leaves is no reason to refuse a start.
		JetStreamMaxStore:      1 << 50,
		DisableJetStreamBanner: true,
		SyncInterval:           syncInterval,
		SyncAlways:             cfg.SyncAlways,
	}
}

// startServer runs a server in this process.
func startServer(ctx context.Context, opts *server.Options, log *slog.Logger) (*server.Server, error) {
	if err := os.MkdirAll(opts.StoreDir, 0o700); err != nil {
		return nil, err
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		return nil, fmt.Errorf("embedded server: %w", err)
	}
	srv.SetLoggerV2(serverLog{log}, false, false, false)
	srv.Start() // returns when the messages that are there have been found
	until := 10 * time.Second
	if deadline, ok := ctx.Deadline(); ok {
		until = time.Until(deadline)
	}
	if ready := srv.ReadyForConnections(until); !ready || !srv.JetStreamEnabled() {
		stopServer(srv)
		return nil, errors.New("embedded server did not start: the log says why")
	}
	return srv, nil
}

func stopServer(srv *server.Server) {
	srv.Shutdown()
	srv.WaitForShutdown()
}

// serverLog is the log of a server. It is written for people who run servers, so much of it is beside the point here.
type serverLog struct{ log *slog.Logger }

func (l serverLog) say(level slog.Level, format string, args []any) {
	if l.log.Enabled(context.Background(), level) {
		l.log.Log(context.Background(), level, "store: embedded server", "text", fmt.Sprintf(format, args...))
	}
}

func (l serverLog) Noticef(format string, args ...any) { l.say(slog.LevelDebug, format, args) }
func (l serverLog) Warnf(format string, args ...any)   { l.say(slog.LevelWarn, format, args) }
func (l serverLog) Errorf(format string, args ...any)  { l.say(slog.LevelError, format, args) }
func (l serverLog) Fatalf(format string, args ...any)  { l.say(slog.LevelError, format, args) }
func (l serverLog) Debugf(format string, args ...any)  { l.say(slog.LevelDebug, format, args) }
func (l serverLog) Tracef(format string, args ...any)  { l.say(slog.LevelDebug, format, args) }
