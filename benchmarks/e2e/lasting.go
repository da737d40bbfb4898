package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/discovery"
	"github.com/push-manager/push-manager/transport/node"
)

// The bars on lasting delivery: what message ids, acknowledgements by clients and the store cost by a push without.

// idsSuite has pushes to a room of a hundred clients and to one client at a time, all of whom can
// acknowledge.
func idsSuite(ctx context.Context, b *Bench) (*Result, error) {
	clients, err := b.role("audience", none{})
	if err != nil {
		return nil, err
	}
	defer clients.end()
	s := &stack{name: "ids", shared: map[string]*child{}, rooms: map[int]*served{}}
	if err := b.startStack(ctx, s, b.binary); err != nil {
		return nil, err
	}
	few, _ := b.crowds()
	room := s.rooms[few]
	room.Acks = true
	if err := clients.call(ctx, "connect", room.Audience, nil); err != nil {
		return nil, err
	}
	turn := b.span(clientTurn)
	type load struct {
		what string
		of   Pushing
	}
	loads := []load{
		{"PushToUser", Pushing{Rate: 2000, Users: true, Duration: turn}},
		{fmt.Sprintf("PushToRoom of %d", few), Pushing{Rate: 60, Duration: turn}},
	}
	var names []string
	turns := map[string]func() (*Turn, error){}
	for _, l := range loads {
		for _, way := range []struct {
			name      string
			ids, acks bool
		}{{"plain", false, false}, {"plain again", false, false}, {"ids", true, false}, {"acks", true, true}} {
			p := l.of
			p.IDs, p.Acks = way.ids, way.acks
			name := l.what + ", " + way.name
			turns[name] = func() (*Turn, error) { return b.clientTurn(ctx, clients, s, room, p) }
			names = append(names, name)
			if _, err := turns[name](); err != nil { // warms it
				return nil, err
			}
		}
	}
	table, err := b.turns("ids", names, func(name string) (*Turn, error) { return turns[name]() })
	if err != nil {
		return nil, err
	}
	r := &Result{Suite: "ids"}
	for _, name := range names {
		r.Rows = append(r.Rows, Row{name, perDelivery(func(of func(*Turn) float64) Figure { return Median(table[name], of) })})
	}
	for _, l := range loads {
		plain := table[l.what+", plain"]
		for _, bar := range []struct {
			way, part string
			limit     float64
		}{{"ids", "push-manager", 1.05}, {"ids", "gateway", 1.10}, {"acks", "push-manager", 1.3}, {"acks", "gateway", 1.3}} {
			with := table[l.what+", "+bar.way]
			r.bar(Bar{What: l.what + ", " + bar.way + ": CPU of the " + bar.part + " / plain", Figure: Ratio(with, plain, partOf(bar.part)), Limit: bar.limit, Kind: AtMost}, with, plain)
		}
		again := table[l.what+", plain again"]
		r.bar(Bar{What: "A/A control: CPU of " + l.what + " / the same", Figure: Ratio(again, plain, CPUPerRequest), Limit: 1, Kind: Includes}, again, plain)
	}
	return r, nil
}

// partOf is the CPU time of one process for each delivery, in microseconds.
func partOf(name string) func(*Turn) float64 {
	return func(t *Turn) float64 { return float64(t.Parts[name].Nanoseconds()) / 1e3 / t.Done }
}

// leastStored is how many messages to users who are away are stored in a second, at least, on whatever machine.
const leastStored = 5000

