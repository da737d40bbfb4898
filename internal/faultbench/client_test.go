package faultbench

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lxzan/gws"

	sdk "github.com/push-manager/push-manager/client"
	"github.com/push-manager/push-manager/internal/devstack"
	"github.com/push-manager/push-manager/internal/freeport"
)

// What the callers of the Go client do. 100,000 pushes with LONG.
const (
	clientUsers   = 400 // so many that a connection remembers all ids while a push is repeated
	clientTimeout = 8 * time.Second
)

// TestNoPushOfTheGoClientArrivesTwice: package client pushes through proxies to Push-Managers that are overloaded, tell their connections to
// go, are killed, restarted and cut off in the middle of answers. Whatever is repeated was refused with an ErrorInfo or has a message id; no
// connection gets a push twice; and what callers are told is what has happened.
func TestNoPushOfTheGoClientArrivesTwice(t *testing.T) {
	slow(t)
	t.Parallel()
	seed := seedOf(t)
	inbox := newInboxes()
	managers := startForClients(t, inbox)
	addresses := make([]string, len(managers))
	for i, m := range managers {
		addresses[i] = m.proxy.addr()
	}
	var repeats, unsafe atomic.Int64
	c, err := sdk.New(strings.Join(addresses, ","), sdk.WithTimeout(clientTimeout), sdk.WithRetries(sdk.Retries{Burst: 100_000}),
		sdk.WithRetryHook(func(_ context.Context, r sdk.Retry) {
			repeats.Add(1)
			if r.Err.Reason == "" && r.MessageID == "" {
				unsafe.Add(1)
			}
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	stream := c.Stream(sdk.StreamConfig{MaxOpen: 128, Lanes: 2})

	stop := make(chan struct{})
	var faults sync.WaitGroup
	faults.Go(func() { harm(managers, rand.New(rand.NewPCG(seed, 1)), stop, t.Logf) })

	total := int64(long(1_500, 100_000))
	book := newAnswers()
	var next atomic.Int64
	var calling sync.WaitGroup
	for i := range long(24, 96) {
		calling.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(i)+2))
			for n := next.Add(1); n <= total; n = next.Add(1) {
				id := "c-" + strconv.FormatInt(n, 10)
				to := sdk.User(clientUser(r.IntN(clientUsers)))
				var options []sdk.PushOption
				named := r.IntN(2) == 0
				if named {
					options = append(options, sdk.MessageID(id))
				}
				var result sdk.Result
				var err error
				ctx, cancel := context.WithTimeout(context.Background(), clientTimeout)
				if i%2 == 0 {
					result, err = c.Push(ctx, to, sdk.Text(id), options...)
				} else {
					result, err = stream.Push(ctx, to, sdk.Text(id), options...)
				}
				cancel()
				book.add(id, named, &result, err)
				wait(pace)
			}
		})
	}
	calling.Wait()
	close(stop)
	faults.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := stream.Close(ctx); err != nil {
		t.Error(err)
	}

	// What was delivered may be on its way still.
	eventually(t, "what was delivered arrives", func() error { return book.missing(inbox.counts()) })
	wait(time.Second) // so may be what must not come
	counts := inbox.counts()
	twice, lies := 0, 0
	for id, n := range counts {
		if n > 1 {
			if twice++; twice <= 5 {
				t.Errorf("%s arrived %d times; it was %s", id, n, book.of(id))
			}
		}
	}
	for id := range book.absent() {
		if counts[id] > 0 {
			if lies++; lies <= 5 {
				t.Errorf("%s arrived, and its caller was told that it did not: %s", id, book.of(id))
			}
		}
	}
	t.Logf("%d pushes: %v; %d repeats, %d of them without ErrorInfo or id; %d arrived twice", total, book, repeats.Load(), unsafe.Load(), twice)
	if unsafe.Load() > 0 {
		t.Errorf("%d were repeated without ErrorInfo or message id", unsafe.Load())
	}
	if repeats.Load() == 0 || book.n("delivered") == 0 {
		t.Error("nothing was repeated, or nothing delivered: this test has shown nothing")
	}
}

func clientUser(i int) string { return "u" + strconv.Itoa(i) }

// behind is a Push-Manager process behind a proxy.
type behind struct {
	*process
	t       testing.TB
	id      string
	env     []string
	metrics string
	proxy   *proxy
}

func (m *behind) boot() { m.process = run(m.t, m.id, exec.Command(pushManager(m.t)), m.env) }

// startForClients starts etcd, a Controller, two gateways with their clients, and three Push-Managers.
func startForClients(t *testing.T, inbox *inboxes) []*behind {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stack, err := devstack.Start(ctx, devstack.Config{Nodes: 2, Store: "off"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := stack.Drain(ctx); err != nil {
			t.Error(err)
		}
	})
	if err := stack.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	nodes := stack.Nodes()
	t.Cleanup(inbox.close)
	for i := range clientUsers {
		if err := inbox.open(nodes[i%len(nodes)].WebSocket(), clientUser(i)); err != nil {
			t.Fatal(err)
		}
	}
	managers := make([]*behind, 3)
	for i := range managers {
		p := freeport.Take(t, 2)
		m := &behind{t: t, id: "pm-" + strconv.Itoa(i), metrics: "http://127.0.0.1:" + p[1], proxy: newProxy(t, "127.0.0.1:"+p[0])}
		m.env = []string{
			"LOOKUP_TIMEOUT=2s", "LINK_ACK_TIMEOUT=4s", "LINK_QUEUE_AGE=4s", "LINK_SILENCE=15s", "SHARDS=1", "MANAGER_ID=" + m.id,
			"GRPC_PORT=" + p[0], "HTTP_PORT=0", "METRICS_PORT=" + p[1], "CONTROLLER_ADDRESS=" + stack.ControllerAddress(), "ETCD_ENDPOINTS=" + stack.EtcdEndpoint(),
			"MAX_IN_FLIGHT=8", // refusals with RetryInfo
			"API_CONNECTION_AGE=3s", "DRAIN_NOTICE=0s",
		}
		m.boot()
		managers[i] = m
	}
	for _, m := range managers {
		eventually(t, m.id+" is ready", func() error {
			code, body, err := get(m.metrics + "/readyz")
			if err == nil && code != 200 {
				err = errors.New(body)
			}
			return err
		})
	}
	return managers
}

