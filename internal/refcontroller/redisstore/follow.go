package redisstore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/push-manager/push-manager/internal/pause"
	"github.com/push-manager/push-manager/internal/refcontroller"
)

const (
	// renewEvery is how often a Controller says that it lives. As often a watcher's mark
	// can go back.
	renewEvery = 250 * time.Millisecond
	// readWait is how long a read of the stream waits for something. It cannot be
	// cancelled, so Run may take as long to end.
	readWait = 100 * time.Millisecond
	// readEntries is how much one read takes.
	readEntries = 1000
	// retryAfter is the pause after an error.
	retryAfter = 100 * time.Millisecond
	// goodbye is how long the last call may take.
	goodbye = time.Second
)

// Run implements refcontroller.Shared.
func (s *Store) Run(ctx context.Context, settle func(context.Context) error) {
	var wg sync.WaitGroup
	wg.Go(func() { s.settleLoop(ctx, settle) })
	s.followLoop(ctx)
	wg.Wait()
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), goodbye)
	defer cancel()
	if s.identity.Load() != nil {
		_, _ = s.do(last, "bye", s.me) // Otherwise the others wait until its lease has ended.
	}
}

// fence is a renewal: once the stream is told up to n, all is that was visible at the time.
type fence struct {
	at time.Time
	n  uint64
}

func (s *Store) followLoop(ctx context.Context) {
	var renewed time.Time
	var due fence
	failing := false
	for ctx.Err() == nil {
		err := func() (err error) {
			defer func() {
				if p := recover(); p != nil {
					err = fmt.Errorf("panic: %v", p)
				}
			}()
			if time.Since(renewed) >= renewEvery {
				renewed = time.Now()
				if due, err = s.renew(ctx); err != nil {
					return err
				}
			}
			if err := s.readSome(ctx); err != nil {
				return err
			}
			s.pass(due)
			return nil
		}()
		if failing != (err != nil) && ctx.Err() == nil {
			if failing = err != nil; failing {
				s.log.Warn("redis cannot be followed: look-ups and reports fail", "err", err)
			} else {
				s.log.Info("redis is followed", "store", s.ID())
			}
		}
		if err != nil {
			renewed, due = time.Time{}, fence{}
			pause.For(ctx, retryAfter)
		}
	}
}

// pass notes that a fence has been reached.
func (s *Store) pass(due fence) {
	s.mu.Lock()
	reached := s.at >= due.n
	s.mu.Unlock()
	if !reached || due.at.IsZero() || !due.at.After(*s.told.Load()) {
		return
	}
	s.told.Store(&due.at)
	s.move(func() {})
	s.tell(refcontroller.Change{})
}

// move changes what mu guards, and has those look again who wait for it.
func (s *Store) move(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	close(s.moved)
	s.moved = make(chan struct{})
}

// renew says that this Controller lives. It finds out what store there is.
func (s *Store) renew(ctx context.Context) (fence, error) {
	if s.identity.Load() == nil {
		return fence{}, s.open(ctx)
	}
	at := time.Now()
	s.mu.Lock()
	settled := s.settled
	s.mu.Unlock()
	believed := "0"
	if id := s.believes.Load(); id != nil && *id == s.ID() {
		believed = "1"
	}
	f, err := s.renewal(ctx, at, settled, believed)
	if errors.Is(err, errLost) {
		return fence{}, s.open(ctx)
	}
	return f, err
}

func (s *Store) renewal(ctx context.Context, at time.Time, settled uint64, believed string) (fence, error) {
	r, err := s.do(ctx, "renew", s.me, s.lease.Load(), settled, believed)
	if err != nil {
		return fence{}, err
	}
	n, _, through, warm := r.number(), r.number(), r.number(), r.number()
	counts := refcontroller.Counts{Rooms: int(r.number()), Users: int(r.number()), Memberships: int(r.number())}
	if r.err != nil {
		return fence{}, r.err
	}
	s.counts.Store(&counts)
	s.believed.Store(warm == 1)
	s.mu.Lock()
	s.settled = max(s.settled, uint64(through))
	s.mu.Unlock()
	return fence{at, uint64(n)}, nil
}

// open finds the store, and begins to follow it from now on. What was told before means nothing
// if it is another one than before: its watchers are not believed, and the Server ends their streams.
func (s *Store) open(ctx context.Context) error {
	s.believed.Store(false)
	v, err := script.Run(ctx, s.client, s.keys, "open", rand.Text()).Slice()
	r, err := s.read("open", v, err)
	if err != nil {
		return err
	}
	found := &identity{r.text(), r.text()}
	if r.err != nil {
		return r.err
	}
	before := s.identity.Load()
	if err := s.jump(ctx, found); err != nil {
		return err
	}
	if before != nil && *before != *found {
		s.m.losses.Inc()
		s.log.Warn("redis has been emptied, restarted or replaced: the nodes are asked again", "store", found.id, "run", found.run)
	}
	return nil
}

