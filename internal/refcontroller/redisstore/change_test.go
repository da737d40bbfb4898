package redisstore

import (
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/push-manager/push-manager/internal/redistest"
	"github.com/push-manager/push-manager/internal/refcontroller"
)

// Whatever stands in the stream, all rooms and users of it are told, and a move is whole.
func FuzzEntryOfTheStream(f *testing.F) {
	f.Add(uint64(1), "r", "u", "+n", "", "", "")
	f.Add(uint64(2), "r\x00r", "u\x00v", "+n\x00-m", "", "", "")
	f.Add(uint64(3), "r\x00s", "u", "+n", "", "", "")
	f.Add(uint64(4), "r", "u", "n", "", "", "")
	f.Add(uint64(5), "r", "u", "+", "", "", "")
	f.Add(uint64(6), "r", "u", "", "", "", "")
	f.Add(uint64(7), "", "", "", "a 5", "b x", "a")
	f.Fuzz(func(t *testing.T, n uint64, rooms, users, nodes, joined, settled, gone string) {
		var told []refcontroller.Change
		s := &Store{tell: func(c refcontroller.Change) { told = append(told, c) }, moved: make(chan struct{}), others: map[string]uint64{}}
		s.take(n, map[string]any{"r": rooms, "u": users, "d": nodes, "j": joined, "s": settled, "g": gone})
		if s.at != n {
			t.Fatalf("it is at %d after %d", s.at, n)
		}
		if users == "" {
			if len(told) > 0 {
				t.Fatalf("told %v", told)
			}
			return
		}
		if len(told) != 1 || told[0].Revision != n || told[0].All {
			t.Fatalf("told %v", told)
		}
		c := told[0]
		gotRooms, gotUsers := slices.Clone(c.Rooms), slices.Clone(c.Users)
		signed := strings.Split(nodes, "\x00")
		for i, m := range c.Moves {
			sign := "+"
			if m.Left {
				sign = "-"
			}
			if m.Node == "" || sign+m.Node != signed[i] {
				t.Fatalf("move %v of %q", m, signed[i])
			}
			gotRooms, gotUsers = append(gotRooms, m.Room), append(gotUsers, m.User)
		}
		if !slices.Equal(gotRooms, strings.Split(rooms, "\x00")) || !slices.Equal(gotUsers, strings.Split(users, "\x00")) {
			t.Fatalf("told %v of rooms %q and users %q", c, rooms, users)
		}
	})
}

// watched sees each renewal before it is made.
type watched func()

func (watched) DialHook(next redis.DialHook) redis.DialHook { return next }

func (watched) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (w watched) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if slices.Contains(cmd.Args(), any("renew")) {
			w()
		}
		return next(ctx, cmd)
	}
}

// A report to a store that is found while its stream is not followed yet would be taken for told.
func TestStoreIsFoundOnceItsStreamIsFollowed(t *testing.T) {
	target, err := Parse(redistest.Start(t).URL())
	if err != nil {
		t.Fatal(err)
	}
	s := New(Config{Target: target})
	var first sync.Once
	var early atomic.Bool
	s.client.AddHook(watched(func() { first.Do(func() { early.Store(s.ID() != "") }) }))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); s.Run(ctx, func(context.Context) error { return nil }) }()
	eventually(t, "the store is found", func() bool { return s.ID() != "" })
	cancel()
	<-ended
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if early.Load() {
		t.Error("the store was found before it was known where its stream ends")
	}
}

// Of entries that are missing, and of a store that has taken the place of another one, all is told
// before a report may be answered that has waited for it.
func TestAllIsToldBeforeReportsThatWaitForItAreAnswered(t *testing.T) {
	server := redistest.Start(t)
	var store atomic.Pointer[Store]
	type at struct {
		entry uint64
		id    string
	}
	told := make(chan at, 100)
	s := opened(t, Config{}, server.URL(), func(c refcontroller.Change) {
		if s := store.Load(); s != nil && c.All {
			s.mu.Lock()
			defer s.mu.Unlock()
			told <- at{s.at, s.ID()}
		}
	})
	store.Store(s)
	err := s.client.Eval(t.Context(), `local n = redis.call('HINCRBY', KEYS[1], 'n', 500)
		return redis.call('XADD', KEYS[2], n .. '-0', 'r', 'r', 'u', 'missed')`, []string{s.keys[0], s.changes}).Err()
	if err != nil {
		t.Fatal(err)
	}
	if got := <-told; got.entry >= 500 {
		t.Errorf("a gap is told when reports up to entry %d are answered", got.entry)
	}
	id := s.ID()
	server.Kill()
	server.Up()
	if got := <-told; got.id != id {
		t.Error("the loss is told when reports to the new store are answered")
	}
}
