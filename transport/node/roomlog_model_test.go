package node

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/push-manager/push-manager/internal/position"
	pubsub "github.com/push-manager/push-manager/proto"
)

// The logs of rooms under random schedules: three members who move between two nodes, three managers that share one log, end streams
// and lose frames. Streams, cursors and inboxes are those of this package, managers and the Controller a model of what theirs have
// to do. Time passes as the schedule says.

// logVariant is what is done wrongly.
type logVariant struct {
	highestSeen  bool // a client's position is the last place that it has seen
	earlyRead    bool // what is read is what there was before the member joined
	noComparison bool // marks name nothing
	heldForgot   bool // what is held is not noted
}

const (
	logModelPushes     = 6 // of each of two callers
	logModelPartitions = 2
)

type logEntry struct {
	seq  uint64
	id   string
	room string
}

type logWorld struct {
	world

	v       logVariant
	wait    func(func() bool) // of the process that runs
	logs    [logModelPartitions][]logEntry
	nodes   [2]*Server
	users   [2]*Users[*modelReader]
	links   [3][2]*logLink
	present map[*modelReader]bool // the Controller's view
	calm    bool                  // nothing fails any more
	clients []*modelClient
	twice   int
}

// modelClient is a member over its connections.
type modelClient struct {
	user     string
	got      map[string]bool
	position string
	seen     [logModelPartitions]uint64
}

// modelReader is one of its connections.
type modelReader struct {
	w      *logWorld
	client *modelClient
	node   int
	cursor *Cursor
	desk   *desk
	alive  bool
	out    []string // frames and positions, in the order in which they are written
	joined [logModelPartitions]uint64
}

func (c *modelReader) Deliver(m *Message) Outcome { return c.DeliverLasting(m, nil) }

func (c *modelReader) DeliverLasting(m *Message, conf *Confirmation) Outcome {
	c.w.wait(now)
	switch {
	case !c.alive:
		return NotHere
	case c.cursor.Holds(m):
		if c.w.v.heldForgot {
			c.forget(m.RoomID)
			return Delivered
		}
		return Failed
	case !c.w.calm && c.w.r.IntN(8) == 0:
		return Failed // Its queue is full.
	}
	out := c.desk.offer(m, conf)
	c.desk.write(len(c.desk.queue))
	for _, e := range c.desk.wire {
		c.out = append(c.out, "m"+e.Frame)
	}
	c.desk.wire = nil
	return out
}

func (c *modelReader) forget(room string) {
	if at, is := c.cursor.find(room); is {
		up := c.cursor.rooms[at].up
		up.low, up.high, up.late = 0, 0, false
	}
}

func (c *modelReader) Resume(position string) bool {
	c.w.wait(now)
	if !c.w.calm && c.w.r.IntN(8) == 0 {
		return false
	}
	c.out = append(c.out, "p"+position)
	return true
}

func (c *modelReader) Gap(room string) bool {
	c.w.broken = fmt.Errorf("a gap in %s", room)
	return true
}

// logLink is a manager's stream to a node.
type logLink struct {
	w       *logWorld
	pm      string
	node    int
	st      *stream
	out     outgoing
	next    uint64
	frames  []*pubsub.DeliverRequest
	follows bool
	after   [logModelPartitions]uint64
	reads   []*pubsub.LogRead
}

func (w *logWorld) partition(room string) int { return int(room[0]-'a') % logModelPartitions }

func (w *logWorld) head(p int) uint64 {
	if n := len(w.logs[p]); n > 0 {
		return w.logs[p][n-1].seq
	}
	return 100
}

// begin opens the stream anew.
func (l *logLink) begin() {
	s := l.w.nodes[l.node]
	l.st = &stream{server: s, acks: newAcks(1<<20, s.online, &s.count), next: 1, aud: audiences{byID: map[uint32]*audience{}}}
	l.next, l.frames, l.follows, l.reads = 1, nil, false, nil
	s.roomLogs.join(l.st, &pubsub.Hello{InstanceId: l.pm, Features: logFeatures}, time.Now())
}

