package jwt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/golang-jwt/jwt/v5"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/label"
	"github.com/push-manager/push-manager/internal/pause"
)

const (
	urlInterval  = 5 * time.Minute  // between two fetches of a set that is well
	fetchTimeout = 5 * time.Second  // of a fetch, body included
	askInterval  = 30 * time.Second // between the start of any fetch and one for an unknown key
	askWait      = time.Second      // how long a token waits for such a fetch
	maxAsking    = 64               // tokens of an issuer that wait at a time; more are refused at once
	keepKeys     = 24 * time.Hour   // how long keys are used whose set cannot be fetched
	retryFirst   = time.Second      // after the first failure; it doubles
	retryLast    = 30 * time.Second
)

// source is an issuer and its keys.
type source struct {
	// Static after New.
	Issuer

	path          string // of the file, or the URL
	validator     *jwt.Validator
	client        *http.Client // nil: the keys are in a file
	interval      time.Duration
	log           *slog.Logger
	changed       func()
	taken, failed *metrics.Counter
	reload, ask   chan struct{} // one token: read now
	keys          atomic.Pointer[keySet]

	// Owned by loop.
	failures int
	trouble  string // what is wrong, "" for nothing

	mu      sync.Mutex
	began   time.Time     // when the last fetch began
	pending chan struct{} // closed when the fetch that is asked for or under way has ended; nil: there is none
	asking  int           // tokens that wait for it
	closed  bool
}

// start begins to read. The goroutine belongs to v.
func (s *source) start(ctx context.Context, cfg *Config, v *Verifier) {
	s.validator = jwt.NewValidator(jwt.WithLeeway(leeway), jwt.WithExpirationRequired(), jwt.WithIssuedAt())
	s.log = cfg.Logger.With("issuer", s.Issuer.Issuer)
	s.changed = func() { v.generation.Add(1) }
	s.reload, s.ask = make(chan struct{}, 1), make(chan struct{}, 1)
	s.interval = cfg.ReloadInterval
	if s.JWKSURL != "" {
		s.interval = urlInterval
		s.pending, s.began = make(chan struct{}), time.Now()
		s.client = &http.Client{
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			Transport: &http.Transport{
				Proxy:                  http.ProxyFromEnvironment,
				DialContext:            cfg.dial,
				DisableKeepAlives:      true, // a fetch is seldom
				DisableCompression:     true, // or the bound would be one of another size
				MaxResponseHeaderBytes: 64 << 10,
			},
		}
	}
	reloads := func(result string) *metrics.Counter {
		return cfg.Metrics.GetOrCreateCounter(label.Name("push_manager_jwks_reloads_total", "issuer", s.Issuer.Issuer, "result", result))
	}
	s.taken, s.failed = reloads("ok"), reloads("failed")
	cfg.Metrics.GetOrCreateGauge(label.Name("push_manager_jwks_keys", "issuer", s.Issuer.Issuer), func() float64 {
		if keys := s.keys.Load(); keys != nil {
			return float64(keys.count())
		}
		return 0
	})
	opened := time.Now()
	cfg.Metrics.GetOrCreateGauge(label.Name("push_manager_jwks_age_seconds", "issuer", s.Issuer.Issuer), func() float64 {
		if keys := s.keys.Load(); keys != nil {
			return time.Since(keys.read).Seconds()
		}
		return time.Since(opened).Seconds()
	})
	v.end.Go(func() { s.loop(ctx) })
}

// takes tells whether the issuer's tokens may use an algorithm.
func (s *source) takes(algorithm string) bool { return slices.Contains(s.Algorithms, algorithm) }

