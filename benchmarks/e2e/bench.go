package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// startTimeout bounds the start of one part.
const startTimeout = 30 * time.Second

// Options say how a Bench measures. The zero value is for full runs.
type Options struct {
	// Rounds of turns. Default 40.
	Rounds int
	// Turn is how long one server is loaded at a time. Default 250 ms.
	Turn time.Duration
	// Conns is the number of connections from the load generator to a server, and
	// of PushStream calls. Default 4.
	Conns int
	// InFlight is the number of callers of a closed loop. Default 128.
	InFlight int
	// StreamInFlight is the number of unanswered pushes of each PushStream. Default 1000,
	// a little less than Push-Manager takes.
	StreamInFlight int
	// Short makes worlds small: for a test of the harness itself.
	Short bool
	// Binary is a push-manager that is built already. Default: it is built from
	// this module.
	Binary string
	// Env is added to the environment of Push-Manager.
	Env []string
	// Dir gets profiles and results. Default: a temporary one.
	Dir string
	// Progress gets a line now and then. Default: nobody.
	Progress io.Writer
}

func (o Options) withDefaults() Options {
	o.Rounds = orDefault(o.Rounds, 40)
	o.Turn = orDefault(o.Turn, 250*time.Millisecond)
	o.Conns = orDefault(o.Conns, 4)
	o.InFlight = orDefault(o.InFlight, 128)
	o.StreamInFlight = orDefault(o.StreamInFlight, 1000)
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	return o
}

func orDefault[T comparable](v, d T) T {
	var zero T
	if v == zero {
		return d
	}
	return v
}

// Bench is a running set of processes.
type Bench struct {
	// Static after Start.
	opts     Options
	dir      string
	binary   string
	client   *http.Client
	spawner  *spawner
	load     *child
	children []*child // all, in order of their start
	names    int
}

// Start builds what is missing and starts the load generator. Close ends all.
func Start(ctx context.Context, opts Options) (_ *Bench, err error) {
	b := &Bench{opts: opts.withDefaults(), spawner: newSpawner()}
	b.client = &http.Client{Transport: &http.Transport{}, Timeout: 2 * startTimeout}
	defer func() {
		if err != nil {
			b.Close()
		}
	}()
	if b.dir, err = os.MkdirTemp("", "push-manager-bench-"); err != nil {
		return nil, err
	}
	if b.binary = b.opts.Binary; b.binary == "" {
		b.binary = filepath.Join(b.dir, "push-manager")
		build := exec.CommandContext(ctx, "go", "build", "-o", b.binary, "github.com/push-manager/push-manager/cmd/push-manager") //nolint:gosec // our own program
		if out, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build push-manager: %w\n%s", err, out)
		}
	}
	b.load, err = b.role("load", none{})
	return b, err
}

// Close ends all processes, those that depend on others first.
func (b *Bench) Close() {
	for _, c := range slices.Backward(b.children) {
		c.end()
	}
	b.children = nil
	b.spawner.close()
	b.client.CloseIdleConnections()
	_ = os.RemoveAll(b.dir) // what is left is temporary
}

func (b *Bench) progress(format string, args ...any) {
	_, _ = fmt.Fprintf(b.opts.Progress, format+"\n", args...) // nobody reads it when this fails
}

func (b *Bench) role(name string, arg any, env ...string) (*child, error) {
	c, err := b.spawner.startRole(name, b.dir, arg, env...)
	if err == nil {
		b.children = append(b.children, c)
	}
	return c, err
}

// ask starts a part and asks it where it is.
func ask[A any](ctx context.Context, c *child, op string) (answer A, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return answer, c.call(ctx, op, none{}, &answer)
}

// World is an etcd, a Controller and Connect-Nodes, with the servers that push to
// them.
type World struct {
	bench      *Bench
	etcd       string
	controller *child
	address    string // of the Controller
	nodesPart  *child
	nodes      map[string]string
	children   []*child
	servers    []*Server
}

// Server is a Push-Manager or a rival, ready for load.
type Server struct {
	Name  string
	child *child
	where where
	bench *Bench
	world *World
}

// World starts everything that a Push-Manager needs, with so many nodes and rooms.
func (b *Bench) World(ctx context.Context, nodes int, rooms []Room) (*World, error) {
	w := &World{bench: b}
	part := func(name string, arg any) (*child, error) {
		c, err := b.role(name, arg)
		if err == nil {
			w.children = append(w.children, c)
		}
		return c, err
	}
	etcd, err := part("etcd", none{})
	if err != nil {
		return nil, err
	}
	if w.etcd, err = ask[string](ctx, etcd, "address"); err != nil {
		return nil, err
	}
	if w.controller, err = part("controller", none{}); err != nil {
		return nil, err
	}
	if w.address, err = ask[string](ctx, w.controller, "address"); err != nil {
		return nil, err
	}
	if err := w.controller.call(ctx, "rooms", rooms, nil); err != nil {
		return nil, err
	}
	w.nodesPart, err = part("nodes", nodesArg{Etcd: w.etcd, Count: nodes, Users: 10})
	if err != nil {
		return nil, err
	}
	w.nodes, err = ask[map[string]string](ctx, w.nodesPart, "nodes")
	return w, err
}

