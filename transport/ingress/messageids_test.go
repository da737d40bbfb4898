package ingress

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

func named(id string) *pubsub.PushOptions { return &pubsub.PushOptions{MessageId: id} }

// to pushes to a user with a message id.
func (w *world) to(ctx context.Context, user, id, text string) (*pubsub.PushToUserResponse, error) {
	return w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: user, Content: content(text), Options: named(id)})
}

// sent is how many deliveries the nodes have got.
func (w *world) sent() int {
	n := 0
	for _, node := range w.network.nodes {
		n += len(node.payloads())
	}
	return n
}

// wait waits until done tells that it is over.
func (w *world) wait(what string, done func() bool) {
	w.t.Helper()
	for end := time.Now().Add(time.Minute); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("%s: not within a minute", what)
		}
	}
}

func wantSummary(t *testing.T, s *pubsub.DeliverySummary, delivered, duplicates int32, id string) {
	t.Helper()
	if s.GetDelivered() != delivered || s.GetDuplicates() != duplicates || s.GetMessageId() != id {
		t.Errorf("summary %v, want %d delivered, %d duplicates, id %q", s, delivered, duplicates, id)
	}
}

func TestARetryThatNobodyNeedsIsNotSent(t *testing.T) {
	w := newWorld(t, nil)
	r, err := w.to(w.context(), "d", "m", "x")
	ok(t, err)
	wantSummary(t, r.Summary, 1, 0, "m")
	for range 3 {
		r, err = w.to(w.context(), "d", "m", "x")
		ok(t, err)
		wantSummary(t, r.Summary, 1, 1, "m")
		if !r.Success || r.Message != "delivered" {
			t.Errorf("answered %v", r)
		}
	}
	st := w.stream(w.context())
	push := userPush(1, "d", "x")
	push.GetToUser().Options = named("m")
	ok(t, st.Send(push))
	wantSummary(t, recv(t, st).GetToUser().GetSummary(), 1, 1, "m")
	if n := w.sent(); n != 1 {
		t.Errorf("%d deliveries, want 1", n)
	}
	for result, want := range map[string]string{"first": "1", "answered": "4", "again": "0", "reused": "0", "waited": "0"} {
		if got := w.metric(`push_manager_message_ids_total{result="` + result + `"}`); got != want {
			t.Errorf("%s: %s, want %s", result, got, want)
		}
	}
	if n := w.metric("push_manager_push_duplicate_total"); n != "4" {
		t.Errorf("%s duplicates are counted", n)
	}
	if n := w.metric("push_manager_message_ids"); n != "2" {
		t.Errorf("%s entries are shown", n)
	}
	// An id is a message's: another target gets it.
	r, err = w.to(w.context(), "b", "m", "x")
	ok(t, err)
	wantSummary(t, r.Summary, 1, 0, "m")
	// Who asks for more than the first did is not answered with what the first has reached.
	r, err = w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "d", Content: content("x"), Options: &pubsub.PushOptions{MessageId: "m", Ack: pubsub.AckPolicy_ACK_CLIENT}})
	ok(t, err)
	wantSummary(t, r.Summary, 1, 0, "m")
	if n := w.sent(); n != 3 {
		t.Errorf("%d deliveries, want 3", n)
	}
	// Nobody remembers what has no id.
	for range 2 {
		_, err = w.to(w.context(), "d", "", "x")
		ok(t, err)
	}
	if n := w.sent(); n != 5 {
		t.Errorf("%d deliveries, want 5", n)
	}
}

func TestATargetIsAllThatItNames(t *testing.T) {
	w := newWorld(t, nil)
	room := func(exclude ...string) *pubsub.DeliverySummary {
		t.Helper()
		r, err := w.client.PushToRoom(w.context(), &pubsub.PushToRoomRequest{RoomId: "r", Content: content("x"), ExcludeUserIds: exclude, Options: named("m")})
		ok(t, err)
		return r.Summary
	}
	wantSummary(t, room("b", "c"), 1, 0, "m")
	wantSummary(t, room("b", "c"), 1, 1, "m")
	wantSummary(t, room("a", "c"), 1, 0, "m")
	users := func(users ...string) *pubsub.DeliverySummary {
		t.Helper()
		r, err := w.client.PushToUsers(w.context(), &pubsub.PushToUsersRequest{UserIds: users, Content: content("x"), Options: named("m")})
		ok(t, err)
		return r.Summary
	}
	wantSummary(t, users("a", "b"), 2, 0, "m")
	wantSummary(t, users("a", "b"), 2, 2, "m")
	wantSummary(t, users("a"), 1, 0, "m")
}

