package webhook

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

// childEtcd has this binary be an instance that sends until it is killed.
const childEtcd, childURL = "WEBHOOK_TEST_ETCD", "WEBHOOK_TEST_URL"

func TestMain(m *testing.M) {
	if os.Getenv(childEtcd) != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m, goleak.IgnoreCurrent())
}

const testSecret = "0123456789abcdef"

// hmacOf is HMAC-SHA256 as RFC 2104 defines it, without crypto/hmac.
func hmacOf(secret, message []byte) string {
	block := make([]byte, 64)
	if len(secret) > 64 {
		sum := sha256.Sum256(secret)
		secret = sum[:]
	}
	copy(block, secret)
	inner, outer := make([]byte, 0, 64+len(message)), make([]byte, 0, 64+32)
	for _, b := range block {
		inner, outer = append(inner, b^0x36), append(outer, b^0x5c)
	}
	sum := sha256.Sum256(append(inner, message...))
	sum = sha256.Sum256(append(outer, sum[:]...))
	return hex.EncodeToString(sum[:])
}

// check is what a receiver does with the header.
func check(secret []byte, header string, body []byte) error {
	var stamp, signature string
	for part := range strings.SplitSeq(header, ",") {
		key, value, _ := strings.Cut(part, "=")
		switch key {
		case "t":
			stamp = value
		case "v1":
			signature = value
		}
	}
	at, err := strconv.ParseInt(stamp, 10, 64)
	if err != nil || time.Since(time.Unix(at, 0)).Abs() > 5*time.Minute {
		return fmt.Errorf("the time is %q", stamp)
	}
	if hmacOf(secret, append([]byte(stamp+"."), body...)) != signature {
		return errors.New("the signature is another")
	}
	return nil
}

