package observe

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

// notProvoked is what such a run cannot bring about for real, and why. The rule tests (`make alerts`) have all of them.
var notProvoked = map[string]string{
	"VersionSkew":  "it takes binaries of two releases",
	"ReceiptsLost": "65,536 receipts, or 16 MiB of them, would have to wait for a store that does not answer: more load than belongs on a shared machine",
}

const (
	people = 30
	rooms  = 5
	tenant = "shop"
	quota  = 4000 // pushes of the tenant in a day
)

// TestEveryAlertFiresAndClears breaks a small deployment in one way after the other.
func TestEveryAlertFiresAndClears(t *testing.T) {
	if os.Getenv("LONG") == "" {
		t.Skip("takes minutes: make observe")
	}
	if _, err := exec.LookPath("prometheus"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("prometheus is missing (Debian: package prometheus)")
		}
		t.Skip("prometheus is missing (Debian: package prometheus)")
	}
	begun := time.Now()
	traces := newReceiver(t)
	c := newCity(t, traces)
	w := newWitness(c)
	app := c.caller("a", c.key)
	b := c.caller("b", "")
	jobs := pubsub.NewBroadcastJobServiceClient(c.dial("b", ""))

	// A little of everything, all the time.
	load := newLoad(t)
	load.every(50*time.Millisecond, func(ctx context.Context, i int) {
		_, _ = app.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "u" + strconv.Itoa(i%people), Content: text("hello")})
	})
	load.every(100*time.Millisecond, func(ctx context.Context, i int) {
		_, _ = app.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "r" + strconv.Itoa(i%rooms), Content: text("hello")})
	})
	load.every(time.Second, func(ctx context.Context, i int) {
		_, _ = b.BroadcastMessage(ctx, &pubsub.BroadcastMessageRequest{Content: text("all")})
		_, _ = b.PushToUsers(ctx, &pubsub.PushToUsersRequest{UserIds: []string{of("u1"), of("u2")}, Content: text("hello")})
		_, _ = app.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "away" + strconv.Itoa(i%10), Content: text("later"),
			Options: &pubsub.PushOptions{Offline: pubsub.OfflinePolicy_OFFLINE_STORE, Ack: pubsub.AckPolicy_ACK_CLIENT, Receipt: pubsub.ReceiptMode_RECEIPT_ASYNC}})
	})

	w.phase("files, limits and callers", []fault{
		{"a certificate has an hour left", []string{"CertificateExpires", "CertificateExpiresSoon"},
			func() { c.certify(time.Hour) }, func() { c.certify(1000 * time.Hour) }},
		{"the policy has a mistake", []string{"PolicyNotTakenOver"}, func() { c.write("policy.yaml", "version: 1\ncallers: [{nme: x}]\n") }, func() { c.policy(quota) }},
		{"the file of API keys is no such file", []string{"APIKeysNotReloaded"}, func() { c.write("keys.yaml", "keys: 7\n") }, func() { c.write("keys.yaml", c.keys) }},
		{"the key set of an issuer is no such file", []string{"IssuerKeysNotRead"}, func() { c.write("jwks.json", "{") }, func() { c.write("jwks.json", keySet(t)) }},
		{"an instance may speak in plain text to nodes, and does", []string{"InsecureMode"}, nil, nil}, // b, from its start to the end of the run
		{"two keys claim one node id, and there are too many nodes", []string{"NodeIDContested", "ConnectNodesLeftOut"}, c.crowd, c.disperse},
		{"a caller pushes what it may not", []string{"CallersDenied"},
			load.whileOf(100*time.Millisecond, func(ctx context.Context, _ int) {
				_, _ = app.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "forbidden", Content: text("x")})
			}), load.stopLast},
		{"the audit log cannot be written", []string{"AuditLinesLost"}, nil, nil}, // b: its disk is full
		{"the receiver of receipts refuses them", []string{"ReceiptWebhookFails"}, func() { c.webhook.Store(false) }, func() { c.webhook.Store(true) }},
		{"memory runs out", []string{"MemoryShedding"}, nil, nil}, // c
	})
	w.phase("callers push to users who are away", []fault{{"", []string{"PushSuccessRateLow"},
		load.whileOf(10*time.Millisecond, func(ctx context.Context, i int) {
			_, _ = b.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "gone" + strconv.Itoa(i), Content: text("x")})
		}), load.stopLast}})
	w.phase("a tenant uses up its quota", []fault{{"", []string{"QuotaNearlyUsed", "QuotaAlmostUsedUp"}, func() { c.policy(100) }, func() { c.policy(100 * quota) }}})
	w.phase("the store fills up", []fault{{"", []string{"StoreNearlyFull"}, func() { c.fill(app) }, func() { c.erase(app) }}})
	w.phase("the certificate's file is cut off", []fault{{"", []string{"CertificatesNotTakenOver"}, func() { c.write("api.crt", "-----BEGIN CERTIFICATE-----\nAAAA\n") }, func() { c.certify(1000 * time.Hour) }}})
	w.phase("a node is slow", []fault{{"", []string{"NodeSlow", "NodeHeartbeatSlow", "PushLatencyHigh", "ErrorBudgetBurnsFast", "ErrorBudgetBurnsSlowly", "HighPriorityRefused", "QueueDrops"},
		func() {
			c.lanes[2].delay.Store(int64(600 * time.Millisecond))
			for range 150 { // all to one user of the slow node
				load.every(time.Millisecond, func(ctx context.Context, _ int) {
					ctx = metadata.AppendToOutgoingContext(ctx, "x-priority", "high")
					_, _ = b.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: of("u2"), Content: text("urgent")})
					time.Sleep(50 * time.Millisecond)
				})
			}
		}, func() {
			for range 150 {
				load.stopLast()
			}
			c.lanes[2].delay.Store(0)
		}}})
	w.phase("something cuts the links to a node again and again", []fault{{"", []string{"LinkReconnectStorm"},
		load.whileOf(1500*time.Millisecond, func(context.Context, int) { c.lanes[2].cut() }), load.stopLast}})
	w.phase("a node stands still", []fault{{"", []string{"LinkStalled", "NodeUnreachable"},
		func() { c.nodes[1].signal(syscall.SIGSTOP) }, func() { c.nodes[1].signal(syscall.SIGCONT) }}})
	w.phase("the store is away, and people connect", []fault{{"", []string{"StoreDown", "StoredMessagesNotSent"},
		func() {
			c.closeStore()
			load.whileOf(500*time.Millisecond, func(_ context.Context, i int) { c.visit("away" + strconv.Itoa(i%10)) })()
		}, func() { load.stopLast(); c.openStore() }}})
	w.phase("the Controller is killed", []fault{{"", []string{"ControllerLookupsFailing", "RoutesServedStale", "PushManagerNotReady", "BroadcastJobWaits"},
		func() {
			c.controller.kill()
			_, err := jobs.CreateJob(t.Context(), &pubsub.CreateJobRequest{JobId: "waits", Spec: &pubsub.BroadcastJobSpec{
				UserIds: []string{"nobody-yet"}, Content: text("x"), RatePerSecond: 1,
			}})
			if err != nil {
				t.Error(err)
			}
			load.whileOf(50*time.Millisecond, func(ctx context.Context, i int) {
				_, _ = b.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "nobody" + strconv.Itoa(i), Content: text("x")})
			})()
		}, func() { load.stopLast(); c.controller.start() }}})
	w.phase("etcd is away", []fault{{"", []string{"RegistrationLost"}, c.etcd.Stop, c.etcd.Restart}})

	// Before the end: what the run has shown must be in every panel.
	c.panels()
	traces.fourPrograms(c, app)

	w.phase("all nodes are killed", []fault{{"", []string{"NoAvailableNodes"},
		func() {
			for _, n := range c.nodes {
				n.kill()
			}
		}, func() {
			for _, n := range c.nodes {
				n.start()
			}
		}}})
	w.phase("all Push-Managers are killed", []fault{{"", []string{"PushManagerAbsent"},
		func() {
			for _, m := range c.managers {
				m.kill()
			}
		}, func() { c.managers["a"].start() }}}) // without b and c their alerts end, too
	load.stop()
	w.allClear()
	w.report(begun)
}

