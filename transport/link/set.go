package link

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/histogram"
	"github.com/push-manager/push-manager/internal/plain"
	pubsub "github.com/push-manager/push-manager/proto"
)

var _ engine.Network = (*Set)(nil)

const (
	// receiveMax bounds a frame from a node. Acks are small, but the Miss of a
	// delivery to 10,000 users may have to name them all, 30 bytes each and more.
	receiveMax = 1 << 20
	// streamWindow is fixed, which switches gRPC's bandwidth estimation and its
	// pings off: they double the writes of a quiet stream.
	streamWindow = 1 << 20
	// keepaliveTime and keepaliveTimeout are the backstop behind our heartbeat. The
	// nodes' enforcement policy must allow them.
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 3 * time.Second
)

// ErrClosed is what Update returns after Close.
var ErrClosed = errors.New("link: set is closed")

// Node is a registered Connect-Node.
type Node struct{ ID, Addr string }

// Set keeps the links of all shards to all nodes. All methods are safe for
// concurrent use.
type Set struct {
	// Static after New.
	cfg        Config
	instance   string // tells this process from all others
	offers     []pubsub.Feature
	log        *slog.Logger
	meters     *meters
	clock      *clock
	dial       []grpc.DialOption
	call       []grpc.CallOption
	stop       chan struct{}
	buffers    bufferPool
	compressor *compressor
	dials      *dials

	hellos   atomic.Uint64 // sent so far: a node tells a late one by its number
	snapshot atomic.Pointer[snapshot]
	clockEnd sync.WaitGroup
	runs     sync.WaitGroup // of all links, old ones included

	mu sync.Mutex
	// Guarded by mu.
	closed bool
}

// snapshot is the immutable set of nodes.
type snapshot struct {
	nodes  []*node // ordered by id
	byID   map[string]*node
	byLink [][]engine.Link // by shard, ordered by node id
	gone   []*node         // no longer registered, with links that still await acks
}

// New makes a Set without nodes. Close ends it.
func New(cfg Config) (*Set, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	s := &Set{
		cfg: cfg, instance: rand.Text(), offers: offers(&cfg), log: cfg.Logger, meters: newMeters(cfg.Metrics), clock: newClock(),
		dial: dialOptions(&cfg), call: callOptions(&cfg), stop: make(chan struct{}),
	}
	var err error
	if s.compressor, err = newCompressor(&cfg, &s.buffers, s.meters); err != nil {
		return nil, err
	}
	s.dials = newDials(&cfg)
	s.snapshot.Store(newSnapshot(nil, cfg.Shards))
	s.meters.register(s)
	s.clockEnd.Go(s.loop)
	return s, nil
}

func dialOptions(cfg *Config) []grpc.DialOption {
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUserAgent("push-manager"),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithIdleTimeout(0),
		grpc.WithStaticStreamWindowSize(streamWindow),
		grpc.WithStaticConnWindowSize(streamWindow),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: keepaliveTime, Timeout: keepaliveTimeout, PermitWithoutStream: true,
		}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: cfg.BackoffMin, Multiplier: 2, Jitter: 0.2, MaxDelay: cfg.BackoffMax},
			MinConnectTimeout: cfg.DialTimeout,
		}),
	}
	return append(opts, cfg.DialOptions...)
}

func callOptions(cfg *Config) []grpc.CallOption {
	return []grpc.CallOption{
		grpc.ForceCodecV2(codec{}),
		grpc.MaxCallRecvMsgSize(receiveMax),
		grpc.MaxCallSendMsgSize(cfg.MaxFrameBytes + frameSpare),
		grpc.StaticMethod(),
	}
}

func newSnapshot(nodes []*node, shards int) *snapshot {
	slices.SortFunc(nodes, func(a, b *node) int { return strings.Compare(a.id, b.id) })
	t := &snapshot{nodes: nodes, byID: make(map[string]*node, len(nodes)), byLink: make([][]engine.Link, shards)}
	for _, n := range nodes {
		t.byID[n.id] = n
		for shard, l := range n.links {
			t.byLink[shard] = append(t.byLink[shard], l)
		}
	}
	return t
}

// left lists the nodes of old that are not in now any more, and those that were gone before.
func (old *snapshot) left(now *snapshot) []*node {
	gone := slices.Clone(old.gone)
	for _, n := range old.nodes {
		if now.byID[n.id] != n {
			gone = append(gone, n)
		}
	}
	return gone
}

