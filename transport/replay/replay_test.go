package replay

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/goleak"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/shard"
)

// ants keeps goroutines of its default pool from its initialisation on.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

// world is a service over the real engine, a store in memory and nodes by script.
type world struct {
	t       testing.TB
	store   *memory
	service *Service
	metrics *metrics.Set
	node    *scripted
}

// scripted is a node, and the network of the engine that leads to it. It takes what comes and answers as it is told.
type scripted struct {
	// decide says what becomes of a delivery, on the engine's goroutine. Nil: it is delivered.
	decide func(d *engine.Delivery) verdict

	mu   sync.Mutex
	got  []sent
	kept []*engine.Delivery
}

type sent struct {
	user, text, room string
	place            engine.Replay
	options          engine.Options
	deadline         time.Time
}

// verdict is what becomes of a delivery.
type verdict struct {
	decline engine.Reason // of the link, at once
	ack     *engine.Ack   // nil: one user reached
	keep    bool          // it is answered by release, or the deadline settles it
	drop    engine.Reason // of the link, later
	unseen  bool          // the node is not reached: it is not in got
}

func (n *scripted) Node() string                              { return "n" }
func (n *scripted) Scopes() bool                              { return true }
func (*scripted) Describe(*engine.Delivery) engine.LinkState  { return engine.LinkState{} }
func (n *scripted) Nudge(_ string, _ uint64, done func(bool)) { done(false) }
func (n *scripted) Link(int, string) engine.Link              { return n }
func (n *scripted) Links(int) []engine.Link                   { return []engine.Link{n} }

func (n *scripted) Send(d *engine.Delivery) engine.Reason {
	var v verdict
	if n.decide != nil {
		v = n.decide(d)
	}
	if v.decline != engine.Sent {
		return v.decline
	}
	o := d.Options()
	if !v.unseen {
		n.mu.Lock()
		n.got = append(n.got, sent{d.Users()[0], string(d.Payload()), d.Room(), *o.Replay, *o, d.Deadline()})
		if v.keep {
			n.kept = append(n.kept, d)
			time.AfterFunc(time.Until(d.Deadline()), func() { d.Lose(engine.LostDeadline) }) // as links do
		}
		n.mu.Unlock()
	}
	switch {
	case v.keep:
	case v.drop != engine.Sent:
		d.Drop(v.drop)
	default:
		respond(d, v.ack)
	}
	return engine.Sent
}

func respond(d *engine.Delivery, a *engine.Ack) {
	if a == nil {
		a = &engine.Ack{Delivered: 1}
	}
	if d.TrySend() {
		_, _ = d.Ack(*a)
	}
}

// release acknowledges what was kept.
func (n *scripted) release() {
	n.mu.Lock()
	kept := n.kept
	n.kept = nil
	n.mu.Unlock()
	for _, d := range kept {
		respond(d, nil)
	}
}

// texts is what has come, in order.
func (n *scripted) texts() (all []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range n.got {
		all = append(all, s.text)
	}
	return all
}

// Room and Users implement route.Source: nobody asks.
func (n *scripted) Room(context.Context, string, func(user, node []byte)) (bool, uint64, error) {
	return false, 0, errors.New("a replay looks up nobody")
}

func (n *scripted) Users(context.Context, []string, [][]string) error {
	return errors.New("a replay looks up nobody")
}

// asker is a stream of a node. It notes how its replays ended.
type asker struct {
	mu   sync.Mutex
	ends map[uint64]end
}

type end struct {
	seq    uint64
	reason string
}

func (a *asker) Node() string { return "n" }

func (a *asker) End(gate, seq uint64, reason string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, twice := a.ends[gate]; twice {
		panic(fmt.Sprintf("gate %d ends twice", gate))
	}
	a.ends[gate] = end{seq, reason}
}

