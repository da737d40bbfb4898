package link

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Whichever way a node says why: callers and logs get one line of text.
func TestWordsOfANodeAreOneShortLine(t *testing.T) {
	const (
		said = "no\r\n{\"level\":\"ERROR\"}\x1b[2J\u202e."
		want = `no  {"level":"ERROR"} [2J .`
	)
	long := strings.Repeat("ü", textMax)
	room := func(w *world) *engine.Push { return w.toRoom("r", "x") }
	for name, test := range map[string]struct {
		node func(said string) *fakeNode
		push func(w *world) *engine.Push
	}{
		"on a stream": {push: room, node: func(said string) *fakeNode {
			return &fakeNode{id: "A", answer: func(seq uint64, users []string, _ string, r *pubsub.DeliverResponse) {
				r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{0}})
				r.Misses = append(r.Misses, &pubsub.Miss{Seq: seq, Failed: users, Reason: said})
			}}
		}},
		"by a status": {push: func(w *world) *engine.Push { return w.toUser("u1", "x") }, node: func(said string) *fakeNode {
			n := unaryNode("A")
			n.message = func(*pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
				return nil, status.Error(codes.ResourceExhausted, said)
			}
			return n
		}},
		"by a unary reply": {push: room, node: func(said string) *fakeNode {
			n := unaryNode("A")
			n.batch = func(r *pubsub.PushMessageBatchRequest) (*pubsub.PushMessageBatchResponse, error) {
				return &pubsub.PushMessageBatchResponse{UnreachedUserIds: r.GetUserIds(), Message: said}, nil
			}
			return n
		}},
	} {
		for said, want := range map[string]string{said: want, long: long[:textMax]} {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, Config{})
				w.start("a:1", test.node(said))
				w.register("A", "a:1")
				w.up(1)
				w.room("r", "A", "u1", "u2")
				if got := reasons(w.do(test.push(w))); got != "failed: "+want {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			})
		}
	}
}

func TestNodeWithoutDeliverGetsTheSameResults(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{Shards: 2})
		n := unaryNode("A")
		n.batch = func(r *pubsub.PushMessageBatchRequest) (*pubsub.PushMessageBatchResponse, error) {
			gone := []string{}
			if slices.Contains(r.GetUserIds(), "u3") {
				gone = []string{"u3"}
			}
			return &pubsub.PushMessageBatchResponse{
				Success: true, DeliveredCount: int32(len(r.GetUserIds()) - len(gone)), FailedUserIds: gone,
			}, nil
		}
		n.message = func(r *pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
			return &pubsub.PushMessageResponse{Success: r.GetUserId() != "u3"}, nil
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(2)
		w.room("r", "A", "u1", "u2", "u3")
		tests := []struct {
			push *engine.Push
			want engine.Result
		}{
			{w.toUser("u1", "one"), engine.Result{Found: true, Targets: 1, Delivered: 1}},
			{w.toUser("u3", "two"), engine.Result{Found: true, Targets: 1, Offline: 1}},
			{w.toRoom("r", "three"), engine.Result{Found: true, Targets: 3, Delivered: 2, Offline: 1}},
			{w.toRoom("r", "four", "u3"), engine.Result{Found: true, Targets: 2, Delivered: 2}},
			{w.toRoom("r", "five", "u3", "u1"), engine.Result{Found: true, Targets: 1, Delivered: 1}},
			{w.toAll("six"), engine.Result{Found: true, Targets: 5, Delivered: 5}},
		}
		for i, tt := range tests {
			got := w.do(tt.push)
			got.NodeFailures = nil
			if got.Delivered != tt.want.Delivered || got.Targets < tt.want.Targets || got.Failed+got.Unknown != 0 {
				t.Errorf("push %d: %+v, want %+v", i+1, got, tt.want)
			}
		}
		if got := n.received(t); !slices.Contains(got, "u2 five") || slices.Contains(got, "u1 five") || !slices.Contains(got, "u2 four") {
			t.Errorf("arrived: %q", got)
		}
		if st := w.set.Nodes()[0]; !st.Unary || st.Connections != 2 {
			t.Errorf("%+v", st)
		}
		synctest.Wait() // a call is counted out after its push is answered
		if st := w.set.Stats(); st.Queued+st.QueuedBytes+st.Unacked != 0 {
			t.Errorf("left over: %+v", st)
		}
	})
}

