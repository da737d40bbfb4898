package webhook

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/reload"
)

// The size of a secret.
const minSecret, maxSecret = 16, 4096

// SecretConfig is what a Secret needs. File must be set.
type SecretConfig struct {
	File           string
	ReloadInterval time.Duration // 0: 10 s
	Logger         *slog.Logger  // nil: nothing is logged
	Metrics        *metrics.Set  // nil: a set of its own
	// OnReload is told of each change of the file, and of each failure. nil: nobody is.
	OnReload func(err error)
}

// Secret is what a file holds, which is read again while it changes.
type Secret struct {
	cfg     SecretConfig
	taken   *metrics.Counter
	failed  *metrics.Counter
	current atomic.Pointer[[]byte]
	trouble string // owned by the loop: what is wrong with the file
	loop    *reload.Loop
}

// CheckSecret tells what is wrong with a file now.
func CheckSecret(file string) error {
	_, err := ReadSecret(file)
	return err
}

// ReadSecret reads a file without the end of its line.
func ReadSecret(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	secret, err := io.ReadAll(io.LimitReader(f, maxSecret+3))
	if err != nil {
		return nil, err
	}
	secret = bytes.TrimRight(secret, "\r\n")
	if len(secret) < minSecret || len(secret) > maxSecret {
		return nil, fmt.Errorf("holds %d bytes, want %d to %d", len(secret), minSecret, maxSecret)
	}
	return secret, nil
}

// OpenSecret reads the file, which must be right, and goes on to read it until Close.
func OpenSecret(cfg SecretConfig) (*Secret, error) {
	if cfg.File == "" {
		return nil, errors.New("webhook: no file of a secret")
	}
	defaultTo(&cfg.ReloadInterval, 10*time.Second)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.NewSet()
	}
	if cfg.OnReload == nil {
		cfg.OnReload = func(error) {}
	}
	first, err := ReadSecret(cfg.File)
	if err != nil {
		return nil, err
	}
	s := &Secret{
		cfg:    cfg,
		taken:  cfg.Metrics.GetOrCreateCounter(`push_manager_receipt_webhook_secret_reloads_total{result="ok"}`),
		failed: cfg.Metrics.GetOrCreateCounter(`push_manager_receipt_webhook_secret_reloads_total{result="failed"}`),
	}
	s.current.Store(&first)
	s.loop = reload.Start(cfg.ReloadInterval, s.read)
	return s, nil
}

// Current is the secret. It is not to be changed.
func (s *Secret) Current() []byte { return *s.current.Load() }

// Reload has the file read soon. It does not wait.
func (s *Secret) Reload() { s.loop.Now() }

// Close ends the reading. It is called once.
func (s *Secret) Close() { s.loop.Close() }

// read takes over what the file holds, if that is something else. It tells whether something is wrong that was not before.
func (s *Secret) read() (worse bool) {
	next, err := ReadSecret(s.cfg.File)
	if err != nil {
		s.failed.Inc()
		if worse = s.trouble != err.Error(); worse {
			s.trouble = err.Error()
			s.cfg.Logger.Error("secret of the webhook not taken over, the one before stays in use", "error", err)
			s.cfg.OnReload(err)
		}
		return worse
	}
	s.trouble = ""
	if !bytes.Equal(next, s.Current()) {
		s.current.Store(&next)
		s.taken.Inc()
		s.cfg.Logger.Info("secret of the webhook taken over")
		s.cfg.OnReload(nil)
	}
	return false
}