// ended is how the replay of a gate ended, nil if it has not.
func (a *asker) ended(gate uint64) *end {
	a.mu.Lock()
	defer a.mu.Unlock()
	if e, ok := a.ends[gate]; ok {
		return &e
	}
	return nil
}

func newAsker() *asker { return &asker{ends: map[uint64]end{}} }

// newWorld starts a service. The end of the test stops it.
func newWorld(t testing.TB, cfg Config) *world {
	t.Helper()
	w := &world{t: t, store: newMemory(), metrics: metrics.NewSet(), node: &scripted{}}
	shards, err := shard.New(shard.Config{Count: 1})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := route.New(route.Config{
		Source: w.node, Shards: 1, Shard: func(string) int { return 0 }, Go: func(_ int, task func()) error { return shards.At(0).Go(task) },
	})
	if err != nil {
		t.Fatal(err)
	}
	e, err := engine.New(engine.Config{Shards: shards, Directory: dir, Network: w.node})
	if err != nil {
		t.Fatal(err)
	}
	cfg.Store, cfg.Start, cfg.Metrics = w.store, e.Start, w.metrics
	if w.service, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, closing := range []func(context.Context) error{w.service.Close, e.Drain, shards.Close} {
			if err := closing(context.Background()); err != nil {
				t.Error(err)
			}
		}
		dir.Close()
		w.service.mu.Lock()
		defer w.service.mu.Unlock()
		if s := w.service; s.open != 0 || len(s.gates) != 0 || len(s.calls) != 0 || s.fresh.Len()+s.ready.Len()+s.waiting.Len() != 0 || s.workers != 0 {
			t.Errorf("left behind: %d open, %d streams, %d calls, %d fresh, %d ready, %d waiting, %d workers",
				s.open, len(s.gates), len(s.calls), s.fresh.Len(), s.ready.Len(), s.waiting.Len(), s.workers)
		}
	})
	return w
}

// in runs a test in virtual time.
func in(t *testing.T, cfg Config, f func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newWorld(t, cfg)) })
}

func (w *world) counter(name string) uint64 { return w.metrics.GetOrCreateCounter(name).Get() }

func (w *world) total(r result) uint64 {
	return w.counter(`push_manager_replay_total{result="` + r.String() + `"}`)
}

// expect fails the test unless the replay of a gate has ended so.
func (w *world) expect(a *asker, gate, seq uint64, reason string) {
	w.t.Helper()
	synctest.Wait()
	switch e := a.ended(gate); {
	case e == nil:
		w.t.Fatalf("the replay of gate %d has not ended", gate)
	case e.seq != seq, reason == "" && e.reason != "", !strings.Contains(e.reason, reason):
		w.t.Fatalf("gate %d ended at %d with %q, want %d, %q", gate, e.seq, e.reason, seq, reason)
	}
}

func (w *world) open(a *asker, gate uint64) {
	w.t.Helper()
	synctest.Wait()
	if e := a.ended(gate); e != nil {
		w.t.Fatalf("the replay of gate %d has ended: %+v", gate, *e)
	}
}

func TestNothingStoredEndsAtOnce(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a, began := newAsker(), time.Now()
		w.service.Catchup(a, 1, "u", 0)
		w.expect(a, 1, 0, "")
		if !time.Now().Equal(began) || w.store.reads != 0 || w.total(resultEmpty) != 1 {
			t.Errorf("after %v and %d reads, %d were empty", time.Since(began), w.store.reads, w.total(resultEmpty))
		}
	})
}