// TestARetryCountsOnNothingThatTheStoreHasNotAnyMore: it is sent again, and its answer says what is true now.
func TestARetryCountsOnNothingThatTheStoreHasNotAnyMore(t *testing.T) {
	start := time.Now()
	stored := engine.Result{Targets: 1, Offline: 1, Stored: 1}
	reached := engine.Result{Found: true, Targets: 1, Delivered: 1}
	for _, c := range []struct {
		name   string
		ttl    time.Duration
		result engine.Result
		erase  string // when ForgetUser comes
		after  time.Duration
		sent   bool
	}{
		{"kept", time.Second, stored, "", 999 * time.Millisecond, false},
		{"expired", time.Second, stored, "", time.Second, true},
		{"without a time of its own", 0, stored, "", time.Minute, false},
		{"erased", 0, stored, "after", time.Second, true},
		{"erased while it was under way", 0, stored, "amid", time.Second, true},
		{"erased before", 0, stored, "before", time.Second, false},
		{"delivered", time.Second, reached, "after", time.Minute, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMessageIDs(10, metrics.NewSet())
			begin := func(at time.Time) verdict {
				v, err := m.begin(&engine.Push{Request: engine.Request{Kind: engine.ToUser, User: "u", Arrived: at, Options: &engine.Options{MessageID: "m", Store: true, TTL: c.ttl}}}, nil)
				ok(t, err)
				return v
			}
			erase := func(when string) {
				if when == c.erase {
					m.erase()
				}
			}
			erase("before")
			v := begin(start)
			erase("amid")
			m.finish(v.claim, c.result, nil)
			erase("after")
			if v = begin(start.Add(c.after)); (v.claim != nil) != c.sent {
				t.Fatalf("sent again: %t", v.claim != nil)
			}
			if c.sent { // and what it finds counts anew
				m.finish(v.claim, c.result, nil)
				if v = begin(start.Add(c.after)); v.claim != nil {
					t.Error("sent a third time")
				}
			}
		})
	}
}

func TestWhomAPushHasLeftOverIsTriedAgain(t *testing.T) {
	w := newWorld(t, nil)
	node := w.network.nodes[0]
	for _, refuse := range []engine.Reason{engine.DropQueueFull, engine.DropQueueFull, engine.Sent} {
		node.mu.Lock()
		node.refuse = refuse
		node.mu.Unlock()
		r, err := w.to(w.context(), "d", "m", "x")
		ok(t, err)
		if r.Success != (refuse == engine.Sent) || r.Summary.Duplicates != 0 {
			t.Errorf("while it refuses with %v: %v", refuse, r)
		}
	}
	for range 2 { // nobody is there
		r, err := w.to(w.context(), "nobody", "m", "x")
		ok(t, err)
		if r.Success || r.Summary.Offline != 1 {
			t.Errorf("to nobody: %v", r)
		}
	}
	if n := w.metric(`push_manager_message_ids_total{result="answered"}`); n != "0" {
		t.Errorf("%s were answered", n)
	}
}