func (l *logLink) run() {
	w := l.w
	w.spawn(func(wait func(func() bool)) { // the node's reader
		for {
			wait(func() bool { return len(l.frames) > 0 })
			f, st := l.frames[0], l.st
			l.frames = l.frames[1:]
			b, err := f.MarshalVT()
			if err == nil {
				err = st.take(b)
			}
			if err != nil {
				w.broken = err
				return
			}
		}
	})
	w.spawn(func(wait func(func() bool)) { // what the node says
		for {
			wait(func() bool {
				o := &l.st.acks.replay
				return len(l.st.acks.counts)+len(o.reads) > 0 || o.follow != nil
			})
			l.st.acks.take(&l.out)
			r := &l.out.response
			if f := r.LogFollow; f != nil {
				l.follows = true
				for p := range l.after {
					if l.after[p] = w.head(p); f.GetEpoch() == testEpoch {
						l.after[p] = f.GetAfter()[p]
					}
					l.mark(p, l.after[p])
				}
			}
			l.reads = append(l.reads, r.LogReads...)
		}
	})
	w.spawn(func(wait func(func() bool)) { // marks
		for {
			wait(func() bool { return l.follows && (w.head(0) > l.after[0] || w.head(1) > l.after[1]) })
			p := w.r.IntN(logModelPartitions)
			to := l.after[p]
			for _, e := range w.logs[p] {
				if e.seq > to && w.r.IntN(3) > 0 {
					to = e.seq
				}
			}
			if to > l.after[p] {
				l.mark(p, to)
			}
		}
	})
	w.spawn(func(wait func(func() bool)) { // pages
		for {
			wait(func() bool { return len(l.reads) > 0 })
			read := l.reads[0]
			l.reads = l.reads[1:]
			l.frames = append(l.frames, &pubsub.DeliverRequest{LogPages: []*pubsub.LogPage{l.page(read)}})
		}
	})
}

func (l *logLink) mark(p int, to uint64) {
	k := &pubsub.LogMark{Partition: uint32(p), Partitions: logModelPartitions, Epoch: testEpoch, After: l.after[p], Seq: to}
	rooms := map[string][]uint64{}
	for _, e := range l.w.logs[p] {
		if e.seq > l.after[p] && e.seq <= to && !l.w.v.noComparison {
			rooms[e.room] = append(rooms[e.room], e.seq)
		}
	}
	for room, seqs := range rooms {
		k.Rooms = append(k.Rooms, &pubsub.LogRoom{RoomId: room, Seqs: seqs})
	}
	l.after[p] = to
	l.frames = append(l.frames, &pubsub.DeliverRequest{LogMarks: []*pubsub.LogMark{k}})
}

func (l *logLink) page(read *pubsub.LogRead) *pubsub.LogPage {
	w := l.w
	if !w.calm && w.r.IntN(10) == 0 {
		return &pubsub.LogPage{Gate: read.GetGate(), Error: "no"}
	}
	room := read.GetRoomId()
	p := w.partition(room)
	page := &pubsub.LogPage{Gate: read.GetGate(), Epoch: testEpoch, Partition: uint32(p), Seq: w.head(p)}
	if w.v.earlyRead {
		page.Seq = w.earlyHead(l.node, p)
	}
	for _, e := range w.logs[p] {
		if e.room != room || e.seq <= read.GetAfter()[p] || e.seq > page.Seq {
			continue
		}
		if len(page.Entries) == 3 {
			page.More, page.Seq = true, page.Entries[2].GetLog().GetSeq()
			break
		}
		page.Entries = append(page.Entries, w.delivery(p, e))
	}
	return page
}

// earlyHead is where the log was right before the last member came that waits for what it has.
func (w *logWorld) earlyHead(node, p int) (head uint64) {
	for c := range w.present {
		if c.node == node && c.alive && c.cursor.holding.Load() > 0 {
			head = max(head, c.joined[p])
		}
	}
	if head == 0 {
		return w.head(p)
	}
	return head
}

func (w *logWorld) delivery(p int, e logEntry, users ...string) *pubsub.Delivery {
	d := lasting(e.id, users...)
	d.RoomId = e.room
	d.Log = &pubsub.LogPosition{Partition: uint32(p), Seq: e.seq, Epoch: testEpoch}
	return d
}