// harm does something to one of the Push-Managers every now and then, and leaves all well.
func harm(managers []*behind, r *rand.Rand, stop <-chan struct{}, logf func(string, ...any)) {
	done := map[string]int{}
	down := map[*behind]time.Time{}
	pause := func(d time.Duration) {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-stop:
		}
	}
	for {
		select {
		case <-stop:
			for _, m := range managers {
				m.proxy.heal()
			}
			logf("faults: %v", done)
			return
		default:
		}
		m := managers[r.IntN(len(managers))]
		for m, since := range down {
			if time.Since(since) > time.Second {
				delete(down, m)
				m.boot()
			}
		}
		what := [...]string{"cut", "reset", "delay", "hold", "mid-answer", "refuse", "kill", "drain"}[r.IntN(8)]
		if _, is := down[m]; is || (what == "kill" || what == "drain") && len(down) > 0 {
			what = "cut"
		}
		done[what]++
		switch what {
		case "cut":
			m.proxy.cut()
		case "reset":
			m.proxy.reset()
		case "delay":
			m.proxy.set(replies, toxic{delay: 30 * time.Millisecond, jitter: 30 * time.Millisecond})
			pause(300 * time.Millisecond)
		case "hold":
			m.proxy.set(replies, toxic{hold: true})
			pause(200 * time.Millisecond)
			m.proxy.cut()
		case "mid-answer": // what has been asked is done, and a part of the answers comes
			m.proxy.set(replies, toxic{slice: 7, rate: 2000})
			pause(100 * time.Millisecond)
			m.proxy.reset()
		case "refuse":
			m.proxy.refuse(true)
			m.proxy.cut()
			pause(200 * time.Millisecond)
		case "kill":
			m.kill()
			down[m] = time.Now()
		case "drain":
			m.signal(syscall.SIGTERM)
			<-m.done
			down[m] = time.Now()
		}
		m.proxy.heal()
		pause(time.Duration(r.IntN(400)) * time.Millisecond)
	}
}

// inboxes are WebSocket clients that count what they get.
type inboxes struct {
	gws.BuiltinEventHandler

	readers sync.WaitGroup

	mu    sync.Mutex
	conns []*gws.Conn
	got   map[string]int // each user has one connection
}

func newInboxes() *inboxes { return &inboxes{got: map[string]int{}} }

func (in *inboxes) open(address, user string) error {
	ws, resp, err := gws.NewClient(in, &gws.ClientOption{Addr: address + "?user_id=" + user, HandshakeTimeout: patience})
	if resp != nil && resp.Body != nil {
		_ = resp.Body.Close()
	}
	if err != nil {
		return err
	}
	in.conns = append(in.conns, ws)
	in.readers.Go(ws.ReadLoop)
	return nil
}

func (in *inboxes) close() {
	for _, ws := range in.conns {
		_ = ws.NetConn().Close()
	}
	in.readers.Wait()
}

// OnPing implements gws.Event.
func (in *inboxes) OnPing(ws *gws.Conn, payload []byte) { _ = ws.WritePong(payload) }

// OnMessage implements gws.Event.
func (in *inboxes) OnMessage(_ *gws.Conn, message *gws.Message) {
	defer func() { _ = message.Close() }()
	var m struct {
		Type string `json:"type"`
		Data struct {
			Content string `json:"content"`
		} `json:"data"`
	}
	if json.Unmarshal(message.Bytes(), &m) != nil || m.Type != "text" {
		return
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.got[m.Data.Content]++
}

func (in *inboxes) counts() map[string]int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return maps.Clone(in.got)
}

// answers are what callers were told.
type answers struct {
	mu   sync.Mutex
	told map[string]string // by push
	all  map[string]int
	no   map[string]bool // they were told that it did not arrive
}

func newAnswers() *answers {
	return &answers{told: map[string]string{}, all: map[string]int{}, no: map[string]bool{}}
}

func (o *answers) add(id string, named bool, r *sdk.Result, err error) {
	what := r.Outcome().String()
	absent := err == nil && r.Unknown == 0 && r.Delivered == 0
	if failed, is := errors.AsType[*sdk.Error](err); is {
		what, absent = "error: unknown", failed.NotSent
		if failed.NotSent {
			what = "error: not sent " + cmp.Or(failed.Reason, failed.Code.String())
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.all[what]++
	if o.told[id] = what; err != nil {
		o.told[id] = err.Error()
	}
	// A push that failed by its last try may have arrived by one before it, if there was one: it has an id.
	if absent && !(named && err == nil) {
		o.no[id] = true
	}
}

func (o *answers) n(what string) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.all[what]
}

func (o *answers) of(id string) string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.told[id]
}

func (o *answers) absent() map[string]bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return maps.Clone(o.no)
}

// missing is an error while something that was delivered has not arrived.
func (o *answers) missing(got map[string]int) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	missing, one := 0, ""
	for id, what := range o.told {
		if what == "delivered" && got[id] == 0 {
			missing, one = missing+1, id
		}
	}
	if missing > 0 {
		return fmt.Errorf("%d are missing, among them %s", missing, one)
	}
	return nil
}

// String is the number of each outcome.
func (o *answers) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return fmt.Sprint(o.all)
}
