package faultbench

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

type deliverStream = grpc.BidiStreamingServer[pubsub.DeliverRequest, pubsub.DeliverResponse]

// answer is what a scripted node does with one delivery. It starts as what an honest
// node does, and a script may change it.
type answer struct {
	// The delivery.
	seq       uint64
	id        string
	users     []string // nil for everybody
	everybody bool

	take      bool     // the clients who are here get it
	delivered int      // what the ack claims
	notHere   []string // and what its miss does
	failed    []string
	refused   bool
	silent    bool          // there is no ack at all
	after     time.Duration // how long the ack waits
}

// script changes what a node does.
type script func(*answer)

// wireNode is a Connect-Node that speaks Deliver frame by frame, and does with it what
// its script says. It keeps the rules of the protocol otherwise, and notes each breach
// by a Push-Manager.
type wireNode struct {
	pubsub.UnimplementedConnectNodeServiceServer

	// Static after start.
	t     testing.TB
	id    string
	users *clients
	conf  wireConfig

	script atomic.Pointer[script]
	open   atomic.Int64 // streams
	boots  atomic.Int64

	mu sync.Mutex
	// Guarded by mu.
	address  string
	server   *grpc.Server
	ended    chan struct{}
	gate     chan struct{} // closed while the node reads
	breaches []string
}

// wireConfig is what a node is like.
type wireConfig struct {
	server []grpc.ServerOption // after our own
	plain  bool                // without our own, as gRPC comes
	deaf   bool                // answers no heartbeats
}

func newWireNode(t testing.TB, l *ledger, id string, conf wireConfig) *wireNode {
	t.Helper()
	n := &wireNode{t: t, id: id, users: newClients(id, l.arrive), conf: conf, address: freeport.Addr(t), gate: make(chan struct{})}
	close(n.gate)
	n.start()
	t.Cleanup(func() {
		n.stop()
		for _, b := range n.breaches {
			t.Errorf("breach of the protocol at %s: %s", id, b)
		}
	})
	return n
}

// start begins to serve, after a stop as a new process would at the same address.
func (n *wireNode) start() {
	n.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	var listener net.Listener
	eventually(n.t, "listen again", func() (err error) {
		listener, err = net.Listen("tcp", n.address)
		return err
	})
	n.boots.Add(1)
	n.address = listener.Addr().String()
	var options []grpc.ServerOption
	if !n.conf.plain {
		options = append(options,
			grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
			grpc.MaxRecvMsgSize(17<<20),
			// Small: a node that does not read is full soon.
			grpc.StaticStreamWindowSize(64<<10), grpc.StaticConnWindowSize(256<<10),
			grpc.ReadBufferSize(16<<10))
	}
	server, ended := grpc.NewServer(append(append(options, n.conf.server...), grpc.WaitForHandlers(true))...), make(chan struct{})
	pubsub.RegisterConnectNodeServiceServer(server, n)
	n.server, n.ended = server, ended
	go func() {
		defer close(ended)
		_ = server.Serve(listener)
	}()
}

// stop ends the node at once.
func (n *wireNode) stop() {
	n.resume()
	n.mu.Lock()
	server, ended := n.server, n.ended
	n.mu.Unlock()
	server.Stop()
	<-ended
}

// play gives the node a script, nil for an honest one.
func (n *wireNode) play(s script) { n.script.Store(&s) }

// pause makes the node read nothing any more: what it has read before it looks at
// after resume.
func (n *wireNode) pause() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.gate = make(chan struct{})
}

func (n *wireNode) resume() {
	n.mu.Lock()
	defer n.mu.Unlock()
	select {
	case <-n.gate:
	default:
		close(n.gate)
	}
}

func (n *wireNode) breach(format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.breaches = append(n.breaches, fmt.Sprintf(format, args...))
}

// Deliver serves one stream.
func (n *wireNode) Deliver(stream deliverStream) error {
	hello, err := stream.Recv()
	if err != nil {
		return err
	}
	if hello.GetHello().GetProtocolVersion() != 1 {
		n.breach("hello is %v", hello)
	}
	n.open.Add(1)
	defer n.open.Add(-1)
	s := &wireStream{node: n, stream: stream, next: 1, audiences: map[uint32]*audience{}, bell: make(chan struct{}, 1), over: make(chan struct{})}
	s.put(0, &pubsub.DeliverResponse{Hello: &pubsub.HelloReply{
		ProtocolVersion: 1, NodeId: n.id, BootId: fmt.Sprint("boot ", n.boots.Load()),
		MaxAudienceMembers: 100_000, OnlineUsers: uint32(n.users.Online()),
	}})
	var sender sync.WaitGroup
	sender.Go(s.send)
	defer sender.Wait()
	defer close(s.over)
	return s.receive()
}

// wireStream is one stream of a scripted node.
type wireStream struct {
	node   *wireNode
	stream deliverStream
	over   chan struct{}
	bell   chan struct{} // wakes the sender; holds one token

	// Owned by the reader.
	next      uint64
	audiences map[uint32]*audience

	mu sync.Mutex
	// Guarded by mu.
	queue []dueReply // ordered by when they are due
}

type dueReply struct {
	due   time.Time
	reply *pubsub.DeliverResponse
}