// push is what a manager does with a push to a room.
func (w *logWorld) push(pm int, id, room string, wait func(func() bool)) {
	p := w.partition(room)
	wait(now)
	e := logEntry{seq: w.head(p) + 1 + w.r.Uint64N(3), id: id, room: room}
	w.logs[p] = append(w.logs[p], e)
	wait(now) // its acknowledgement
	for n := range w.nodes {
		var users []string
		for c := range w.present {
			if c.node == n {
				users = append(users, c.client.user)
			}
		}
		slices.Sort(users)
		if len(users) == 0 || w.r.IntN(6) == 0 {
			continue // nobody is there, as far as the manager knows; or the frame is lost
		}
		wait(now)
		l := w.links[pm][n]
		l.frames = append(l.frames, &pubsub.DeliverRequest{FirstSeq: l.next, Deliveries: []*pubsub.Delivery{w.delivery(p, e, users...)}})
		l.next++
	}
}

func (w *logWorld) connect(client *modelClient, wait func(func() bool)) *modelReader {
	c := &modelReader{w: w, client: client, node: w.r.IntN(2), desk: newDesk(false), alive: true}
	cursor, err := w.nodes[c.node].Cursor(client.user, c, client.position)
	if err != nil {
		w.broken = err
		return c
	}
	c.cursor = cursor
	w.users[c.node].Add(client.user, c)
	for _, room := range []string{"a", "b"} {
		if w.v.earlyRead {
			c.joined[w.partition(room)] = w.head(w.partition(room))
			wait(now)
		}
		cursor.Join(room)
		wait(now)
	}
	w.present[c] = true
	w.spawn(func(wait func(func() bool)) { // the writer, and the client at its other end
		had := map[string]bool{}
		for {
			wait(func() bool { return !c.alive || len(c.out) > 0 })
			if !c.alive {
				return
			}
			frame := c.out[0]
			c.out = c.out[1:]
			if frame[0] == 'p' {
				if !w.v.highestSeen {
					client.position = frame[1:]
				}
				continue
			}
			if had[frame[1:]] {
				w.twice++
			}
			had[frame[1:]] = true
			client.take(w, frame[1:])
		}
	})
	return c
}

func (client *modelClient) take(w *logWorld, id string) {
	client.got[id] = true
	for p := range w.logs {
		for _, e := range w.logs[p] {
			if e.id == id {
				client.seen[p] = max(client.seen[p], e.seq)
			}
		}
	}
	if w.v.highestSeen {
		at := position.Position{Epoch: testEpoch}
		for p, seq := range client.seen {
			at.Places = append(at.Places, position.Place{Partition: uint32(p), Seq: seq})
		}
		client.position = at.String()
	}
}

func (w *logWorld) drop(c *modelReader, wait func(func() bool)) {
	c.alive = false
	w.users[c.node].Remove(c.client.user, c)
	c.desk.inbox.Close()
	c.cursor.Close()
	wait(now) // The Controller hears of it later.
	delete(w.present, c)
}

// settled tells that every node with members knows of everything, and no member is behind.
func (w *logWorld) settled() bool {
	for n, s := range w.nodes {
		r := s.roomLogs
		if r.behind > 0 || len(r.dirty) > 0 || len(r.pages) > 0 || len(r.reads) > 0 {
			return false
		}
		for p := range w.logs {
			if r.total.Load() > 0 && (!r.ready || r.log[p].place < w.head(p)) {
				return false
			}
		}
		for pm := range w.links {
			if len(w.links[pm][n].frames) > 0 {
				return false
			}
		}
	}
	for c := range w.present {
		if len(c.out) > 0 {
			return false
		}
	}
	return true
}

// run lets processes run, one step of a random one at a time, until all is settled.
func (w *logWorld) run() bool {
	var ready []*proc
	for range 40_000 {
		if w.calm && w.settled() || w.broken != nil {
			return true
		}
		if w.r.IntN(4) == 0 {
			time.Sleep(time.Duration(w.r.IntN(60)) * time.Millisecond)
		}
		ready = ready[:0]
		for _, p := range w.procs {
			if p.cond() {
				ready = append(ready, p)
			}
		}
		p := ready[w.r.IntN(len(ready))]
		w.wait = func(c func() bool) { p.wait(c) } // It is set with the first step.
		if c, ok := p.next(); ok {
			p.cond = c
		} else {
			w.procs = slices.DeleteFunc(w.procs, func(other *proc) bool { return other == p })
		}
	}
	return false
}

