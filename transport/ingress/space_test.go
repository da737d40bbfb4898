package ingress

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

func (s *space) books() (taken int64, waiting int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken, s.waiting
}

// Whoever takes, waits, gives up and gives back, in whichever order: no more is taken than there
// is, nobody waits who could be let in, and at the end all is back.
func TestBooksOfTheSpaceBalance(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		synctest.Test(t, func(t *testing.T) {
			const bytes, line = 100, 4
			s := newSpace(bytes, line, metrics.NewSet())
			var all sync.WaitGroup
			for i := range rapid.IntRange(1, 40).Draw(rt, "requests") {
				name := func(what string) string { return fmt.Sprint(what, i) }
				start := time.Duration(rapid.IntRange(0, 20).Draw(rt, name("start")))
				hold := time.Duration(rapid.IntRange(0, 10).Draw(rt, name("hold")))
				leave := time.Duration(rapid.IntRange(1, 12).Draw(rt, name("leave")))
				n := int64(rapid.IntRange(1, 2*bytes).Draw(rt, name("bytes")))
				p := engine.Priorities()[rapid.IntRange(0, 3).Draw(rt, name("priority"))]
				maxWait := time.Duration(rapid.IntRange(0, 5).Draw(rt, name("wait")))
				all.Go(func() {
					time.Sleep(start)
					ctx, cancel := context.WithTimeout(t.Context(), leave)
					defer cancel()
					got, err := s.reserve(ctx, new(throttle.Conn), p, n, maxWait)
					if err != nil {
						if got != 0 || !errors.Is(err, errNoSpace) && !errors.Is(err, engine.ErrDeadline) {
							t.Errorf("got %d and %v", got, err)
						}
						return
					}
					if taken, _ := s.books(); got != min(n, s.most[p.Rank()]) || taken > bytes {
						t.Errorf("got %d of %d, and %d are taken", got, n, taken)
					}
					time.Sleep(hold)
					part := got / 3
					s.release(new(throttle.Conn), part)
					s.release(new(throttle.Conn), got-part)
				})
			}
			all.Wait()
			if taken, waiting := s.books(); taken != 0 || waiting != 0 {
				t.Errorf("at the end %d bytes are taken and %d wait", taken, waiting)
			}
		})
	})
}

// The highest priority is let in first, among equals who came first, and a large one is not
// passed by small ones.
func TestSpaceIsForThoseWhoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSpace(100, 10, metrics.NewSet())
		got, err := s.reserve(t.Context(), new(throttle.Conn), engine.Critical, 100, time.Second)
		ok(t, err)
		var mu sync.Mutex
		var order []string
		for _, one := range []struct {
			name  string
			p     engine.Priority
			bytes int64
		}{
			{"low", engine.Low, 50},
			{"normal, large", engine.Normal, 88},
			{"normal, small", engine.Normal, 1},
			{"high", engine.High, 20},
		} {
			go func() {
				got, err := s.reserve(t.Context(), new(throttle.Conn), one.p, one.bytes, time.Second)
				if err != nil {
					t.Errorf("%s: %v", one.name, err)
				}
				mu.Lock()
				order = append(order, one.name)
				mu.Unlock()
				time.Sleep(time.Millisecond)
				s.release(new(throttle.Conn), got)
			}()
			synctest.Wait()
		}
		if got := s.try(new(throttle.Conn), engine.Normal, 1); got != 0 {
			t.Error("one that comes now passes those who wait")
		}
		for range got / 10 {
			s.release(new(throttle.Conn), 10)
			synctest.Wait()
		}
		time.Sleep(time.Second)
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		if want := "[high normal, large normal, small low]"; fmt.Sprint(order) != want {
			t.Errorf("let in: %v, want %s", order, want)
		}
		if taken, waiting := s.books(); taken != 0 || waiting != 0 {
			t.Errorf("at the end %d bytes are taken and %d wait", taken, waiting)
		}
	})
}

// expiring is a context whose deadline passes between the first look at it and the second.
type expiring struct {
	context.Context //nolint:containedctx // it is one itself

	looks int
}

func (c *expiring) Err() error {
	if c.looks++; c.looks == 1 {
		return nil
	}
	return context.DeadlineExceeded
}

func TestDeadlineAsTheWaitEndsIsNoCancellation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSpace(100, 1, metrics.NewSet())
		_, err := s.reserve(t.Context(), new(throttle.Conn), engine.Critical, 100, time.Second)
		ok(t, err)
		if _, err := s.reserve(&expiring{Context: t.Context()}, new(throttle.Conn), engine.Critical, 1, time.Second); !errors.Is(err, errNoSpace) && !errors.Is(err, engine.ErrDeadline) {
			t.Errorf("nobody has canceled: %v", err)
		}
	})
}

func TestWaitForSpaceIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSpace(100, 1, metrics.NewSet())
		_, err := s.reserve(t.Context(), new(throttle.Conn), engine.Critical, 100, time.Second)
		ok(t, err)
		began := time.Now()
		go func() {
			if _, err := s.reserve(t.Context(), new(throttle.Conn), engine.Critical, 1, time.Second); !errors.Is(err, errNoSpace) || time.Since(began) != time.Second {
				t.Errorf("%v after %v, want %v after a second", err, time.Since(began), errNoSpace)
			}
		}()
		synctest.Wait()
		if _, err := s.reserve(t.Context(), new(throttle.Conn), engine.Critical, 1, time.Second); !errors.Is(err, errNoSpace) || time.Since(began) != 0 {
			t.Errorf("one too many in line: %v after %v", err, time.Since(began))
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := s.reserve(ctx, new(throttle.Conn), engine.Critical, 1, 0); !errors.Is(err, engine.ErrCanceled) {
			t.Errorf("a caller who has gone: %v", err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
	})
}