// key finds a key. Where it is unknown and its set has a URL, it waits a little for a fetch, if there may be one.
func (s *source) key(ctx context.Context, id keyID) (key any, ok bool) {
	if key, ok = s.keys.Load().lookup(id); ok || s.client == nil {
		return key, ok
	}
	s.mu.Lock()
	pending := s.pending
	if pending == nil && !s.closed && time.Since(s.began) >= askInterval {
		pending = make(chan struct{})
		s.pending, s.began = pending, time.Now()
		s.wake(s.ask)
	}
	if pending == nil || s.asking >= maxAsking {
		s.mu.Unlock()
		return s.keys.Load().lookup(id) // a fetch may just have ended
	}
	s.asking++
	s.mu.Unlock()

	timer := time.NewTimer(askWait)
	defer timer.Stop()
	select {
	case <-pending:
	case <-timer.C:
	case <-ctx.Done():
	}
	s.mu.Lock()
	s.asking--
	s.mu.Unlock()
	return s.keys.Load().lookup(id)
}

// wake leaves a token, unless there is one.
func (*source) wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// loop reads the keys until ctx ends.
func (s *source) loop(ctx context.Context) {
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.closed = true
		if s.pending != nil {
			close(s.pending)
			s.pending = nil
		}
	}()
	wait := s.interval
	if s.client != nil {
		wait = 0 // New has read files, and no URL
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-s.reload:
		case <-s.ask:
		case <-ctx.Done():
			return
		}
		s.mu.Lock()
		s.began = time.Now()
		if s.pending == nil {
			s.pending = make(chan struct{})
		}
		select {
		case <-s.ask: // this one answers it
		default:
		}
		s.mu.Unlock()

		keys, err := s.read(ctx)
		if ctx.Err() != nil {
			return
		}
		s.take(keys, err)

		s.mu.Lock()
		close(s.pending)
		s.pending = nil
		s.mu.Unlock()
		wait = s.interval
		if s.failures > 0 {
			wait = min(wait, retryLast, retryFirst<<min(s.failures-1, 10))
		}
		if s.client != nil {
			wait = pause.Jitter(wait)
		}
		timer.Reset(wait)
	}
}

// read reads the file, or fetches the URL.
func (s *source) read(ctx context.Context) (*keySet, error) {
	if s.client == nil {
		return s.readFile()
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.path, nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", "application/jwk-set+json, application/json")
	request.Header.Set("User-Agent", "push-manager")
	response, err := s.client.Do(request)
	if err != nil {
		if inner := (*url.Error)(nil); errors.As(err, &inner) {
			err = inner.Err // without the URL, whose query may hold a secret
		}
		return nil, fmt.Errorf("fetch: %w", err)
	}
	defer func() { _ = response.Body.Close() }() // nothing was written
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("fetch: status %d, want 200 (redirects are not followed)", response.StatusCode)
	}
	text, err := io.ReadAll(io.LimitReader(response.Body, maxJWKS+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("fetch: %w", err)
	case len(text) > maxJWKS:
		return nil, fmt.Errorf("fetch: larger than %s", config.FormatBytes(maxJWKS))
	}
	return s.parse(text)
}

// take uses the keys that were read, or keeps those before.
func (s *source) take(keys *keySet, err error) {
	before := s.keys.Load()
	if err != nil {
		s.failed.Inc()
		s.failures++
		if s.trouble != err.Error() {
			s.trouble = err.Error()
			s.log.Error("keys of the issuer not taken over, those before stay in use", "error", err)
		}
		if s.client != nil && before != nil && len(before.byID) > 0 && time.Since(before.read) > keepKeys {
			s.keys.Store(&keySet{read: before.read})
			s.changed()
			s.log.Error("keys of the issuer could not be fetched for too long, its tokens are refused from now on", "for", keepKeys)
		}
		return
	}
	if s.trouble != "" {
		s.log.Info("keys of the issuer can be read again")
	}
	s.trouble, s.failures = "", 0
	s.keys.Store(keys)
	if before == nil || before.sum != keys.sum {
		s.changed()
		s.taken.Inc()
		s.log.Info("keys of the issuer taken over", "keys", keys.count())
		if len(keys.byID) == 0 {
			s.log.Warn("the issuer has withdrawn all its keys: its tokens are refused")
		}
	}
}

// dialer is how a test has URLs fetched from its memory.
type dialer func(ctx context.Context, network, address string) (net.Conn, error)