func TestAnIDNamesOneContent(t *testing.T) {
	w := newWorld(t, nil)
	_, err := w.to(w.context(), "d", "m", "x")
	ok(t, err)
	for _, user := range []string{"d", "b"} {
		_, err = w.to(w.context(), user, "m", "y")
		wantError(t, err, codes.AlreadyExists, "MESSAGE_ID_REUSED", "")
	}
	st := w.stream(w.context())
	push := userPush(1, "d", "y")
	push.GetToUser().Options = named("m")
	ok(t, st.Send(push))
	wantStatus(t, status.FromProto(recv(t, st).Error), codes.AlreadyExists, "MESSAGE_ID_REUSED", "")
	if n := w.sent(); n != 1 {
		t.Errorf("%d deliveries, want 1", n)
	}
	// What was refused names nothing: it can be corrected.
	w.server.SetServing(true)
	_, err = w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "", Content: content("x"), Options: named("n")})
	wantError(t, err, codes.InvalidArgument, "REQUIRED", "user_id")
	_, err = w.to(w.context(), "d", "n", "y")
	ok(t, err)
}

func TestIDsOfCallersAndTenantsAreTheirOwn(t *testing.T) {
	const all = `{methods: ["*"], users: ["*"], rooms: ["*"]}`
	a := newAccess(t, authtest.New(t, policyOf(caller("a", all), caller("b", all))))
	w := newWorld(t, a.set)
	for _, name := range []string{"a", "b"} {
		r, err := w.to(w.as(a.Token(name, time.Hour)), "d", "m", "from "+name)
		ok(t, err)
		wantSummary(t, r.Summary, 1, 0, "m")
	}
	_, err := w.to(w.as(a.Token("a", time.Hour)), "d", "m", "from b")
	wantError(t, err, codes.AlreadyExists, "MESSAGE_ID_REUSED", "")
	m := newMessageIDs(10, metrics.NewSet())
	key := func(scope, sender, id string) [2]uint64 {
		k, target := m.keys(&engine.Push{Request: engine.Request{Kind: engine.ToUser, User: "u", Scope: scope, Options: &engine.Options{Sender: sender, MessageID: id}}})
		return [2]uint64{k, target}
	}
	seen := map[[2]uint64]bool{}
	for _, k := range [][2]uint64{key("", "a", "m"), key("a", "", "m"), key("", "am", ""), key("", "", "am"), key("am", "", ""), key("", "", "m")} {
		if seen[k] {
			t.Error("two ids are one")
		}
		seen[k] = true
	}
}

// TestARetryWaitsForThePushThatIsUnderWay, and has its answer.
func TestARetryWaitsForThePushThatIsUnderWay(t *testing.T) {
	w := newWorld(t, nil)
	node := w.network.nodes[0]
	node.setKeep(true)
	type answer struct {
		r   *pubsub.PushToUserResponse
		err error
	}
	answers := make(chan answer, 10)
	push := func() {
		r, err := w.to(w.context(), "d", "m", "x")
		answers <- answer{r, err}
	}
	go push()
	w.wait("the first is sent", func() bool { return node.len() == 1 })
	for range 4 {
		go push()
	}
	w.wait("others wait", func() bool { return w.metric(`push_manager_message_ids_total{result="waited"}`) == "4" })
	_, err := w.to(w.context(), "d", "m", "y")
	wantError(t, err, codes.AlreadyExists, "MESSAGE_ID_REUSED", "")
	ack(node.take()[0])
	duplicates := int32(0)
	for range 5 {
		a := <-answers
		ok(t, a.err)
		if !a.r.Success || a.r.Summary.Delivered != 1 {
			t.Errorf("answered %v", a.r)
		}
		duplicates += a.r.Summary.Duplicates
	}
	if duplicates != 4 || w.sent() != 1 {
		t.Errorf("%d duplicates of %d deliveries", duplicates, w.sent())
	}
}