// Close ends the world's processes.
func (w *World) Close(ctx context.Context) {
	for _, s := range w.servers {
		_ = w.bench.load.call(ctx, "drop", s.Name, nil) // the generator is gone when this fails
	}
	for _, c := range slices.Backward(w.children) {
		c.end()
	}
	w.bench.children = slices.DeleteFunc(w.bench.children, func(c *child) bool { return slices.Contains(w.children, c) })
}

// Rival starts one of the roles echo, floor and naive.
func (w *World) Rival(ctx context.Context, role string, env ...string) (*Server, error) {
	c, err := w.bench.role(role, peers{Controller: w.address, Nodes: w.nodes}, env...)
	if err != nil {
		return nil, err
	}
	w.children = append(w.children, c)
	at, err := ask[where](ctx, c, "address")
	if err != nil {
		return nil, err
	}
	return w.server(ctx, role, c, at, access{})
}

func (w *World) server(ctx context.Context, name string, c *child, at where, as access) (*Server, error) {
	w.bench.names++
	s := &Server{Name: name + "-" + strconv.Itoa(w.bench.names), child: c, where: at, bench: w.bench, world: w}
	w.servers = append(w.servers, s)
	return s, w.bench.load.call(ctx, "target", target{Name: s.Name, Addr: at.API, Conns: w.bench.opts.Conns, As: as}, nil)
}

// PushManager starts the product, with extra environment. It has all its streams up
// when this returns.
func (w *World) PushManager(ctx context.Context, env ...string) (*Server, error) {
	return w.pushManager(ctx, "pm", w.bench.binary, env, access{})
}

// pushManager starts a world with the product in it.
func (b *Bench) pushManager(ctx context.Context, nodes int, rooms []Room, env ...string) (*World, *Server, error) {
	w, err := b.World(ctx, nodes, rooms)
	if err != nil {
		return nil, nil, err
	}
	pm, err := w.PushManager(ctx, env...)
	if err != nil {
		w.Close(context.WithoutCancel(ctx))
		return nil, nil, err
	}
	return w, pm, nil
}

// pushManager starts a build of the product. as is how the load generator calls it.
func (w *World) pushManager(ctx context.Context, name, binary string, env []string, as access) (*Server, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	env = slices.Concat([]string{
		"MANAGER_ID=" + name + "-" + strconv.Itoa(w.bench.names), "GRPC_PORT=0", "HTTP_PORT=0", "METRICS_PORT=0", "LOG_FORMAT=json",
		"ETCD_ENDPOINTS=" + w.etcd, "CONTROLLER_ADDRESS=" + w.address,
	}, w.bench.opts.Env, env)
	c, err := w.bench.child(name, binary, env)
	if err != nil {
		return nil, err
	}
	w.children = append(w.children, c)
	var started struct {
		GRPC, HTTP string
		Web        string `json:"push_api_http"`
		Shards     float64
	}
	if err := c.runs(ctx, "push-manager runs", &started); err != nil {
		return nil, err
	}
	at := where{API: started.GRPC, Ops: started.HTTP}
	if as.JSON {
		at.API = started.Web
	}
	s, err := w.server(ctx, name, c, at, as)
	if err != nil {
		return nil, err
	}
	return s, s.connected(ctx, float64(len(w.nodes))*started.Shards)
}

// connected waits until a Push-Manager has its streams to the nodes and trusts its
// cache.
func (s *Server) connected(ctx context.Context, links float64) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		m, err := s.metrics(ctx)
		if err != nil {
			return err
		}
		if total(m, "push_manager_node_connections") == links && m["push_manager_route_watched"] == 1 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s does not reach its nodes: %w%s", s.Name, ctx.Err(), s.child.stderr)
		}
	}
}

func (s *Server) metrics(ctx context.Context) (map[string]float64, error) {
	return scrape(ctx, s.bench.client, s.where.Ops)
}

// total sums the samples of a metric over its labels.
func total(samples map[string]float64, name string) (sum float64) {
	for k, v := range samples {
		if k == name || strings.HasPrefix(k, name+"{") {
			sum += v
		}
	}
	return sum
}

// errFailed: a figure with failures is none.
var errFailed = errors.New("pushes failed")

// run loads a server once.
func (b *Bench) run(ctx context.Context, l Load) (*Loaded, error) {
	ctx, cancel := context.WithTimeout(ctx, maxRun+startTimeout)
	defer cancel()
	var out Loaded
	return &out, b.load.call(ctx, "run", l, &out)
}

// warmings is how often a server may fail to warm up: on a busy machine a look-up or
// an ack may be late.
const warmings = 3

// Warm asks for every key once, so that caches are full and audiences defined.
func (s *Server) Warm(ctx context.Context, work Work) error {
	for attempt := 1; ; attempt++ {
		out, err := s.bench.run(ctx, Load{Target: s.Name, Mode: Sweep, Work: work, InFlight: 64})
		switch {
		case err != nil:
			return fmt.Errorf("warm %s: %w", s.Name, err)
		case out.Failed == 0:
			return nil
		case attempt == warmings:
			return fmt.Errorf("warm %s: %w: %d of %d: %s", s.Name, errFailed, out.Failed, out.Done, out.Error)
		}
	}
}