func text(s string) *pubsub.MessageContent { return &pubsub.MessageContent{Data: []byte(s)} }

// fault is something that goes wrong, and the alerts that say so. Without do it has been wrong from the start; without undo
// it ends with the program.
type fault struct {
	what     string
	alerts   []string
	do, undo func()
}

// witness asks Prometheus which alerts fire.
type witness struct {
	c *city

	mu     sync.Mutex
	firing map[string]bool // guarded by mu
	fired  map[string]time.Duration
	clear  map[string]bool
	since  map[string]time.Time // of the fault
}

func newWitness(c *city) *witness {
	w := &witness{c: c, firing: map[string]bool{}, fired: map[string]time.Duration{}, clear: map[string]bool{}, since: map[string]time.Time{}}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(500 * time.Millisecond): //nolint:forbidigo // a test
				w.look()
			}
		}
	}()
	c.t.Cleanup(func() { close(stop); <-done })
	return w
}

func (w *witness) look() {
	var data struct {
		Alerts []struct {
			Labels map[string]string
			State  string
		}
	}
	if err := w.c.query("/api/v1/alerts", nil, &data); err != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	now := map[string]bool{}
	for _, a := range data.Alerts {
		if a.State == "firing" {
			now[a.Labels["alertname"]] = true
		}
	}
	for name := range now {
		if _, known := w.fired[name]; !known {
			w.fired[name] = time.Since(w.since[name])
		}
	}
	for name := range w.firing {
		if !now[name] {
			w.clear[name] = true
		}
	}
	w.firing = now
}