// wrongNode counts that another node is where a registered one should be. Ids that are not registered are one: whoever is
// there chooses them.
func (s *Set) wrongNode(id, found string) {
	nodes := s.snapshot.Load().byID
	if nodes[id] == nil {
		return // it has gone, and its counters with it
	}
	if nodes[found] == nil {
		found = "not registered"
	}
	s.meters.wrongNode(id, found)
}

// Link returns the link of a shard to a node, nil when no such node is registered.
func (s *Set) Link(shard int, node string) engine.Link {
	n, ok := s.snapshot.Load().byID[node]
	if !ok {
		return nil
	}
	return n.links[shard]
}

// Links returns a shard's links to all nodes, ordered by node id. The slice is
// shared: callers do not change it.
func (s *Set) Links(shard int) []engine.Link { return s.snapshot.Load().byLink[shard] }

// Update makes nodes the complete set of registered nodes. A node with a new
// address gets new links at once and loses the old ones, but for those on which it
// drains. One that is gone gets nothing more, and what it has got is awaited. One that
// is down is tried without delay.
func (s *Set) Update(nodes []Node) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	old := s.snapshot.Load()
	next := make([]*node, 0, len(nodes))
	seen := make(map[string]bool, len(nodes))
	var kept, started []*node
	for _, n := range nodes {
		if seen[n.ID] {
			continue
		}
		seen[n.ID] = true
		known := old.byID[n.ID]
		if known != nil && known.addr == n.Addr {
			kept = append(kept, known)
			next = append(next, known)
			continue
		}
		fresh := newNode(s, n)
		fresh.beats, fresh.acks = s.meters.beats(n.ID), s.meters.ackSeconds(n.ID)
		fresh.stalls, fresh.breaks = s.meters.nodeStalls(n.ID), s.meters.breaks(n.ID)
		started = append(started, fresh)
		next = append(next, fresh)
	}
	t := newSnapshot(next, s.cfg.Shards)
	t.gone = old.left(t)
	s.snapshot.Store(t)
	s.dials.keep(slices.Concat(t.nodes, t.gone))
	for _, n := range started {
		for _, l := range n.links {
			s.runs.Go(l.run)
		}
		s.meters.show(s, n.id)
	}
	for _, n := range old.nodes {
		if t.byID[n.id] == nil {
			s.meters.forget(n.id)
		}
	}
	s.mu.Unlock()

	for _, n := range old.nodes {
		switch now := t.byID[n.id]; {
		case now == nil:
			n.close(engine.DropUnknownNode)
			s.log.Info("node gone", "node", n.id, "addr", n.addr)
		case now != n:
			n.close(engine.DropUnreachable)
			s.log.Info("node moved", "node", n.id, "from", n.addr, "to", now.addr)
		}
	}
	for _, n := range t.gone {
		if slices.ContainsFunc(started, func(fresh *node) bool { return fresh.addr == n.addr }) {
			n.close(engine.DropUnreachable) // or the new links might overtake the old ones
		}
	}
	for _, n := range kept {
		n.announced()
	}
	return nil
}

// waiting is what waits for one node on all of its links, and the age of the oldest. The age knows what waits
// for a stream: behind unary calls it says nothing about the node.
func (n *node) waiting() (bytes int, age time.Duration, stalled int) {
	ran := n.set.clock.ran.Load()
	for _, l := range n.links {
		l.mu.Lock()
		bytes += l.load.bytes
		if l.queue.len > 0 {
			age = max(age, time.Duration(ran-l.queue.slot(0).at))
		}
		if l.stalled {
			stalled++
		}
		l.mu.Unlock()
	}
	return bytes, age, stalled
}

// loop is the clock of all links.
func (s *Set) loop() {
	t := time.NewTicker(tick)
	defer t.Stop()
	var scratch due
	for {
		select {
		case <-s.stop:
			return
		case <-t.C:
			s.clock.advance()
			now, ran := s.clock.real.Load(), s.clock.ran.Load()
			t := s.snapshot.Load()
			for _, nodes := range [][]*node{t.nodes, t.gone} { // what the latter owe has its deadline, too
				for _, n := range nodes {
					for _, l := range n.links {
						if l.nextTick.Load() <= ran {
							l.tick(now, ran, &scratch)
						}
					}
				}
			}
			if slices.ContainsFunc(t.gone, (*node).ended) {
				s.forget()
			}
		}
	}
}

// forget lets go of the nodes that are gone and whose links have ended.
func (s *Set) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := *s.snapshot.Load()
	t.gone = slices.DeleteFunc(slices.Clone(t.gone), (*node).ended)
	s.snapshot.Store(&t)
}

func (s *Set) panicked(where string, what any) {
	s.meters.panics.Inc()
	s.log.Error("panic", "where", "link "+where, "panic", fmt.Sprint(what), "stack", string(debug.Stack()))
}

