package link

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	connectnode "github.com/push-manager/push-manager/transport/node"
)

// kicking is a gateway that notes whom it was to disconnect, among the pushes that it got.
type kicking struct {
	gatewayThat

	hang   chan struct{} // closed when disconnects may end; nil: at once
	closed int           // connections, for each disconnect; negative: it panics
}

func (g *kicking) Disconnect(d *connectnode.Disconnect) int {
	if g.hang != nil {
		<-g.hang
	}
	if g.closed < 0 {
		panic("a fault of the gateway")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.got = append(g.got, "close "+d.User+d.Device+d.Room+" "+d.Reason)
	return g.closed
}

func newKicking(closed int) *kicking {
	return &kicking{closed: closed, gatewayThat: gatewayThat{deliver: func(string, string) connectnode.Outcome { return connectnode.Delivered }}}
}

func TestDisconnectReachesEveryNodeAndSaysWhichHaveNotDoneIt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{Shards: 2})
		a, b, stuck := newKicking(2), newKicking(3), newKicking(5)
		stuck.hang = make(chan struct{})
		w.startReal("a:1", connectnode.Config{NodeID: "A", Sessions: a})
		w.startReal("b:1", connectnode.Config{NodeID: "B", Sessions: b})
		w.start("c:1", &fakeNode{id: "C"}) // as it was before there was Disconnect
		w.startReal("d:1", connectnode.Config{NodeID: "D", Sessions: stuck})
		w.register("A", "a:1", "B", "b:1", "C", "c:1", "D", "d:1", "E", "nobody:1")
		w.up(8)
		began := time.Now()
		got := w.set.Disconnect(context.Background(), 1, &Disconnect{User: "u", Code: 4000, Reason: "why"})
		if took := time.Since(began); took > disconnectWait+tick {
			t.Errorf("it took %v", took)
		}
		want := []Disconnected{
			{Node: "A", Connections: 2}, {Node: "B", Connections: 3}, {Node: "C", Failure: "node cannot disconnect"},
			{Node: "D", Failure: "no acknowledgement in time", MayBeDone: true}, {Node: "E", Failure: "node not reachable"},
		}
		if !slices.Equal(got, want) {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
		close(stuck.hang) // the answer comes too late, which is no fault of the node
		synctest.Wait()
		if n := w.set.Stats(); n.Live != 8 || w.set.meters.strikes.Get() != 0 {
			t.Errorf("after a late answer: %+v, %d strikes", n, w.set.meters.strikes.Get())
		}
		// A message for each node, not for each of its links.
		if got := a.received(); !slices.Equal(got, []string{"close u why"}) {
			t.Errorf("node A got %v", got)
		}
	})
}

func TestPushesThatWereSentBeforeADisconnectArriveBeforeIt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		g := newKicking(1)
		w.startReal("a:1", connectnode.Config{NodeID: "A", Sessions: g})
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u")
		w.do(w.toUser("u", "warm"))
		var pushes []*pending
		for _, text := range []string{"1", "2", "3"} {
			pushes = append(pushes, w.begin(w.toUser("u", text)))
		}
		answers := w.set.Disconnect(context.Background(), 0, &Disconnect{User: "u", Code: 4000, Reason: "now"})
		if len(answers) != 1 || answers[0].Connections != 1 {
			t.Errorf("answers %+v", answers)
		}
		for _, p := range pushes {
			if r := w.end(p); r.Delivered != 1 {
				t.Errorf("a push before it: %+v", r)
			}
		}
		if got := g.received(); !slices.Equal(got, []string{"u warm", "u 1", "u 2", "u 3", "close u now"}) {
			t.Errorf("got %v", got)
		}
	})
}

func TestADisconnectOfANodeWhoseStreamBreaksIsInDoubtOrGoesOverTheNextOne(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		w.start("a:1", &fakeNode{id: "A"}).kill()
		w.register("A", "a:1")
		time.AfterFunc(300*time.Millisecond, func() { // it comes in time
			w.startReal("a:1", connectnode.Config{NodeID: "A", Sessions: newKicking(1)})
			w.register("A", "a:1")
		})
		answers := w.set.Disconnect(context.Background(), 0, &Disconnect{Room: "r", Code: 4000})
		if len(answers) != 1 || answers[0].Failure != "" || answers[0].Connections != 1 {
			t.Errorf("answers %+v", answers)
		}
	})
}

func TestAGatewayThatPanicsIsNoSuccess(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		w.startReal("a:1", connectnode.Config{NodeID: "A", Sessions: newKicking(-1)})
		w.register("A", "a:1")
		w.up(1)
		for _, d := range []Disconnect{{User: "u", Code: 4000}, {Room: "r", Code: 4000}} {
			answers := w.set.Disconnect(context.Background(), 0, &d)
			if want := []Disconnected{{Node: "A", Failure: "node failed while it disconnected", MayBeDone: true}}; !slices.Equal(answers, want) {
				t.Errorf("%+v: %+v, want %+v", d, answers, want)
			}
		}
	})
}

// TestARoomThatIsDisconnectedHoldsNoPushUp although a gateway may look at all its connections for that.
func TestARoomThatIsDisconnectedHoldsNoPushUp(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		g := newKicking(1)
		g.hang = make(chan struct{})
		w.startReal("a:1", connectnode.Config{NodeID: "A", Sessions: g})
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u")
		answers := make(chan []Disconnected, 1)
		go func() { answers <- w.set.Disconnect(context.Background(), 0, &Disconnect{Room: "r", Code: 4000}) }()
		synctest.Wait()
		began := time.Now()
		if r := w.do(w.toUser("u", "1")); r.Delivered != 1 || time.Since(began) > 100*time.Millisecond {
			t.Errorf("a push meanwhile: %+v after %v", r, time.Since(began))
		}
		close(g.hang)
		if got := <-answers; len(got) != 1 || got[0].Connections != 1 || got[0].Failure != "" {
			t.Errorf("answers %+v", got)
		}
	})
}