// phase brings faults about at the same time, waits until their alerts fire, and ends them.
func (w *witness) phase(name string, faults []fault) {
	w.c.t.Helper()
	begun := time.Now()
	var want []string
	for _, f := range faults {
		w.mu.Lock()
		for _, a := range f.alerts {
			w.since[a] = time.Now()
			delete(w.fired, a)
			delete(w.clear, a)
			if w.firing[a] { // since another fault
				w.fired[a] = 0
			}
		}
		w.mu.Unlock()
		if f.do != nil {
			f.do()
		}
		want = append(want, f.alerts...)
	}
	var missing []string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(250 * time.Millisecond) {
		w.mu.Lock()
		missing = slices.DeleteFunc(slices.Clone(want), func(a string) bool { _, ok := w.fired[a]; return ok })
		w.mu.Unlock()
		if len(missing) == 0 {
			break
		}
	}
	for _, f := range faults {
		if f.undo != nil {
			f.undo()
		}
	}
	w.c.t.Logf("%-45s %3.0f s  %s", name, time.Since(begun).Seconds(), strings.Join(want, " "))
	if len(missing) > 0 {
		w.c.t.Errorf("%s: does not fire: %v", name, missing)
	}
}

// allClear waits until nothing fires.
func (w *witness) allClear() {
	for end := time.Now().Add(2 * patience); time.Now().Before(end); time.Sleep(time.Second) {
		w.mu.Lock()
		n := len(w.firing)
		w.mu.Unlock()
		if n == 0 {
			return
		}
	}
}

