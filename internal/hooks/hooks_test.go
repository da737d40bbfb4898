package hooks

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.etcd.io/bbolt"
	"go.uber.org/goleak"

	"github.com/push-manager/push-manager/internal/webhook"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const secret = "0123456789abcdef"

// got is an event as a receiver sees it.
type got struct {
	ID, Event string
	User      string `json:"user_id"`
	Room      string `json:"room_id"`
	Node      string `json:"node_id"`
	Boot      string `json:"boot_id"`
}

// receiver notes events, and does with requests what a test says.
type receiver struct {
	t   *testing.T
	url string

	mu     sync.Mutex
	mode   func(w http.ResponseWriter) // before it takes a request: what it answers in place of taking it, if it says so
	events []got                       // of requests that were taken or may have been, in their order
	wrong  int                         // requests that nobody has signed
}

func newReceiver(t *testing.T) *receiver {
	r := &receiver{t: t}
	srv := httptest.NewServer(r)
	t.Cleanup(srv.Close)
	r.url = srv.URL
	return r
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	body, _ := io.ReadAll(q.Body)
	stamp, signature, _ := strings.Cut(strings.TrimPrefix(q.Header.Get(webhook.SignatureHeader), "t="), ",v1=")
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(stamp + "." + string(body)))
	var batch struct{ Events []got }
	err := json.Unmarshal(body, &batch)
	r.mu.Lock()
	mode := r.mode
	if err != nil || hex.EncodeToString(mac.Sum(nil)) != signature {
		r.wrong++
	}
	r.events = append(r.events, batch.Events...)
	r.mu.Unlock()
	if mode != nil {
		mode(w)
	}
}

func (r *receiver) set(mode func(http.ResponseWriter)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mode = mode
}

func (r *receiver) seen() []got {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events)
}

func (r *receiver) until(what string, ok func([]got) bool) []got {
	r.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if seen := r.seen(); ok(seen) {
			return seen
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("not in time: %s; %d events", what, len(r.seen()))
		}
	}
}

// write writes a file of hooks and its secret.
func write(t *testing.T, dir, hooks string) string {
	t.Helper()
	file := filepath.Join(dir, "hooks.yaml")
	for name, text := range map[string]string{file: "version: 1\nhooks:\n" + strings.ReplaceAll(hooks, "SECRET", filepath.Join(dir, "secret")), filepath.Join(dir, "secret"): secret} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return file
}

func entry(name, url, events string) string {
	return fmt.Sprintf("- {name: %s, url: %q, secret_file: SECRET, events: [%s]}\n", name, url, events)
}

