package apikey

import (
	"crypto/sha256"
	"crypto/subtle"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/reload"
)

// DefaultReloadInterval is how often the file is read.
const DefaultReloadInterval = 10 * time.Second

// Key is a key of the file.
type Key struct {
	ID       string
	NotAfter time.Time // the zero time: no end
	Name     string    // of the caller, for people: rights go by ID
	Comment  string
}

// Reason is why a key was refused. It is the error that Verify returns, and a label of metrics.
type Reason string

// Reasons of refusals.
const (
	Malformed Reason = "malformed"   // no key: its form or its checksum is wrong
	Unknown   Reason = "unknown_key" // not in the file, or with another secret
	Expired   Reason = "expired"     // not_after lies behind
)

func (r Reason) Error() string { return "API key refused: " + string(r) }

// Config of a Store. File is required.
type Config struct {
	File string
	// ReloadInterval is how often the file is read. 0 means DefaultReloadInterval.
	ReloadInterval time.Duration

	Logger  *slog.Logger // nil: nothing is logged
	Metrics *metrics.Set // nil: a set of its own
}

// Store is the keys of a file that is kept up to date. Its methods may be called by any number of goroutines at a time.
type Store struct {
	// Static after Open.
	cfg           Config
	taken, failed *metrics.Counter
	loop          *reload.Loop
	current       atomic.Pointer[keys]
	generation    atomic.Uint64

	trouble string // what is wrong with the file, "" for nothing; owned by read
}

// Check tells what is wrong with a file now.
func Check(file string) error {
	_, err := read(file, nil)
	return err
}

// Open reads the file, which must be right, and goes on to read it until Close.
func Open(cfg Config) (*Store, error) {
	if cfg.ReloadInterval == 0 {
		cfg.ReloadInterval = DefaultReloadInterval
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.NewSet()
	}
	first, err := read(cfg.File, nil)
	if err != nil {
		return nil, err
	}
	s := &Store{cfg: cfg}
	s.taken = cfg.Metrics.GetOrCreateCounter(`push_manager_api_keys_reloads_total{result="ok"}`)
	s.failed = cfg.Metrics.GetOrCreateCounter(`push_manager_api_keys_reloads_total{result="failed"}`)
	s.current.Store(first)
	cfg.Metrics.GetOrCreateGauge("push_manager_api_keys", func() float64 { return float64(len(s.current.Load().byID)) })
	s.loop = reload.Start(cfg.ReloadInterval, s.read)
	return s, nil
}

// Verify finds the key that raw is. Its error is a Reason.
func (s *Store) Verify(raw string) (Key, error) {
	id, secret, ok := split(raw)
	if !ok {
		return Key{}, Malformed
	}
	e, known := s.current.Load().byID[id]
	hash := sha256.Sum256(secret)
	switch same := subtle.ConstantTimeCompare(hash[:], e.hash[:]); {
	case !known || same == 0:
		return Key{}, Unknown
	case !e.NotAfter.IsZero() && !time.Now().Before(e.NotAfter):
		return Key{}, Expired
	}
	return e.Key, nil
}

// Generation is raised whenever the keys have changed. A verdict holds while the generation is the one that was read
// before Verify was called, and not beyond Key.NotAfter.
func (s *Store) Generation() uint64 { return s.generation.Load() }

// Reload has the file read soon. It does not wait.
func (s *Store) Reload() { s.loop.Now() }

// Close ends the reading. Keys can still be verified. It is called once.
func (s *Store) Close() { s.loop.Close() }

// read takes over what the file holds, if that is something else. It tells whether something is wrong that was not before.
func (s *Store) read() (worse bool) {
	before := s.current.Load()
	next, err := read(s.cfg.File, before)
	switch {
	case err != nil:
		s.failed.Inc()
		if worse = s.trouble != err.Error(); worse {
			s.trouble = err.Error()
			s.cfg.Logger.Error("file of API keys not taken over, the keys before stay in use", "error", err)
		}
		return worse
	case next != before:
		s.current.Store(next)
		s.generation.Add(1)
		s.taken.Inc()
		s.cfg.Logger.Info("API keys taken over", "keys", len(next.byID))
	case s.trouble != "":
		s.cfg.Logger.Info("file of API keys is as before")
	}
	s.trouble = ""
	return false
}