// report says what became of each alert of the rules.
func (w *witness) report(begun time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var rules strings.Builder
	for _, name := range []string{"alerts.yml", "slo.yml"} {
		b, err := os.ReadFile("../../deploy/prometheus/" + name)
		if err != nil {
			w.c.t.Fatal(err)
		}
		rules.Write(b)
	}
	seen := 0
	for _, m := range regexp.MustCompile(`(?m)^ +- alert: (\w+)$`).FindAllStringSubmatch(rules.String(), -1) {
		name := m[1]
		after, fired := w.fired[name]
		switch why := notProvoked[name]; {
		case why != "":
			w.c.t.Logf("%-26s NOT PROVOKED: %s", name, why)
		case !fired:
			w.c.t.Errorf("%s has not fired", name)
		case w.firing[name] || !w.clear[name]:
			w.c.t.Errorf("%s has fired and not cleared", name)
		default:
			seen++
			w.c.t.Logf("%-26s fired after %2.0f s, and cleared", name, after.Seconds())
		}
	}
	w.c.t.Logf("%d alerts were seen firing and clearing in %v", seen, time.Since(begun).Round(time.Second))
}

// load is callers that come at their times. Each has a goroutine, which waits for the answer.
type load struct {
	t     *testing.T
	group sync.WaitGroup

	mu    sync.Mutex
	stops []context.CancelFunc // guarded by mu
}

func newLoad(t *testing.T) *load {
	l := &load{t: t}
	t.Cleanup(l.stop)
	return l
}

func (l *load) every(pause time.Duration, act func(context.Context, int)) {
	ctx, cancel := context.WithCancel(context.Background())
	l.mu.Lock()
	l.stops = append(l.stops, cancel)
	l.mu.Unlock()
	l.group.Go(func() {
		tick := time.NewTicker(pause)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				call, end := context.WithTimeout(ctx, 3*time.Second)
				act(call, i)
				end()
			}
		}
	})
}

// whileOf is every as something that goes wrong.
func (l *load) whileOf(pause time.Duration, act func(context.Context, int)) func() {
	return func() { l.every(pause, act) }
}

// stopLast ends the latest that still runs.
func (l *load) stopLast() {
	l.mu.Lock()
	defer l.mu.Unlock()
	last := len(l.stops) - 1
	l.stops[last]()
	l.stops = l.stops[:last]
}

func (l *load) stop() {
	l.mu.Lock()
	for _, cancel := range l.stops {
		cancel()
	}
	l.stops = nil
	l.mu.Unlock()
	l.group.Wait()
}