func TestPagesWaitForTheClient(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a, places := newAsker(), w.store.fill(t, "u", 250)
		w.service.Catchup(a, 1, "u", 0)
		for _, page := range []int{100, 200, 250} {
			w.open(a, 1)
			if n := len(w.node.texts()); n != page {
				t.Fatalf("%d messages have come, want %d", n, page)
			}
			w.service.Taken(a, 1, places[page-2]) // not all of it
			w.open(a, 1)
			if n := len(w.node.texts()); n != page {
				t.Fatalf("%d messages have come before the page was taken, want %d", n, page)
			}
			if left := w.store.places("u"); len(left) != 250-page+1 {
				t.Fatalf("%d are left after %d were taken", len(left), page-1)
			}
			w.service.Taken(a, 1, places[page-1])
		}
		w.expect(a, 1, places[249], "")
		if left := w.store.places("u"); len(left) > 0 {
			t.Errorf("left in the store: %v", left)
		}
		after := uint64(0)
		for i, s := range w.node.got {
			o := s.options
			if s.place != (engine.Replay{Node: "n", Gate: 1, Seq: places[i], After: after}) || s.user != "u" {
				t.Fatalf("message %d went to %s, %+v, behind %d", i, s.user, s.place, after)
			}
			if o.MessageID != "id x" || o.Sender != "sender" || o.PayloadHash != 7 || o.TTL <= 59*time.Minute || o.TTL > time.Hour || o.ClientAck || o.Store {
				t.Fatalf("options %+v", o)
			}
			after = places[i]
		}
		if n := w.counter("push_manager_replay_messages_total"); n != 250 || w.total(resultComplete) != 1 {
			t.Errorf("%d messages counted, %d complete", n, w.total(resultComplete))
		}
	})
}

// A client may take a message before the node has acknowledged that it handed it over: the two come on different streams.
func TestTakenBeforeTheAck(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a, places := newAsker(), w.store.fill(t, "u", 3)
		w.node.decide = func(*engine.Delivery) verdict { return verdict{keep: true} }
		w.service.Catchup(a, 1, "u", 0)
		synctest.Wait()
		w.service.Taken(a, 1, places[2])
		w.open(a, 1)
		if trims := w.store.trimmed("u"); len(trims) > 0 {
			t.Errorf("trimmed %v without an ack", trims)
		}
		w.node.release()
		w.expect(a, 1, places[2], "")
		if trims := w.store.trimmed("u"); !slices.Equal(trims, places[2:]) {
			t.Errorf("trimmed %v, want %v", trims, places[2:])
		}
	})
}

// The rest of a page may be taken while the store trims the beginning.
func TestWhatIsTakenDuringATrimIsTrimmed(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a, places := newAsker(), w.store.fill(t, "u", 3)
		w.store.onTrim = func(context.Context) error {
			w.service.Taken(a, 1, places[2])
			return nil
		}
		w.service.Catchup(a, 1, "u", 0)
		w.open(a, 1)
		w.service.Taken(a, 1, places[0])
		w.expect(a, 1, places[2], "")
		if left := w.store.places("u"); len(left) > 0 {
			t.Errorf("left in the store: %v", left)
		}
	})
}

func TestWindowOfTheNodeBoundsAPage(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a, places := newAsker(), w.store.fill(t, "u", 10)
		w.service.Catchup(a, 1, "u", 4)
		for _, n := range []int{4, 8, 10} {
			w.open(a, 1)
			if len(w.node.texts()) != n {
				t.Fatalf("%d on their way, want %d", len(w.node.texts()), n)
			}
			w.service.Taken(a, 1, places[n-1])
		}
		w.expect(a, 1, places[9], "")
	})
}

