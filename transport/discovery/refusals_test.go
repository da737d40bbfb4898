package discovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/etcdtest"
)

// ledger is a sink that keeps what holds.
type ledger struct {
	mu    sync.Mutex
	all   map[string]KnownRefusal
	lists int
	ticks int
}

func (l *ledger) List(all map[string]KnownRefusal, _ int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all, l.lists = all, l.lists+1
}

func (l *ledger) Put(key string, r KnownRefusal) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all[key] = r
}

func (l *ledger) Delete(key string, _ int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.all, key)
}

func (l *ledger) Tick() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ticks++
}

func (l *ledger) has(r Refusal) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok := l.all[r.Key()]
	return ok
}

func TestRefusalsAreKnownToThoseWhoWatchAndToThoseWhoComeLater(t *testing.T) {
	etcd := etcdtest.Start(t)
	w := &Refusals{Client: etcd.Client(), Most: 3, Timeout: 10 * time.Second}
	watch := func() *ledger {
		l := &ledger{all: map[string]KnownRefusal{}}
		rw := WatchRefusals(etcd.Client(), 100, l, slog.New(slog.DiscardHandler))
		t.Cleanup(rw.Close)
		return l
	}
	until := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not in time: %s", what)
			}
		}
	}
	early := watch()
	user, device, room := Refusal{User: "shop/a", Code: 4410, Seconds: 3600}, Refusal{User: "shop/a", Device: "d", Code: 4411, Reason: "x", Seconds: 3600}, Refusal{Room: "r", Code: 4412, Seconds: 2}
	for _, r := range []*Refusal{&user, &device, &room} {
		if _, err := w.Refuse(t.Context(), "", r); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Refuse(t.Context(), "", &Refusal{User: "b", Code: 4410, Seconds: 60}); !errors.Is(err, ErrManyRefusals) {
		t.Errorf("one too many: %v", err)
	}
	again := user
	again.Reason = "again"
	before, err := w.Refuse(t.Context(), "", &again) // in the place of the first
	if err != nil {
		t.Fatal(err)
	}
	late := watch()
	for _, l := range []*ledger{early, late} {
		until("all are known", func() bool { return l.has(user) && l.has(device) })
	}
	until("the newer one is known", func() bool {
		early.mu.Lock()
		defer early.mu.Unlock()
		return early.all[user.Key()].Reason == "again" && early.all[user.Key()].Revision == before
	})
	after, err := w.Lift(t.Context(), &user)
	if err != nil || after <= before {
		t.Errorf("lifted at %d, written at %d: %v", after, before, err)
	}
	for _, l := range []*ledger{early, late} {
		until("it is lifted", func() bool { return !l.has(user) && l.has(device) })
		until("the end of the other one", func() bool { return !l.has(room) }) // its lease is over
	}
	if _, err := w.Lift(t.Context(), &user); err != nil {
		t.Errorf("lifted twice: %v", err)
	}
	leases, err := etcd.Client().Leases(t.Context())
	if err != nil || len(leases.Leases) != 1 { // those of what was replaced or lifted are gone
		t.Errorf("leases %v, %v", leases, err)
	}
}

func TestWhatIsNoRefusalIsLeftOut(t *testing.T) {
	good := Refusal{User: "u", Code: 4410, Seconds: 1}
	for what, c := range map[string]struct{ key, value string }{
		"good":           {good.Key(), `{"user":"u","code":4410,"seconds":1}`},
		"another key":    {RefusedPrefix + "user/v", `{"user":"u","code":4410,"seconds":1}`},
		"no JSON":        {good.Key(), `{`},
		"nobody":         {RefusedPrefix + "user/", `{"code":4410,"seconds":1}`},
		"two":            {good.Key(), `{"user":"u","room":"r","code":4410,"seconds":1}`},
		"a wrong code":   {good.Key(), `{"user":"u","code":1000,"seconds":1}`},
		"no time":        {good.Key(), `{"user":"u","code":4410}`},
		"a long reason":  {good.Key(), fmt.Sprintf(`{"user":"u","code":4410,"seconds":1,"reason":%q}`, strings.Repeat("x", 121))},
		"control":        {good.Key(), `{"user":"u","code":4410,"seconds":1,"reason":"a\nb"}`},
		"a code too big": {good.Key(), `{"user":"u","code":70000,"seconds":1}`},
		"too long":       {good.Key(), `{"user":"u","code":4410,"seconds":1}` + strings.Repeat(" ", maxValueBytes)},
	} {
		if _, ok := parseRefusal(c.key, []byte(c.value)); ok != (what == "good") {
			t.Errorf("%s: %t", what, ok)
		}
	}
}

