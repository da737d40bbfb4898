package micro

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/shard"
)

// The world that pushes go to.
const (
	nodes   = 3
	users   = 1024
	members = 100
	roomID  = "room-1"
)

// Rig is an engine with everything in its caches.
type Rig struct {
	shards    *shard.Set
	directory *route.Directory
	engine    *engine.Engine
	payload   []byte
	users     []string
}

// New makes a Rig. Close ends it.
func New() (*Rig, error) {
	r := &Rig{}
	var err error
	if r.shards, err = shard.New(shard.Config{}); err != nil {
		return nil, err
	}
	if r.directory, err = route.New(route.Config{
		Source: source{}, Shards: r.shards.Len(),
		Shard: func(key string) int { return r.shards.For(key).Index() },
		Go:    func(home int, task func()) error { return r.shards.At(home).Go(task) },
	}); err != nil {
		return nil, err
	}
	r.directory.Vouch(time.Now().Add(1000 * time.Hour))
	if r.engine, err = engine.New(engine.Config{Shards: r.shards, Directory: r.directory, Network: newNetwork()}); err != nil {
		return nil, err
	}
	if r.payload, err = proto.Marshal(&pubsub.MessageContent{Data: make([]byte, 128), Timestamp: 1}); err != nil {
		return nil, err
	}
	for i := range users {
		r.users = append(r.users, "user-"+strconv.Itoa(i))
		if err := r.Push(r.make(engine.ToUser, i)); err != nil {
			return nil, err
		}
	}
	return r, r.Push(r.make(engine.ToRoom, 0))
}

// Close ends what the Rig has started.
func (r *Rig) Close(ctx context.Context) error {
	err := r.engine.Drain(ctx)
	r.directory.Close()
	return errors.Join(err, r.shards.Close(ctx))
}

// Pushes makes n pushes, as decoding does.
func (r *Rig) Pushes(kind engine.Kind, n int) []engine.Push {
	all := make([]engine.Push, n)
	for i := range all {
		r.fill(&all[i], kind, i)
	}
	return all
}

func (r *Rig) make(kind engine.Kind, i int) *engine.Push {
	p := new(engine.Push)
	r.fill(p, kind, i)
	return p
}

func (r *Rig) fill(p *engine.Push, kind engine.Kind, i int) {
	p.Kind, p.Payload = kind, r.payload
	p.Content = engine.Content{Present: true, DataLen: 128, Timestamp: 1}
	switch kind {
	case engine.ToUser:
		p.User = r.users[i%len(r.users)]
	case engine.ToRoom:
		p.Room = roomID
	default:
	}
}

var errLost = errors.New("a push was not delivered")

// Push takes a push from validation to its outcome and checks it.
func (r *Rig) Push(p *engine.Push) error {
	res, err := r.engine.Do(context.Background(), p)
	if err == nil && !res.Success() {
		err = errLost
	}
	return err
}

// done is told the end of a push. The network acks within Start, so it is before that
// returns.
type done struct{ wg sync.WaitGroup }

// Complete implements engine.Completer.
func (d *done) Complete(*engine.Push) { d.wg.Done() }

// Start takes a push from validation to its outcome, without waiting for it.
func (r *Rig) Start(p *engine.Push, d *done) error {
	d.wg.Add(1)
	return r.engine.Start(p, d)
}

// warm is how many pushes are made anew before the others use their memory again.
const warm = 16

var errKept = errors.New("a finished push cannot be used again")

// Allocations per push on the warm path, from the decoded push to its outcome, over n
// pushes. As in the push API, a push that is answered is used again.
func (r *Rig) Allocations(kind engine.Kind, n int) (float64, error) {
	all, d := make([]engine.Push, warm), new(done)
	push := func(i int) error {
		r.fill(&all[i%warm], kind, i)
		if err := r.Start(&all[i%warm], d); err != nil {
			return fmt.Errorf("push %d: %w", i, err)
		}
		if !all[i%warm].Reusable() {
			return errKept
		}
		all[i%warm].Reset()
		return nil
	}
	for i := range warm {
		if err := push(i); err != nil {
			return 0, err
		}
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // nobody else allocates meanwhile
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range n {
		if err := push(i); err != nil {
			return 0, err
		}
	}
	d.wg.Wait()
	runtime.ReadMemStats(&after)
	return float64(after.Mallocs-before.Mallocs) / float64(n), nil
}

// source is a Controller that knows everybody.
type source struct{}

// Room implements route.Source.
func (source) Room(_ context.Context, _ string, add func(user, node []byte)) (bool, uint64, error) {
	for i := range members {
		add([]byte("member-"+strconv.Itoa(i)), []byte(nodeID(i)))
	}
	return true, 0, nil
}

// Users implements route.Source.
func (source) Users(_ context.Context, users []string, nodes [][]string) error {
	for i, user := range users {
		nodes[i] = []string{nodeID(len(user) + int(user[len(user)-1]))}
	}
	return nil
}

func nodeID(i int) string { return "connect-node-" + strconv.Itoa(i%nodes) }

// network has links that acknowledge at once.
type network struct {
	byNode map[string]engine.Link
	all    []engine.Link
}

func newNetwork() *network {
	n := &network{byNode: map[string]engine.Link{}}
	for i := range nodes {
		l := link(nodeID(i))
		n.byNode[string(l)] = l
		n.all = append(n.all, l)
	}
	return n
}

// Link implements engine.Network.
func (n *network) Link(_ int, node string) engine.Link { return n.byNode[node] }

// Links implements engine.Network.
func (n *network) Links(int) []engine.Link { return n.all }

type link string

// Node implements engine.Link.
func (l link) Node() string { return string(l) }

// Scopes implements engine.Link.
func (l link) Scopes() bool                             { return true }
func (link) Describe(*engine.Delivery) engine.LinkState { return engine.LinkState{} }

func (l link) Nudge(_ string, _ uint64, done func(bool)) { done(false) }

// Send implements engine.Link.
func (l link) Send(d *engine.Delivery) engine.Reason {
	if time.Now().Before(d.Deadline()) && d.TrySend() {
		_, _ = d.Ack(engine.Ack{Delivered: d.Targets()}) // it tells the truth, so there is no error
	}
	return engine.Sent
}