// TestTheSignatureIsTheDocumentedOne, as another language computes it.
func TestTheSignatureIsTheDocumentedOne(t *testing.T) {
	const want = "t=1700000000,v1=09566a85c9317659291342cc081759c7ef9619edcff08fd8373749fd39e4e21d"
	if got := sign([]byte(testSecret), []byte(`{"receipts":[]}`), time.Unix(1_700_000_000, 5)); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// receiver is a server that takes receipts.
type receiver struct {
	*httptest.Server
	t *testing.T

	mu     sync.Mutex
	secret []byte
	answer func(w http.ResponseWriter, r *http.Request) bool // false: it does not take them
	taken  []item
	sizes  []int // of requests that were taken
	failed int
}

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	r := &receiver{t: t, secret: []byte(testSecret)}
	r.Server = httptest.NewServer(r)
	t.Cleanup(r.Close)
	return r
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	body, err := io.ReadAll(request.Body)
	if err != nil {
		return // cut off
	}
	r.mu.Lock()
	answer, secret := r.answer, r.secret
	r.mu.Unlock()
	if err := check(secret, request.Header.Get("Push-Manager-Signature"), body); err != nil {
		r.mu.Lock()
		r.failed++
		r.mu.Unlock()
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	if request.Method != http.MethodPost || request.Header.Get("Content-Type") != "application/json" {
		r.t.Errorf("%s %v", request.Method, request.Header)
	}
	if answer != nil && !answer(w, request) {
		r.mu.Lock()
		r.failed++
		r.mu.Unlock()
		return
	}
	var b batch
	if err := json.Unmarshal(body, &b); err != nil {
		r.t.Errorf("%s: %v", body, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.taken, r.sizes = append(r.taken, b.Receipts...), append(r.sizes, len(b.Receipts))
}

// ids are the message ids that were taken.
func (r *receiver) ids() (ids []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, it := range r.taken {
		m := new(pubsub.PushReceipt)
		if err := protojson.Unmarshal(it.Receipt, m); err != nil {
			r.t.Fatalf("%s: %v", it.Receipt, err)
		}
		ids = append(ids, m.MessageId)
	}
	return ids
}

func (r *receiver) set(answer func(w http.ResponseWriter, r *http.Request) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answer = answer
}

func (r *receiver) refused() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failed
}

func receipt(t testing.TB, id string) []byte {
	t.Helper()
	b, err := proto.Marshal(&pubsub.PushReceipt{MessageId: id, Target: "user:u", Final: true, Summary: &pubsub.DeliverySummary{Delivered: 1}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func numbers(n int) (ids []string) {
	for i := range n {
		ids = append(ids, strconv.Itoa(i))
	}
	return ids
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("not within 1m: %s", what)
		}
		time.Sleep(2 * time.Millisecond) // polling real sockets
	}
}

// hook is a Webhook over a Queue, with short pauses.
type hook struct {
	*Webhook
	queue *Queue
	set   *metrics.Set
}

func start(t *testing.T, url string, change func(*Config)) *hook {
	t.Helper()
	set := metrics.NewSet()
	q := NewQueue(set)
	cfg := Config{
		URL: url, Secret: func() []byte { return []byte(testSecret) }, Source: q, Turns: q, Metrics: set,
		RetryMin: 5 * time.Millisecond, RetryMax: 20 * time.Millisecond,
	}
	if change != nil {
		change(&cfg)
	}
	w, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.stop)
	return &hook{w, q, set}
}

func (h *hook) drain(t *testing.T, within time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	h.Drain(ctx)
}

func TestReceiptsAreSentInOrderInBatches(t *testing.T) {
	r := newReceiver(t)
	h := start(t, r.URL, nil)
	for i, id := range numbers(250) {
		h.queue.Append(fmt.Sprint("shop/caller ", i%2), receipt(t, id))
	}
	h.queue.Append("bad", []byte{0xff})
	h.drain(t, time.Minute)
	if got := r.ids(); !slices.Equal(got, numbers(250)) {
		t.Errorf("got %d: %q", len(got), got)
	}
	if slices.Max(r.sizes) > MaxBatch {
		t.Errorf("batches of %v", r.sizes)
	}
	if r.taken[0].Caller != "shop/caller 0" || r.taken[0].Position != "" {
		t.Errorf("the first is %+v", r.taken[0])
	}
	if h.lost.Get() != 1 || h.sent.Get() != 250 || h.queue.Len() != 0 {
		t.Errorf("%d are lost, %d sent, %d wait", h.lost.Get(), h.sent.Get(), h.queue.Len())
	}
}

// TestAReceiverThatFailsGetsTheSameAgain: whatever it does, nothing is left out, nothing overtakes, and nothing is believed.
func TestAReceiverThatFailsGetsTheSameAgain(t *testing.T) {
	for name, answer := range map[string]func(t *testing.T, w http.ResponseWriter, r *http.Request){
		"500": func(_ *testing.T, w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
		},
		"404":     func(_ *testing.T, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) },
		"hanging": func(_ *testing.T, _ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"redirect": func(_ *testing.T, w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		},
		"cut off": func(_ *testing.T, _ http.ResponseWriter, _ *http.Request) { panic(http.ErrAbortHandler) },
		"huge headers": func(_ *testing.T, w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 1<<20))
			w.WriteHeader(http.StatusOK)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newReceiver(t)
			var elsewhere atomic.Int64
			r.set(func(w http.ResponseWriter, request *http.Request) bool {
				if request.URL.Path == "/elsewhere" {
					elsewhere.Add(1)
				}
				r.mu.Lock()
				again := r.failed < 3
				if again && name == "cut off" {
					r.failed++
				}
				r.mu.Unlock()
				if again {
					answer(t, w, request)
				}
				return !again
			})
			h := start(t, r.URL, func(c *Config) { c.Timeout = 200 * time.Millisecond })
			for _, id := range numbers(10) {
				h.queue.Append("a", receipt(t, id))
			}
			eventually(t, "all are taken", func() bool { return h.queue.Len() == 0 })
			h.queue.Append("a", receipt(t, "10"))
			h.drain(t, time.Minute)
			if got := slices.Compact(r.ids()); !slices.Equal(got, numbers(11)) {
				t.Errorf("got %q", got)
			}
			if h.failed.Get() < 3 || h.lost.Get() != 0 || elsewhere.Load() != 0 || h.failures.Load() != 0 {
				t.Errorf("%d requests failed, %d receipts lost, %d redirects followed, %d failures now", h.failed.Get(), h.lost.Get(), elsewhere.Load(), h.failures.Load())
			}
		})
	}
}

// TestAnAnswerIsReadNoFurtherThanItsBound though it never ends, and the status counts.
func TestAnAnswerIsReadNoFurtherThanItsBound(t *testing.T) {
	r := newReceiver(t)
	var written atomic.Int64
	r.set(func(w http.ResponseWriter, request *http.Request) bool {
		w.WriteHeader(http.StatusOK)
		for request.Context().Err() == nil && written.Load() < 1<<30 {
			n, err := w.Write(make([]byte, 64<<10))
			written.Add(int64(n))
			if err != nil {
				break
			}
		}
		return true
	})
	h := start(t, r.URL, nil)
	h.queue.Append("a", receipt(t, "0"))
	eventually(t, "it is taken", func() bool { return h.queue.Len() == 0 })
	h.drain(t, time.Minute)
	if h.ok.Get() != 1 || written.Load() >= 1<<30 {
		t.Errorf("%d taken, %d bytes written", h.ok.Get(), written.Load())
	}
}

