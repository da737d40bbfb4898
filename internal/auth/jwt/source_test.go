package jwt

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/go-jose/go-jose/v4"
)

// provider serves a JWK set over memory, in virtual time.
type provider struct {
	set   atomic.Pointer[[]byte]
	serve atomic.Pointer[http.HandlerFunc] // in place of the set
	hits  atomic.Int32

	conns chan net.Conn
	close func()
}

func startProvider(keys []byte) *provider {
	p := &provider{conns: make(chan net.Conn)}
	p.set.Store(&keys)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.hits.Add(1)
		if serve := p.serve.Load(); serve != nil {
			(*serve)(w, r)
			return
		}
		_, _ = w.Write(*p.set.Load())
	})}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.Serve(p)
	}()
	p.close = func() {
		_ = server.Close()
		<-ended
	}
	return p
}

func (p *provider) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case p.conns <- far:
		return near, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *provider) Accept() (net.Conn, error) {
	conn, ok := <-p.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return conn, nil
}
func (p *provider) Close() error { close(p.conns); return nil }
func (*provider) Addr() net.Addr { return &net.UnixAddr{} }

// answer has the provider do something else than serve its set; nil ends that.
func (p *provider) answer(f http.HandlerFunc) {
	if f == nil {
		p.serve.Store(nil)
		return
	}
	p.serve.Store(&f)
}

// hang answers nothing while the client is there.
func hang(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// served is issuer A by URL, in a bubble of virtual time.
type served struct {
	*Verifier

	t       *testing.T
	idp     *provider
	metrics *metrics.Set
	log     *bytes.Buffer // see logged
}

// logged is the log when nothing more is to be done now.
func (s *served) logged() string {
	synctest.Wait()
	return s.log.String()
}

// bubble runs f with issuer A, whose provider serves these keys, in virtual time.
func bubble(t *testing.T, keys []byte, f func(t *testing.T, s *served)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &served{t: t, idp: startProvider(keys), metrics: metrics.NewSet(), log: new(bytes.Buffer)}
		defer s.idp.close()
		var err error
		s.Verifier, err = New(Config{
			Issuers: []Issuer{{Issuer: issuerA, Audience: audience, JWKSURL: "http://localhost/jwks"}},
			Logger:  slog.New(slog.NewTextHandler(s.log, nil)), Metrics: s.metrics, dial: s.idp.dial,
		})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		f(t, s)
	})
}

// wants verifies a token of a key now, and wants this error.
func (s *served) wants(key pair, want error) {
	s.t.Helper()
	if _, err := s.Verify(s.t.Context(), key.sign(s.t, good(nil), nil)); !errors.Is(err, want) {
		s.t.Errorf("token of %s: %v, want %v", key.kid, err, want)
	}
}

