package engine

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// protocol is a node, a client, a Controller and a store that do their part of the protocol of
// stored messages, each step after a random time. One user connects, leaves and moves; what a
// connection gets from the store comes before what is pushed to it meanwhile (its gate).
type protocol struct {
	w   *world
	ctx context.Context //nolint:containedctx // of the test

	mu sync.Mutex
	// Guarded by mu.
	rng      *rand.Rand
	ids      []string // by place in the store, less one
	store    []storedMessage
	conn     *protocolConn
	got      []string // at the client, in order, with repeats
	promised map[string]Result
	steps    []string // "append m", "look-up", "nudge m", "taken m", "closed m"
}

type storedMessage struct {
	id  string
	seq uint64
}

type protocolConn struct {
	node    string
	alive   bool
	gate    bool // closed: direct pushes are held behind the replay
	reading bool
	sent    uint64
	queue   []protocolItem // to be written
	held    []protocolItem
	writing bool
}

type protocolItem struct {
	id  string
	seq uint64    // 0: live
	d   *Delivery // of a live one
}

// pause is a random while; mu is not held.
func (x *protocol) pause(most time.Duration) {
	x.mu.Lock()
	d := time.Duration(x.rng.Int64N(int64(most)))
	x.mu.Unlock()
	time.Sleep(d)
}

func (x *protocol) note(format string, a ...any) {
	x.steps = append(x.steps, fmt.Sprintf(format, a...))
}

// AppendLog implements Spool.
func (x *protocol) AppendLog(_ *Stored, _ time.Time, done func(Place, error)) {
	done(Place{}, ErrSpoolDown)
}

// Append implements Spool.
func (x *protocol) Append(m *Stored, users []string, _ time.Time, done func([]Spooled)) {
	go func() {
		x.pause(10 * time.Millisecond)
		x.mu.Lock()
		x.ids = append(x.ids, m.MessageID)
		seq := uint64(len(x.ids))
		x.store = append(x.store, storedMessage{m.MessageID, seq})
		x.mu.Unlock()
		x.pause(10 * time.Millisecond)
		x.mu.Lock()
		x.note("append %s", m.MessageID)
		x.mu.Unlock()
		done([]Spooled{{Seq: seq}})
	}()
}

// answer is the node's reader.
func (x *protocol) answer(node string, d *Delivery) {
	x.mu.Lock()
	c := x.conn
	if c == nil || !c.alive || c.node != node {
		x.mu.Unlock()
		_, _ = d.Ack(Ack{NotHere: []string{"u"}})
		return
	}
	item := protocolItem{id: d.Options().MessageID, d: d}
	_, _ = d.Ack(Ack{Delivered: 1, Pending: 1})
	if c.gate {
		c.held = append(c.held, item)
	} else {
		c.queue = append(c.queue, item)
	}
	x.mu.Unlock()
	x.write(c)
}

// write is the connection's writer and the client at its end.
func (x *protocol) write(c *protocolConn) {
	x.mu.Lock()
	busy := c.writing
	c.writing = true
	x.mu.Unlock()
	if busy {
		return
	}
	go func() {
		for x.writeOne(c) {
			x.replayOn(c)
		}
	}()
}

// writeOne has the client get and acknowledge the first of the queue. False means that there is none, or
// that the connection is gone.
func (x *protocol) writeOne(c *protocolConn) bool {
	alive := func() bool {
		if !c.alive || len(c.queue) == 0 {
			c.writing = false
			x.mu.Unlock()
			return false
		}
		return true
	}
	x.mu.Lock()
	if !alive() {
		return false
	}
	item := c.queue[0]
	x.mu.Unlock()
	x.pause(3 * time.Millisecond)
	x.mu.Lock()
	if !alive() {
		return false
	}
	x.got = append(x.got, item.id)
	x.mu.Unlock()
	x.pause(3 * time.Millisecond)
	x.mu.Lock()
	if !alive() {
		return false
	}
	c.queue = c.queue[1:]
	if item.d == nil {
		x.store = slices.DeleteFunc(x.store, func(s storedMessage) bool { return s.seq <= item.seq })
	}
	x.mu.Unlock()
	if item.d != nil {
		_ = item.d.Receipt(1, nil, true)
	}
	return true
}

// replayLocked closes the gate and reads the store until nothing is left.
func (x *protocol) replayLocked(c *protocolConn) {
	c.gate = true
	if c.reading {
		return // it reads until nothing is left
	}
	c.reading = true
	go func() {
		x.pause(10 * time.Millisecond)
		x.replayOn(c)
	}()
}

// replayOn sends the next page, or opens the gate.
func (x *protocol) replayOn(c *protocolConn) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !c.alive || !c.reading || slices.ContainsFunc(c.queue, func(i protocolItem) bool { return i.d == nil }) {
		return
	}
	for _, s := range x.store {
		if s.seq > c.sent {
			c.queue = append(c.queue, protocolItem{id: s.id, seq: s.seq})
			c.sent = s.seq
		}
	}
	if !slices.ContainsFunc(c.queue, func(i protocolItem) bool { return i.d == nil }) {
		c.queue = append(c.queue, c.held...)
		c.held, c.gate, c.reading = nil, false, false
	}
	go x.write(c)
}

func (x *protocol) connect() {
	x.mu.Lock()
	c := &protocolConn{node: nodeIDs[x.rng.IntN(2)], alive: true, gate: true}
	x.conn = c
	x.mu.Unlock()
	x.pause(5 * time.Millisecond)
	x.w.mu.Lock()
	x.w.users["u"] = []string{c.node}
	x.w.mu.Unlock()
	x.pause(5 * time.Millisecond)
	x.mu.Lock()
	x.replayLocked(c)
	x.mu.Unlock()
}