// What the node has not taken, and everything behind it, stays and comes again.
func TestReplayStopsAtWhatIsNotTaken(t *testing.T) {
	full := &engine.Ack{Failed: []string{"u"}, Text: "queue of the client is full"}
	for name, test := range map[string]struct {
		verdict verdict
		reason  string
		behind  bool // the next one was sent before it was known
		result  result
	}{
		"refused by the link":   {verdict{decline: engine.DropQueueFull}, "queue full", false, resultNode},
		"refused by the node":   {verdict{ack: full}, "is full", false, resultNode},
		"user is not there":     {verdict{ack: &engine.Ack{NotHere: []string{"u"}}}, "not there", false, resultAway},
		"no acknowledgement":    {verdict{keep: true}, "deadline", true, resultNode},
		"node is not reachable": {verdict{decline: engine.DropUnreachable}, "not reachable", false, resultNode},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, Config{}, func(t *testing.T, w *world) {
				a, places := newAsker(), w.store.fill(t, "u", 5)
				w.node.decide = func(d *engine.Delivery) verdict {
					if d.Options().Replay.Seq == places[2] {
						return test.verdict
					}
					return verdict{}
				}
				w.service.Catchup(a, 1, "u", 0)
				time.Sleep(10 * time.Second)
				w.expect(a, 1, places[1], test.reason)
				if n := len(w.node.texts()); n == 5 != test.behind {
					t.Errorf("%d messages were sent", n)
				}
				if left := w.store.places("u"); !slices.Equal(left, places) {
					t.Errorf("left: %v, want %v", left, places)
				}
				if w.total(test.result) != 1 {
					t.Errorf("not counted as %s", test.result)
				}
				w.node.decide = nil
				w.service.Catchup(a, 2, "u", 0)
				synctest.Wait()
				w.service.Taken(a, 2, places[4])
				w.expect(a, 2, places[4], "")
			})
		})
	}
}

// The node says no to what comes behind a lost message, and it may say that the client has taken what it has.
func TestNothingBehindALostMessageIsTrimmed(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a, places := newAsker(), w.store.fill(t, "u", 5)
		w.node.decide = func(d *engine.Delivery) verdict { return verdict{keep: d.Options().Replay.Seq == places[2]} }
		w.service.Catchup(a, 1, "u", 0)
		synctest.Wait()
		w.service.Taken(a, 1, places[4]) // as if the node knew nothing of After
		time.Sleep(time.Minute)
		w.expect(a, 1, places[1], "deadline")
		if left := w.store.places("u"); left[len(left)-3] != places[2] {
			t.Errorf("left %v, but %v were lost", left, places[2:])
		}
	})
}

func TestExpiredIsPassedOver(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a := newAsker()
		var places []uint64
		for i, ttl := range []time.Duration{time.Hour, 500 * time.Millisecond, time.Hour, time.Second, time.Hour} {
			places = append(places, w.store.put(t, "u", fmt.Sprint("m", i), ttl))
		}
		// The second runs out between the read and its sending, the fourth in the link's queue: the node refuses what
		// stands behind it.
		last := uint64(0)
		w.node.decide = func(d *engine.Delivery) verdict {
			place := d.Options().Replay
			switch {
			case place.Seq == places[0]:
				time.Sleep(600 * time.Millisecond)
			case place.Seq == places[3]:
				time.Sleep(400 * time.Millisecond)
				return verdict{drop: engine.DropExpired, unseen: true}
			case place.After != last:
				return verdict{ack: &engine.Ack{Refused: true, Text: "behind one that did not come"}}
			}
			last = place.Seq
			return verdict{}
		}
		w.service.Catchup(a, 1, "u", 0)
		time.Sleep(2 * time.Second)
		w.open(a, 1)
		w.service.Taken(a, 1, places[4])
		w.expect(a, 1, places[4], "")
		if got := w.node.texts(); !slices.Equal(got, []string{"m0", "m2", "m4"}) && !slices.Equal(got, []string{"m0", "m2", "m4", "m4"}) {
			t.Errorf("sent: %v", got)
		}
		if n := w.counter("push_manager_replay_passed_over_total"); n != 2 || w.counter("push_manager_replay_messages_total") != 3 {
			t.Errorf("%d passed over, %d taken", n, w.counter("push_manager_replay_messages_total"))
		}
	})
}

// What can never be delivered must not hold up the rest for ever.
func TestHopelessIsPassedOver(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a, places := newAsker(), w.store.fill(t, "u", 3)
		w.node.decide = func(d *engine.Delivery) verdict {
			if d.Options().Replay.Seq == places[1] {
				return verdict{ack: &engine.Ack{Reused: []string{"u"}}}
			}
			return verdict{}
		}
		w.service.Catchup(a, 1, "u", 0)
		synctest.Wait()
		w.service.Taken(a, 1, places[2])
		w.expect(a, 1, places[2], "")
	})
}