func (s *served) count(metric string) string {
	var b strings.Builder
	s.metrics.WritePrometheus(&b)
	for line := range strings.Lines(b.String()) {
		if value, ok := strings.CutPrefix(line, metric+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

const failedReloads = `push_manager_jwks_reloads_total{issuer="https://a.example",result="failed"}`

func TestKeysRotateWithOverlap(t *testing.T) {
	k1, k2 := keyOf(t, "k1", "EdDSA"), keyOf(t, "k2", "ES256")
	bubble(t, setOf(t, k1), func(t *testing.T, s *served) {
		s.wants(k1, nil)
		s.wants(k2, UnknownKey)
		first := s.Generation()

		both := setOf(t, k1, k2)
		s.idp.set.Store(&both)
		time.Sleep(askInterval)
		s.wants(k2, nil) // it asks
		s.wants(k1, nil)
		if s.idp.hits.Load() != 2 || s.Generation() == first {
			t.Errorf("%d fetches, generation %d", s.idp.hits.Load(), s.Generation())
		}

		second, newer := s.Generation(), setOf(t, k2)
		s.idp.set.Store(&newer)
		s.wants(k1, nil)
		time.Sleep(urlInterval)
		s.wants(k1, UnknownKey)
		s.wants(k2, nil)
		if s.Generation() == second {
			t.Error("a key was withdrawn, and verdicts about it stay")
		}
		third := s.Generation()
		time.Sleep(3 * urlInterval)
		if s.Generation() != third {
			t.Error("nothing has changed, and verdicts are asked anew")
		}

		none := []byte(`{"keys":[]}`)
		s.idp.set.Store(&none)
		s.Reload()
		synctest.Wait()
		s.wants(k2, UnknownKey)
		if !strings.Contains(s.logged(), "withdrawn all its keys") {
			t.Errorf("log: %s", s.logged())
		}
	})
}

// TestUnknownKeysCostOneFetchIn30Seconds: 10,000 of them in a second, while the provider answers and while it hangs. Nobody
// waits for longer than a second, few wait at all, and who has a good token does not notice (jwkset#26, tilegroxy#883).
func TestUnknownKeysCostOneFetchIn30Seconds(t *testing.T) {
	key := keyOf(t, "k1", "EdDSA")
	for name, answer := range map[string]http.HandlerFunc{"answers": nil, "hangs": hang} {
		t.Run(name, func(t *testing.T) {
			bubble(t, setOf(t, key), func(t *testing.T, s *served) {
				s.wants(key, nil)
				time.Sleep(2 * askInterval)
				s.idp.answer(answer)
				before := s.idp.hits.Load()
				good1 := key.sign(t, good(nil), nil)
				var wg sync.WaitGroup
				var waited atomic.Int32
				for i := range 10_000 {
					raw := raw(fmt.Sprintf(`{"alg":"EdDSA","kid":"random-%d"}`, i), `{"iss":"`+issuerA+`"}`, "x")
					wg.Go(func() {
						began := time.Now()
						if _, err := s.Verify(t.Context(), raw); !errors.Is(err, UnknownKey) {
							t.Error(err)
						}
						if took := time.Since(began); took > askWait {
							t.Errorf("waited for %v", took)
						} else if took > 0 {
							waited.Add(1)
						}
						if i%10 != 9 {
							return
						}
						began = time.Now()
						if _, err := s.Verify(t.Context(), good1); err != nil || time.Since(began) > 0 {
							t.Errorf("a good token: %v after %v", err, time.Since(began))
						}
					})
					if i%10 == 9 {
						time.Sleep(time.Millisecond)
					}
				}
				wg.Wait()
				if n := s.idp.hits.Load() - before; n != 1 {
					t.Errorf("%d fetches, want 1", n)
				}
				if n := waited.Load(); answer != nil && (n == 0 || n > maxAsking) {
					t.Errorf("%d tokens waited", n)
				}
			})
		})
	}
}

// TestFirstTokensWaitForTheFirstFetch, for a second at most: a program may start together with its provider.
func TestFirstTokensWaitForTheFirstFetch(t *testing.T) {
	key := keyOf(t, "k1", "EdDSA")
	synctest.Test(t, func(t *testing.T) {
		idp := startProvider(setOf(t, key))
		defer idp.close()
		for delay, want := range map[time.Duration]error{800 * time.Millisecond: nil, 3 * time.Second: Unavailable} {
			idp.answer(func(w http.ResponseWriter, _ *http.Request) {
				time.Sleep(delay)
				_, _ = w.Write(*idp.set.Load())
			})
			v, err := New(Config{Issuers: []Issuer{{Issuer: issuerA, Audience: audience, JWKSURL: "http://localhost/jwks"}}, dial: idp.dial})
			if err != nil {
				t.Fatal(err)
			}
			raw := key.sign(t, good(nil), nil)
			if _, err := v.Verify(t.Context(), raw); !errors.Is(err, want) {
				t.Errorf("a fetch of %v: %v, want %v", delay, err, want)
			}
			time.Sleep(delay)
			if _, err := v.Verify(t.Context(), raw); err != nil {
				t.Errorf("after a fetch of %v: %v", delay, err)
			}
			v.Close()
		}
	})
}

// TestBadProviderChangesNothing: the keys before stay in use, whatever comes in place of a set. It is counted each time
// and logged once, and the provider is asked again soon, but not at once.
func TestBadProviderChangesNothing(t *testing.T) {
	key, other := keyOf(t, "k1", "EdDSA"), keyOf(t, "k2", "EdDSA")
	text := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) }
	}
	private, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: other.private, KeyID: "k2"}}})
	if err != nil {
		t.Fatal(err)
	}
	for name, answer := range map[string]http.HandlerFunc{
		"hangs": hang,
		"hangs in the body": func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write(setOf(t, other)[:20])
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		},
		"one byte a second": func(w http.ResponseWriter, r *http.Request) {
			for _, b := range setOf(t, other) {
				if _, err := w.Write([]byte{b}); err != nil || r.Context().Err() != nil {
					return
				}
				_ = http.NewResponseController(w).Flush()
				time.Sleep(time.Second)
			}
		},
		"larger than 1 MiB": text(string(setOf(t, other)) + strings.Repeat(" ", maxJWKS)),
		"has no end":        func(w http.ResponseWriter, _ *http.Request) { endless(w) },
		"headers of 1 MiB":  func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 1<<20)) },
		"redirects": func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/other" {
				_, _ = w.Write(setOf(t, other))
				return
			}
			http.Redirect(w, r, "http://localhost/other", http.StatusFound)
		},
		"redirects to files": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
		},
		"500": func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "sorry", http.StatusInternalServerError) },
		"a set that is no OK": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			_, _ = w.Write(setOf(t, other))
		},
		"204":              func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) },
		"closes":           func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"empty":            text(""),
		"HTML":             text("<html>"),
		"an error in JSON": text(`{"error":"no"}`),
		"keys null":        text(`{"keys":null}`),
		"keys no list":     text(`{"keys":{}}`),
		"cut off":          text(string(setOf(t, other)[:50])),
		"two documents":    text(string(setOf(t, other)) + string(setOf(t, other))),
		"private keys":     text(string(private)),
		"secrets":          text(`{"keys":[{"kty":"oct","k":"` + strings.Repeat("A", 64) + `","kid":"k2"}]}`),
		"encryption only":  text(strings.ReplaceAll(string(setOf(t, other)), `"sig"`, `"enc"`)),
		"same kid twice":   text(string(setOf(t, other, keyOf(t, "k2", "EdDSA")))),
		"300 keys":         text(`{"keys":[` + strings.Repeat("{},", 300) + `{}]}`),
		"deep nesting":     text(`{"keys":[` + strings.Repeat("[", 100_000)),
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, setOf(t, key), func(t *testing.T, s *served) {
				s.wants(key, nil)
				generation, hits := s.Generation(), s.idp.hits.Load()
				s.idp.answer(answer)
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				s.wants(key, nil)
				if s.Generation() != generation {
					t.Error("the keys have changed")
				}
				if n := s.idp.hits.Load() - hits; n < 5 || n > 50 {
					t.Errorf("asked %d times in 10 minutes", n)
				}
				if n := s.count(failedReloads); n == "" || n == "0" {
					t.Errorf("failed: %q", n)
				}
				log := s.logged()
				if n := strings.Count(log, "level=ERROR"); n != 1 {
					t.Errorf("logged %d times:\n%s", n, log)
				}
				s.idp.answer(nil)
				set := setOf(t, other)
				s.idp.set.Store(&set)
				time.Sleep(time.Minute)
				s.wants(other, nil)
				s.wants(key, UnknownKey)
			})
		})
	}
}