func open(t *testing.T, cfg Config) *Hooks {
	t.Helper()
	cfg.Node, cfg.RetryMin, cfg.RetryMax = "n", 5*time.Millisecond, 20*time.Millisecond
	cfg.Timeout = cmp.Or(cfg.Timeout, 300*time.Millisecond)
	h, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// TestEveryEventComesAtLeastOnceAndInOrderForEachUser whatever the receiver does meanwhile, and over restarts: what was emitted and what came
// are noted on both sides.
func TestEveryEventComesAtLeastOnceAndInOrderForEachUser(t *testing.T) {
	r := newReceiver(t)
	dir := t.TempDir()
	cfg := Config{File: write(t, dir, entry("a", r.url, "join")), Dir: filepath.Join(dir, "queue")}
	const users, rounds = 20, 100
	down := func(w http.ResponseWriter) { w.WriteHeader(http.StatusServiceUnavailable) }
	cut := func(w http.ResponseWriter) { // killed before it has answered what it has taken
		if c, _, err := w.(http.Hijacker).Hijack(); err == nil {
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
		}
	}
	slow := func(http.ResponseWriter) { time.Sleep(50 * time.Millisecond) }
	late := func(http.ResponseWriter) { time.Sleep(400 * time.Millisecond) } // past the timeout
	modes := []func(http.ResponseWriter){down, cut, nil, slow, late, cut, nil}
	emitted := map[string][]string{} // room numbers by user
	h := open(t, cfg)
	for round := range rounds {
		if round%10 == 0 {
			r.set(modes[round/10%len(modes)])
		}
		for u := range users {
			user, room := fmt.Sprint("u", u), fmt.Sprint(round)
			emitted[user] = append(emitted[user], room)
			h.Emit(Event{Kind: Join, At: time.Now(), Boot: "b", User: user, Room: room, Connection: "c"})
		}
		if round == rounds/2 { // what waits is sent by the next process
			ctx := canceled()
			if err := h.Close(ctx); err != nil {
				t.Fatal(err)
			}
			h = open(t, cfg)
		}
		time.Sleep(5 * time.Millisecond)
	}
	r.set(nil)
	seen := r.until("every event has come", func(seen []got) bool {
		first := map[string]bool{}
		for _, e := range seen {
			first[e.User+" "+e.Room] = true
		}
		return len(first) == users*rounds
	})
	if err := h.Close(t.Context()); err != nil {
		t.Error(err)
	}
	// Of each user, leaving out what has come before, the events are those that were emitted, in that order.
	came, had := map[string][]string{}, map[string]bool{}
	for _, e := range seen {
		if !had[e.User+" "+e.Room] {
			had[e.User+" "+e.Room] = true
			came[e.User] = append(came[e.User], e.Room)
		}
	}
	for user, want := range emitted {
		if !slices.Equal(came[user], want) {
			t.Errorf("user %s: came %v, emitted %v", user, came[user], want)
		}
	}
	if len(seen) == users*rounds {
		t.Error("nothing came twice: the receiver was never killed in its answer")
	}
	if r.wrong > 0 {
		t.Errorf("%d requests were not signed, or are no JSON", r.wrong)
	}
}

func TestAHookGetsTheEventsAndRoomsThatItAsksFor(t *testing.T) {
	r, all := newReceiver(t), newReceiver(t)
	dir := t.TempDir()
	h := open(t, Config{Dir: dir, File: write(t, dir, entry("all", all.url, "connect, disconnect, join, leave")+
		fmt.Sprintf("- {name: some, url: %q, secret_file: SECRET, events: [join, disconnect], rooms: [lobby, 'game-*']}\n", r.url))})
	emit := func(kind Kind, room string) {
		h.Emit(Event{Kind: kind, At: time.Now(), Boot: "b", User: "u", Room: room, Connection: "c"})
	}
	emit(Connect, "")
	for _, room := range []string{"lobby", "game-7", "other"} {
		emit(Join, room)
		emit(Leave, room)
	}
	emit(Disconnect, "")
	all.until("all events", func(seen []got) bool { return len(seen) == 8 })
	seen := r.until("the last one", func(seen []got) bool { return len(seen) > 0 && seen[len(seen)-1].Event == "disconnect" })
	var list []string
	for _, e := range seen {
		list = append(list, e.Event+" "+e.Room)
	}
	if !slices.Equal(list, []string{"join lobby", "join game-7", "disconnect "}) {
		t.Errorf("got %v", list)
	}
	if e := seen[0]; e.Node != "n" || e.Boot != "b" || !strings.HasPrefix(e.ID, "b-") {
		t.Errorf("%+v", e)
	}
	if err := h.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestAQueueThatIsFullLosesTheOldestAndCountsThem while its receiver takes nothing.
func TestAQueueThatIsFullLosesTheOldestAndCountsThem(t *testing.T) {
	r := newReceiver(t)
	r.set(func(w http.ResponseWriter) { w.WriteHeader(http.StatusInternalServerError) })
	dir, set := t.TempDir(), metrics.NewSet()
	h := open(t, Config{Dir: dir, File: write(t, dir, entry("a", r.url, "join")), QueueBytes: 20_000, Metrics: set})
	for i := range 1000 {
		h.Emit(Event{Kind: Join, At: time.Now(), Boot: "b", User: "u", Room: fmt.Sprint(i), Connection: "c"})
	}
	q := (*h.current.Load())[0].queue
	events := 0
	for deadline, written := time.Now().Add(30*time.Second), uint64(0); written < 1000; time.Sleep(time.Millisecond) {
		if err := q.file.view(func(tx *bbolt.Tx) error {
			b := tx.Bucket(q.name)
			written, events = b.Sequence(), b.Stats().KeyN
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of 1000 are written", written)
		}
	}
	if _, bytes := q.size(); bytes > 20_000 || events < 50 {
		t.Errorf("%d events of %d bytes wait", events, bytes)
	}
	r.mu.Lock()
	r.events = nil
	r.mu.Unlock()
	r.set(nil)
	lost := set.GetOrCreateCounter(`connect_node_hook_lost_total{hook="a"}`)
	taken := set.GetOrCreateCounter(`connect_node_hook_events_total{hook="a"}`)
	seen := r.until("each event has come or is counted as lost", func([]got) bool { return lost.Get()+taken.Get() == 1000 })
	if lost.Get() != uint64(1000-events) || seen[len(seen)-1].Room != "999" {
		t.Errorf("%d are lost, %d waited, the last one is %s", lost.Get(), events, seen[len(seen)-1].Room)
	}
	if err := h.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestFilesAreReadAgainAndAWrongOneChangesNothing(t *testing.T) {
	one, two := newReceiver(t), newReceiver(t)
	dir := t.TempDir()
	cfg := Config{Dir: dir, File: write(t, dir, entry("a", one.url, "join")), ReloadInterval: time.Hour}
	h := open(t, cfg)
	emit := func(room string) {
		h.Emit(Event{Kind: Join, At: time.Now(), Boot: "b", User: "u", Room: room, Connection: "c"})
	}
	has := func(room string) func([]got) bool {
		return func(seen []got) bool { return slices.ContainsFunc(seen, func(e got) bool { return e.Room == room }) }
	}
	reload := func(hooks string) {
		t.Helper()
		write(t, dir, hooks)
		before := h.reloaded[true].Get() + h.reloaded[false].Get()
		h.Reload()
		for deadline := time.Now().Add(30 * time.Second); h.reloaded[true].Get()+h.reloaded[false].Get() == before; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("not read")
			}
		}
	}
	emit("1")
	one.until("the first", has("1"))
	reload("- {name: a}\n")
	if h.reloaded[false].Get() != 1 {
		t.Error("a wrong file was taken over")
	}
	emit("2")
	one.until("the second, by the old file", has("2"))
	reload(entry("a", two.url, "join") + entry("b", one.url, "connect"))
	emit("3")
	two.until("the third, at the new URL", has("3"))
	h.Emit(Event{Kind: Connect, At: time.Now(), User: "u", Connection: "c"})
	one.until("an event of the new hook", func(seen []got) bool { return seen[len(seen)-1].Event == "connect" })
	reload(entry("b", one.url, "connect")) // a is there no more
	emit("4")
	if n := len(*h.current.Load()); n != 1 {
		t.Errorf("%d hooks", n)
	}
	if err := h.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if has("4")(two.seen()) {
		t.Error("a hook that is there no more was told")
	}
}

func TestAFileThatCannotBeMeantIsRefusedByItsField(t *testing.T) {
	for want, text := range map[string]string{
		"holds nothing":  "",
		"version":        "version: 2",
		"field colour":   "version: 1\nhooks: [{name: a, colour: red}]",
		"name":           "version: 1\nhooks: [{name: 'A b'}]",
		"url":            "version: 1\nhooks: [{name: a, url: 'ftp://x'}]",
		"without TLS":    "version: 1\nhooks: [{name: a, url: 'http://a.example/x'}]",
		"secret_file":    "version: 1\nhooks: [{name: a, url: 'https://x'}]",
		"events":         "version: 1\nhooks: [{name: a, url: 'https://x', secret_file: s, events: [jump]}]",
		"rooms":          "version: 1\nhooks: [{name: a, url: 'https://x', secret_file: s, events: [join], rooms: ['*a']}]",
		"more than one":  "version: 1\n---\nversion: 1",
		"hooks[1].name":  "version: 1\nhooks: [{name: a, url: 'https://x', secret_file: s, events: [join]}, {name: a}]",
		"has a user":     "version: 1\nhooks: [{name: a, url: 'https://u:p@x'}]",
		"did not find":   "version: 1\nhooks: [{",
		"more than 2621": strings.Repeat("#", maxFile+1),
	} {
		if _, err := parse([]byte(text), false); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: %v, want something about %q", text, err, want)
		}
	}
	if _, err := parse([]byte("version: 1\nhooks: [{name: a, url: 'http://127.0.0.1:1/x', secret_file: s, events: [join]}]"), false); err != nil {
		t.Error(err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("version: 1\nhooks: [{name: a, url: 'https://x', secret_file: s, events: [join], rooms: [a, 'b*']}]"))
	f.Add([]byte("version: 1\nhooks: [&a {name: a}, *a]"))
	f.Fuzz(func(t *testing.T, text []byte) {
		list, err := parse(text, true)
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("an error of several lines: %q", err)
			}
			return
		}
		for i := range list {
			list[i].wants(&Event{Kind: Join, Room: "r"})
		}
	})
}

