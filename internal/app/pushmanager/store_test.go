package pushmanager

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/transport/store"
)

func TestBadSettingsOfTheStoreAreNamed(t *testing.T) {
	ca := etcdtest.NewCA(t)
	credentials := filepath.Join(t.TempDir(), "credentials")
	if err := os.WriteFile(credentials, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		env  map[string]string
		want string // "" for none
	}{
		"off":                          {nil, ""},
		"embedded":                     {map[string]string{"STORE": "embedded", "STORE_SYNC": "always"}, ""},
		"a cluster":                    {map[string]string{"STORE": "nats://127.0.0.1:1,localhost:2,[::1]"}, ""},
		"a cluster over TLS":           {map[string]string{"STORE": "nats://a:1,b:2", "STORE_TLS_CA_FILE": ca.File, "STORE_TLS_SERVER_NAME": "nats"}, ""},
		"TLS of the system":            {map[string]string{"STORE": "tls://a,tls://b"}, ""},
		"credentials":                  {map[string]string{"STORE": "tls://a", "STORE_CREDENTIALS_FILE": credentials}, ""},
		"another word":                 {map[string]string{"STORE": "redis"}, "STORE:"},
		"another scheme":               {map[string]string{"STORE": "redis://a:1"}, "STORE:"},
		"nothing in a list":            {map[string]string{"STORE": "nats://a,,b", "ALLOW_INSECURE": "true"}, "STORE:"},
		"a path":                       {map[string]string{"STORE": "nats://localhost/x"}, "STORE:"},
		"no TLS":                       {map[string]string{"STORE": "nats://nats.example:4222"}, "STORE_TLS_CA_FILE"},
		"TLS here and there":           {map[string]string{"STORE": "tls://localhost,nats://localhost"}, "STORE:"},
		"a password in it":             {map[string]string{"STORE": "nats://u:secret@localhost"}, "store_password"},
		"a user without a password":    {map[string]string{"STORE": "nats://localhost", "STORE_USERNAME": "u"}, "STORE_PASSWORD"},
		"a password without a user":    {map[string]string{"STORE": "nats://localhost", "STORE_PASSWORD": "p"}, "STORE_USERNAME"},
		"a user and credentials":       {map[string]string{"STORE": "nats://localhost", "STORE_USERNAME": "u", "STORE_PASSWORD": "p", "STORE_CREDENTIALS_FILE": credentials}, "STORE_CREDENTIALS_FILE"},
		"no such credentials":          {map[string]string{"STORE": "nats://localhost", "STORE_CREDENTIALS_FILE": "/nowhere"}, "STORE_CREDENTIALS_FILE"},
		"no such authorities":          {map[string]string{"STORE": "nats://localhost", "STORE_TLS_CA_FILE": "/nowhere"}, "STORE_TLS_CA_FILE"},
		"a name without TLS":           {map[string]string{"STORE": "nats://localhost", "STORE_TLS_SERVER_NAME": "x"}, "STORE_TLS_SERVER_NAME"},
		"a user of nothing":            {map[string]string{"STORE_USERNAME": "u"}, "STORE_USERNAME"},
		"replicas of an embedded one":  {map[string]string{"STORE": "embedded", "STORE_REPLICAS": "3"}, "STORE_REPLICAS"},
		"TLS of an embedded one":       {map[string]string{"STORE": "embedded", "STORE_TLS_CA_FILE": ca.File}, "STORE_TLS_CA_FILE"},
		"longer than the longest":      {map[string]string{"STORE_TTL": "200h"}, "STORE_TTL"},
		"longer than what is possible": {map[string]string{"STORE_MAX_TTL": "99999h"}, "STORE_MAX_TTL"},
		"another time to write":        {map[string]string{"STORE_SYNC": "5s"}, "STORE_SYNC"},
		"nothing for a user":           {map[string]string{"STORE_MAX_PER_USER": "0"}, "STORE_MAX_PER_USER"},
		"too many partitions":          {map[string]string{"STORE_PARTITIONS": "65"}, "STORE_PARTITIONS"},
	} {
		_, err := load(t, nil, tc.env, "")
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "secret")):
			t.Errorf("%s: %v, want a line with %s", name, err, tc.want)
		}
	}
}

// withStore are the settings of a Push-Manager with an embedded store of its own.
func withStore(t *testing.T, etcd, id string) map[string]string {
	t.Helper()
	return map[string]string{"ETCD_ENDPOINTS": etcd, "MANAGER_ID": id, "CONTROLLER_ADDRESS": freeport.Addr(t), "STORE": "embedded", "STORE_DIR": filepath.Join(t.TempDir(), "store")}
}

// spoolOne stores a message through the Spool, and returns what became of it.
func spoolOne(t *testing.T, m *PushManager, user, payload string) engine.Spooled {
	t.Helper()
	done := make(chan engine.Spooled, 1)
	m.spool.Append(&engine.Stored{MessageID: "m", Payload: []byte(payload)}, []string{user}, time.Now().Add(20*time.Second), func(r []engine.Spooled) { done <- r[0] })
	return <-done
}