func newCity(t *testing.T, traces *receiver) *city {
	c := &city{t: t, dir: t.TempDir(), managers: map[string]*process{}, api: map[string]string{}}
	c.binary = c.file("push-manager")
	build := exec.Command("go", "build", "-tags", "nodev", "-o", c.binary, "./cmd/push-manager")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	authority, ca, err := certs.NewAuthority("observe", time.Now().Add(24*365*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	c.authority = authority
	c.write("ca.crt", string(ca.Cert))
	c.certify(1000 * time.Hour)
	c.write("jwks.json", keySet(t))
	c.write("secret", "0123456789abcdef0123456789abcdef\n")
	c.key = c.apiKey("app")
	b, err := os.ReadFile(c.file("keys.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	c.keys = string(b)
	c.policy(quota * 100)
	if err := os.Symlink("/dev/full", c.file("audit-full.log")); err != nil {
		t.Fatal(err)
	}

	c.etcd = etcdtest.Start(t)
	c.natsPort = freeport.Row(t, 1)
	c.openStore()
	t.Cleanup(func() { c.closeStore() })
	c.webhook.Store(true)
	hook := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		if !c.webhook.Load() {
			rw.WriteHeader(http.StatusInternalServerError)
		}
	}))
	t.Cleanup(hook.Close)

	otlp := []string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://" + traces.address, "OTEL_TRACES_SAMPLER=parentbased_always_off", "OTEL_BSP_SCHEDULE_DELAY=500"}
	common := append([]string{"ETCD_ENDPOINTS=" + c.etcd.Endpoint(), "LOG_LEVEL=warn"}, otlp...)
	p := freeport.Take(t, 2)
	c.controller = c.launch("controller", append([]string{"GRPC_PORT=" + p[0], "METRICS_PORT=" + p[1], "WARMUP=5s"}, common...), "controller")
	c.scraped = append(c.scraped, "127.0.0.1:"+p[1])
	c.lookups = "127.0.0.1:" + p[0]
	common = append(common, "CONTROLLER_ADDRESS="+c.lookups)

	manager := func(name string, env ...string) (metrics string) {
		p := freeport.Take(t, 2)
		c.api[name] = "127.0.0.1:" + p[0]
		c.managers[name] = c.launch("pm-"+name, slices.Concat([]string{"MANAGER_ID=pm-" + name, "GRPC_PORT=" + p[0], "HTTP_PORT=0", "METRICS_PORT=" + p[1]}, common, env))
		c.scraped = append(c.scraped, "127.0.0.1:"+p[1])
		return "127.0.0.1:" + p[1]
	}
	a := manager("a", "TLS_CERT_FILE="+c.file("api.crt"), "TLS_KEY_FILE="+c.file("api.key"), "TLS_RELOAD_INTERVAL=500ms",
		"AUTH_MODE=required", "AUTH_POLICY_FILE="+c.file("policy.yaml"), "AUTH_API_KEYS_FILE="+c.file("keys.yaml"),
		fmt.Sprintf("AUTH_JWT=[{issuer: %q, audience: push, jwks_file: %q}]", issuer, c.file("jwks.json")),
		"AUDIT_FILE="+c.file("audit.log"), "DISCOVERY_MAX_NODES=4", "ROUTE_STALE_TTL=8s", "ROUTE_CACHE_TTL=1s",
		fmt.Sprintf("STORE=nats://127.0.0.1:%d", c.natsPort), "STORE_REPLICAS=1", "STORE_PARTITIONS=1", "STORE_MAX_BYTES=4MiB", "STORE_MAX_PER_USER=100000",
		"RECEIPT_WEBHOOK_URL="+hook.URL, "RECEIPT_WEBHOOK_SECRET_FILE="+c.file("secret"), "GOMEMLIMIT=1GiB")
	// Its nodes do not know TLS, its audit log is on a full disk, and it takes little at a time.
	manager("b", "LINK_TLS_CA_FILE="+c.file("ca.crt"), "LINK_TLS_MIGRATE=true", "LINK_TLS_IDENTITY=none",
		"AUDIT_FILE="+c.file("audit-full.log"), "MAX_IN_FLIGHT=120", "LINK_QUEUE_LENGTH=4", "ROUTE_STALE_TTL=8s")
	manager("c", "GOMEMLIMIT=10MiB") // next to no memory

	var nodes []string
	for i := range 3 {
		p := freeport.Take(t, 3)
		lane := newLane(t, "127.0.0.1:"+p[0])
		c.lanes = append(c.lanes, lane)
		c.nodes = append(c.nodes, c.launch(fmt.Sprint("node-", i), append([]string{"NODE_ID=" + fmt.Sprint("node-", i), "GRPC_PORT=" + p[0], "HTTP_PORT=" + p[1], "METRICS_PORT=" + p[2],
			"ADVERTISE_ADDRESS=" + lane.listen.Addr().String(), "PUSH_MANAGER_ADDRESS=" + c.api["b"]}, common...), "connect-node"))
		c.http = append(c.http, "127.0.0.1:"+p[1])
		nodes = append(nodes, "127.0.0.1:"+p[2])
	}
	c.scraped = append(c.scraped, nodes...)
	for _, at := range c.scraped {
		c.answers(at, "/healthz")
	}
	for _, at := range append(nodes, a) {
		c.answers(at, "/readyz")
	}
	c.people(people, rooms)
	c.watch()
	return c
}

// policy lets the caller push to everybody but one, within a quota of its tenant.
func (c *city) policy(pushes int) {
	c.write("policy.yaml", fmt.Sprintf(`version: 1
tenants:
  %s: {daily_pushes: %d}
callers:
  - name: app
    tenant: %s
    match: [{key: %s}]
    allow:
      - methods: ["*"]
        users: ["u*", "away*", "full*"]
        rooms: ["*"]
`, tenant, pushes, tenant, c.key[4:12]))
}

// caller is a client of a Push-Manager.
func (c *city) caller(name, key string) pubsub.PushManagerServiceClient {
	c.t.Helper()
	return pubsub.NewPushManagerServiceClient(c.dial(name, key))
}

func (c *city) dial(name, key string) *grpc.ClientConn {
	c.t.Helper()
	opts := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	if key != "" {
		pool := x509.NewCertPool()
		ca, err := os.ReadFile(c.file("ca.crt"))
		if err != nil || !pool.AppendCertsFromPEM(ca) {
			c.t.Fatal("no authority")
		}
		opts = []grpc.DialOption{
			grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13})),
			grpc.WithPerRPCCredentials(bearer(key)),
		}
	}
	conn, err := grpc.NewClient(c.api[name], opts...)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}
