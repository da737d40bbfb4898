package link

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
	connectnode "github.com/push-manager/push-manager/transport/node"
)

// lastingGateway is a gateway whose users' names say what becomes of a message for them.
type lastingGateway struct {
	gatewayThat

	mu   sync.Mutex
	last map[string]*connectnode.Options // by user
}

func (g *lastingGateway) Features() []pubsub.Feature { return lasting }

func (g *lastingGateway) DeliverLasting(user string, m *connectnode.Message, c *connectnode.Confirmation) connectnode.Outcome {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.last == nil {
		g.last = map[string]*connectnode.Options{}
	}
	g.last[user] = m.Options
	switch {
	case strings.HasPrefix(user, "acks"):
		c.Expect()
		time.AfterFunc(100*time.Millisecond, c.Acked)
		return connectnode.Pending
	case strings.HasPrefix(user, "leaves"):
		c.Expect()
		time.AfterFunc(200*time.Millisecond, c.GaveUp)
		return connectnode.Pending
	case strings.HasPrefix(user, "silent"):
		c.Expect()
		return connectnode.Pending
	case strings.HasPrefix(user, "again"):
		return connectnode.Duplicate
	case strings.HasPrefix(user, "other"):
		return connectnode.Reused
	case strings.HasPrefix(user, "gone"):
		return connectnode.NotHere
	}
	return connectnode.Delivered
}

func TestClientsOfARealNodeAcknowledge(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := &lastingGateway{}
		w := newWorld(t, Config{Shards: 2})
		w.serveReal("a:1", connectnode.Config{NodeID: "A", Sessions: g})
		w.register("A", "a:1")
		w.up(2)
		push := func(room string, o engine.Options, users ...string) (engine.Result, time.Duration) {
			w.room(room, "A", users...)
			p := w.toRoom(room, "x")
			p.Options = &o
			begun := time.Now()
			return w.do(p), time.Since(begun)
		}
		ask := engine.Options{MessageID: "m", Sender: "s", PayloadHash: 7, TTL: time.Minute, ClientAck: true, AckTimeout: 3 * time.Second}
		if r, took := push("all", ask, "acks1", "acks2", "plain"); r.Delivered != 3 || r.Acked != 2 || took > time.Second {
			t.Errorf("all that can: %+v after %v", r, took)
		}
		synctest.Wait()
		o := g.last["acks1"]
		if o.ID != "m" || o.Sender != "s" || o.PayloadHash != 7 || !o.WantsAck || time.Until(o.Expires) < 50*time.Second || time.Until(o.AckBy) > 3*time.Second {
			t.Errorf("arrived: %+v", o)
		}
		if r, took := push("one leaves", ask, "acks1", "leaves1"); r.Delivered != 1 || r.Acked != 1 || r.Unknown != 1 || took > time.Second {
			t.Errorf("%+v after %v", r, took)
		}
		if r, took := push("one is silent", ask, "acks1", "silent1"); r.Acked != 1 || r.Unknown != 1 || took > 3100*time.Millisecond {
			t.Errorf("%+v after %v", r, took)
		}
		r, _ := push("others", ask, "again1", "again2", "other1", "gone1")
		if r.Delivered != 2 || r.Duplicates != 2 || r.Failed != 1 || r.Offline != 1 || !strings.Contains(reasons(r), engine.DropReused.String()) {
			t.Errorf("%+v", r)
		}
		time.Sleep(2 * receiptsSweep)
		synctest.Wait()
		if st := w.set.Stats(); st.Unconfirmed != 0 || w.set.meters.strikes.Get() != 0 {
			t.Errorf("%+v, %d strikes", st, w.set.meters.strikes.Get())
		}
	})
}

// door is a connection with a gate. It notes what it is told, in order.
type door struct {
	mu   sync.Mutex
	told []string
}

func (d *door) note(what string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.told = append(d.told, what)
}

func (d *door) DeliverLasting(m *connectnode.Message, _ *connectnode.Confirmation) connectnode.Outcome {
	d.note("stored " + string(m.Data))
	m.Options.Taken()
	return connectnode.Delivered
}

func (d *door) Opened() { d.note("opened") }

// A user connects to a real node, gets what is stored, and is nudged for what is stored later.
func TestRealNodeHasWhatIsStoredReplayed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := &replayer{}
		w := newWorld(t, Config{Replayer: r, Shards: 2})
		store := []string{"one", "two"}
		r.then = func(a Asker, gate uint64) {
			go func() {
				for i, text := range store {
					p := w.toUser("u1", text)
					p.Options = &engine.Options{MessageID: text, Replay: &engine.Replay{Node: a.Node(), Gate: gate, Seq: uint64(10 + i), After: uint64(9+i) * uint64(min(i, 1))}}
					if got := w.do(p); got.Delivered != 1 {
						t.Errorf("%s: %+v", text, got)
					}
				}
				a.End(gate, 11, "")
			}()
		}
		s := w.serveReal("a:1", connectnode.Config{NodeID: "A", Sessions: &lastingGateway{}})
		w.register("A", "a:1")
		w.up(2)
		synctest.Wait()
		d := &door{}
		gate := s.Gate("u1", d, 10)
		defer gate.Leave()
		w.room("r", "A", "u1")
		gate.Ready()
		time.Sleep(time.Second)
		synctest.Wait()
		if got := d.told; !slices.Equal(got, []string{"stored one", "stored two", "opened"}) {
			t.Errorf("the connection: %q", got)
		}
		heard := r.heard()
		if len(heard) < 2 || !strings.HasPrefix(heard[0], "A: catchup ") || !strings.HasSuffix(heard[0], " u1 10") || !strings.HasSuffix(heard[len(heard)-1], " 11") {
			t.Errorf("the store: %q", heard)
		}
		// Both are taken, and forgotten. A third is stored for the user, who seemed to be away.
		store = []string{"three"}
		var answer, nobody nudged
		w.set.Link(0, "A").Nudge("u1", 12, answer.done)
		w.set.Link(1, "A").Nudge("nobody", 12, nobody.done)
		time.Sleep(time.Second)
		synctest.Wait()
		answer.is(t, "for the user", true)
		nobody.is(t, "for nobody", true)
		if got := d.told[3:]; !slices.Equal(got, []string{"stored three", "opened"}) {
			t.Errorf("after the nudge: %q", got)
		}
		if st := w.set.Stats(); st.Gates != 0 || st.Nudges != 0 || w.set.meters.strikes.Get() != 0 {
			t.Errorf("%+v, %d strikes", st, w.set.meters.strikes.Get())
		}
	})
}