func wantStored(t *testing.T, m *PushManager, user, payload string) store.Entry {
	t.Helper()
	page, _, err := m.store.Read(t.Context(), user, 0, 10, 1<<20)
	if err != nil || len(page) != 1 || string(page[0].Message.Payload) != payload {
		t.Fatalf("read: %v, %v", page, err)
	}
	return page[0]
}

func TestEmbeddedStoreKeepsMessagesAcrossStarts(t *testing.T) {
	etcd := etcdtest.Start(t)
	env := withStore(t, etcd.Endpoint(), "pm-1")
	env["STORE_TTL"], env["STORE_MAX_PER_USER"] = "2h", "1"
	var log bytes.Buffer
	m := startLogging(t, env, slog.NewTextHandler(&log, nil))
	if r := spoolOne(t, m, "u", "message"); r.Err != nil {
		t.Fatal(r.Err)
	}
	if r := spoolOne(t, m, "u", "message"); r.Err == nil || r.Err.Error() != "user has 1 messages waiting" {
		t.Errorf("above the quota: %v", r.Err)
	}
	if left := time.Until(wantStored(t, m, "u", "message").Expires); left < time.Hour || left > 2*time.Hour {
		t.Errorf("expires in %v", left)
	}
	eventually(t, "registered", func() bool { return m.entry.Registered() })
	got, err := etcd.Client().Get(t.Context(), "/services/push-manager/pm-1")
	if err != nil || len(got.Kvs) != 1 {
		t.Fatal(got, err)
	}
	var entry struct{ Metadata map[string]string }
	if err := json.Unmarshal(got.Kvs[0].Value, &entry); err != nil || entry.Metadata["store"] != "embedded" {
		t.Errorf("%s, %v", got.Kvs[0].Value, err)
	}
	_, metrics := get(t, "http://"+m.HTTPAddr()+"/metrics")
	for _, want := range []string{`push_manager_store_append_total{result="stored"} 1`, "push_manager_store_up 1", "push_manager_store_max_bytes 8053063680", "push_manager_store_log_bytes 0"} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no metric %s", want)
		}
	}
	drain(t, m, 8*time.Second)
	if !strings.Contains(log.String(), `survive="the end of the process, not a power cut"`) {
		t.Errorf("the log does not say what is survived:\n%s", log.String())
	}
	env["STORE_SYNC"] = "always"
	m = startPushManager(t, env)
	defer drain(t, m, 8*time.Second)
	wantStored(t, m, "u", "message")
	if m.store.Durability() != store.OfMachine {
		t.Errorf("durability %d", m.store.Durability())
	}
}

// TestPushesToRoomsAreLoggedAcrossStarts holds that the Spool is wired to the logs of the store, with its limits.
func TestPushesToRoomsAreLoggedAcrossStarts(t *testing.T) {
	etcd := etcdtest.Start(t)
	env := withStore(t, etcd.Endpoint(), "pm-1")
	env["STORE_TTL"], env["STORE_PARTITIONS"] = "2h", "3"
	logged := func(m *PushManager, room string) engine.Place {
		t.Helper()
		type answer struct {
			place engine.Place
			err   error
		}
		done := make(chan answer, 1)
		entry := &engine.Stored{MessageID: "m", Room: room, Payload: []byte("message"), Exclude: []string{"u"}}
		m.spool.AppendLog(entry, time.Now().Add(20*time.Second), func(place engine.Place, err error) { done <- answer{place, err} })
		got := <-done
		if got.err != nil {
			t.Fatal(got.err)
		}
		return got.place
	}
	m := startPushManager(t, env)
	first, partitions := map[string]engine.Place{}, map[uint32]bool{}
	for _, room := range []string{"a", "b", "c", "d", "e", "f", "g", "h"} {
		first[room] = logged(m, room)
		partitions[first[room].Partition] = true
	}
	if len(partitions) != 3 {
		t.Errorf("partitions %v of 3", partitions)
	}
	eventually(t, "the size is shown", func() bool {
		_, metrics := get(t, "http://"+m.HTTPAddr()+"/metrics")
		return strings.Contains(metrics, "push_manager_store_log_bytes ") && !strings.Contains(metrics, "push_manager_store_log_bytes 0\n")
	})
	drain(t, m, 8*time.Second)
	m = startPushManager(t, env)
	defer drain(t, m, 8*time.Second)
	for room, place := range first {
		again := logged(m, room)
		if again.Epoch != place.Epoch || again.Partition != place.Partition || again.Seq <= place.Seq {
			t.Errorf("%q: place %+v follows %+v", room, again, place)
		}
		page, err := m.store.ReadLog(t.Context(), room, 0, 10, 1<<20)
		if err != nil || page.Gap || len(page.Entries) != 2 || page.Entries[0].Place != place || page.Entries[0].Message.Exclude[0] != "u" {
			t.Fatalf("read: %+v, %v", page, err)
		}
		if left := time.Until(page.Entries[0].Expires); left < time.Hour || left > 2*time.Hour {
			t.Errorf("expires in %v", left)
		}
	}
}

