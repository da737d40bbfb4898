package jetstream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/nats-io/nats.go"
)

// Reach connects to the servers of a store elsewhere and asks whether JetStream answers. It makes and changes nothing.
func Reach(ctx context.Context, cfg Config) (server string, err error) {
	cfg = cfg.withDefaults()
	cfg.Logger = slog.New(slog.DiscardHandler) // what it would say stands in err
	s := &Store{cfg: cfg, prepares: make(chan struct{}, 1)}
	if err := s.connect(); err != nil {
		return "", err
	}
	defer s.nc.Close()
	if _, err := s.js.AccountInfo(ctx); err != nil {
		if last := s.nc.LastError(); s.nc.Status() != nats.CONNECTED && last != nil {
			err = last
		}
		if errors.Is(err, nats.ErrReconnectBufExceeded) { // The client would send once it is connected.
			err = errors.New("none of its servers answers")
		}
		return "", fmt.Errorf("ask for JetStream: %w", err)
	}
	return s.nc.ConnectedUrlRedacted(), nil
}