func TestUnaryCallsKeepTheOrderOfEachKey(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := unaryNode("A")
		n.message = func(*pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
			time.Sleep(100 * time.Microsecond)
			return &pubsub.PushMessageResponse{Success: true}, nil
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		for _, u := range []string{"u1", "u2", "u3"} {
			w.room("r-"+u, "A", u)
			w.do(w.toUser(u, "warm"))
		}
		var started []*pending
		var stream engine.Order
		for i := range 2000 {
			for _, u := range []string{"u1", "u2", "u3"} {
				p := w.toUser(u, fmt.Sprint(i))
				p.Order = &stream
				started = append(started, w.begin(p))
			}
		}
		for _, f := range started {
			if r := w.end(f); r.Delivered != 1 {
				t.Fatalf("%+v", r)
			}
		}
		next := map[string]int{}
		for _, line := range n.received(t) {
			user, text, _ := strings.Cut(line, " ")
			if text == "warm" {
				continue
			}
			if text != fmt.Sprint(next[user]) {
				t.Fatalf("%s got %s, not %d", user, text, next[user])
			}
			next[user]++
		}
	})
}

func TestRoomOverAStreamingAndAUnaryNode(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{Shards: 2})
		a, b := w.start("a:1", &fakeNode{id: "A"}), w.start("b:1", unaryNode("B"))
		w.register("A", "a:1", "B", "b:1")
		w.up(4)
		w.room("r", "A", "u1", "u2")
		w.mu.Lock()
		w.rooms["r"]["u3"], w.rooms["r"]["u4"] = "B", "B"
		w.mu.Unlock()
		for range 3 {
			if r := w.do(w.toRoom("r", "x")); r.Delivered != 4 || !r.Success() {
				t.Errorf("%+v", r)
			}
		}
		if len(a.received(t)) != 6 || len(b.received(t)) != 6 {
			t.Error("not all arrived")
		}
	})
}

func TestUnaryErrorsTellWhatIsKnown(t *testing.T) {
	tests := map[codes.Code]string{
		codes.InvalidArgument:    "failed: refused by the node",
		codes.PermissionDenied:   "failed: refused by the node",
		codes.FailedPrecondition: "failed: refused by the node",
		codes.ResourceExhausted:  "failed: no", // the user is there, and was not reached
		codes.Unimplemented:      "failed: refused by the node",
		codes.Internal:           "unknown: stream broke before the acknowledgement",
		codes.Unavailable:        "unknown: stream broke before the acknowledgement",
		codes.Aborted:            "unknown: stream broke before the acknowledgement",
	}
	for code, want := range tests {
		t.Run(code.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, Config{})
				n := unaryNode("A")
				n.message = func(*pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
					return nil, status.Error(code, "no")
				}
				w.start("a:1", n)
				w.register("A", "a:1")
				w.up(1)
				w.room("r", "A", "u1")
				if r := w.do(w.toUser("u1", "x")); reasons(r) != want {
					t.Errorf("%+v", r)
				}
			})
		})
	}
}

func TestUnaryNodeThatHangsIsStalledForAWhile(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := unaryNode("A")
		var hang atomic.Bool
		hang.Store(true)
		n.message = func(*pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
			if hang.Load() {
				time.Sleep(2 * time.Second)
			}
			return &pubsub.PushMessageResponse{Success: true}, nil
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		began := time.Now()
		first, second := w.begin(w.toUser("u1", "1")), w.begin(w.toUser("u1", "2"))
		if r := w.end(first); reasons(r) != "unknown: no acknowledgement in time" {
			t.Errorf("first: %+v", r)
		}
		if r := w.end(second); r.Failed != 1 || second.at.Sub(began) > 1050*time.Millisecond {
			t.Errorf("second: %+v", r)
		}
		if r := w.do(w.toUser("u1", "3")); reasons(r) != "failed: node does not acknowledge" {
			t.Errorf("stalled: %+v", r)
		}
		if n := w.set.meters.nodeStalls("A").Get(); n != 1 {
			t.Errorf("%d stalls of the node", n)
		}
		hang.Store(false)
		time.Sleep(1100 * time.Millisecond)
		if r := w.do(w.toUser("u1", "4")); r.Delivered != 1 {
			t.Errorf("after the stall: %+v", r)
		}
		time.Sleep(time.Second) // lets the node's calls end
	})
}

