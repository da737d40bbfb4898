package certs

import (
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/time/rate"

	"github.com/push-manager/push-manager/internal/label"
	"github.com/push-manager/push-manager/internal/reload"
)

// DefaultReloadInterval is how often files are read.
const DefaultReloadInterval = 10 * time.Second

// Config of a Source. Role and Files are required.
type Config struct {
	Files

	// Role names the set in the log and the metrics: a word of the program's.
	Role string
	// ReloadInterval is how often the files are read. 0 means DefaultReloadInterval.
	ReloadInterval time.Duration

	Logger  *slog.Logger // nil: nothing is logged
	Metrics *metrics.Set // nil: a set of its own
}

// Source is a set of files that is kept up to date.
type Source struct {
	// Static after Open.
	cfg                 Config
	taken, failed       *metrics.Counter
	handshakeFailures   *metrics.Counter
	loop                *reload.Loop
	current             atomic.Pointer[set]
	sayHandshakeFailure rate.Sometimes

	trouble string // what is wrong with the files, "" for nothing; owned by read
}

// Open reads the files, which must be right, and goes on to read them until Close. Its error is a *FileError.
func Open(cfg Config) (*Source, error) {
	if cfg.ReloadInterval == 0 {
		cfg.ReloadInterval = DefaultReloadInterval
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.NewSet()
	}
	first, err := cfg.load(time.Now())
	if err != nil {
		return nil, err
	}
	s := &Source{cfg: cfg, sayHandshakeFailure: rate.Sometimes{Interval: 10 * time.Second}}
	reloads := func(result string) *metrics.Counter {
		return cfg.Metrics.GetOrCreateCounter(label.Name("push_manager_tls_reloads_total", "role", cfg.Role, "result", result))
	}
	s.taken, s.failed = reloads("ok"), reloads("failed")
	s.handshakeFailures = cfg.Metrics.GetOrCreateCounter(label.Name("push_manager_tls_handshake_failures_total", "role", cfg.Role))
	s.current.Store(first)
	if cfg.Files != (Files{}) { // the authorities of the system have no end
		cfg.Metrics.GetOrCreateGauge(label.Name("push_manager_tls_certificate_expiry_timestamp_seconds", "role", cfg.Role), func() float64 {
			return float64(s.current.Load().expires.Unix())
		})
	}
	s.loop = reload.Start(cfg.ReloadInterval, s.read)
	return s, nil
}

// Reload has the files read soon. It does not wait.
func (s *Source) Reload() { s.loop.Now() }

// Close ends the reading. What the Source has made goes on to work. It is called once.
func (s *Source) Close() { s.loop.Close() }

// read takes over what the files hold, if that is another set. It tells whether something is wrong that was
// not before.
func (s *Source) read() (worse bool) {
	before := s.current.Load()
	next, err := s.cfg.load(time.Now())
	if err != nil {
		s.failed.Inc()
		worse = err.Error() != s.trouble
		if worse {
			s.trouble = err.Error()
			s.cfg.Logger.Error("certificates not taken over, those before stay in use", "role", s.cfg.Role, "error", err, "expires", before.expires.UTC())
		}
		return worse
	}
	if s.trouble != "" && next.sum == before.sum {
		s.cfg.Logger.Info("certificate files are as before", "role", s.cfg.Role)
	}
	s.trouble = ""
	if next.sum != before.sum {
		s.current.Store(next)
		s.taken.Inc()
		s.cfg.Logger.Info("certificates taken over", "role", s.cfg.Role, "serial", next.serial(), "expires", next.expires.UTC())
	}
	return false
}

// serial is that of the certificate, in hexadecimal as openssl writes it.
func (s *set) serial() string {
	if s.cert == nil {
		return ""
	}
	return s.cert.Leaf.SerialNumber.Text(16)
}
