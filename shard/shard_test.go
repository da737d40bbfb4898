package shard

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"
)

// ants keeps goroutines of its default pool from its initialisation on.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

func newSet(t *testing.T, c Config) *Set {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestKeyKeepsItsHome(t *testing.T) {
	s := newSet(t, Config{Count: 8})
	load := make([]int, s.Len())
	for i := range 8000 {
		key := fmt.Sprint("room-", i)
		home := s.For(key)
		if again := s.For(strings.Clone(key)); again != home {
			t.Fatalf("%q moved from shard %d to %d", key, home.Index(), again.Index())
		}
		load[home.Index()]++
	}
	for i, n := range load {
		if n < 500 || n > 2000 {
			t.Errorf("shard %d has %d of 8000 keys", i, n)
		}
	}
}

func TestFullPoolRefusesAtOnceAndAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSet(t, Config{Count: 2, PoolSize: 3})
		release := make(chan struct{})
		var ran sync.WaitGroup
		for range 3 {
			ran.Add(1)
			if err := s.At(0).Go(func() { defer ran.Done(); <-release }); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.At(0).Go(func() { t.Error("ran beyond the bound") }); !errors.Is(err, ErrFull) {
			t.Errorf("full pool: %v", err)
		}
		other := make(chan struct{})
		if err := s.At(1).Go(func() { close(other) }); err != nil {
			t.Errorf("the other shard: %v", err)
		}
		<-other
		close(release)
		ran.Wait()
		if got := s.At(0).Stats(); got.Rejected != 1 || got.Limit != 3 {
			t.Errorf("stats %+v", got)
		}
	})
}

func TestPanicEndsOnlyItsTask(t *testing.T) {
	s := newSet(t, Config{Count: 1, PoolSize: 1})
	settled := make(chan struct{})
	if err := s.At(0).Go(func() { defer close(settled); panic("boom") }); err != nil {
		t.Fatal(err)
	}
	<-settled
	next := make(chan struct{})
	for { // the goroutine that panicked gives its place back a moment later
		err := s.At(0).Go(func() { close(next) })
		if err == nil {
			break
		}
		if !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
	}
	<-next
	if got := s.At(0).Stats().Panics; got != 1 {
		t.Errorf("%d panics counted", got)
	}
}

func TestClosedSetRefuses(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := s.At(0).Go(func() {}); !errors.Is(err, ErrClosed) {
		t.Errorf("got %v", err)
	}
}

func TestBadSizesAreNamed(t *testing.T) {
	_, err := New(Config{Count: -1, PoolSize: -2})
	if err == nil || !strings.Contains(err.Error(), "count -1") || !strings.Contains(err.Error(), "pool size -2") {
		t.Errorf("got %v", err)
	}
}
