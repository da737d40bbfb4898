package ingress

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	"github.com/push-manager/push-manager/internal/position"
	pubsub "github.com/push-manager/push-manager/proto"
)

// roomLog is an engine.Spool that keeps the logs of rooms in memory.
type roomLog struct {
	mu   sync.Mutex
	log  []*engine.Stored
	down bool
}

func (l *roomLog) Append(_ *engine.Stored, users []string, _ time.Time, done func([]engine.Spooled)) {
	done(make([]engine.Spooled, len(users)))
}

func (l *roomLog) AppendLog(m *engine.Stored, _ time.Time, done func(engine.Place, error)) {
	l.mu.Lock()
	if l.down {
		l.mu.Unlock()
		done(engine.Place{}, engine.ErrSpoolDown)
		return
	}
	l.log = append(l.log, m)
	at := engine.Place{Epoch: 7, Partition: 3, Seq: uint64(len(l.log))}
	l.mu.Unlock()
	done(at, nil)
}

func (l *roomLog) set(_ *Config, c *engine.Config) { c.Spool = l }

func (l *roomLog) written() []*engine.Stored {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.log)
}

// wantPosition holds that a reply names a place in the log, 0 for none.
func wantPosition(t *testing.T, what string, s *pubsub.DeliverySummary, seq uint64) {
	t.Helper()
	if seq == 0 {
		if s.GetPosition() != "" {
			t.Errorf("%s: position %q", what, s.GetPosition())
		}
		return
	}
	p, err := position.Parse(s.GetPosition())
	if at, in := p.In(3); err != nil || p.Epoch != 7 || len(p.Places) != 1 || !in || at != seq {
		t.Errorf("%s: position %q is %+v, %v, want %d", what, s.GetPosition(), p, err, seq)
	}
}

func storeRoom(room, id string, exclude ...string) *pubsub.PushToRoomRequest {
	return &pubsub.PushToRoomRequest{
		RoomId: room, Content: content("x"), ExcludeUserIds: exclude,
		Options: &pubsub.PushOptions{MessageId: id, Offline: pubsub.OfflinePolicy_OFFLINE_STORE},
	}
}

// TestARoomsMessageIsWrittenOnce by a call of its own, by a PushStream, and by no retry of either.
func TestARoomsMessageIsWrittenOnce(t *testing.T) {
	l := new(roomLog)
	w := newWorld(t, l.set)
	for try := range 3 {
		r, err := w.client.PushToRoom(w.context(), storeRoom("r", "m"))
		ok(t, err)
		wantSummary(t, r.Summary, 2, min(int32(try), 1)*2, "m")
		wantPosition(t, "a call", r.Summary, 1)
		if !r.Success || r.Summary.Stored != 1 || r.Summary.Offline != 1 || r.Message != "delivered to 2 of 3 users: 1 offline (1 stored)" {
			t.Errorf("answered %v", r)
		}
	}
	st := w.stream(w.context())
	for id, seq := range map[string]uint64{"m": 1, "another": 2} {
		ok(t, st.Send(&pubsub.PushStreamRequest{Id: 1, Push: &pubsub.PushStreamRequest_ToRoom{ToRoom: storeRoom("r", id)}}))
		got := recv(t, st).GetToRoom()
		wantPosition(t, "a stream", got.GetSummary(), seq)
		if !got.GetSuccess() || got.GetSummary().GetStored() != 1 {
			t.Errorf("answered %v", got)
		}
	}
	r, err := w.client.PushToRoom(w.context(), storeRoom("nowhere", ""))
	ok(t, err)
	wantPosition(t, "an unknown room", r.Summary, 3)
	if !r.Success || r.Message != `room "nowhere" not found; stored` || r.Summary.MessageId == "" {
		t.Errorf("answered %v", r)
	}
	if again, err := w.client.PushToRoom(w.context(), storeRoom("nowhere", r.Summary.MessageId)); err != nil || again.Message != r.Message || again.Summary.Position != r.Summary.Position {
		t.Errorf("its retry is answered %v, %v", again, err)
	}
	if n := len(l.written()); n != 3 {
		t.Errorf("%d messages are in the log", n)
	}
	if n := w.metric("push_manager_push_stored_total"); n != "5" { // one of each push to r, retries too
		t.Errorf("%s are counted as stored", n)
	}
}

// TestWhomARoomsPushHasLeftOverIsTriedAgain, and what is in the log stays there.
func TestWhomARoomsPushHasLeftOverIsTriedAgain(t *testing.T) {
	l := new(roomLog)
	w := newWorld(t, l.set)
	node := w.network.nodes[0]
	for i, refuse := range []engine.Reason{engine.DropTooLarge, engine.DropTooLarge, engine.Sent, engine.Sent} {
		node.mu.Lock()
		node.refuse = refuse
		node.mu.Unlock()
		r, err := w.client.PushToRoom(w.context(), storeRoom("r", "m"))
		ok(t, err)
		wantPosition(t, "a retry", r.Summary, 1)
		if r.Success != (refuse == engine.Sent) || r.Summary.Stored != 1 || r.Summary.Failed != map[bool]int32{false: 1, true: 0}[r.Success] {
			t.Errorf("try %d: %v", i, r)
		}
	}
	if n := len(l.written()); n != 1 {
		t.Errorf("%d messages are in the log", n)
	}
	if n := w.sent(); n != 4 { // n2 three times, n1 once; the last one is answered
		t.Errorf("%d deliveries", n)
	}
}