func (bearer) RequireTransportSecurity() bool { return true }

// crowd registers nodes that are none.
func (c *city) crowd() {
	for i, id := range []string{"x1", "x2", "x3", "node-0"} {
		ctx, cancel := context.WithTimeout(c.t.Context(), patience)
		value := fmt.Sprintf(`{"Op":0,"Addr":"127.0.0.1:1","Metadata":{"node_id":%q}}`, id)
		if _, err := c.etcd.Client().Put(ctx, fmt.Sprint("/services/connect-node/extra-", i), value); err != nil {
			c.t.Error(err)
		}
		cancel()
	}
}

func (c *city) disperse() {
	for i := range 4 {
		ctx, cancel := context.WithTimeout(c.t.Context(), patience)
		if _, err := c.etcd.Client().Delete(ctx, fmt.Sprint("/services/connect-node/extra-", i)); err != nil {
			c.t.Error(err)
		}
		cancel()
	}
}

// fill stores messages until the store has no room.
func (c *city) fill(api pubsub.PushManagerServiceClient) {
	for i := range 200 {
		ctx, cancel := context.WithTimeout(c.t.Context(), 5*time.Second)
		_, _ = api.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "full" + strconv.Itoa(i%4), Content: text(strings.Repeat("x", 32<<10)),
			Options: &pubsub.PushOptions{Offline: pubsub.OfflinePolicy_OFFLINE_STORE}})
		cancel()
	}
}

func (c *city) erase(api pubsub.PushManagerServiceClient) {
	for i := range 4 {
		c.until("what is stored is erased", func() error {
			ctx, cancel := context.WithTimeout(c.t.Context(), 20*time.Second)
			defer cancel()
			_, err := api.ForgetUser(ctx, &pubsub.ForgetUserRequest{UserId: "full" + strconv.Itoa(i)})
			return err
		})
	}
}

// panels asks everything that the dashboard asks.
func (c *city) panels() {
	b, err := os.ReadFile("../../deploy/grafana/push-manager.json")
	if err != nil {
		c.t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &board); err != nil {
		c.t.Fatal(err)
	}
	fill := strings.NewReplacer("$job", ".*", "$instance", ".*", "$node_id", ".*", "$__rate_interval", "1m", "30d", "10m")
	n, empty := 0, map[string]string{}
	for _, p := range board.Panels {
		for _, target := range p.Targets {
			n++
			var data struct{ Result []json.RawMessage }
			values := url.Values{
				"query": {fill.Replace(target.Expr)}, "start": {fmt.Sprint(time.Now().Add(-15 * time.Minute).Unix())}, "end": {fmt.Sprint(time.Now().Unix())}, "step": {"5"},
			}
			if err := c.query("/api/v1/query_range", values, &data); err != nil {
				c.t.Errorf("%s: %s: %v", p.Title, target.Expr, err)
			} else if len(data.Result) == 0 {
				empty[target.Expr] = p.Title
			}
		}
	}
	c.t.Logf("%d queries of the dashboard, %d without data", n, len(empty))
	for _, expr := range slices.Sorted(maps.Keys(empty)) {
		c.t.Errorf("%s: no data: %s", empty[expr], expr)
	}
}
