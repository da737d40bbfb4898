package faultbench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

// bench is a deployment that can be broken in all its parts. Its end holds the two
// ledgers against each other.
type bench struct {
	t          testing.TB
	seed       uint64
	ledger     *ledger
	world      *world
	etcd       *etcdtest.Server
	client     *clientv3.Client
	controller *controller
	children   []*child
	program    string // path of the push-manager that is started next, "" for ours
	unwatch    func() // ends the watch of the machine and waits for its end
}

// slackForCI is what a loaded machine may take beyond a deadline. The real figure is
// printed.
const slackForCI = 3 * time.Second

func newBench(t testing.TB) *bench {
	t.Helper()
	return newBenchOf(t, etcdtest.Start(t))
}

func newBenchOf(t testing.TB, etcd *etcdtest.Server) *bench {
	t.Helper()
	b := &bench{t: t, seed: seedOf(t), ledger: newLedger(), world: newWorld(), etcd: etcd, unwatch: func() {}}
	b.watch(starved)
	t.Cleanup(func() { b.unwatch() })
	b.client = b.etcd.Client()
	b.controller = newController(t, b.world)
	t.Cleanup(b.finish) // before the parts end
	return b
}

// watch notes from now on when the machine lets nobody run for longer than is tolerated. It
// takes the place of the watch before: what two of them see would count twice.
func (b *bench) watch(tolerated time.Duration) {
	b.unwatch()
	stop := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() { b.ledger.watchMachine(stop, tolerated) })
	b.unwatch = func() { close(stop); watching.Wait() }
}

// seedOf is the seed of a run: SEED, or one of its own.
func seedOf(t testing.TB) uint64 {
	t.Helper()
	seed := rand.Uint64() % 1_000_000
	if text := os.Getenv("SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("SEED: %v", err)
		}
	}
	t.Logf("SEED=%d", seed)
	return seed
}

// finish checks the ledgers. A test may call it itself, before it says more.
func (b *bench) finish() {
	b.t.Helper()
	b.flush()
	found := b.ledger.check(slackForCI)
	for i, v := range found {
		if i == 5 {
			b.t.Errorf("and %d more", len(found)-i)
			break
		}
		b.t.Errorf("%s is broken: %s\n%s\n%s", v.rule, v.text, v.push, b.ledger.history(v.push))
	}
	all := b.ledger.tally(0, b.ledger.now(), nil)
	b.t.Logf("in all: %v; latest answer %v after its deadline", all, max(all.overrun, 0).Round(time.Millisecond))
}

// flush waits until all that has arrived so far stands in the ledger.
func (b *bench) flush() {
	for _, c := range b.children {
		c.cont()
		c.flush()
	}
}

// wire starts a scripted node with users and registers it.
func (b *bench) wire(id string, users ...string) *wireNode {
	b.t.Helper()
	n := newWireNode(b.t, b.ledger, id, wireConfig{})
	b.register(id, n.address)
	b.connect(n, users...)
	return n
}

// connect makes users connected to a scripted node, for the Controller as well.
func (b *bench) connect(n *wireNode, users ...string) {
	for _, user := range users {
		n.users.connect(user)
	}
	b.world.place(n.id, users...)
}

// child starts a real node as a process with users and registers it.
func (b *bench) child(id string, users ...string) *child {
	b.t.Helper()
	c := newChild(b.t, b.ledger, id, freeport.Addr(b.t), "")
	b.children = append(b.children, c)
	b.register(id, c.address)
	c.connect(users...)
	b.world.place(id, users...)
	return c
}

const nodeKeys = "/services/connect-node/"

// register writes a node's key as the contract has it.
func (b *bench) register(id, addr string) { b.put(nodeKeys+id, value(b.t, id, addr)) }

func value(t testing.TB, id, addr string) string {
	t.Helper()
	v, err := json.Marshal(map[string]any{"Op": 0, "Addr": addr, "Metadata": map[string]string{"node_id": id}})
	if err != nil {
		t.Fatal(err)
	}
	return string(v)
}

func (b *bench) put(key, value string, options ...clientv3.OpOption) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := b.client.Put(ctx, key, value, options...); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) remove(key string, options ...clientv3.OpOption) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := b.client.Delete(ctx, key, options...); err != nil {
		b.t.Fatal(err)
	}
}

// manager is a Push-Manager process and a Biz-Server's connection to it.
type manager struct {
	*process
	pubsub.PushManagerServiceClient
	b        *bench
	id       string
	api      string
	metrics  string // the HTTP side
	env      []string
	streams  atomic.Int64       // PushStreams that callers have opened
	baseline map[string]float64 // see rest
}