// TestWhoGivesUpHurtsNobodyElse: neither the first nor those who wait for it.
func TestWhoGivesUpHurtsNobodyElse(t *testing.T) {
	w := newWorld(t, nil)
	node := w.network.nodes[0]
	node.setKeep(true)
	first, cancel := context.WithCancel(w.context())
	ended := make(chan error, 3)
	push := func(ctx context.Context) {
		r, err := w.to(ctx, "d", "m", "x")
		if err == nil && !r.Success {
			err = errors.New(r.Message)
		}
		ended <- err
	}
	go push(first)
	w.wait("the first is sent", func() bool { return node.len() == 1 })
	// A second whose deadline passes does not say that nothing was sent.
	short, stop := context.WithTimeout(w.context(), 50*time.Millisecond)
	defer stop()
	go push(short)
	if err := <-ended; status.Code(err) != codes.DeadlineExceeded || len(status.Convert(err).Details()) > 0 {
		t.Errorf("a second whose deadline has passed: %v", err)
	}
	waited := w.metric(`push_manager_message_ids_total{result="waited"}`)
	go push(w.context())
	w.wait("a third waits", func() bool { return w.metric(`push_manager_message_ids_total{result="waited"}`) != waited })
	// The first is given up before its delivery is written, so that nothing was sent.
	cancel()
	if err := <-ended; status.Code(err) != codes.Canceled {
		t.Errorf("the first: %v", err)
	}
	w.wait("the third takes its place", func() bool { return node.len() == 2 })
	for _, d := range node.take() {
		ack(d)
	}
	ok(t, <-ended)
	w.server.messageIDs.mu.Lock()
	defer w.server.messageIDs.mu.Unlock()
	for _, e := range w.server.messageIDs.entries {
		if e.open || e.underway != 0 || e.waiting != nil {
			t.Errorf("it is over, and there is %+v", e)
		}
	}
}

// TestAPushOfAStreamThatWaitsBlocksNobody: what comes behind it is sent at once, and it itself is not sent behind that.
func TestAPushOfAStreamThatWaitsBlocksNobody(t *testing.T) {
	for name, end := range map[string]func(*engine.Delivery){
		"delivered": ack,
		"failed":    func(d *engine.Delivery) { d.Drop(engine.DropQueueFull) },
		"unknown":   func(d *engine.Delivery) { d.TrySend(); d.Lose(engine.LostAck) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			node := w.network.nodes[0]
			node.setKeep(true)
			st := w.stream(w.context())
			twice := func(id uint64) *pubsub.PushStreamRequest {
				push := userPush(id, "d", "x")
				push.GetToUser().Options = named("m")
				return push
			}
			ok(t, st.Send(twice(1)))
			w.wait("the first is sent", func() bool { return node.len() == 1 })
			ok(t, st.Send(twice(2)))
			ok(t, st.Send(userPush(3, "d", "y")))
			ok(t, st.Send(userPush(4, "b", "z")))
			if r := recv(t, st); r.Id != 4 {
				t.Errorf("got %v before", r)
			}
			w.wait("the third is sent", func() bool { return node.len() == 2 })
			kept := node.take()
			end(kept[0])
			ack(kept[1])
			got := map[uint64]*pubsub.PushStreamResponse{}
			for len(got) < 3 {
				r := recv(t, st)
				got[r.Id] = r
			}
			first, second := got[1].GetToUser(), got[2].GetToUser()
			if first == nil || second == nil || first.Success != second.Success || first.Message != second.Message || second.Summary.Duplicates != second.Summary.Delivered {
				t.Errorf("the first %v, the second %v", got[1], got[2])
			}
			if n := len(node.payloads()); n != 2 {
				t.Errorf("%d deliveries", n)
			}
			// Over that, it can be tried again.
			node.setKeep(false)
			ok(t, st.Send(twice(5)))
			if r := recv(t, st).GetToUser(); !r.GetSuccess() {
				t.Errorf("tried again: %v", r)
			}
		})
	}
}

func TestAPushOfAStreamWhoseEarlierOneWasNotSentSaysSo(t *testing.T) {
	w := newWorld(t, nil)
	node := w.network.nodes[0]
	node.setKeep(true)
	ctx, cancel := context.WithCancel(w.context())
	ended := make(chan error, 1)
	go func() {
		_, err := w.to(ctx, "d", "m", "x")
		ended <- err
	}()
	w.wait("the first is sent", func() bool { return node.len() == 1 })
	st := w.stream(w.context())
	push := userPush(1, "d", "x")
	push.GetToUser().Options = named("m")
	ok(t, st.Send(push))
	w.wait("the second waits", func() bool { return w.metric(`push_manager_message_ids_total{result="waited"}`) == "1" })
	cancel()
	if err := <-ended; status.Code(err) != codes.Canceled {
		t.Errorf("the first: %v", err)
	}
	wantStatus(t, status.FromProto(recv(t, st).Error), codes.Unavailable, "EARLIER_PUSH_UNSENT", "")
}