func logSchedule(tb testing.TB, v logVariant, seed uint64) (twice int, err error) {
	tb.Helper()
	w := &logWorld{v: v, present: map[*modelReader]bool{}}
	w.r = rand.New(rand.NewPCG(seed, 1))
	defer func() {
		for _, p := range w.procs {
			p.stop()
		}
	}()
	for n := range w.nodes {
		w.users[n] = NewLastingUsers[*modelReader](logFeatures...)
		s, err := New(Config{NodeID: fmt.Sprint(n), Sessions: w.users[n]})
		if err != nil {
			tb.Fatal(err)
		}
		defer s.Close()
		w.nodes[n] = s
		s.roomLogs.looping = true // The model is the loop.
		s.roomLogs.turn = w.r.Uint64()
		for pm := range w.links {
			l := &logLink{w: w, pm: fmt.Sprint(pm), node: n}
			w.links[pm][n] = l
			l.begin()
			l.run()
		}
		w.spawn(func(wait func(func() bool)) {
			for {
				wait(now)
				s.roomLogs.look(time.Now())
				if read := s.roomLogs.nextPage(); read != nil {
					s.roomLogs.handOut(read)
				}
				s.roomLogs.tell(time.Now())
			}
		})
	}
	w.spawn(func(wait func(func() bool)) { // streams that end
		for !w.calm {
			for range w.r.IntN(600) {
				wait(now)
			}
			l := w.links[w.r.IntN(3)][w.r.IntN(2)]
			if w.calm {
				continue
			}
			w.nodes[l.node].roomLogs.part(l.st, time.Now())
			l.begin()
		}
	})
	finished := 0
	var ids []string
	for caller := range 2 {
		w.spawn(func(wait func(func() bool)) {
			for k := range logModelPushes {
				id := fmt.Sprintf("%d-%d", caller, k)
				ids = append(ids, id)
				w.push(w.r.IntN(3), id, []string{"a", "b"}[w.r.IntN(2)], wait)
				for range w.r.IntN(150) {
					wait(now)
				}
			}
			finished++
		})
	}
	start := position.Position{Epoch: testEpoch}
	for p := range w.logs {
		start.Places = append(start.Places, position.Place{Partition: uint32(p), Seq: 100})
	}
	for i := range 3 {
		client := &modelClient{user: fmt.Sprint("user-", i), got: map[string]bool{}, position: start.String()}
		client.seen = [logModelPartitions]uint64{100, 100}
		w.clients = append(w.clients, client)
		w.spawn(func(wait func(func() bool)) {
			for range 3 {
				c := w.connect(client, wait)
				for range w.r.IntN(500) {
					wait(now)
				}
				w.drop(c, wait)
				for range w.r.IntN(50) {
					wait(now)
				}
			}
			w.connect(client, wait) // and stays
			if finished++; finished == 5 {
				w.calm = true
			}
			for finished < 5 {
				wait(now)
			}
			w.calm = true
		})
	}
	switch done := w.run(); {
	case w.broken != nil:
		return w.twice, w.broken
	case !done:
		return w.twice, errors.New("does not come to rest")
	}
	for _, client := range w.clients {
		for _, id := range ids {
			if !client.got[id] {
				return w.twice, fmt.Errorf("%w: %s never got %s", errLost, client.user, id)
			}
		}
	}
	return w.twice, nil
}

func TestMembersWhoMoveMissNothingOfTheLogs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for seed := range uint64(60) {
			twice, err := logSchedule(t, logVariant{}, seed)
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if twice > 0 {
				t.Fatalf("seed %d: a connection was given %d messages twice", seed, twice)
			}
		}
	})
}

// TestEachPartOfTheLogsIsNeeded does one thing wrongly at a time: the schedules above must then find it.
func TestEachPartOfTheLogsIsNeeded(t *testing.T) {
	for name, v := range map[string]logVariant{
		"position is the highest seen":      {highestSeen: true},
		"read before the member has joined": {earlyRead: true},
		"marks are not compared":            {noComparison: true},
		"what is held is forgotten":         {heldForgot: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				for seed := range uint64(3000) {
					if _, err := logSchedule(t, v, seed); err != nil {
						t.Logf("seed %d: %v", seed, err)
						if !errors.Is(err, errLost) {
							t.Fatal(err)
						}
						return
					}
				}
				t.Error("nothing was lost")
			})
		})
	}
}