func FuzzParseRefusal(f *testing.F) {
	f.Add(RefusedPrefix+"user/u", []byte(`{"user":"u","code":4410,"seconds":1}`))
	f.Add(RefusedPrefix+"device/u/d/1", []byte(`{"user":"u","device":"d","code":4410,"seconds":1}`))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		if r, ok := parseRefusal(key, value); ok && (r.Check() != nil || r.Key() != key) {
			t.Errorf("%q: %+v", key, r)
		}
	})
}

// TestATenantRefusesItsShareAndNoMore of users, devices and rooms together.
func TestATenantRefusesItsShareAndNoMore(t *testing.T) {
	w := &Refusals{Client: etcdtest.Start(t).Client(), Most: 12, Timeout: 10 * time.Second}
	refuse := func(scope string, r Refusal) error {
		r.Code, r.Seconds = 4410, 3600
		_, err := w.Refuse(t.Context(), scope, &r)
		return err
	}
	for _, r := range []Refusal{{User: "shop/a"}, {User: "shop/a", Device: "d"}, {Room: "shop/a"}, {Room: "shop/a"}} { // the last one is known
		if err := refuse("shop/", r); err != nil {
			t.Fatalf("%+v: %v", r, err)
		}
	}
	for _, r := range []Refusal{{User: "shop/b"}, {User: "shop/a", Device: "e"}, {Room: "shop/b"}} {
		if err := refuse("shop/", r); !errors.Is(err, ErrManyRefusals) {
			t.Errorf("more than a quarter, %+v: %v", r, err)
		}
	}
	if err := refuse("shopping/", Refusal{User: "shopping/a"}); err != nil {
		t.Errorf("for another tenant: %v", err)
	}
	if err := refuse("", Refusal{User: "shop/b"}); err != nil {
		t.Errorf("for who has no tenant: %v", err)
	}
	if _, err := w.Lift(t.Context(), &Refusal{User: "shop/b"}); err != nil {
		t.Error(err)
	}
	if _, err := w.Lift(t.Context(), &Refusal{User: "shop/a", Device: "d"}); err != nil {
		t.Error(err)
	}
	if err := refuse("shop/", Refusal{User: "shop/b"}); err != nil {
		t.Errorf("in the place of one that was lifted: %v", err)
	}
}

// TestNoTwoRefusalsHaveOneKey whatever slashes their ids have.
func TestNoTwoRefusalsHaveOneKey(t *testing.T) {
	keys := map[string]Refusal{}
	parts := []string{"a", "1", "a/1", "1/a", "a/1/1", "a/", "/1"}
	for _, user := range parts {
		for _, device := range append(parts, "") {
			r := Refusal{User: user, Device: device}
			if other, twice := keys[r.Key()]; twice {
				t.Errorf("%+v and %+v: %s", r, other, r.Key())
			}
			keys[r.Key()] = r
		}
	}
}

// leaving is an etcd whose caller leaves when a lease was made for a refusal, or a refusal was written or deleted.
type leaving struct {
	clientv3.KV
	leave func()
}

// leavingLease is the same of leases.
type leavingLease struct {
	clientv3.Lease
	leave func()
}

func (l leavingLease) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	defer l.leave()
	return l.Lease.Grant(ctx, ttl)
}

func (l leaving) Delete(ctx context.Context, key string, options ...clientv3.OpOption) (*clientv3.DeleteResponse, error) {
	defer l.leave()
	return l.KV.Delete(ctx, key, options...)
}

// TestCallersWhoLeaveLeaveNoLeasesBehind: each would live for as long as a refusal may.
func TestCallersWhoLeaveLeaveNoLeasesBehind(t *testing.T) {
	etcd := etcdtest.Start(t)
	client := etcdtest.NewClient(t, etcd.Endpoint())
	kv, lease := client.KV, client.Lease
	w := &Refusals{Client: client, Most: 3, Timeout: 10 * time.Second}
	leases := func() int {
		t.Helper()
		r, err := lease.Leases(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return len(r.Leases)
	}
	for range 3 {
		ctx, leave := context.WithCancel(t.Context())
		client.KV, client.Lease = leaving{kv, leave}, leavingLease{lease, leave}
		if _, err := w.Refuse(ctx, "", &Refusal{User: "a", Code: 4410, Seconds: 3600}); err != nil {
			t.Fatal(err)
		}
		leave()
		if n := leases(); n != 1 {
			t.Fatalf("%d leases for one refusal", n)
		}
	}
	ctx, leave := context.WithCancel(t.Context())
	client.KV, client.Lease = leaving{kv, leave}, leavingLease{lease, leave}
	if _, err := w.Lift(ctx, &Refusal{User: "a"}); err != nil {
		t.Fatal(err)
	}
	if n := leases(); n != 0 {
		t.Errorf("%d leases for nobody", n)
	}
	client.KV, client.Lease = kv, lease
}