func TestMessageIDsAreForgotten(t *testing.T) {
	push := func(id string, at time.Time) *engine.Push {
		return &engine.Push{Request: engine.Request{Kind: engine.ToUser, User: "u", Arrived: at, Options: &engine.Options{MessageID: id}}}
	}
	reached := engine.Result{Found: true, Targets: 1, Delivered: 1}
	first := func(m *messageIDs, p *engine.Push) bool {
		v, err := m.begin(p, func() *idWaiter { return nil })
		ok(t, err)
		if v.claim != nil {
			m.finish(v.claim, reached, nil)
		}
		return v.claim != nil
	}
	now := time.Now()
	t.Run("after 5 minutes", func(t *testing.T) {
		m := newMessageIDs(10, metrics.NewSet())
		for _, step := range []struct {
			after time.Duration
			first bool
		}{{0, true}, {5 * time.Minute, false}, {10 * time.Minute, false}, {15*time.Minute + time.Second, true}} {
			if got := first(m, push("m", now.Add(step.after))); got != step.first {
				t.Errorf("after %v: sent %v", step.after, got)
			}
		}
		first(m, push("n", now.Add(time.Hour)))
		if n := len(m.entries); n != 2 {
			t.Errorf("%d entries are left", n)
		}
	})
	t.Run("when there are more, the last used is kept", func(t *testing.T) {
		m := newMessageIDs(10, metrics.NewSet())
		for i := range 1000 {
			first(m, push(fmt.Sprint(i), now))
			if i > 0 && first(m, push("0", now)) {
				t.Fatalf("the one in use was forgotten at %d", i)
			}
			if n := len(m.entries); n > 20 {
				t.Fatalf("%d entries", n)
			}
		}
		if !first(m, push("5", now)) {
			t.Error("an old one is known")
		}
	})
	t.Run("while it is under way, too", func(t *testing.T) {
		m := newMessageIDs(1, metrics.NewSet())
		v, err := m.begin(push("m", now), nil)
		ok(t, err)
		first(m, push("n", now))
		m.finish(v.claim, reached, nil)
		m.finish(v.claim, engine.Result{}, errMayBeSent) // it counts once
		if len(m.entries) != 2 || m.recent.next.next.next != &m.recent || m.recent.prev.prev.prev != &m.recent {
			t.Errorf("%d entries", len(m.entries))
		}
	})
}

// TestMessageIDsUnderAnyUse: one push of an id and target is under way at a time, all that wait are told, nothing is kept
// beyond the bound, and the list is whole.
func TestMessageIDsUnderAnyUse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		most := rapid.IntRange(1, 5).Draw(t, "most")
		m := newMessageIDs(most, metrics.NewSet())
		now := time.Now()
		var flights []*idClaim
		waiting, told := 0, 0
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(0, 60).Draw(t, "seconds")) * time.Second)
			if len(flights) > 0 && rapid.Bool().Draw(t, "finish") {
				i := rapid.IntRange(0, len(flights)-1).Draw(t, "which")
				res, err := engine.Result{Found: true, Targets: 1, Delivered: 1}, error(nil)
				switch rapid.IntRange(0, 2).Draw(t, "how") {
				case 1:
					res = engine.Result{Found: true, Targets: 1, Failed: 1}
				case 2:
					err = engine.ErrOverloaded
				}
				m.finish(flights[i], res, err)
				flights = append(flights[:i], flights[i+1:]...)
			} else {
				id, user := fmt.Sprint(rapid.IntRange(0, 3).Draw(t, "id")), fmt.Sprint(rapid.IntRange(0, 2).Draw(t, "user"))
				payload := uint32(rapid.IntRange(0, 9).Draw(t, "payload") / 9)
				p := &engine.Push{Request: engine.Request{Kind: engine.ToUser, User: user, Arrived: now, Options: &engine.Options{MessageID: id, PayloadHash: payload}}}
				v, err := m.begin(p, func() *idWaiter {
					waiting++
					return &idWaiter{func(engine.Result, error) { told++ }}
				})
				if err == nil && v.claim != nil {
					flights = append(flights, v.claim)
				}
			}
			n := 0
			for e := m.recent.next; e != &m.recent; e = e.next {
				if n++; m.entries[e.key] != e || e.next.prev != e {
					t.Fatal("the list is broken")
				}
			}
			if n != len(m.entries) || n > 2*most {
				t.Fatalf("%d in the list, %d entries, bound %d", n, len(m.entries), 2*most)
			}
		}
		for _, f := range flights {
			m.finish(f, engine.Result{}, engine.ErrDraining)
		}
		if waiting != told {
			t.Fatalf("%d wait, %d were told", waiting, told)
		}
		for _, e := range m.entries {
			if e.open || e.underway != 0 || e.waiting != nil {
				t.Fatalf("all is over, and there is %+v", e)
			}
		}
	})
}