func endless(w io.Writer) {
	for {
		if _, err := w.Write(make([]byte, 64<<10)); err != nil {
			return
		}
	}
}

func TestKeysThatCannotBeFetchedAreKeptForADay(t *testing.T) {
	key := keyOf(t, "k1", "EdDSA")
	bubble(t, setOf(t, key), func(t *testing.T, s *served) {
		s.wants(key, nil)
		generation := s.Generation()
		s.idp.answer(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
		time.Sleep(keepKeys - time.Minute)
		s.wants(key, nil)
		time.Sleep(time.Minute + urlInterval)
		s.wants(key, UnknownKey)
		if s.Generation() == generation || s.count(`push_manager_jwks_keys{issuer="https://a.example"}`) != "0" {
			t.Error("verdicts by these keys stay")
		}
		if n := strings.Count(s.logged(), "refused from now on"); n != 1 {
			t.Errorf("said %d times", n)
		}
		s.idp.answer(nil)
		time.Sleep(time.Minute)
		s.wants(key, nil)
	})
}

// TestCloseEndsAFetchThatHangs, and those who wait for it. Afterwards nobody waits.
func TestCloseEndsAFetchThatHangs(t *testing.T) {
	key := keyOf(t, "k1", "EdDSA")
	synctest.Test(t, func(t *testing.T) {
		idp := startProvider(nil)
		defer idp.close()
		idp.answer(hang)
		v, err := New(Config{Issuers: []Issuer{{Issuer: issuerA, Audience: audience, JWKSURL: "http://localhost/jwks"}}, dial: idp.dial})
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := v.Verify(t.Context(), key.sign(t, good(nil), nil)); !errors.Is(err, Unavailable) {
				t.Error(err)
			}
		})
		synctest.Wait()
		v.Close()
		wg.Wait()
		time.Sleep(2 * askInterval)
		began := time.Now()
		if _, err := v.Verify(t.Context(), key.sign(t, good(nil), nil)); !errors.Is(err, Unavailable) || time.Since(began) > 0 {
			t.Errorf("%v after %v", err, time.Since(began))
		}
	})
}