func TestADirectoryIsOneProcesses(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Dir: dir, File: write(t, dir, entry("a", "https://127.0.0.1:1/", "join"))}
	h := open(t, cfg)
	cfg.Node = "m"
	if second, err := Open(cfg); err == nil {
		_ = second.Close(t.Context())
		t.Error("two have it")
	}
	if err := h.Close(canceled()); err != nil {
		t.Error(err)
	}
}

// TestAHookThatWasTakenOutWhileNobodyReadTheFileIsForgotten with what waited for it.
func TestAHookThatWasTakenOutWhileNobodyReadTheFileIsForgotten(t *testing.T) {
	r, dir := newReceiver(t), t.TempDir()
	r.set(func(w http.ResponseWriter) { w.WriteHeader(http.StatusInternalServerError) })
	both := entry("a", r.url, "join") + entry("b", r.url, "leave")
	run := func(hooks string, do func(h *Hooks)) {
		t.Helper()
		h := open(t, Config{Dir: dir, File: write(t, dir, hooks)})
		do(h)
		if err := h.Close(canceled()); err != nil {
			t.Error(err)
		}
	}
	run(both, func(h *Hooks) {
		h.Emit(Event{Kind: Join, At: time.Now(), Boot: "b", User: "u", Room: "r", Connection: "c"})
		h.Emit(Event{Kind: Leave, At: time.Now(), Boot: "b", User: "u", Room: "r", Connection: "c"})
	})
	size := func(h *Hooks, name string) int {
		i := slices.IndexFunc(*h.current.Load(), func(s *sender) bool { return s.name == name })
		n, _ := (*h.current.Load())[i].queue.size()
		return n
	}
	run(entry("b", r.url, "leave"), func(h *Hooks) {
		if n := size(h, "b"); n != 1 {
			t.Errorf("%d events wait for the hook that is there still", n)
		}
	})
	run(both, func(h *Hooks) {
		if a, b := size(h, "a"), size(h, "b"); a != 0 || b != 1 {
			t.Errorf("%d events wait for the hook that was taken out, %d for the other one", a, b)
		}
	})
}