func TestStoreThatDoesNotAnswer(t *testing.T) {
	hang := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	fail := func(context.Context) error { return fmt.Errorf("%w: broken pipe", engine.ErrSpoolDown) }
	for name, hook := range map[string]func(m *memory, f func(context.Context) error){
		"any":  func(m *memory, f func(context.Context) error) { m.onAny = f },
		"read": func(m *memory, f func(context.Context) error) { m.onRead = f },
		"trim": func(m *memory, f func(context.Context) error) { m.onTrim = f },
	} {
		for how, f := range map[string]func(context.Context) error{"hangs": hang, "fails": fail} {
			t.Run(name+" "+how, func(t *testing.T) {
				in(t, Config{}, func(t *testing.T, w *world) {
					hook(w.store, f)
					a, places, began := newAsker(), w.store.fill(t, "u", 3), time.Now()
					w.service.Catchup(a, 1, "u", 0)
					synctest.Wait()
					passed := uint64(0)
					if name == "trim" {
						passed = places[2]
						w.service.Taken(a, 1, passed)
					}
					for a.ended(1) == nil {
						time.Sleep(100 * time.Millisecond)
					}
					w.expect(a, 1, passed, "store: not reachable")
					if took := time.Since(began); took > 2*time.Second+100*time.Millisecond || w.total(resultStore) != 1 {
						t.Errorf("after %v, counted %d", took, w.total(resultStore))
					}
					hook(w.store, nil)
					w.service.Catchup(a, 2, "u", 0)
					synctest.Wait()
					w.service.Taken(a, 2, places[2])
					w.expect(a, 2, places[2], "")
				})
			})
		}
	}
}

func TestPanicOfTheStoreEndsTheReplay(t *testing.T) {
	for name, hook := range map[string]func(m *memory, f func(context.Context) error){
		"any":  func(m *memory, f func(context.Context) error) { m.onAny = f },
		"read": func(m *memory, f func(context.Context) error) { m.onRead = f },
	} {
		t.Run(name, func(t *testing.T) {
			in(t, Config{}, func(t *testing.T, w *world) {
				hook(w.store, func(context.Context) error { panic("a bug") })
				a := newAsker()
				w.store.fill(t, "u", 1)
				w.service.Catchup(a, 1, "u", 0)
				w.expect(a, 1, 0, "internal error")
				hook(w.store, nil)
				w.service.Catchup(a, 2, "u", 0)
				w.open(a, 2)
				if n := w.counter(`push_manager_panics_total{part="replay"}`); n != 1 || len(w.node.texts()) != 1 {
					t.Errorf("%d panics, %d messages", n, len(w.node.texts()))
				}
			})
		})
	}
}

// The stream ends: nothing more is sent, and what the client has taken is trimmed.
func TestGone(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a, b, places := newAsker(), newAsker(), w.store.fill(t, "u", 150)
		w.service.Catchup(b, 1, "nobody", 0)
		w.service.Catchup(a, 1, "u", 0)
		synctest.Wait()
		let := make(chan struct{})
		w.store.onTrim = func(context.Context) error { <-let; return nil }
		w.service.Taken(a, 1, places[20])
		synctest.Wait()
		w.service.Taken(a, 1, places[30]) // comes while the trim is under way
		w.service.Gone(a)
		close(let)
		synctest.Wait()
		if left := w.store.places("u"); len(left) != 150-31 {
			t.Errorf("%d are left of 150, of which 31 were taken", len(left))
		}
		w.service.Taken(a, 1, places[99])
		synctest.Wait()
		if e := a.ended(1); e != nil || len(w.node.texts()) != 100 || w.total(resultGone) != 1 {
			t.Errorf("ended %v, %d messages, %d gone", e, len(w.node.texts()), w.total(resultGone))
		}
	})
}