// TestFileIsReadAgain each interval and with Reload; a bad one leaves the keys before it.
func TestFileIsReadAgain(t *testing.T) {
	k1, k2 := keyOf(t, "k1", "EdDSA"), keyOf(t, "k2", "EdDSA")
	synctest.Test(t, func(t *testing.T) {
		path := write(t, filepath.Join(t.TempDir(), "jwks.json"), setOf(t, k1))
		v, err := New(Config{Issuers: []Issuer{{Issuer: issuerA, Audience: audience, JWKSFile: path}}})
		if err != nil {
			t.Fatal(err)
		}
		defer v.Close()
		s := &served{t: t, Verifier: v}
		s.wants(k1, nil)
		s.wants(k2, UnknownKey)

		write(t, path, setOf(t, k2))
		time.Sleep(DefaultReloadInterval + time.Second)
		s.wants(k2, nil)
		s.wants(k1, UnknownKey)
		generation := v.Generation()

		write(t, path, setOf(t, k1)[:30])
		v.Reload()
		synctest.Wait()
		s.wants(k2, nil)
		write(t, path, setOf(t, k2))
		time.Sleep(DefaultReloadInterval)
		if v.Generation() != generation {
			t.Error("the file is as before, and verdicts are asked anew")
		}
		write(t, path, setOf(t, k1))
		v.Reload()
		synctest.Wait()
		s.wants(k1, nil)
		s.wants(k2, UnknownKey)
	})
}

// TestNobodyWaitsLongerThanItsContext, neither for a key nor for its turn.
func TestNobodyWaitsLongerThanItsContext(t *testing.T) {
	key := keyOf(t, "k1", "EdDSA")
	bubble(t, setOf(t, key), func(t *testing.T, s *served) {
		s.wants(key, nil)
		for range cap(s.cpu) {
			s.cpu <- struct{}{}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := s.Verify(ctx, key.sign(t, good(nil), nil)); !errors.Is(err, Unavailable) {
			t.Error(err)
		}
		time.Sleep(askInterval)
		s.idp.answer(hang)
		began := time.Now()
		ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := s.Verify(ctx, keyOf(t, "new", "EdDSA").sign(t, good(nil), nil)); !errors.Is(err, UnknownKey) || time.Since(began) > 200*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(began))
		}
	})
}