// TestADamagedFileOfQueuesIsRefusedInALine and does not bring the gateway down.
func TestADamagedFileOfQueuesIsRefusedInALine(t *testing.T) {
	good := func(t *testing.T) (cfg Config, content []byte) {
		t.Helper()
		dir := t.TempDir()
		cfg = Config{Dir: dir, File: write(t, dir, entry("a", "https://127.0.0.1:1/", "join"))}
		h := open(t, cfg)
		for i := range 3000 { // several pages, and one above them
			h.Emit(Event{Kind: Join, At: time.Now(), Boot: "b", User: fmt.Sprint("user ", i), Room: "r", Connection: "c"})
		}
		if err := h.Close(canceled()); err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(filepath.Join(dir, fileName))
		if err != nil {
			t.Fatal(err)
		}
		return cfg, content
	}
	page := os.Getpagesize()
	for name, damage := range map[string]func(b []byte) []byte{
		"no file of its kind":   func(b []byte) []byte { return []byte(strings.Repeat("x", len(b))) },
		"cut off":               func(b []byte) []byte { return b[:len(b)/2] },
		"cut to two pages":      func(b []byte) []byte { return b[:2*page] },
		"zeros behind the head": func(b []byte) []byte { return append(b[:2*page:2*page], make([]byte, len(b)-2*page)...) },
		"text behind the head":  func(b []byte) []byte { return append(b[:2*page:2*page], strings.Repeat("y", len(b)-2*page)...) },
	} {
		t.Run(name, func(t *testing.T) {
			cfg, content := good(t)
			if err := os.WriteFile(filepath.Join(cfg.Dir, fileName), damage(content), 0o600); err != nil {
				t.Fatal(err)
			}
			h, err := Open(cfg)
			if err == nil {
				_ = h.Close(canceled())
				t.Fatal("it is taken")
			}
			if !strings.Contains(err.Error(), cfg.Dir) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%q", err)
			}
		})
	}
}