// manage starts a Push-Manager that knows the nodes so far, and waits until it is
// connected to them.
func (b *bench) manage(nodes int, env ...string) *manager {
	b.t.Helper()
	m := b.launch("pm-1", env...)
	m.reaches(nodes)
	return m
}

// launch starts a Push-Manager and waits until it is ready.
func (b *bench) launch(id string, env ...string) *manager {
	b.t.Helper()
	p := freeport.Take(b.t, 2)
	m := &manager{b: b, id: id, metrics: "http://127.0.0.1:" + p[1], api: "127.0.0.1:" + p[0]}
	m.env = append([]string{
		// On a loaded machine our own nodes and Controllers are late, too. Where that is
		// not the fault in question, it must not look like one.
		"LOOKUP_TIMEOUT=2s", "LINK_ACK_TIMEOUT=4s", "LINK_QUEUE_AGE=4s", "LINK_SILENCE=15s",
		"MANAGER_ID=" + id, "GRPC_PORT=" + p[0], "HTTP_PORT=0", "METRICS_PORT=" + p[1], "SHARDS=2",
		"CONTROLLER_ADDRESS=" + b.controller.address, "ETCD_ENDPOINTS=" + b.etcd.Endpoint(),
	}, env...)
	m.boot()
	m.PushManagerServiceClient = m.dial()
	m.ready()
	return m
}

// redial is how soon a caller connects again. gRPC's own pauses grow to seconds, in which a
// caller fails by itself although its Push-Manager is back.
const redial = 20 * time.Millisecond

// dial is a connection of its own, as each Biz-Server has: the calls under way on one
// are bounded.
func (m *manager) dial() pubsub.PushManagerServiceClient {
	m.b.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+m.api, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: redial, Multiplier: 1, MaxDelay: redial}, MinConnectTimeout: 20 * time.Second}))
	if err != nil {
		m.b.t.Fatal(err)
	}
	m.b.t.Cleanup(func() { _ = conn.Close() })
	return pubsub.NewPushManagerServiceClient(conn)
}

// prompt are the defaults of what tells a node that does not work, for the tests
// that are about that.
func prompt(env ...string) []string {
	return append([]string{"LINK_ACK_TIMEOUT=1s", "LINK_QUEUE_AGE=1s", "LINK_SILENCE=3s"}, env...)
}

// lenient are settings that grant a loaded machine all it may take, for callers who ask
// patiently.
func lenient(env ...string) []string {
	return append([]string{"PUSH_TIMEOUT=30s", "LINK_ACK_TIMEOUT=30s", "LINK_QUEUE_AGE=30s", "LINK_SILENCE=1m", "LOOKUP_TIMEOUT=10s"}, env...)
}

// binary is the push-manager that is started next.
func (b *bench) binary() string {
	b.t.Helper()
	if b.program != "" {
		return b.program
	}
	return pushManager(b.t)
}

// boot starts the process, for the first time or again.
func (m *manager) boot() {
	m.process = run(m.b.t, m.id, exec.Command(m.b.binary()), m.env)
}

func (m *manager) ready() {
	m.b.t.Helper()
	ready(m.b.t, m.id, m.metrics)
}

// ready waits until a program says that it is.
func ready(t testing.TB, id, metrics string) {
	t.Helper()
	eventually(t, id+" is ready", func() error {
		code, body, err := get(metrics + "/readyz")
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("%d %s", code, body)
		}
		return err
	})
}

// reaches waits until the manager is connected to n nodes on all its shards.
func (m *manager) reaches(n int) time.Duration {
	m.b.t.Helper()
	return eventually(m.b.t, "links to the nodes", func() error {
		values, err := m.read()
		if err != nil {
			return err
		}
		up := 0
		for name, v := range values {
			if strings.HasPrefix(name, "push_manager_node_connections{") && v >= 2 {
				up++
			}
		}
		if up != n {
			return fmt.Errorf("%d of %d nodes are connected", up, n)
		}
		return nil
	})
}

// connections is the number of links to a node that are up, -1 if it is not known.
func (m *manager) connections(node string) int {
	values, err := m.read()
	if v, ok := values["push_manager_node_connections{node_id="+strconv.Quote(node)+"}"]; ok && err == nil {
		return int(v)
	}
	return -1
}

// metric reads one metric.
func (m *manager) metric(name string) float64 {
	m.b.t.Helper()
	values, err := m.read()
	if err != nil {
		m.b.t.Fatal(err)
	}
	v, ok := values["push_manager_"+name]
	if !ok {
		m.b.t.Fatalf("there is no metric push_manager_%s", name)
	}
	return v
}