// Drain stops intake, sends what is queued, tells the nodes, and waits until they
// have acknowledged everything or ctx ends. Close must follow.
func (s *Set) Drain(ctx context.Context) error {
	t := s.snapshot.Load()
	nodes := slices.Concat(t.nodes, t.gone)
	for _, n := range nodes {
		for _, l := range n.links {
			l.leave()
		}
	}
	for _, n := range nodes {
		for _, l := range n.links {
			select {
			case <-l.done:
			case <-ctx.Done():
				return fmt.Errorf("drain link to node %q: %w", n.id, context.Cause(ctx))
			}
		}
	}
	return nil
}

// Close ends all links and waits for their goroutines. What is queued is dropped
// and what is not acknowledged is lost.
func (s *Set) Close() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		s.runs.Wait()
		return
	}
	s.closed = true
	t := s.snapshot.Load()
	s.mu.Unlock()
	for _, n := range slices.Concat(t.nodes, t.gone) {
		n.close(engine.DropDraining)
	}
	s.runs.Wait()
	close(s.stop)
	s.clockEnd.Wait()
	for _, n := range t.nodes {
		s.meters.forget(n.id)
	}
	s.meters.unregister()
}

// Stats counts what the links hold at this moment.
type Stats struct {
	Nodes        int // registered
	Reachable    int // with at least one live link
	Able         int // of those, with a link that takes deliveries: not stalled, not draining
	Unscoped     int // nodes that cannot tell tenants apart
	Links        int // shards x nodes
	Live         int // links with an open stream, or with a connection to a node without Deliver
	Unary        int // of those, the latter
	Compressing  int // links whose node has picked a codec
	Plain        int // nodes that do not know TLS, see Config.Migrate
	Stalled      int // links whose node owes an overdue ack
	Queued       int // deliveries that wait to be written
	QueuedBytes  int
	Unacked      int // deliveries that were written
	UnackedBytes int
	Unconfirmed  int // deliveries whose receipts are open
	Nudges       int // without an answer
	Gates        int // whose replays have not ended
	LogReads     int // reads of logs of rooms whose pages are not written
	LogBytes     int // of the marks and pages of logs that wait to be written
}

// Stats walks all links.
func (s *Set) Stats() Stats {
	var t Stats
	for _, n := range s.snapshot.Load().nodes {
		t.Nodes++
		if n.live.Load() > 0 {
			t.Reachable++
		}
		if n.unscoped.Load() {
			t.Unscoped++
		}
		able, plain := false, false
		for _, l := range n.links {
			l.mu.Lock()
			t.Links++
			t.Live += live(l.state)
			t.Queued += l.load.len
			t.QueuedBytes += l.load.bytes
			if l.stalled {
				t.Stalled++
			}
			if l.way != nil {
				l.way.statsLocked(&t)
			}
			able = able || live(l.state) == 1 && l.refusal == engine.Sent
			plain = plain || l.plain
			l.mu.Unlock()
		}
		if able {
			t.Able++
		}
		if plain {
			t.Plain++
		}
	}
	return t
}

// Reachable is the number of nodes with at least one live link.
func (s *Set) Reachable() int {
	count := 0
	for _, n := range s.snapshot.Load().nodes {
		if n.live.Load() > 0 {
			count++
		}
	}
	return count
}

// Alive tells whether a node has a live link and does not drain: it vouches for a node
// that is gone from etcd.
func (s *Set) Alive(id string) bool {
	n, ok := s.snapshot.Load().byID[id]
	return ok && n.live.Load() > 0 && !n.status().Draining
}

// NodeStatus describes one node.
type NodeStatus struct {
	Node
	BootID      string
	Connections int // live links
	Unary       bool
	Stalled     bool
	Draining    bool
}

// Nodes describes all nodes, ordered by id.
func (s *Set) Nodes() []NodeStatus {
	nodes := s.snapshot.Load().nodes
	list := make([]NodeStatus, 0, len(nodes))
	for _, n := range nodes {
		list = append(list, n.status())
	}
	return list
}

// node is what the links to one node share.
type node struct {
	// Static after newNode.
	set      *Set
	id, addr string
	place    *place
	links    []*Link       // by shard
	lines    *rate.Limiter // of the log, see say
	beats    *metrics.PrometheusHistogram
	acks     *histogram.Histogram
	stalls   *metrics.Counter
	breaks   *metrics.Counter

	live atomic.Int64 // links that are up

	unscoped atomic.Bool // the last hello did not have FEATURE_SCOPE, or there is no Deliver

	inPlain sync.Once // said that it does not know TLS

	unsaid atomic.Int64 // lines of the log that were left out since the last one

	mu sync.Mutex
	// Guarded by mu.
	boot      string
	trouble   string // kind of what was logged last, "" while all is well
	told      bool   // that the node is unary
	announces time.Time
}

