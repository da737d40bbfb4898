package link

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

// TestDetailsSayHowANodeIs: its state, and what of its links a person wants to know.
func TestDetailsSayHowANodeIs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{Shards: 2})
		details := func() (all []NodeDetails) {
			w.set.Details(func(d *NodeDetails) {
				one := *d
				one.Acks = slices.Clone(d.Acks)
				all = append(all, one)
			})
			return all
		}
		node := &fakeNode{id: "A", answer: func(seq uint64, _ []string, _ string, r *pubsub.DeliverResponse) {
			time.Sleep(time.Millisecond)
			r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{1}})
		}}
		a := w.start("a:1", node)
		w.start("b:1", unaryNode("B"))
		stalls := &fakeNode{id: "D", answer: func(uint64, []string, string, *pubsub.DeliverResponse) {}} // never acknowledges
		w.start("d:1", stalls)
		w.register("A", "a:1", "B", "b:1", "D", "d:1", "E", "nobody:1")
		w.until("all are connected that can be", func() bool { return w.set.Stats().Live >= 6 })
		w.room("r", "A", "u1")
		time.Sleep(time.Second)
		if r := w.do(w.toRoom("r", "x")); r.Delivered != 1 {
			t.Fatalf("%+v", r)
		}
		for shard, users := range [][]string{w.ofShard(0, 1), w.ofShard(1, 1)} {
			w.room([]string{"d0", "d1"}[shard], "D", users...)
			w.begin(w.toUser(users[0], "never acknowledged"))
		}
		time.Sleep(1200 * time.Millisecond) // more than the ack timeout
		synctest.Wait()
		all := details()
		for i, want := range []struct {
			id, state           string
			connections, frames int
			trouble             bool
		}{
			{"A", NodeUp, 2, 1, false}, {"B", NodeUnary, 2, 0, false}, {"D", NodeStalled, 2, 0, false}, {"E", NodeDown, 0, 0, true},
		} {
			d := all[i]
			frames := 0
			for _, n := range d.Acks {
				frames += int(n)
			}
			if d.ID != want.id || d.State != want.state || d.Connections != want.connections || d.Links != 2 || frames != want.frames || (d.Trouble != "") != want.trouble || len(d.Acks) != len(AckBounds())+1 {
				t.Errorf("%+v, want %+v", d, want)
			}
		}
		if d := all[0]; d.Addr != "a:1" || d.BootID == "" || d.Window == 0 {
			t.Errorf("%+v", d)
		}
		if d := all[2]; d.UnackedFor < time.Second || d.Stalls == 0 {
			t.Errorf("%+v", d)
		}
		a.kill()
		w.until("A is down", func() bool { return details()[0].State == NodeDown })
		if d := details()[0]; d.Breaks == 0 || d.Trouble == "" || d.Connections != 0 {
			t.Errorf("%+v", d)
		}
	})
}