// TestRetriesOfAllWaysAtOnceAreSentOnce: unary and on streams, of a push that is delivered in the end.
func TestRetriesOfAllWaysAtOnceAreSentOnce(t *testing.T) {
	w := newWorld(t, nil)
	var wg sync.WaitGroup
	var delivered, duplicates atomic.Int64
	const ids, tries = 20, 10
	count := func(s *pubsub.DeliverySummary) {
		delivered.Add(int64(s.GetDelivered()))
		duplicates.Add(int64(s.GetDuplicates()))
	}
	for try := range tries {
		wg.Go(func() {
			if try%2 == 0 {
				for i := range ids {
					r, err := w.to(w.context(), "d", fmt.Sprint(i), "x")
					if err != nil {
						t.Error(err)
					}
					count(r.GetSummary())
				}
				return
			}
			st := w.stream(w.context())
			for i := range ids {
				push := userPush(uint64(i)+1, "d", "x")
				push.GetToUser().Options = named(fmt.Sprint(i))
				if err := st.Send(push); err != nil {
					t.Error(err)
				}
			}
			for range ids {
				r, err := st.Recv()
				if err != nil {
					t.Error(err)
					return
				}
				count(r.GetToUser().GetSummary())
			}
		})
	}
	wg.Wait()
	if delivered.Load() != ids*tries || duplicates.Load() != ids*(tries-1) || w.sent() != ids {
		t.Errorf("%d delivered, %d duplicates, %d deliveries", delivered.Load(), duplicates.Load(), w.sent())
	}
}

// A call that waits behind several others ends when any other call would.
func TestWhoWaitsForSeveralOthersEndsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(_ *Config, c *engine.Config) { c.Timeout = time.Second })
		_, err := w.to(w.context(), "d", "warm", "x")
		ok(t, err)
		w.network.nodes[0].setKeep(true)
		const calls = 20
		began := time.Now()
		ended := make(chan time.Duration, calls)
		for range calls {
			go func() {
				_, _ = w.to(t.Context(), "d", "m", "x")
				ended <- time.Since(began)
			}()
		}
		for range 20 { // so about 10 of them have their turn
			time.Sleep(100 * time.Millisecond)
			for _, d := range w.network.nodes[0].take() {
				d.Drop(engine.DropQueueFull)
			}
		}
		for range calls {
			if took := <-ended; took > 1100*time.Millisecond {
				t.Errorf("took %v", took)
			}
		}
	})
}

func TestAnAuditLineNamesTheMessage(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.log")
	log, err := audit.Open(audit.Config{File: file})
	ok(t, err)
	w := newWorld(t, func(c *Config, _ *engine.Config) { c.Audit = log })
	_, err = w.client.BroadcastMessage(w.context(), &pubsub.BroadcastMessageRequest{Content: content("secret"), Options: named("m-1")})
	ok(t, err)
	ok(t, log.Close(w.context()))
	lines, err := os.ReadFile(file)
	ok(t, err)
	if text := string(lines); !strings.Contains(text, `"message_id":"m-1"`) || strings.Contains(text, "secret") {
		t.Error(text)
	}
}