// storeSuite pushes to users whom no Controller knows.
func storeSuite(ctx context.Context, b *Bench) (*Result, error) {
	w, err := b.World(ctx, 1, nil)
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	dir, err := os.MkdirTemp(b.dir, "store-")
	if err != nil {
		return nil, fmt.Errorf("directory for the store: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	pm, err := w.PushManager(ctx, "STORE=embedded", "STORE_DIR="+filepath.Join(dir, "store"), "STORE_MAX_PER_USER=1000000")
	if err != nil {
		return nil, err
	}
	away := Work{Users: "away", UserN: b.userN(), Mix: [3]int{1, 0, 0}, Payload: payload, Store: true}
	load := b.closed(away)
	slots := []Slot{{"stored", pm, load}, {"stored again", pm, load}}
	r, t, err := b.measure(ctx, "store", slots)
	if err != nil {
		return nil, err
	}
	r.bar(Bar{What: "PushToUser to users who are away: stored in a second, embedded", Figure: Median(t["stored"], Rate), Limit: leastStored, Kind: AtLeast}, t["stored"])
	r.bar(Bar{What: "A/A control: CPU of stored / the same", Figure: Ratio(t["stored again"], t["stored"], CPUPerRequest), Limit: 1, Kind: Includes}, t["stored"], t["stored again"])
	return r, nil
}

// reconnectsSuite has a node ask for what is stored for users who have nothing, as one does when
// all of its clients come at once.
func reconnectsSuite(ctx context.Context, b *Bench) (*Result, error) {
	users := 100_000
	if b.opts.Short {
		users = 1000
	}
	w, err := b.World(ctx, 0, nil)
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	asking, err := b.role("asking", w.etcd)
	if err != nil {
		return nil, err
	}
	w.children = append(w.children, asking)
	w.nodes = map[string]string{askingNode: ""}
	dir, err := os.MkdirTemp(b.dir, "store-")
	if err != nil {
		return nil, fmt.Errorf("directory for the store: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	pm, err := w.PushManager(ctx, "STORE=embedded", "STORE_DIR="+filepath.Join(dir, "store"))
	if err != nil {
		return nil, err
	}
	r := &Result{Suite: "reconnects"}
	var seconds []float64
	for range 3 {
		before, err := cpuTime(pm.child.pid())
		if err != nil {
			return nil, err
		}
		if err := asking.call(ctx, "ask", users, nil); err != nil {
			return nil, err
		}
		after, err := cpuTime(pm.child.pid())
		if err != nil {
			return nil, err
		}
		seconds = append(seconds, (after - before).Seconds())
	}
	r.bar(Bar{What: fmt.Sprintf("%d users connect, nothing is stored: CPU seconds of Push-Manager and its store", users), Figure: medianOf(seconds), Limit: 1, Kind: AtMost})
	return r, nil
}

// askingNode is the id of the node of askingRole.
const askingNode = "asking"

// asking is a Connect-Node that has no users and asks for what is stored for many.
type asking struct {
	pubsub.UnimplementedConnectNodeServiceServer

	streams chan grpc.BidiStreamingServer[pubsub.DeliverRequest, pubsub.DeliverResponse]
	mu      sync.Mutex // held while sending
	ended   chan uint64
	gates   uint64
}

func askingRole(ctx context.Context, p *part) error {
	endpoint, err := roleArg[string]()
	if err != nil {
		return err
	}
	a := &asking{
		streams: make(chan grpc.BidiStreamingServer[pubsub.DeliverRequest, pubsub.DeliverResponse], 64),
		ended:   make(chan uint64, 1<<17),
	}
	l, err := listen(ctx)
	if err != nil {
		return err
	}
	gs := grpc.NewServer(node.ServerOptions()...)
	pubsub.RegisterConnectNodeServiceServer(gs, a)
	var serving sync.WaitGroup
	serving.Go(func() { _ = gs.Serve(l) })
	p.onStop(func() { gs.Stop(); serving.Wait() })
	etcd, err := discovery.NewClient(discovery.ClientConfig{Endpoints: []string{endpoint}})
	if err != nil {
		return err
	}
	p.onStop(func() { _ = etcd.Close() })
	key, err := json.Marshal(map[string]any{"Op": 0, "Addr": l.Addr().String(), "Metadata": map[string]string{"node_id": askingNode}})
	if err != nil {
		return err
	}
	if _, err := etcd.Put(ctx, discovery.ConnectNodePrefix+askingNode, string(key)); err != nil {
		return fmt.Errorf("register: %w", err)
	}
	handle(p, "ask", a.ask)
	return nil
}

// Deliver serves a stream: it says that replays are known, and hears when they end.
func (a *asking) Deliver(stream grpc.BidiStreamingServer[pubsub.DeliverRequest, pubsub.DeliverResponse]) error {
	if _, err := stream.Recv(); err != nil {
		return err
	}
	if err := a.send(stream, &pubsub.DeliverResponse{Hello: &pubsub.HelloReply{
		ProtocolVersion: 1, NodeId: askingNode, BootId: "1", MaxAudienceMembers: 1000, Features: []pubsub.Feature{pubsub.Feature_FEATURE_REPLAY},
	}}); err != nil {
		return err
	}
	select {
	case a.streams <- stream:
	default: // there are enough
	}
	for {
		f, err := stream.Recv()
		if err != nil {
			return err
		}
		if f.GetHeartbeat() != 0 {
			if err := a.send(stream, &pubsub.DeliverResponse{Heartbeat: f.GetHeartbeat()}); err != nil {
				return err
			}
		}
		for _, end := range f.GetReplayEnds() {
			if end.GetError() != "" {
				return fmt.Errorf("gate %d: %s", end.GetGate(), end.GetError())
			}
			a.ended <- end.GetGate()
		}
	}
}

func (a *asking) send(stream grpc.BidiStreamingServer[pubsub.DeliverRequest, pubsub.DeliverResponse], r *pubsub.DeliverResponse) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return stream.Send(r)
}

// ask asks for so many users, and returns when all answers are there.
func (a *asking) ask(ctx context.Context, users int) (none, error) {
	const together = 100 // in a frame
	stream := <-a.streams
	a.streams <- stream
	for i := 0; i < users; i += together {
		r := &pubsub.DeliverResponse{}
		for j := range together {
			a.gates++
			r.Catchups = append(r.Catchups, &pubsub.Catchup{UserId: "back-" + strconv.Itoa(i+j), Gate: a.gates})
		}
		if err := a.send(stream, r); err != nil {
			return none{}, err
		}
	}
	timer := time.NewTimer(maxRun)
	defer timer.Stop()
	for n := range users {
		select {
		case <-a.ended:
		case <-timer.C:
			return none{}, fmt.Errorf("%d of %d replays have ended", n, users)
		case <-ctx.Done():
			return none{}, ctx.Err()
		}
	}
	return none{}, nil
}