func TestGoneInTheMiddleOfAPage(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a, places := newAsker(), w.store.fill(t, "u", 10)
		w.node.decide = func(d *engine.Delivery) verdict {
			if d.Options().Replay.Seq == places[3] {
				w.service.Gone(a)
			}
			return verdict{}
		}
		w.service.Catchup(a, 1, "u", 0)
		synctest.Wait()
		if n := len(w.node.texts()); n != 4 || a.ended(1) != nil {
			t.Errorf("%d messages were sent, the stream had ended with the fourth", n)
		}
	})
}

func TestClaimsThatCannotBeAreCounted(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a, places := newAsker(), w.store.fill(t, "u", 3)
		w.service.Catchup(a, 1, "u", 0)
		synctest.Wait()
		w.service.Taken(a, 1, places[2]+1)
		w.open(a, 1)
		w.service.Catchup(a, 1, "u", 0) // twice
		w.service.Catchup(a, 0, "u", 0)
		w.service.Catchup(a, 2, "", 0)
		w.service.Catchup(a, 3, strings.Repeat("x", 289), 0)
		w.service.Catchup(a, 4, "a\x00b", 0)
		w.service.Taken(a, 77, 1) // may have ended
		w.open(a, 1)
		if n := w.counter("push_manager_replay_violations_total"); n != 6 || len(w.store.trimmed("u")) > 0 || len(w.node.texts()) != 3 {
			t.Errorf("%d violations, trimmed %v, %d messages", n, w.store.trimmed("u"), len(w.node.texts()))
		}
		for _, gate := range []uint64{2, 3, 4} {
			w.expect(a, gate, 0, "no user id")
		}
	})
}

func TestClientThatTakesNothing(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a, places := newAsker(), w.store.fill(t, "u", 3)
		w.service.Catchup(a, 1, "u", 0)
		time.Sleep(takenTimeout - time.Second)
		w.service.Taken(a, 1, places[0]) // it is only slow
		time.Sleep(takenTimeout - time.Second)
		w.open(a, 1)
		time.Sleep(2 * time.Second)
		w.expect(a, 1, places[2], "takes nothing")
		if w.total(resultUntaken) != 1 || len(w.store.places("u")) != 2 {
			t.Errorf("counted %d, left %v", w.total(resultUntaken), w.store.places("u"))
		}
	})
}

// A user's devices share the inbox, and replays of theirs know nothing of each other.
func TestTwoDevices(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a, b, places := newAsker(), newAsker(), w.store.fill(t, "u", 150)
		w.service.Catchup(a, 1, "u", 0)
		w.service.Catchup(b, 1, "u", 0)
		synctest.Wait()
		w.service.Taken(a, 1, places[99])
		synctest.Wait()
		w.service.Taken(a, 1, places[149])
		w.expect(a, 1, places[149], "")
		w.service.Taken(b, 1, places[50]) // less than was trimmed
		w.open(b, 1)
		w.service.Taken(b, 1, places[99])
		w.expect(b, 1, places[99], "")
		if left := w.store.places("u"); len(left) > 0 {
			t.Errorf("left %v", left)
		}
	})
}

// What is on its way is bounded by the workers, and a replay that waits for its client takes none.
func TestPlacesInFlight(t *testing.T) {
	in(t, Config{Concurrency: 3, Page: 10}, func(t *testing.T, w *world) {
		a := newAsker()
		w.node.decide = func(*engine.Delivery) verdict { return verdict{keep: true} }
		for i := range 10 {
			user := fmt.Sprint("u", i)
			w.store.fill(t, user, 20)
			w.service.Catchup(a, uint64(i+1), user, 0)
		}
		for _, sent := range []int{30, 60, 90, 100} {
			synctest.Wait()
			if n := len(w.node.texts()); n != sent {
				t.Fatalf("%d messages have been sent, want %d", n, sent)
			}
			w.node.release()
		}
		synctest.Wait()
		if w.service.workers != 0 {
			t.Errorf("%d workers while all wait for their clients", w.service.workers)
		}
	})
}