func TestOnlyOnePushManagerHasAnEmbeddedStore(t *testing.T) {
	etcd := etcdtest.Start(t)
	first := startPushManager(t, withStore(t, etcd.Endpoint(), "pm-1"))
	env := withStore(t, etcd.Endpoint(), "pm-2")
	c, err := load(t, nil, env, "")
	if err != nil {
		t.Fatal(err)
	}
	c.GRPCPort, c.HTTPPort, c.MetricsPort = 0, 0, 0
	_, err = Start(t.Context(), *c, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "STORE=embedded") || !strings.Contains(err.Error(), `"pm-1"`) || strings.Contains(err.Error(), "\n") {
		t.Errorf("a second one: %v", err)
	}
	env["STORE"] = "off"
	other := startPushManager(t, env)
	drain(t, other, 8*time.Second)
	drain(t, first, 8*time.Second)
	env["STORE"] = "embedded"
	next := startPushManager(t, env) // the claim ended with the first
	drain(t, next, 8*time.Second)
}

func TestOfPushManagersThatStartAtTheSameMomentOneHasTheStore(t *testing.T) {
	etcd := etcdtest.Start(t)
	const n = 4
	var mu sync.Mutex
	var started []*PushManager
	var wg sync.WaitGroup
	for i := range n {
		c, err := load(t, nil, withStore(t, etcd.Endpoint(), "pm-"+string(rune('1'+i))), "")
		if err != nil {
			t.Fatal(err)
		}
		c.GRPCPort, c.HTTPPort, c.MetricsPort = 0, 0, 0
		wg.Go(func() {
			m, err := Start(t.Context(), *c, slog.New(slog.DiscardHandler))
			if err != nil {
				if !strings.Contains(err.Error(), "STORE=embedded") {
					t.Error(err)
				}
				return
			}
			mu.Lock()
			defer mu.Unlock()
			started = append(started, m)
		})
	}
	wg.Wait()
	if len(started) != 1 {
		t.Errorf("%d of %d have an embedded store", len(started), n)
	}
	for _, m := range started {
		drain(t, m, 8*time.Second)
	}
}

func TestPushManagersThatStartWithoutEtcdAreToldApartWhenItIsThere(t *testing.T) {
	etcd := etcdtest.Reserve(t)
	var all []*PushManager
	for _, id := range []string{"pm-1", "pm-2"} {
		env := withStore(t, etcd.Endpoint(), id)
		env["ETCD_REQUEST_TIMEOUT"] = "500ms"
		m := startPushManager(t, env)
		defer drain(t, m, 8*time.Second)
		all = append(all, m)
	}
	etcd.Restart()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	select {
	case err := <-all[0].Failed():
		if !strings.Contains(err.Error(), `"pm-2"`) {
			t.Error(err)
		}
	case err := <-all[1].Failed():
		if !strings.Contains(err.Error(), `"pm-1"`) {
			t.Error(err)
		}
	case <-ctx.Done():
		t.Error("both have an embedded store")
	}
}

func TestAStoreElsewhereThatIsAwayKeepsNobodyFromStarting(t *testing.T) {
	etcd := etcdtest.Start(t)
	var log bytes.Buffer
	m := startLogging(t, map[string]string{"ETCD_ENDPOINTS": etcd.Endpoint(), "CONTROLLER_ADDRESS": freeport.Addr(t), "STORE": "nats://" + freeport.Addr(t)}, slog.NewTextHandler(&log, nil))
	began := time.Now()
	if r := spoolOne(t, m, "u", "message"); r.Err == nil || r.Err.Error() != engine.ErrSpoolDown.Error() || time.Since(began) > 10*time.Second {
		t.Errorf("%v after %v", r.Err, time.Since(began))
	}
	if why := strings.Join(m.NotReady(), " "); strings.Contains(why, "store") {
		t.Errorf("not ready: %s", why)
	}
	drain(t, m, 8*time.Second)
	if !strings.Contains(log.String(), "level=WARN") || !strings.Contains(log.String(), "store: not reachable") {
		t.Errorf("no warning:\n%s", log.String())
	}
}

func TestAStoreWithAnotherNumberOfPartitionsDoesNotStart(t *testing.T) {
	etcd := etcdtest.Start(t)
	env := withStore(t, etcd.Endpoint(), "pm-1")
	drain(t, startPushManager(t, env), 8*time.Second)
	env["STORE_PARTITIONS"] = "2"
	c, err := load(t, nil, env, "")
	if err != nil {
		t.Fatal(err)
	}
	c.GRPCPort, c.HTTPPort, c.MetricsPort = 0, 0, 0
	_, err = Start(t.Context(), *c, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "STORE_PARTITIONS") || strings.Contains(err.Error(), "\n") {
		t.Errorf("%v", err)
	}
	env["STORE_PARTITIONS"] = "1"
	drain(t, startPushManager(t, env), 8*time.Second)
}

func TestNoStoreIsTheDefault(t *testing.T) {
	m := startPushManager(t, map[string]string{"ETCD_ENDPOINTS": etcdtest.Start(t).Endpoint(), "CONTROLLER_ADDRESS": freeport.Addr(t)})
	if m.store != nil || m.spool != nil {
		t.Error("there is a store")
	}
	drain(t, m, 8*time.Second)
}