// until waits for a condition on one metric.
func (m *manager) until(name string, ok func(float64) bool) time.Duration {
	m.b.t.Helper()
	return eventually(m.b.t, name, func() error {
		if v := m.metric(name); !ok(v) {
			return fmt.Errorf("it is %v", v)
		}
		return nil
	})
}

// read returns the manager's metrics by name with labels.
func (m *manager) read() (map[string]float64, error) { return readMetrics(m.metrics) }

// readMetrics reads all metrics of a program.
func readMetrics(at string) (map[string]float64, error) {
	_, body, err := get(at + "/metrics")
	if err != nil {
		return nil, err
	}
	values := make(map[string]float64)
	for line := range strings.Lines(body) {
		line = strings.TrimSpace(line)
		at := strings.LastIndexByte(line, ' ') // labels may have spaces
		if at < 0 || line[0] == '#' {
			continue
		}
		if v, err := strconv.ParseFloat(line[at+1:], 64); err == nil {
			values[line[:at]] = v
		}
	}
	return values, nil
}

var httpClient = &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}

func get(url string) (int, string, error) {
	resp, err := httpClient.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

// request is what a caller asks for.
type request struct {
	kind     kind
	key      string
	users    []string
	deadline time.Duration       // 0: none
	size     int                 // of the payload, 0: as small as can be
	priority string              // "": none is claimed
	patient  bool                // the manager's own deadline is not before this one
	options  *pubsub.PushOptions // nil: none. Without a message id the push's own is taken
	again    *push               // the try before: the message is the same
	content  string              // in place of the id
}

func user(id string) request { return request{kind: toUser, key: id, deadline: 4 * time.Second} }
func room(id string) request { return request{kind: toRoom, key: id, deadline: 4 * time.Second} }
func everybody() request     { return request{kind: toAll, deadline: 4 * time.Second} }

// patiently asks for the same with time for a machine that has other work: what is in
// question is whether it is served, and not whether this machine is fast. It is for a
// Push-Manager that grants as much: PUSH_TIMEOUT=30s, as lenient has it.
func patiently(r request) request {
	r.deadline, r.patient = 30*time.Second, true
	return r
}

// defaultDeadline is what a call without one gets.
const defaultDeadline = 5 * time.Second

// push asks and waits for the answer.
func (m *manager) push(r request) *push { return m.ask(context.Background(), m, r) }

// ask pushes through one connection.
func (m *manager) ask(ctx context.Context, api pubsub.PushManagerServiceClient, r request) *push {
	p := &push{kind: r.kind, key: r.key, users: r.users, options: r.options, manager: m.id, limit: defaultDeadline}
	if r.again != nil {
		p.id = r.again.id
	}
	if r.deadline > 0 {
		p.limit = min(p.limit, r.deadline)
		if r.patient {
			p.limit = r.deadline
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, r.deadline)
		defer cancel()
	}
	if r.priority != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "x-priority", r.priority)
	}
	m.b.ledger.begin(p)
	content := &pubsub.MessageContent{Data: payload(p.id, r.size)}
	if r.content != "" {
		content.Data = []byte(r.content)
	}
	var success bool
	var s *pubsub.DeliverySummary
	var err error
	switch r.kind {
	case toUser:
		var reply *pubsub.PushToUserResponse
		reply, err = api.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: r.key, Content: content, Options: p.options})
		success, s, p.message = reply.GetSuccess(), reply.GetSummary(), reply.GetMessage()
	case toUsers:
		var reply *pubsub.PushToUsersResponse
		reply, err = api.PushToUsers(ctx, &pubsub.PushToUsersRequest{UserIds: r.users, Content: content, Options: p.options})
		success, s = reply.GetSuccess(), reply.GetSummary()
	case toRoom:
		var reply *pubsub.PushToRoomResponse
		reply, err = api.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: r.key, Content: content, Options: p.options})
		success, s, p.message = reply.GetSuccess(), reply.GetSummary(), reply.GetMessage()
	case toAll:
		var reply *pubsub.BroadcastMessageResponse
		reply, err = api.BroadcastMessage(ctx, &pubsub.BroadcastMessageRequest{Content: content, Options: p.options})
		success, s = reply.GetSuccess(), reply.GetSummary()
	}
	m.b.ledger.answer(p, success, s, err)
	return p
}

// load pushes from many callers at once, each one after the other, until it is
// stopped.
type load struct {
	m    *manager
	apis []pubsub.PushManagerServiceClient
	done atomic.Int64 // pushes answered
	stop chan struct{}
	wg   sync.WaitGroup
}