// Who has stood in line for so long that the node has opened its gate is told to ask again.
func TestLineIsNotWorthWaitingForLong(t *testing.T) {
	in(t, Config{Concurrency: 1}, func(t *testing.T, w *world) {
		a := newAsker()
		w.store.fill(t, "slow", 1)
		w.store.fill(t, "u", 1)
		w.store.onRead = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		w.service.Catchup(a, 1, "slow", 0)
		synctest.Wait()
		time.Sleep(time.Millisecond)
		w.service.Catchup(a, 2, "slow", 0)
		w.service.Catchup(a, 3, "u", 0)
		time.Sleep(time.Minute)
		w.expect(a, 1, 0, "store: not reachable")
		w.expect(a, 2, 0, "store: not reachable")
		w.expect(a, 3, 0, "too many replays")
		if w.total(resultRefused) != 1 {
			t.Errorf("%d refused", w.total(resultRefused))
		}
	})
}

func TestOneNodeTakesHalfOfThePlaces(t *testing.T) {
	w := newWorld(t, Config{})
	let := make(chan struct{})
	w.store.onAny = func(context.Context) error { <-let; return nil }
	a, b := newAsker(), newAsker()
	for gate := range uint64(maxOpen/2 + 1) {
		w.service.Catchup(a, gate+1, "u", 0)
	}
	if e := a.ended(maxOpen/2 + 1); e == nil || !strings.Contains(e.reason, "too many replays") {
		t.Errorf("one too many: %+v", e)
	}
	w.service.Catchup(b, 1, "u", 0)
	if e := b.ended(1); e != nil {
		t.Errorf("the first of another node: %+v", e)
	}
	close(let)
	for b.ended(1) == nil {
		time.Sleep(time.Millisecond)
	}
}

// Those who come while the store is asked share the next question.
func TestStormIsAskedForTogether(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a := newAsker()
		w.store.onAny = func(context.Context) error { time.Sleep(time.Millisecond); return nil }
		for gate := range uint64(5000) {
			w.service.Catchup(a, gate+1, fmt.Sprint("u", gate), 0)
		}
		time.Sleep(time.Second)
		w.store.mu.Lock()
		defer w.store.mu.Unlock()
		a.mu.Lock()
		defer a.mu.Unlock()
		if n := len(w.store.anys); n > 6 || slices.Max(w.store.anys) > 1000 || len(a.ends) != 5000 {
			t.Errorf("%d questions of %v users, %d ends", n, w.store.anys, len(a.ends))
		}
	})
}

func TestClose(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a := newAsker()
		w.store.fill(t, "u", 200)
		w.store.fill(t, "v", 1)
		w.service.Catchup(a, 1, "u", 0)
		synctest.Wait()
		w.store.onRead = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		w.service.Catchup(a, 2, "v", 0)
		synctest.Wait()
		if err := w.service.Close(t.Context()); err != nil {
			t.Error(err)
		}
		w.expect(a, 1, 100, "draining")
		w.expect(a, 2, 0, "draining")
		w.service.Catchup(a, 3, "u", 0)
		w.expect(a, 3, 0, "draining")
		if _, err := w.service.Replay(t.Context(), "u", "n"); !errors.Is(err, engine.ErrDraining) {
			t.Errorf("replay after the end: %v", err)
		}
	})
}