// TestARoomsMessageThatWasNotWrittenIsWrittenByItsRetry: the store was away for a while.
func TestARoomsMessageThatWasNotWrittenIsWrittenByItsRetry(t *testing.T) {
	l := &roomLog{down: true}
	w := newWorld(t, l.set)
	r, err := w.client.PushToRoom(w.context(), storeRoom("r", "m", "c"))
	ok(t, err)
	wantPosition(t, "while it is away", r.Summary, 0)
	if r.Success || r.Summary.Delivered != 2 || len(r.Summary.NodeFailures) != 1 || r.Summary.NodeFailures[0].Reason != "failed: store: not reachable" || r.Message != "delivered to 2 users; not stored" {
		t.Errorf("answered %v", r)
	}
	l.mu.Lock()
	l.down = false
	l.mu.Unlock()
	r, err = w.client.PushToRoom(w.context(), storeRoom("r", "m", "c"))
	ok(t, err)
	wantPosition(t, "then", r.Summary, 1)
	if !r.Success {
		t.Errorf("answered %v", r)
	}
}

// TestARetryCountsOnTheLogAsLongAsItKeeps: what has expired is written anew. The log keeps what it has when a user is erased.
func TestARetryCountsOnTheLogAsLongAsItKeeps(t *testing.T) {
	start, at := time.Now(), engine.Place{Epoch: 1, Partition: 2, Seq: 3}
	stored := engine.Result{Found: true, Targets: 1, Offline: 1, Stored: 1, Place: at}
	failed := engine.Result{Found: true, Targets: 1, Failed: 1, Place: at}
	for name, c := range map[string]struct {
		ttl    time.Duration
		result engine.Result
		err    error
		after  time.Duration
		sent   bool
		place  engine.Place // with which it is sent
	}{
		"kept":                       {ttl: time.Second, result: stored, after: 999 * time.Millisecond},
		"without a time of its own":  {result: stored, after: time.Minute},
		"expired":                    {ttl: time.Second, result: stored, after: time.Second, sent: true},
		"left somebody over":         {ttl: time.Second, result: failed, after: 999 * time.Millisecond, sent: true, place: at},
		"left over, and expired":     {ttl: time.Second, result: failed, after: time.Second, sent: true},
		"nobody knows what it wrote": {err: errMayBeSent, after: time.Second, sent: true},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMessageIDs(10, metrics.NewSet())
			var p *engine.Push
			begin := func(after time.Duration) verdict {
				p = &engine.Push{Request: engine.Request{Kind: engine.ToRoom, Room: "r", Arrived: start.Add(after), Options: &engine.Options{MessageID: "m", Store: true, TTL: c.ttl}}}
				v, err := m.begin(p, nil)
				ok(t, err)
				return v
			}
			v := begin(0)
			m.finish(v.claim, c.result, c.err)
			m.erase()
			v = begin(c.after)
			if (v.claim != nil) != c.sent || p.Options.Place != c.place || !c.sent && v.result.Place != at {
				t.Fatalf("sent again: %t, with %+v; answered %+v", v.claim != nil, p.Options.Place, v.result)
			}
			if c.place != at {
				return
			}
			m.finish(v.claim, engine.Result{}, engine.ErrOverloaded) // a retry that is refused forgets nothing
			if v = begin(c.after); p.Options.Place != at {
				t.Error("its place is forgotten")
			}
			if m.finish(v.claim, c.result, nil); begin(c.ttl).claim != nil && p.Options.Place != (engine.Place{}) {
				t.Errorf("a retry has made the place last: %+v", p.Options.Place)
			}
		})
	}
}

// TestTheLogOfATenantsRoomIsItsOwn: rooms and those who are excluded are named with the tenant there.
func TestTheLogOfATenantsRoomIsItsOwn(t *testing.T) {
	policy := "version: 1\ntenants: {shop: }\n" + policyOf(strings.Replace(
		caller("a", `{methods: ["*"], users: ["*"], rooms: ["*"]}`), "name: a,", "name: a, tenant: shop,", 1))[len("version: 1\n"):]
	a, l := newAccess(t, authtest.New(t, policy)), new(roomLog)
	w := newWorld(t, func(c *Config, e *engine.Config) { a.set(c, e); l.set(c, e) })
	w.source.rooms["shop/r"] = []member{{"shop/a", "n1"}, {"shop/b", ""}}
	r, err := w.client.PushToRoom(w.as(a.Token("a", time.Hour)), storeRoom("r", "m", "x", "c"))
	ok(t, err)
	wantPosition(t, "of a tenant", r.Summary, 1)
	if !r.Success || r.Summary.Delivered != 1 || r.Summary.Stored != 1 {
		t.Errorf("answered %v", r)
	}
	got := l.written()
	if len(got) != 1 || got[0].Room != "shop/r" || !slices.Equal(got[0].Exclude, []string{"shop/c", "shop/x"}) || got[0].Sender != "a" {
		t.Errorf("in the log: %+v", got[0])
	}
}