// TestAnEventWithoutItsNumberOrTimeIsADamage of the file.
func TestAnEventWithoutItsNumberOrTimeIsADamage(t *testing.T) {
	for key, value := range map[string]string{"short": "a value that is long enough", "8 bytes!": "short"} {
		dir := t.TempDir()
		db, err := bbolt.Open(filepath.Join(dir, fileName), 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		err = db.Update(func(tx *bbolt.Tx) error {
			b, err := tx.CreateBucket([]byte("a"))
			if err != nil {
				return err
			}
			return b.Put([]byte(key), []byte(value))
		})
		if err = errors.Join(err, db.Close()); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(Config{Dir: dir, File: write(t, dir, entry("a", "https://127.0.0.1:1/", "join"))}); err == nil || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("%q: %v", key, err)
		}
	}
}

// TestAFileThatIsDamagedWhileItIsOpenEndsNothing: the gateway goes on, and what is lost is counted.
func TestAFileThatIsDamagedWhileItIsOpenEndsNothing(t *testing.T) {
	r, dir := newReceiver(t), t.TempDir()
	set := metrics.NewSet()
	h := open(t, Config{Dir: dir, File: write(t, dir, entry("a", r.url, "join")), Metrics: set})
	event := Event{Kind: Join, At: time.Now(), Boot: "b", User: "u", Room: "r", Connection: "c"}
	h.Emit(event)
	r.until("it works", func([]got) bool { n, _ := (*h.current.Load())[0].queue.size(); return n == 0 && len(r.seen()) == 1 })
	if err := os.Truncate(filepath.Join(dir, fileName), 0); err != nil { // its pages are mapped
		t.Fatal(err)
	}
	for range 3 {
		h.Emit(event)
	}
	for deadline := time.Now().Add(30 * time.Second); !h.file.broken.Load(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nobody has noticed")
		}
	}
	h.Emit(event)
	if err := os.WriteFile(filepath.Join(dir, "hooks.yaml"), []byte("version: 1\nhooks: []\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.read() // its queue is to be deleted, in the same file
	if err := h.Close(canceled()); err != nil {
		t.Error(err)
	}
	if n := set.GetOrCreateCounter("connect_node_hook_events_dropped_total").Get(); n != 4 {
		t.Errorf("%d events are counted as lost, want 4", n)
	}
}