func newNode(s *Set, n Node) *node {
	fresh := &node{
		set: s, id: n.ID, addr: n.Addr, place: s.dials.place(n.Addr), links: make([]*Link, s.cfg.Shards),
		lines: rate.NewLimiter(rate.Every(lineEvery), s.cfg.Shards+lineBurst),
	}
	for shard := range fresh.links {
		fresh.links[shard] = newLink(s, fresh, shard)
	}
	return fresh
}

// close ends the links for good; why is what becomes of what is queued. It does not wait
// for them. A second close ends at once.
func (n *node) close(why engine.Reason) {
	for _, l := range n.links {
		l.close(why)
	}
}

// ended tells that none of the links runs any more.
func (n *node) ended() bool {
	for _, l := range n.links {
		select {
		case <-l.done:
		default:
			return false
		}
	}
	return true
}

// announcePause bounds how often an announcement cuts a backoff short: a node in a
// crash loop announces itself each time.
const announcePause = 500 * time.Millisecond

// announced makes links that are down try again.
func (n *node) announced() {
	n.mu.Lock()
	now := time.Now()
	recent := now.Sub(n.announces) < announcePause
	if !recent {
		n.announces = now
	}
	n.mu.Unlock()
	if recent {
		return
	}
	for _, l := range n.links {
		l.mu.Lock()
		isDown := l.state == down
		l.mu.Unlock()
		if isDown {
			l.retryNow()
		}
	}
}

// A node brings about one line of the log in lineEvery for long, whatever it does. Before,
// it has one for each of its links, which may all notice the same, and lineBurst more.
const (
	lineEvery = 10 * time.Second
	lineBurst = 8
)

// say tells whether to log what the node has done, and how many lines were left out before.
func (n *node) say() (unreported int64, ok bool) {
	if !n.lines.Allow() {
		n.unsaid.Add(1)
		return 0, false
	}
	return n.unsaid.Swap(0), true
}

// booted notes the boot id of a hello and tells whether the node has restarted.
func (n *node) booted(boot string) bool {
	n.mu.Lock()
	was := n.boot
	n.boot = plain.Line(boot, textMax)
	now := n.boot
	n.mu.Unlock()
	if was == "" || was == now {
		return false
	}
	if left, ok := n.say(); ok {
		n.set.log.Info("node has restarted", "node", n.id, "addr", n.addr, "unreported", left)
	}
	return true
}

// reachable logs that the node can be pushed to: at first, and after unreachable has logged
// the opposite.
func (n *node) reachable(isUnary bool) {
	n.mu.Lock()
	was := n.trouble
	n.trouble = "none"
	tell := isUnary && !n.told
	n.told = n.told || isUnary
	n.mu.Unlock()
	if tell {
		n.set.log.Info("node has no Deliver, served over unary calls", "node", n.id, "addr", n.addr)
	}
	if was != "none" {
		n.set.log.Info("node reachable", "node", n.id, "addr", n.addr)
	}
}

// unreachable logs why the node cannot be pushed to, once for each kind of cause. What say
// does not allow is logged with a later attempt, should it still be so.
func (n *node) unreachable(err error) {
	kind := cmp.Or(status.Code(err).String(), "none")
	for _, known := range []error{errWrongNode, errVersion, errCodec, errHandshake, errNobody, errDialTimeout, errNoTurn, errViolation, errDrained, errSilent, errOwing, errWire} {
		if errors.Is(err, known) {
			kind = known.Error()
		}
	}
	n.mu.Lock()
	tell, left := n.trouble != kind, int64(0)
	if tell {
		left, tell = n.say()
	}
	if tell {
		n.trouble = kind
	}
	n.mu.Unlock()
	if tell {
		n.set.log.Warn("node not reachable", "node", n.id, "addr", n.addr, "error", plain.Line(err.Error(), textMax), "unreported", left)
	}
}

func (n *node) status() NodeStatus {
	n.mu.Lock()
	st := NodeStatus{Node: Node{n.id, n.addr}, BootID: n.boot, Connections: int(n.live.Load())}
	n.mu.Unlock()
	for _, l := range n.links {
		l.mu.Lock()
		st.Unary = st.Unary || l.state == unary
		st.Stalled = st.Stalled || l.stalled
		st.Draining = st.Draining || l.state == draining
		l.mu.Unlock()
	}
	return st
}