// Replay asked for from outside goes on by itself: what was delivered is trimmed.
func TestReplayFromOutside(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		places := w.store.fill(t, "u", 40)
		n, err := w.service.Replay(t.Context(), "u", "n")
		if n != callWindow || err != nil {
			t.Errorf("replayed %d, %v", n, err)
		}
		synctest.Wait()
		if left := w.store.places("u"); len(left) > 0 || len(w.node.texts()) != 40 {
			t.Errorf("left %v, sent %d", left, len(w.node.texts()))
		}
		for i, s := range w.node.got {
			if s.place.Gate != 0 || s.place.Seq != places[i] || s.place.Node != "n" || !s.options.ClientAck {
				t.Fatalf("message %d: %+v, %+v", i, s.place, s.options)
			}
		}
		if n, err := w.service.Replay(t.Context(), "u", "n"); n != 0 || err != nil {
			t.Errorf("with nothing stored: %d, %v", n, err)
		}
	})
}

func TestReplayFromOutsideFails(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		w.store.fill(t, "u", 1)
		w.node.decide = func(*engine.Delivery) verdict { return verdict{decline: engine.DropQueueFull} }
		if n, err := w.service.Replay(t.Context(), "u", "n"); n != 0 || !errors.Is(err, ErrNotTaken) || !strings.Contains(err.Error(), "queue full") {
			t.Errorf("node that takes nothing: %d, %v", n, err)
		}
		w.store.onAny = func(context.Context) error { return engine.ErrSpoolDown }
		if n, err := w.service.Replay(t.Context(), "u", "n"); n != 0 || !errors.Is(err, engine.ErrSpoolDown) {
			t.Errorf("store that is away: %d, %v", n, err)
		}
		w.store.onAny = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		began := time.Now()
		if n, err := w.service.Replay(ctx, "u", "n"); n != 0 || !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > time.Second {
			t.Errorf("caller who has no time: %d, %v after %v", n, err, time.Since(began))
		}
		if len(w.store.places("u")) != 1 {
			t.Error("a message is lost")
		}
	})
}

// Nothing of a page that was read before is sent once the user is forgotten. What comes later is.
func TestForget(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a := newAsker()
		places := w.store.fill(t, "u", 10)
		w.node.decide = func(d *engine.Delivery) verdict {
			if d.Options().Replay.Seq == places[3] {
				if n, err := w.service.Forget(context.Background(), "u"); n != 10 || err != nil {
					t.Errorf("forgot %d, %v", n, err)
				}
				w.store.put(t, "u", "new", time.Hour)
			}
			return verdict{}
		}
		w.service.Catchup(a, 1, "u", 0)
		w.open(a, 1)
		w.service.Taken(a, 1, places[3])
		w.open(a, 1)
		if got := w.node.texts(); len(got) != 5 || got[4] != "new" {
			t.Errorf("sent %v", got)
		}
		w.store.onRead, w.store.onAny = nil, nil
	})
}

// A user of a tenant has a longer id than the engine's limit for the caller's part.
func TestUserOfATenant(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a, user := newAsker(), strings.Repeat("t", 31)+"/"+strings.Repeat("u", 256)
		w.store.fill(t, user, 1)
		w.service.Catchup(a, 1, user, 0)
		w.open(a, 1)
		if len(w.node.texts()) != 1 {
			t.Error("the message was not sent")
		}
	})
}

func TestMessageOfARoomSaysSo(t *testing.T) {
	in(t, Config{}, func(t *testing.T, w *world) {
		a := newAsker()
		w.store.put(t, "u", "x", time.Hour)
		w.store.users["u"][0].Message.Room = "r"
		w.service.Catchup(a, 1, "u", 0)
		w.open(a, 1)
		if len(w.node.got) != 1 || w.node.got[0].room != "r" {
			t.Errorf("sent %+v", w.node.got)
		}
	})
}

func TestConfigIsValidated(t *testing.T) {
	for name, cfg := range map[string]Config{
		"nothing":     {},
		"concurrency": {Store: newMemory(), Start: func(*engine.Push, engine.Completer) error { return nil }, Concurrency: 1025},
		"page":        {Store: newMemory(), Start: func(*engine.Push, engine.Completer) error { return nil }, Page: -1},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