func (x *protocol) leave() {
	x.mu.Lock()
	c := x.conn
	c.alive, x.conn = false, nil
	given := slices.Concat(c.queue, c.held)
	x.mu.Unlock()
	for _, item := range given {
		if item.d != nil {
			_ = item.d.Receipt(0, []string{"u"}, true)
		}
	}
	x.pause(5 * time.Millisecond)
	x.w.mu.Lock()
	delete(x.w.users, "u")
	x.w.mu.Unlock()
}

// run lets two callers push one after the other while the user comes and goes, and at last comes
// and stays. It says what is wrong in the end.
func (x *protocol) run(e *Engine) error {
	var all sync.WaitGroup
	for caller := range 2 {
		all.Go(func() {
			for k := range 8 {
				id := fmt.Sprintf("%d-%d", caller, k)
				p := toUser("u")
				p.Payload = []byte(id)
				r, err := e.Do(x.ctx, with(p, Options{MessageID: id, ClientAck: true, Store: true}))
				x.mu.Lock()
				if err != nil {
					x.note("error %s: %v", id, err)
				}
				x.promised[id] = r
				x.note("closed %s", id)
				x.mu.Unlock()
				x.pause(60 * time.Millisecond)
			}
		})
	}
	all.Go(func() {
		for range 3 {
			x.pause(50 * time.Millisecond)
			x.connect()
			x.pause(150 * time.Millisecond)
			x.leave()
		}
		x.pause(50 * time.Millisecond)
		x.connect()
	})
	all.Wait()
	time.Sleep(time.Second)
	x.mu.Lock()
	defer x.mu.Unlock()
	for id, r := range x.promised {
		if r.Delivered+r.Stored != 1 || len(r.NodeFailures) > 0 || r.check() != nil {
			return fmt.Errorf("%s: %+v", id, r)
		}
		if !slices.Contains(x.got, id) {
			return fmt.Errorf("lost: %s, answered with %+v", id, r)
		}
	}
	for caller := range 2 {
		for k := range 7 {
			a, b := fmt.Sprintf("%d-%d", caller, k), fmt.Sprintf("%d-%d", caller, k+1)
			if slices.Index(x.got, a) > slices.Index(x.got, b) {
				return fmt.Errorf("order: %s before %s", b, a)
			}
		}
	}
	return x.stepsInOrder()
}

// stepsInOrder holds that the books of a stored message close behind its append, a look-up that
// began after that, and the nudges that it led to.
func (x *protocol) stepsInOrder() error {
	for id, r := range x.promised {
		if r.Stored == 0 {
			continue
		}
		appended, closed := slices.Index(x.steps, "append "+id), slices.Index(x.steps, "closed "+id)
		lookedUp := -1
		if appended >= 0 && closed > appended {
			lookedUp = slices.Index(x.steps[appended:closed], "look-up")
		}
		if lookedUp < 0 {
			return fmt.Errorf("%s was not looked up between %d and %d of %v", id, appended, closed, x.steps)
		}
		nudge, taken := slices.Index(x.steps, "nudge "+id), slices.Index(x.steps, "taken "+id)
		if nudge >= 0 && (nudge < appended+lookedUp || taken < nudge || closed < taken) {
			return fmt.Errorf("%s: nudge %d, taken %d, closed %d of %v", id, nudge, taken, closed, x.steps)
		}
	}
	return nil
}

// TestStoredMessagesReachWhoeverConnects runs the protocol under random schedules, and with a part of the
// engine's half left out, which has to be noticed.
func TestStoredMessagesReachWhoeverConnects(t *testing.T) {
	const schedules = 150
	for name, tt := range map[string]struct {
		nudge func(x *protocol, taken func()) // nil: as designed
		wrong bool
	}{
		"as designed":       {},
		"nudges do nothing": {func(_ *protocol, taken func()) { taken() }, true},
	} {
		t.Run(name, func(t *testing.T) {
			wrong, nudges := 0, 0
			for seed := range uint64(schedules) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld()
					x := &protocol{w: w, rng: rand.New(rand.NewPCG(seed, 7)), promised: map[string]Result{}}
					w.config.Spool, x.ctx = x, t.Context()
					w.delay = func() {
						x.mu.Lock()
						x.note("look-up")
						x.mu.Unlock()
						x.pause(4 * time.Millisecond)
					}
					for _, id := range nodeIDs {
						q := make(chan func(), 1000)
						w.nodes[id].answer = func(d *Delivery) { q <- func() { x.answer(id, d) } }
						w.nodes[id].nudge = func(_ string, seq uint64, done func(bool)) {
							x.mu.Lock()
							m := x.ids[seq-1]
							x.note("nudge %s", m)
							nudges++
							x.mu.Unlock()
							q <- func() {
								x.mu.Lock()
								if c := x.conn; c != nil && c.alive && c.node == id && tt.nudge == nil {
									x.replayLocked(c)
								}
								x.note("taken %s", m)
								x.mu.Unlock()
								done(true)
							}
						}
						ctx := t.Context()
						go func() { // the node's reader, in order
							for {
								select {
								case f := <-q:
									x.pause(3 * time.Millisecond)
									f()
								case <-ctx.Done():
									return
								}
							}
						}()
					}
					e := w.engine(t)
					if err := x.run(e); err != nil {
						wrong++
						if !tt.wrong {
							t.Errorf("seed %d: %v\n%v", seed, err, x.got)
						}
					}
				})
			}
			if tt.wrong && wrong == 0 || nudges == 0 {
				t.Errorf("%d of %d schedules went wrong, with %d nudges", wrong, schedules, nudges)
			}
			t.Logf("%d of %d schedules went wrong, with %d nudges", wrong, schedules, nudges)
		})
	}
}