func TestUnaryNodeThatIsUpgradedGetsAStream(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		old := w.start("a:1", unaryNode("A"))
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		w.do(w.toUser("u1", "x"))
		time.Sleep(time.Second)
		n := &fakeNode{id: "A"}
		w.start("a:1", n)
		old.kill()
		w.until("a stream is open", func() bool { return n.opened() == 1 })
		synctest.Wait()
		if r := w.do(w.toUser("u1", "y")); r.Delivered != 1 {
			t.Errorf("%+v", r)
		}
		if st := w.set.Nodes()[0]; st.Unary {
			t.Errorf("%+v", st)
		}
	})
}

func TestLanesWaitForAPoolThatIsFull(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var refusals atomic.Int32
		var tasks sync.WaitGroup
		w := newWorld(t, Config{Go: func(_ int, task func()) error {
			if refusals.Add(1) <= 3 {
				return errors.New("full")
			}
			tasks.Go(task)
			return nil
		}})
		w.start("a:1", unaryNode("A"))
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		if r := w.do(w.toUser("u1", "x")); r.Delivered != 1 {
			t.Errorf("%+v", r)
		}
		tasks.Wait()
	})
}

func TestCloseSettlesWhatAUnaryNodeOwes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{UnaryLanes: 1})
		n := unaryNode("A")
		n.message = func(*pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
			time.Sleep(500 * time.Millisecond)
			return &pubsub.PushMessageResponse{Success: true}, nil
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		first, second := w.begin(w.toUser("u1", "1")), w.begin(w.toUser("u1", "2"))
		synctest.Wait()
		w.set.Close()
		if r := w.end(first); r.Unknown != 1 {
			t.Errorf("in flight: %+v", r)
		}
		if r := w.end(second); r.Failed != 1 {
			t.Errorf("waiting: %+v", r)
		}
		time.Sleep(time.Second)
	})
}

func TestDrainWaitsForUnaryCalls(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := unaryNode("A")
		n.message = func(*pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
			time.Sleep(100 * time.Millisecond)
			return &pubsub.PushMessageResponse{Success: true}, nil
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		first, second := w.begin(w.toUser("u1", "1")), w.begin(w.toUser("u1", "2"))
		synctest.Wait()
		if err := w.set.Drain(context.Background()); err != nil {
			t.Fatal(err)
		}
		for _, f := range []*pending{first, second} {
			if r := w.end(f); r.Delivered != 1 {
				t.Errorf("%+v", r)
			}
		}
	})
}

func TestUnaryNodeThatStopsGracefullyAnswersItsCalls(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{UnaryLanes: 1})
		n := unaryNode("A")
		n.message = func(*pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
			time.Sleep(300 * time.Millisecond)
			return &pubsub.PushMessageResponse{Success: true}, nil
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		first, second := w.begin(w.toUser("u1", "1")), w.begin(w.toUser("u1", "2"))
		synctest.Wait()
		n.srv.GracefulStop()
		if r := w.end(first); r.Delivered != 1 {
			t.Errorf("in flight: %+v", r)
		}
		if r := w.end(second); r.Failed != 1 {
			t.Errorf("waiting: %+v", r)
		}
	})
}

