package replay

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/store"
	"github.com/push-manager/push-manager/transport/store/storetest"
)

// memory is a store in memory. Its hooks are called before the call does its work, without the lock.
type memory struct {
	onRead, onAny, onTrim, onAppend func(ctx context.Context) error
	limits                          storetest.Limits

	mu    sync.Mutex
	last  uint64
	bytes int // ever stored
	users map[string][]store.Entry
	trims map[string][]uint64
	anys  []int // users of each call
	reads int
}

func newMemory() *memory {
	return &memory{users: map[string][]store.Entry{}, trims: map[string][]uint64{}, limits: storetest.Limits{MaxPerUser: 1000, MaxBytes: 1 << 30}}
}

// kept is memory as storetest sees it: what it keeps outlives its store.
type kept struct{ *memory }

func (k kept) Open(_ *testing.T, limits storetest.Limits) store.Store {
	k.limits = storetest.Limits{MaxPerUser: cmp.Or(limits.MaxPerUser, 1000), MaxBytes: cmp.Or(limits.MaxBytes, 1<<30)}
	return k.memory
}

func (k kept) Files() string { return "" }

// The tests here rest on a store that keeps the rules of stores.
func TestMemory(t *testing.T) {
	storetest.Run(t, func(*testing.T) storetest.Data { return kept{newMemory()} })
}

// overQuota says how many messages a user has.
type overQuota int

func (n overQuota) Error() string { return fmt.Sprintf("user has %d messages waiting", int(n)) }
func (overQuota) Unwrap() error   { return engine.ErrSpoolQuota }

// before is what each call begins with.
func before(ctx context.Context, hook func(context.Context) error) error {
	if hook != nil {
		if err := hook(ctx); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (m *memory) Append(ctx context.Context, entries []store.Entry) []error {
	errs := make([]error, len(entries))
	if err := before(ctx, m.onAppend); err != nil {
		for i := range errs {
			errs[i] = fmt.Errorf("%w: %w", engine.ErrSpoolDown, err)
		}
		return errs
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range entries {
		e := &entries[i]
		list := m.unexpired(e.User)
		if key := e.Message.CollapseKey; key != "" {
			list = slices.DeleteFunc(list, func(o store.Entry) bool { return o.Message.CollapseKey == key })
		}
		if len(list) >= m.limits.MaxPerUser {
			errs[i] = overQuota(len(list))
			continue
		}
		if len(e.Message.Payload) > 64<<20 {
			errs[i] = fmt.Errorf("%w: for so large a message", engine.ErrSpoolFull)
			continue
		}
		if m.bytes+len(e.Message.Payload) > m.limits.MaxBytes {
			errs[i] = engine.ErrSpoolFull
			continue
		}
		m.bytes += len(e.Message.Payload)
		m.last++
		e.Seq = m.last
		m.users[e.User] = append(list, *e)
	}
	return errs
}

func (m *memory) unexpired(user string) []store.Entry {
	return slices.DeleteFunc(slices.Clone(m.users[user]), func(e store.Entry) bool { return !time.Now().Before(e.Expires) })
}

func (m *memory) Read(ctx context.Context, user string, after uint64, most, bytes int) (page []store.Entry, more bool, err error) {
	if err := before(ctx, m.onRead); err != nil {
		return nil, false, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reads++
	size := 0
	for _, e := range m.unexpired(user) {
		if e.Seq <= after {
			continue
		}
		size += len(e.Message.Payload)
		if len(page) == most || len(page) > 0 && size > bytes {
			return page, true, nil
		}
		page = append(page, e)
	}
	return page, false, nil
}

func (m *memory) Any(ctx context.Context, users []string) ([]bool, error) {
	if err := before(ctx, m.onAny); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.anys = append(m.anys, len(users))
	some := make([]bool, len(users))
	for i, user := range users {
		some[i] = len(m.users[user]) > 0
	}
	return some, nil
}

func (m *memory) Trim(ctx context.Context, user string, seq uint64) error {
	if err := before(ctx, m.onTrim); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.trims[user] = append(m.trims[user], seq)
	m.users[user] = slices.DeleteFunc(slices.Clone(m.users[user]), func(e store.Entry) bool { return e.Seq <= seq })
	return nil
}

func (m *memory) Forget(ctx context.Context, user string) (int, error) {
	if err := before(ctx, nil); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := len(m.users[user])
	delete(m.users, user)
	return n, nil
}

func (m *memory) Durability() store.Durability { return store.OfProcess }
func (m *memory) Close(context.Context) error  { return nil }

// places is where the user's messages are.
func (m *memory) places(user string) (all []uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range m.users[user] {
		all = append(all, e.Seq)
	}
	return all
}

// trimmed is where the user's messages were trimmed, in order.
func (m *memory) trimmed(user string) []uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.trims[user])
}

// put stores a message with the text for the user, and returns its place.
func (m *memory) put(t testing.TB, user, text string, ttl time.Duration) uint64 {
	t.Helper()
	e := []store.Entry{{User: user, Expires: time.Now().Add(ttl), Message: &engine.Stored{
		MessageID: "id " + text, Sender: "sender", PayloadHash: 7, Payload: []byte(text),
	}}}
	if err := m.Append(t.Context(), e)[0]; err != nil {
		t.Fatal(err)
	}
	return e[0].Seq
}

// fill stores so many messages.
func (m *memory) fill(t testing.TB, user string, n int) (places []uint64) {
	t.Helper()
	for range n {
		places = append(places, m.put(t, user, "x", time.Hour))
	}
	return places
}