// jump goes on at the end of the stream of a store. What was changed up to there is told as All,
// and before a report may find that it has been told: of a store that nobody has seen yet that is
// not needed, since no report to it is under way here.
func (s *Store) jump(ctx context.Context, to *identity) error {
	r, err := s.doAt(ctx, to, "renew", s.me, s.lease.Load(), 0, "0")
	if err != nil {
		return err
	}
	n, change, through := uint64(r.number()), uint64(r.number()), uint64(r.number())
	for range 4 { // for renewals
		r.number()
	}
	list := r.list()
	others := map[string]uint64{}
	for len(list.rest) > 0 {
		id := list.text()
		others[id] = uint64(list.number())
	}
	if err := errors.Join(r.err, list.err); err != nil {
		return err
	}
	before := s.identity.Load()
	s.tell(refcontroller.Change{All: before != nil})
	s.move(func() {
		if before == nil || *before != *to {
			s.settled = 0
		}
		s.at, s.change, s.settled, s.others = n, change, max(s.settled, through), others
		s.identity.Store(to) // A report to it waits for what comes after n.
	})
	return nil
}

// readSome tells what stands in the stream.
func (s *Store) readSome(ctx context.Context) error {
	if s.identity.Load() == nil {
		return errAway
	}
	s.mu.Lock()
	at := s.at
	s.mu.Unlock()
	streams, err := s.client.XRead(ctx, &redis.XReadArgs{
		Streams: []string{s.changes, strconv.FormatUint(at, 10) + "-0"}, Count: readEntries, Block: readWait,
	}).Result()
	if errors.Is(err, redis.Nil) {
		return nil
	}
	if err != nil {
		s.m.errors.Inc()
		return fmt.Errorf("redis: read changes: %w", err)
	}
	for _, stream := range streams {
		for _, entry := range stream.Messages {
			at++
			n, err := strconv.ParseUint(strings.TrimSuffix(entry.ID, "-0"), 10, 64)
			if err != nil {
				return errReply
			}
			if n != at { // The stream is bounded, and has lost what stood between.
				s.m.gaps.Inc()
				return s.jump(ctx, s.identity.Load())
			}
			s.take(n, entry.Values)
		}
	}
	return nil
}

// take tells an entry of the stream.
func (s *Store) take(n uint64, values map[string]any) {
	value := func(key string) string {
		text, _ := values[key].(string)
		return text
	}
	if users := value("u"); users != "" {
		s.tell(parseChange(n, value("r"), users, value("d")))
		s.move(func() { s.at, s.change = n, n })
		return
	}
	s.move(func() {
		s.at = n
		for _, key := range []string{"j", "s"} {
			if id, through, ok := strings.Cut(value(key), " "); ok && id != s.me {
				settled, _ := strconv.ParseUint(through, 10, 64) // 0 if it is none: it is waited for
				s.others[id] = max(s.others[id], settled)
			}
		}
		delete(s.others, value("g"))
	})
}

// settleLoop says to the others what the watchers here know.
func (s *Store) settleLoop(ctx context.Context, settle func(context.Context) error) {
	for ctx.Err() == nil {
		var through uint64
		err := s.await(ctx, func() (bool, error) {
			through = s.change
			return len(s.others) > 0 && through > s.settled, nil
		})
		if err == nil {
			err = settle(ctx)
		}
		if err == nil {
			_, err = s.do(ctx, "settled", s.me, through)
		}
		if err != nil {
			pause.For(ctx, retryAfter)
			continue
		}
		s.move(func() { s.settled = max(s.settled, through) })
	}
}

// Settle implements refcontroller.Shared.
func (s *Store) Settle(ctx context.Context) error {
	id := s.identity.Load()
	s.mu.Lock()
	through := s.change
	s.mu.Unlock()
	return s.await(ctx, func() (bool, error) {
		if s.identity.Load() != id {
			return false, errLost
		}
		for settled := range maps.Values(s.others) {
			if settled < through {
				return false, nil
			}
		}
		return true, nil
	})
}

// Told implements refcontroller.Shared.
func (s *Store) Told() time.Time { return *s.told.Load() }

// Vouch implements refcontroller.Shared.
func (s *Store) Vouch(ctx context.Context, lease time.Duration) error {
	for {
		now := s.lease.Load()
		if lease.Milliseconds() <= now || s.lease.CompareAndSwap(now, lease.Milliseconds()) {
			break
		}
	}
	since := time.Now()
	return s.await(ctx, func() (bool, error) { return s.Told().After(since), nil })
}

// Believe implements refcontroller.Shared.
func (s *Store) Believe(id string) { s.believes.Store(&id) }

// Believed implements refcontroller.Shared.
func (s *Store) Believed() bool { return s.believed.Load() }