func TestASlowReceiverHoldsNobodyUp(t *testing.T) {
	r := newReceiver(t)
	release := make(chan struct{})
	r.set(func(_ http.ResponseWriter, request *http.Request) bool {
		select {
		case <-release:
		case <-request.Context().Done():
		}
		return true
	})
	h := start(t, r.URL, nil)
	h.queue.Append("a", receipt(t, "0"))
	eventually(t, "it is under way", func() bool { return h.turn.Load() })
	for _, id := range numbers(20_000)[1:] {
		h.queue.Append("a", receipt(t, id)) // it returns, or the test does not
	}
	close(release)
	h.drain(t, time.Minute)
	if got := r.ids(); !slices.Equal(got, numbers(20_000)) {
		t.Errorf("got %d", len(got))
	}
}

// TestADrainEndsThoughTheReceiverIsAway.
func TestADrainEndsThoughTheReceiverIsAway(t *testing.T) {
	r := newReceiver(t)
	r.Close()
	h := start(t, r.URL, func(c *Config) { c.RetryMin, c.RetryMax = time.Hour, time.Hour })
	h.queue.Append("a", receipt(t, "0"))
	eventually(t, "one has failed", func() bool { return h.failed.Get() == 1 })
	h.drain(t, 50*time.Millisecond)
	if h.queue.Len() != 1 {
		t.Errorf("%d wait", h.queue.Len())
	}
}

func TestTheSecretIsTakenOverWhileItChanges(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, bad := range []string{"", "short\n", strings.Repeat("x", maxSecret+1)} {
		write(bad)
		if CheckSecret(file) == nil {
			t.Errorf("%d bytes are a secret", len(bad))
		}
	}
	if _, err := OpenSecret(SecretConfig{File: file + "x"}); err == nil {
		t.Error("no file is a secret")
	}
	write(testSecret + "\r\n")
	set := metrics.NewSet()
	s, err := OpenSecret(SecretConfig{File: file, ReloadInterval: time.Millisecond, Metrics: set})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r := newReceiver(t)
	h := start(t, r.URL, func(c *Config) { c.Secret = s.Current })
	h.queue.Append("a", receipt(t, "0"))
	eventually(t, "the first is taken", func() bool { return len(r.ids()) == 1 })
	write("short")
	eventually(t, "it is read", func() bool { return s.failed.Get() > 0 })
	if string(s.Current()) != testSecret {
		t.Errorf("taken over: %q", s.Current())
	}
	// The receiver knows the next one only: what is under way fails until it is taken over.
	const next = "another secret of 26 bytes"
	r.mu.Lock()
	r.secret = []byte(next)
	r.mu.Unlock()
	h.queue.Append("a", receipt(t, "1"))
	eventually(t, "it is refused", func() bool { return r.refused() > 0 })
	write(next)
	s.Reload()
	h.drain(t, time.Minute)
	if got := r.ids(); !slices.Equal(got, numbers(2)) {
		t.Errorf("got %q", got)
	}
}

func TestTheQueueDropsTheOldestAndTellsHowMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := NewQueue(metrics.NewSet())
		for range queueLen + 5 {
			q.Append("a", []byte("x"))
		}
		page, _ := q.Read(t.Context(), Position{}, 10, 1<<20)
		if q.Len() != queueLen || page.Missed != 5 || page.Last.Seq != 15 || len(page.Receipts) != 10 {
			t.Errorf("%d wait, %d missed, up to %v", q.Len(), page.Missed, page.Last)
		}
		if page, _ = q.Read(t.Context(), Position{Seq: 5}, 10, 2); len(page.Receipts) != 3 || page.Missed != 0 {
			t.Errorf("%d of 3 bytes, %d missed", len(page.Receipts), page.Missed)
		}
		time.Sleep(queueAge + time.Second)
		q.Append("a", []byte("y"))
		page, _ = q.Read(t.Context(), Position{Seq: 5}, 10, 1<<20)
		if page.Missed != queueLen || len(page.Receipts) != 1 || page.Last.Seq != queueLen+6 {
			t.Errorf("a day later: %d missed, %d left, up to %v", page.Missed, len(page.Receipts), page.Last)
		}
		for range 100 {
			q.Append("a", make([]byte, 1<<20))
		}
		if q.bytes > queueBytes || q.Len() > 64 {
			t.Errorf("%d bytes, %d", q.bytes, q.Len())
		}
	})
}

// counted is a Source with the receipts 0 to n-1.
type counted struct {
	n    uint64
	pace time.Duration // for each read
}

func (c counted) Head(context.Context) (Position, error) { return Position{Epoch: 1}, nil }