// A node may have Deliver again behind a connection that has not broken: a proxy's, say.
// It is asked now and then, and soon after it has refused the unary methods.
func TestUnaryNodeIsAskedForDeliverAgain(t *testing.T) {
	for _, refuses := range []bool{true, false} {
		t.Run(fmt.Sprint("refuses calls: ", refuses), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, Config{})
				var upgraded atomic.Bool
				var asked atomic.Int32
				n := &fakeNode{id: "A"}
				n.deliver = func(st deliverStream) error {
					asked.Add(1)
					if !upgraded.Load() {
						return status.Error(codes.Unimplemented, "unknown method Deliver")
					}
					return n.serve(st)
				}
				n.message = func(*pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
					if refuses {
						return nil, status.Error(codes.Unimplemented, "unknown method PushMessage")
					}
					return &pubsub.PushMessageResponse{Success: true}, nil
				}
				w.start("a:1", n)
				w.register("A", "a:1")
				w.up(1)
				w.room("r", "A", "u1")
				for range 100 { // refused or not, it has neither for 5 s
					w.do(w.toUser("u1", "x"))
					time.Sleep(50 * time.Millisecond)
				}
				if n := asked.Load(); refuses && n < 5 || n > 8 {
					t.Errorf("asked for Deliver %d times in 5 s", n)
				}
				upgraded.Store(true)
				patience := 2 * time.Minute
				if refuses {
					w.do(w.toUser("u1", "y"))
					patience = time.Second
				}
				time.Sleep(patience)
				if r := w.do(w.toUser("u1", "z")); r.Delivered != 1 || w.set.Nodes()[0].Unary {
					t.Errorf("%v after the upgrade: %+v, unary %v", patience, r, w.set.Nodes()[0].Unary)
				}
			})
		})
	}
}

func TestUnaryBroadcastCannotClaimMoreThanANodeHas(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{NodeUsers: 4}) // the node says 5
		w.start("a:1", unaryNode("A"))
		w.register("A", "a:1")
		w.up(1)
		for range 3 {
			if r := w.do(w.toAll("x")); r.Delivered != 0 || r.Success() || reasons(r) != "unknown: acknowledgement does not add up" {
				t.Errorf("%+v", r)
			}
		}
		w.until("the node is left alone", func() bool { return w.set.Reachable() == 0 })
	})
}

// What the dispatcher has not given to the lanes when the session ends was taken after what
// waits in them, and stays behind it.
func TestOrderIsKeptWhenAUnarySessionEnds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		pool, hello := make(chan struct{}), make(chan struct{})
		var held, upgraded atomic.Bool
		var tasks sync.WaitGroup
		w := newWorld(t, Config{Go: func(_ int, task func()) error {
			if held.Load() {
				<-pool // and so the dispatcher is held up
			}
			tasks.Go(task)
			return nil
		}})
		n := &fakeNode{id: "A"}
		n.deliver = func(st deliverStream) error {
			if !upgraded.Load() {
				return status.Error(codes.Unimplemented, "unknown method Deliver")
			}
			<-hello
			return n.serve(st)
		}
		n.message = func(r *pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
			if upgraded.Load() && r.GetUserId() == "u2" {
				return nil, status.Error(codes.Unimplemented, "unknown method PushMessage")
			}
			time.Sleep(100 * time.Millisecond)
			return &pubsub.PushMessageResponse{Success: true}, nil
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		users := []string{"u1", "u2", "u3", "u4", "u5", "u6", "u7", "u8"}
		w.room("r", "A", users...)
		for _, u := range users {
			w.do(w.toUser(u, "warm"))
		}
		time.Sleep(time.Second)
		upgraded.Store(true)
		w.do(w.toUser("u2", "refused")) // and so the node is asked for Deliver
		started := []*pending{w.begin(w.toUser("u1", "1")), w.begin(w.toUser("u1", "2"))}
		synctest.Wait() // the first is with the node, the second waits in its lane
		held.Store(true)
		for _, u := range users[2:] { // most of them have other lanes
			started = append(started, w.begin(w.toUser(u, "x")))
		}
		synctest.Wait()
		started = append(started, w.begin(w.toUser("u1", "3")))
		close(hello)
		synctest.Wait()
		held.Store(false)
		close(pool)
		for _, f := range started {
			w.end(f)
		}
		tasks.Wait()
		got := slices.DeleteFunc(n.received(t), func(s string) bool { return !strings.HasPrefix(s, "u1 ") })
		if want := []string{"u1 warm", "u1 1", "u1 2", "u1 3"}; !slices.Equal(got, want) {
			t.Errorf("arrived: %q, want %q", got, want)
		}
	})
}