// callers starts n of them; each asks for what next says.
func (m *manager) callers(n int, next func(r *rand.Rand) request) *load {
	l := &load{m: m, stop: make(chan struct{})}
	for i := range n {
		if i%100 == 0 {
			l.apis = append(l.apis, m.dial())
		}
		api := l.apis[i/100]
		l.wg.Go(func() {
			r := rand.New(rand.NewPCG(m.b.seed, uint64(i)))
			for {
				select {
				case <-l.stop:
					return
				default:
					m.ask(context.Background(), api, next(r))
					l.done.Add(1)
					wait(pace) // a refused caller must not take all of the CPU
				}
			}
		})
	}
	m.b.t.Cleanup(l.end)
	return l
}

// halt lets the callers begin no more pushes.
func (l *load) halt() {
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
}

// end stops the callers and waits for their last answers.
func (l *load) end() {
	l.halt()
	l.wg.Wait()
}

// settle ends them and waits until the Push-Manager is done with all that they have asked
// for. Those whose deadline has passed did not wait for it, and on a busy machine it reads
// their last calls later than that.
func (l *load) settle() {
	l.m.b.t.Helper()
	l.end()
	for _, api := range l.apis {
		l.m.hears(api)
	}
	l.m.until("pushes_in_flight", func(v float64) bool { return v == 0 })
}

// hears waits until all calls that came over a connection have been read.
func (m *manager) hears(api pubsub.PushManagerServiceClient) {
	m.b.t.Helper()
	eventually(m.b.t, "all calls are read", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := api.PushToUser(ctx, &pubsub.PushToUserRequest{}); status.Code(err) != codes.InvalidArgument {
			return fmt.Errorf("a push to nobody: %w", err)
		}
		return nil
	})
}

// more waits until n more pushes have been answered.
func (l *load) more(n int64) {
	l.m.b.t.Helper()
	until := l.done.Load() + n
	eventually(l.m.b.t, "pushes in the fault window", func() error {
		if got := l.done.Load(); got < until {
			return fmt.Errorf("%d of %d are missing", until-got, n)
		}
		return nil
	})
}

// rest notes what the manager holds while nothing happens, and atRest waits until it
// holds no more than that again (I5).
func (m *manager) rest() {
	m.b.t.Helper()
	eventually(m.b.t, "metrics", func() (err error) {
		m.baseline, err = m.read()
		return err
	})
}

// What may be there that was not: goroutines of pools that end by themselves after a
// while, and the connection that reads the metrics.
const (
	spareGoroutines = 24
	spareFiles      = 6
)

func (m *manager) atRest() {
	m.b.t.Helper()
	took := eventually(m.b.t, "back at the baseline", func() error {
		now, err := m.read()
		if err != nil {
			return err
		}
		var errs []error
		for name, spare := range map[string]float64{"go_goroutines": spareGoroutines, "process_open_fds": spareFiles} {
			if now[name] > m.baseline[name]+spare {
				errs = append(errs, fmt.Errorf("%s was %v and is %v", name, m.baseline[name], now[name]))
			}
		}
		for _, name := range []string{"push_manager_pushes_in_flight", "push_manager_link_queue_deliveries", "push_manager_route_waiting"} {
			if now[name] != 0 {
				errs = append(errs, fmt.Errorf("%s is %v", name, now[name]))
			}
		}
		return errors.Join(errs...)
	})
	m.b.t.Logf("I5: back at the baseline after %v", took.Round(time.Millisecond))
}

// good waits until pushes succeed again, 20 in a row (I8).
func (m *manager) good(r request) time.Duration {
	m.b.t.Helper()
	row := 0
	took := eventually(m.b.t, "success is back", func() error {
		for row < 20 {
			if p := m.push(r); !p.success {
				row = 0
				return errors.New(p.String())
			}
			row++
		}
		return nil
	})
	m.b.t.Logf("I8: success is back after %v", took.Round(time.Millisecond))
	return took
}

// names makes n ids.
func names(prefix string, n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprint(prefix, i)
	}
	return list
}

// pick is a random one of a list.
func pick(r *rand.Rand, list []string) string { return list[r.IntN(len(list))] }

// errStill says that what is waited for has not happened yet.
var errStill = errors.New("not yet")

const sigterm = syscall.SIGTERM

func broadcast() *pubsub.BroadcastMessageRequest {
	return &pubsub.BroadcastMessageRequest{Content: &pubsub.MessageContent{Data: []byte("unnumbered")}}
}