func (c counted) Read(_ context.Context, after Position, _, _ int) (p Page, err error) {
	time.Sleep(c.pace)
	p.Last = after
	for range 10 {
		if p.Last.Seq < c.n {
			b, err := proto.Marshal(&pubsub.PushReceipt{MessageId: strconv.FormatUint(p.Last.Seq, 10)})
			if err != nil {
				return p, err
			}
			p.Last.Seq++
			p.Receipts = append(p.Receipts, Receipt{Position: p.Last.String(), Sender: "a", Content: b})
		}
	}
	return p, nil
}

// child sends until it is killed.
func child() {
	client := must(newClientOf(os.Getenv(childEtcd)))
	must(Start(Config{
		URL: os.Getenv(childURL), Secret: func() []byte { return []byte(testSecret) }, Source: counted{1 << 40, 5 * time.Millisecond},
		Turns: &EtcdTurns{Client: client, Prefix: "/hook", Name: "child", TTL: 5 * time.Second, RequestTimeout: 20 * time.Second}, Shared: true,
	}))
	select {}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestAnotherInstanceGoesOnWhereAKilledOneWas: one of them sends at a time, and nothing is left out.
func TestAnotherInstanceGoesOnWhereAKilledOneWas(t *testing.T) {
	etcd := etcdtest.Start(t)
	r := newReceiver(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEtcd+"="+etcd.Endpoint(), childURL+"="+r.URL)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	killed := false
	kill := func() {
		if !killed {
			killed = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	defer kill()
	eventually(t, "the first sends", func() bool { return len(r.ids()) > 50 })
	h := start(t, r.URL, func(c *Config) {
		c.Source, c.Shared = counted{n: 1 << 40, pace: time.Millisecond}, true
		c.Turns = &EtcdTurns{Client: etcd.Client(), Prefix: "/hook", Name: "test", TTL: 5 * time.Second, RequestTimeout: 20 * time.Second}
	})
	more := len(r.ids()) + 500
	eventually(t, "the first goes on", func() bool { return len(r.ids()) > more })
	if h.ok.Get()+h.failed.Get() != 0 || h.turn.Load() {
		t.Error("the second sends, too")
	}
	kill()
	eventually(t, "the second goes on", func() bool { return h.sent.Get() > 500 })
	h.drain(t, time.Minute)
	got, next, again := r.ids(), 0, 0
	for _, id := range got {
		n := must(strconv.Atoi(id))
		if n > next {
			t.Fatalf("%d follows %d", n, next-1)
		}
		if n < next { // the seam
			again++
		}
		next = n + 1
	}
	if again > 1 {
		t.Errorf("it went back %d times", again)
	}
	// Who has ended gives the turn back at once.
	got2, err := etcd.Client().Get(t.Context(), "/hook/turn")
	if err != nil || len(got2.Kvs) != 0 {
		t.Errorf("the turn: %v, %v", got2, err)
	}
}

// TestATurnEndsWhileEtcdIsAway: then nothing is sent, and afterwards it goes on.
func TestATurnEndsWhileEtcdIsAway(t *testing.T) {
	etcd := etcdtest.Start(t)
	turns := &EtcdTurns{Client: etcd.Client(), Prefix: "/hook", Name: "test", TTL: 5 * time.Second, RequestTimeout: 20 * time.Second}
	turn := must(turns.Next(t.Context()))
	if err := turn.Keep(t.Context(), Position{Epoch: 7, Seq: 9}); err != nil {
		t.Fatal(err)
	}
	etcd.Stop()
	eventually(t, "the turn ends", func() bool {
		select {
		case <-turn.Over():
			return true
		default:
			return false
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	if _, err := turns.Next(ctx); err == nil {
		t.Error("a turn without etcd")
	}
	turn.End(ctx)
	cancel()
	etcd.Restart()
	var next Turn
	eventually(t, "another turn", func() bool {
		var err error
		next, err = turns.Next(t.Context())
		return err == nil
	})
	p, known, err := next.Position(t.Context())
	if err != nil || !known || p != (Position{Epoch: 7, Seq: 9}) {
		t.Errorf("the position is %v, %v, %v", p, known, err)
	}
	if err := turn.Keep(t.Context(), Position{Epoch: 7, Seq: 1}); !errors.Is(err, errTurnOver) {
		t.Errorf("who has lost the turn keeps a position: %v", err)
	}
	next.End(t.Context())
}

func FuzzParsePosition(f *testing.F) {
	f.Add("7.9")
	f.Fuzz(func(t *testing.T, text string) {
		if p, ok := parsePosition(text); ok {
			if again, ok := parsePosition(p.String()); !ok || again != p {
				t.Errorf("%q is %v, again %v", text, p, again)
			}
		}
	})
}

func newClientOf(endpoint string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, DialTimeout: 10 * time.Second, Logger: zap.NewNop()})
}