// put has a reply sent after a while.
func (s *wireStream) put(after time.Duration, r *pubsub.DeliverResponse) {
	d := dueReply{time.Now().Add(after), r}
	s.mu.Lock()
	at := len(s.queue)
	for at > 0 && s.queue[at-1].due.After(d.due) {
		at--
	}
	s.queue = slices.Insert(s.queue, at, d)
	s.mu.Unlock()
	select {
	case s.bell <- struct{}{}:
	default:
	}
}

func (s *wireStream) send() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		s.mu.Lock()
		wait := time.Hour
		var ready []dueReply
		for len(s.queue) > 0 {
			if wait = time.Until(s.queue[0].due); wait > 0 {
				break
			}
			ready = append(ready, s.queue[0])
			s.queue = s.queue[1:]
			wait = time.Hour
		}
		s.mu.Unlock()
		for _, r := range ready {
			if s.stream.Send(r.reply) != nil {
				return // the reader learns why
			}
		}
		timer.Reset(wait)
		select {
		case <-s.bell:
		case <-timer.C:
		case <-s.over:
			return
		}
	}
}

func (s *wireStream) receive() error {
	for {
		f, err := s.stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		s.node.mu.Lock()
		gate := s.node.gate
		s.node.mu.Unlock()
		select {
		case <-gate:
		case <-s.stream.Context().Done():
			return s.stream.Context().Err()
		}
		if len(f.GetDeliveries()) > 0 && f.GetFirstSeq() != s.next {
			s.node.breach("first_seq is %d, not %d", f.GetFirstSeq(), s.next)
		}
		for _, d := range f.GetDeliveries() {
			s.deliver(d)
			s.next++
		}
		for _, id := range f.GetForgetAudiences() {
			if s.audiences[id] == nil {
				s.node.breach("forgets the unknown audience %d", id)
			}
			delete(s.audiences, id)
		}
		if f.GetHeartbeat() != 0 && !s.node.conf.deaf {
			s.put(0, &pubsub.DeliverResponse{Heartbeat: f.GetHeartbeat(), OnlineUsers: uint32(s.node.users.Online())})
		}
		if len(f.GetNudges())+len(f.GetReplayEnds()) > 0 {
			s.node.breach("a feature that was not offered is used: %v", f)
		}
		if f.GetDrain() {
			return nil
		}
	}
}

// deliver does with one delivery what the script says.
func (s *wireStream) deliver(d *pubsub.Delivery) {
	n := s.node
	if d.GetMessageId() != "" || d.GetPayloadHash() != 0 || d.GetTtlMs() != 0 || d.GetWantAck() || d.GetAckTimeoutMs() != 0 ||
		d.GetCollapseKey() != "" || d.GetReplay() != nil || d.GetSender() != "" {
		n.breach("a feature that was not offered is used: %v", d)
	}
	data := d.GetContent().GetData()
	a := &answer{seq: s.next, id: idOf(data), everybody: d.GetEverybody(), take: true}
	if a.everybody {
		a.delivered = n.users.Online()
	} else {
		a.users = s.resolve(d)
		for _, user := range a.users {
			if n.users.has(user) {
				a.delivered++
			} else {
				a.notHere = append(a.notHere, user)
			}
		}
	}
	if play := n.script.Load(); play != nil && *play != nil {
		(*play)(a)
	}
	if a.take && !a.refused {
		if a.everybody {
			n.users.all(data)
		}
		for _, user := range a.users {
			if !slices.Contains(a.notHere, user) && !slices.Contains(a.failed, user) {
				n.users.take(user, data)
			}
		}
	}
	if a.silent {
		return
	}
	r := &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: a.seq, Delivered: []uint32{uint32(a.delivered)}}}}
	if len(a.notHere)+len(a.failed) > 0 || a.refused {
		r.Misses = []*pubsub.Miss{{Seq: a.seq, NotHere: a.notHere, Failed: a.failed, Refused: a.refused, Reason: "by script"}}
	}
	s.put(a.after, r)
}

type audience struct {
	version uint32
	users   map[string]bool
}

// resolve finds for whom a delivery is.
func (s *wireStream) resolve(d *pubsub.Delivery) []string {
	ref := d.GetAudience()
	if ref == nil {
		if len(d.GetUserIds()) == 0 {
			s.node.breach("nobody is named in %v", d)
		}
		return d.GetUserIds()
	}
	a := s.audiences[ref.GetId()]
	if a == nil {
		a = &audience{users: map[string]bool{}}
		s.audiences[ref.GetId()] = a
	}
	if len(ref.GetJoin())+len(ref.GetLeave()) > 0 {
		a.version++
	}
	for _, user := range ref.GetJoin() {
		a.users[user] = true
	}
	for _, user := range ref.GetLeave() {
		delete(a.users, user)
	}
	if a.version != ref.GetVersion() {
		s.node.breach("audience %d is at version %d, not %d", ref.GetId(), a.version, ref.GetVersion())
	}
	var users []string
	for user := range a.users {
		if !slices.Contains(d.GetExceptUserIds(), user) {
			users = append(users, user)
		}
	}
	slices.Sort(users)
	return users
}
