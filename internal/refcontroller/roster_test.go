package refcontroller

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/slots"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/discovery"
)

// sync says that a node has reported everything, or not.
func (b *bench) sync(node, boot string, complete bool) *pubsub.SyncNodeResponse {
	b.t.Helper()
	in := &pubsub.SyncNodeRequest{NodeId: node, BootId: boot}
	if complete {
		in.ReportedTo = b.server.svc.store.ID()
	}
	out, err := b.SyncNode(b.t.Context(), in)
	if err != nil {
		b.t.Fatal(err)
	}
	return out
}

// lookUps are the errors of all look-ups.
func (b *bench) lookUps() map[string]error {
	ctx := b.t.Context()
	errs := map[string]error{}
	_, errs["GetRoomInfo"] = b.GetRoomInfo(ctx, &pubsub.GetRoomInfoRequest{RoomId: "r"})
	_, errs["GetUserNode"] = b.GetUserNode(ctx, &pubsub.GetUserNodeRequest{UserId: "u"})
	_, errs["GetUserNodes"] = b.GetUserNodes(ctx, &pubsub.GetUserNodesRequest{UserIds: []string{"u"}})
	_, errs["GetRoomStats"] = b.GetRoomStats(ctx, &pubsub.GetRoomStatsRequest{})
	return errs
}

func (b *bench) wantLookUps(code codes.Code, why string) {
	b.t.Helper()
	for method, err := range b.lookUps() {
		if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), why) {
			b.t.Errorf("%s: %v", method, err)
		}
	}
}

func registerNode(t *testing.T, b *bench, etcd *etcdtest.Server, id, boot string) *discovery.Registration {
	t.Helper()
	r, err := discovery.Register(t.Context(), discovery.RegistrationConfig{
		Client: etcd.Client(), ID: id, Addr: "10.0.0.1:1", Metadata: map[string]string{"boot_id": boot},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close(context.Background()) })
	if b != nil {
		eventually(t, id+" is known", func() bool { return b.server.roster.boot(id) == boot })
	}
	return r
}

func TestControllerThatHasJustStartedIsNotBelieved(t *testing.T) {
	etcd := etcdtest.Start(t)
	registerNode(t, nil, etcd, "n1", "boot-1")
	registerNode(t, nil, etcd, "n2", "boot-2")
	b := start(t, Config{Client: etcd.Client(), Warmup: time.Hour})
	eventually(t, "the nodes are known", func() bool { return strings.Contains(b.server.WarmingUp(), "n1, n2") })
	b.wantLookUps(codes.Unavailable, "n1, n2")
	stream, err := b.WatchRoutes(t.Context(), &pubsub.WatchRoutesRequest{})
	if err != nil {
		t.Fatal(err)
	}

	// Reports are taken, and do not make it believe itself.
	joined := make(chan error, 1)
	go func() {
		_, err := b.JoinRoom(t.Context(), &pubsub.JoinRoomRequest{UserId: "u", RoomId: "r", NodeId: "n1", BootId: "boot-1", Seq: 1})
		joined <- err
	}()
	eventually(t, "the report is taken", func() bool { return b.server.svc.store.Counts().Memberships == 1 })
	b.sync("n1", "boot-1", false)
	b.sync("n1", "boot-1", true)
	eventually(t, "the other one is awaited", func() bool { return strings.HasPrefix(b.server.WarmingUp(), "n2 ") })
	b.wantLookUps(codes.Unavailable, "n2")
	if n := b.server.svc.hub.len(); n != 0 {
		t.Errorf("%d change streams are in sync", n)
	}

	b.sync("n2", "boot-2", true)
	if msg, err := stream.Recv(); err != nil || !msg.GetSynced() {
		t.Fatalf("%v, %v", msg, err)
	}
	if err := <-joined; err != nil {
		t.Error(err)
	}
	b.wantLookUps(codes.OK, "")
	b.want("room", b.room("r"), "u@n1")
	if why := b.server.WarmingUp(); why != "" {
		t.Errorf("still: %s", why)
	}
}

// Old routes serve meanwhile as if they were good: they lack who joins.
func TestNumberedReportsAreAnsweredAfterTheWarmup(t *testing.T) {
	etcd := etcdtest.Start(t)
	registerNode(t, nil, etcd, "n", "boot")
	b := start(t, Config{Client: etcd.Client(), Warmup: time.Hour})
	eventually(t, "the node is known", func() bool { return strings.Contains(b.server.WarmingUp(), "n ") })
	ctx := t.Context()
	join := func(ctx context.Context, user string, seq uint64) error {
		_, err := b.JoinRoom(ctx, &pubsub.JoinRoomRequest{UserId: user, RoomId: "r", NodeId: "n", BootId: "boot", Seq: seq})
		return err
	}
	leave := func(user, room string, seq uint64) error {
		_, err := b.LeaveRoom(ctx, &pubsub.LeaveRoomRequest{UserId: user, RoomId: room, NodeId: "n", BootId: "boot", Seq: seq})
		return err
	}
	counts := func() Counts { return b.server.svc.store.Counts() }

	// The call at the start is answered at once: before it the node says nothing.
	if err := leave("", "", 1); err != nil {
		t.Fatal(err)
	}
	answers := make(chan error, 3)
	go func() { answers <- join(ctx, "u", 2) }()
	go func() { answers <- join(ctx, "v", 3) }()
	eventually(t, "joins are executed", func() bool { return counts().Memberships == 2 })
	go func() { answers <- leave("v", "r", 4) }()
	eventually(t, "the leave is executed", func() bool { return counts().Memberships == 1 })

	// Who gives up gets an error, and is in the room all the same.
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := join(short, "w", 5); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("who has given up got %v", err)
	}
	// Nodes that do not number their reports make them again by these.
	b.join("old", "r", "other")
	b.leave("old", "r", "other")
	// Nor does the comparison wait, which ends the warm-up.
	if got := b.sync("n", "boot", false); got.GetStoreId() == "" {
		t.Error("no store_id")
	}
	slot := slots.Of(slots.Hash("x", "r"))
	if _, err := b.SyncNode(ctx, &pubsub.SyncNodeRequest{NodeId: "n", BootId: "boot", Slots: []*pubsub.NodeSlot{
		{Slot: uint32(slot), Seq: 6, Memberships: []*pubsub.NodeMembership{{UserId: "x", RoomId: "r"}}},
	}}); err != nil {
		t.Error(err)
	}
	select {
	case err := <-answers:
		t.Errorf("answered during the warm-up: %v", err)
	default:
	}
	b.sync("n", "boot", true)
	for range 3 {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
	b.want("room", b.room("r"), "u@n w@n x@n")
}

func TestDrainEndsReportsThatWaitForTheWarmup(t *testing.T) {
	b := start(t, Config{Warmup: time.Hour})
	answer := make(chan error, 1)
	go func() {
		_, err := b.JoinRoom(t.Context(), &pubsub.JoinRoomRequest{UserId: "u", RoomId: "r", NodeId: "n", BootId: "b", Seq: 1})
		answer <- err
	}()
	eventually(t, "the join is executed", func() bool { return b.server.svc.store.Counts().Memberships == 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	if err := b.server.Drain(ctx); err != nil {
		t.Error(err)
	}
	if err := <-answer; status.Code(err) != codes.Unavailable {
		t.Error(err)
	}
}

// The words of nodes that say no more are forgotten, with etcd and without.
func TestWordsOfNodesDoNotPileUp(t *testing.T) {
	without, err := newRoster(Config{Store: NewMemory(0)}.withDefaults())
	if err != nil {
		t.Fatal(err)
	}
	without.began = time.Now()
	for name, r := range map[string]*roster{"without etcd": without, "etcd is silent": quietRoster(t, Config{})} {
		for i := range 100 {
			r.heard(fmt.Sprint("node-", i), "b", r.store.ID(), r.began)
		}
		r.heard("lives", "b", r.store.ID(), r.began.Add(wordMemory))
		r.at(t, wordMemory)
		if n := len(r.words); n != 101 {
			t.Errorf("%s: %d words", name, n)
		}
		r.at(t, wordMemory+time.Second)
		if n := len(r.words); n != 1 {
			t.Errorf("%s: %d words in the end", name, n)
		}
	}
}

// Whoever reports with ever new ids is remembered only so often, and nobody else is refused.
func TestNodesThatAreNotRegisteredAreBounded(t *testing.T) {
	r := quietRoster(t, Config{})
	report := func(id string, after time.Duration) error { return r.admit(id, r.began.Add(after)) }
	for i := range maxStrangers {
		if err := report(fmt.Sprint("made-up-", i), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := report("one-too-many", 0); status.Code(err) != codes.ResourceExhausted || r.refused.Get() != 1 {
		t.Errorf("one more: %v, %d counted", err, r.refused.Get())
	}
	if err := report("made-up-7", wordMemory); err != nil {
		t.Error("one that was there before:", err)
	}
	r.set(discovery.Node{ID: "one-too-many"})
	if err := report("one-too-many", 0); err != nil {
		t.Error("it is registered by now:", err)
	}
	r.at(t, wordMemory+time.Second)
	if len(r.strangers) != 1 {
		t.Errorf("%d are kept though they have been silent", len(r.strangers))
	}
	// One of them registers.
	r.set(discovery.Node{ID: "made-up-7"})
	r.at(t, wordMemory+2*time.Second)
	if len(r.strangers) != 0 {
		t.Errorf("%d are kept though they are registered", len(r.strangers))
	}
}

// All that reports goes through that.
func TestReportsOfOneNodeTooManyAreRefused(t *testing.T) {
	b := start(t, Config{})
	for i := range maxStrangers {
		if err := b.server.roster.admit(fmt.Sprint("made-up-", i), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	ctx := t.Context()
	_, join := b.JoinRoom(ctx, &pubsub.JoinRoomRequest{UserId: "u", RoomId: "r", NodeId: "n"})
	_, numbered := b.JoinRoom(ctx, &pubsub.JoinRoomRequest{UserId: "u", RoomId: "r", NodeId: "n", BootId: "b", Seq: 7})
	_, begin := b.LeaveRoom(ctx, &pubsub.LeaveRoomRequest{NodeId: "n"})
	_, sync := b.SyncNode(ctx, &pubsub.SyncNodeRequest{NodeId: "n", BootId: "b"})
	for what, err := range map[string]error{"join": join, "with a number": numbered, "begin": begin, "sync": sync} {
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := len(b.server.roster.words); n != 0 {
		t.Errorf("%d words are kept", n)
	}
	b.join("u", "r", "made-up-1")
}

func TestDeadNodesAreOneLineOfTheLog(t *testing.T) {
	var log strings.Builder
	store := NewMemory(0)
	r := quietRoster(t, Config{Store: store, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	for i := range 1000 {
		if _, err := store.Join(t.Context(), Join{Reporter: Reporter{Node: fmt.Sprint("n", i), Boot: "b", Seq: 1}, User: "u", Room: "r"}); err != nil {
			t.Fatal(err)
		}
	}
	r.set()
	r.at(t, 0)
	r.at(t, time.Minute)
	if n := store.Counts().Memberships; n != 0 {
		t.Errorf("%d memberships are left", n)
	}
	if text := log.String(); strings.Count(text, "\n") != 1 || len(text) > 300 || !strings.Contains(text, "count=1000 memberships=1000") {
		t.Errorf("%d lines, %.1000s", strings.Count(text, "\n"), text)
	}
}

func TestFirstStartOfAnEmptyClusterIsBelievedAtOnce(t *testing.T) {
	b := start(t, Config{Client: etcdtest.Start(t).Client(), Warmup: time.Hour})
	eventually(t, "look-ups are answered", func() bool { return b.lookUps()["GetRoomInfo"] == nil })
}

func TestDrainEndsChangeStreamsThatWaitForTheWarmup(t *testing.T) {
	b := start(t, Config{Warmup: time.Hour})
	stream, err := b.WatchRoutes(t.Context(), &pubsub.WatchRoutesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	b.wantLookUps(codes.Unavailable, "just started") // The stream has been opened before.
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	if err := b.server.Drain(ctx); err != nil {
		t.Error(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Error(err)
	}
}

// quietRoster is a roster whose clock the test has.
func quietRoster(t *testing.T, cfg Config) *roster {
	t.Helper()
	cfg.Client = etcdtest.NewClient(t, "127.0.0.1:1") // Its watcher is not started.
	r, err := newRoster(cfg.withDefaults())
	if err != nil {
		t.Fatal(err)
	}
	r.began = time.Now()
	r.looked = r.began
	return r
}

func (r *roster) set(nodes ...discovery.Node) { r.onNodes(nodes) }

// at looks after a time, without the gap that stands for a process that stood still.
func (r *roster) at(t *testing.T, after time.Duration) {
	t.Helper()
	now := r.began.Add(after)
	r.looked = now
	r.look(t.Context(), now)
}

func TestWarmupEnds(t *testing.T) {
	const warmup = 15 * time.Second
	nodes := []discovery.Node{{ID: "new", BootID: "b"}, {ID: "old"}}
	for name, tc := range map[string]struct {
		before func(r *roster, at func(time.Duration) time.Time)
		nodes  []discovery.Node
		over   time.Duration
	}{
		"when a node says nothing: after the time": {
			before: func(r *roster, at func(time.Duration) time.Time) { r.heard("new", "b", r.store.ID(), at(0)) },
			nodes:  nodes, over: warmup,
		},
		"when all have reported: at once": {
			before: func(r *roster, at func(time.Duration) time.Time) {
				r.heard("new", "b", r.store.ID(), at(0))
				r.heard("old", "x", r.store.ID(), at(0))
			},
			nodes: nodes, over: 0,
		},
		"when one is still reporting: later": {
			before: func(r *roster, at func(time.Duration) time.Time) {
				r.heard("old", "x", r.store.ID(), at(0))
				r.heard("new", "b", "", at(warmupMost*warmup))
			},
			nodes: nodes, over: warmupMost * warmup,
		},
		"when one has begun and died: after the time": {
			before: func(r *roster, at func(time.Duration) time.Time) {
				r.heard("old", "x", r.store.ID(), at(0))
				r.heard("new", "b", "", at(time.Second))
			},
			nodes: nodes, over: warmup,
		},
		"when an earlier process has reported: after the time": {
			before: func(r *roster, at func(time.Duration) time.Time) {
				r.heard("old", "x", r.store.ID(), at(0))
				r.heard("new", "a", r.store.ID(), at(0))
			},
			nodes: nodes, over: warmup,
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := quietRoster(t, Config{Warmup: warmup})
			r.set(tc.nodes...)
			tc.before(r, func(d time.Duration) time.Time { return r.began.Add(d) })
			if tc.over > 0 {
				r.at(t, tc.over-time.Millisecond)
				if r.isWarm() {
					t.Error("too early")
				}
			}
			r.at(t, tc.over)
			if !r.isWarm() {
				t.Error("too late")
			}
		})
	}
	t.Run("when etcd does not answer: after the time", func(t *testing.T) {
		r := quietRoster(t, Config{Warmup: warmup})
		if r.at(t, warmup-time.Millisecond); r.isWarm() {
			t.Error("too early")
		}
		if r.at(t, warmup); !r.isWarm() {
			t.Error("too late")
		}
	})
}

func TestMembershipsLiveAsLongAsTheirNode(t *testing.T) {
	const grace = 15 * time.Second
	registered := discovery.Node{ID: "n", BootID: "b"}
	for name, tc := range map[string]struct {
		boot    string
		spoke   time.Duration // its last SyncNode; negative: never
		nodes   []discovery.Node
		dropped time.Duration // 0: never
	}{
		"registered and silent":                     {boot: "b", spoke: 0, nodes: []discovery.Node{registered}},
		"registered without a boot id":              {boot: "b", spoke: 0, nodes: []discovery.Node{{ID: "n"}}},
		"gone and silent: at once":                  {boot: "b", spoke: 0, dropped: silentAfter},
		"gone and alive: the grace":                 {boot: "b", spoke: time.Hour, dropped: grace},
		"gone, and never called SyncNode":           {boot: "", spoke: -1, dropped: grace},
		"registered by another process, and silent": {boot: "a", spoke: 0, nodes: []discovery.Node{registered}, dropped: silentAfter},
	} {
		t.Run(name, func(t *testing.T) {
			store := NewMemory(0)
			r := quietRoster(t, Config{Store: store})
			if _, err := store.Join(t.Context(), Join{Reporter: Reporter{Node: "n", Boot: tc.boot, Seq: 1}, User: "u", Room: "r"}); err != nil {
				t.Fatal(err)
			}
			if tc.spoke >= 0 {
				r.heard("n", tc.boot, r.store.ID(), r.began.Add(tc.spoke))
			}
			r.set(tc.nodes...)
			r.at(t, 0)
			for _, step := range []struct {
				at   time.Duration
				gone bool
			}{{tc.dropped - time.Millisecond, false}, {tc.dropped, true}, {time.Minute, tc.dropped > 0}} {
				if step.at <= 0 {
					continue
				}
				r.at(t, step.at)
				if gone := store.Counts().Memberships == 0; gone != step.gone {
					t.Fatalf("after %v: gone %v", step.at, gone)
				}
			}
		})
	}
}

// A Controller that was stopped finds what the nodes said meanwhile unread.
func TestPausedControllerDoesNotTakeItsNodesForSilent(t *testing.T) {
	store := NewMemory(0)
	r := quietRoster(t, Config{Store: store})
	if _, err := store.Join(t.Context(), Join{Reporter: Reporter{Node: "n", Boot: "b", Seq: 1}, User: "u", Room: "r"}); err != nil {
		t.Fatal(err)
	}
	r.heard("n", "b", r.store.ID(), r.began)
	r.set() // Its lease has ended meanwhile.
	r.look(t.Context(), r.began.Add(10*time.Second))
	if store.Counts().Memberships == 0 {
		t.Error("its memberships are gone")
	}
}

func TestReportOfAProcessThatIsNotRegisteredIsRefused(t *testing.T) {
	etcd := etcdtest.Start(t)
	b := start(t, Config{Client: etcd.Client()})
	registerNode(t, b, etcd, "n", "new")
	ctx := t.Context()
	_, join := b.JoinRoom(ctx, &pubsub.JoinRoomRequest{UserId: "u", RoomId: "r", NodeId: "n", BootId: "old", Seq: 7})
	_, begin := b.LeaveRoom(ctx, &pubsub.LeaveRoomRequest{NodeId: "n", BootId: "old", Seq: 1})
	_, sync := b.SyncNode(ctx, &pubsub.SyncNodeRequest{NodeId: "n", BootId: "old"})
	for what, err := range map[string]error{"join": join, "begin": begin, "sync": sync} {
		if status.Code(err) != codes.Aborted {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := b.JoinRoom(ctx, &pubsub.JoinRoomRequest{UserId: "u", RoomId: "r", NodeId: "n", BootId: "new", Seq: 1}); err != nil {
		t.Error(err)
	}
	b.join("v", "r", "n") // From a gateway that knows nothing of all this.
	b.want("room", b.room("r"), "u@n v@n")
}

func TestSyncMakesBothSidesEqual(t *testing.T) {
	b := start(t, Config{MaxUsers: 1})
	ctx := t.Context()
	stream := b.watch()
	hash := slots.Hash("u", "r")
	digests := make([]uint64, slots.Count)
	digests[slots.Of(hash)] = hash
	sync := func(seq uint64, members ...*pubsub.NodeMembership) []uint32 {
		t.Helper()
		in := &pubsub.SyncNodeRequest{NodeId: "n", BootId: "b", Digests: digests}
		if seq > 0 {
			in.Slots = []*pubsub.NodeSlot{{Slot: uint32(slots.Of(hash)), Seq: seq, Memberships: members}}
		}
		out, err := b.SyncNode(ctx, in)
		if err != nil {
			t.Fatal(err)
		}
		return out.GetDiffering()
	}
	u := &pubsub.NodeMembership{UserId: "u", RoomId: "r", UserName: "name"}
	if got := sync(0); !slices.Equal(got, []uint32{uint32(slots.Of(hash))}) {
		t.Fatalf("differing %v", got)
	}
	b.join("other", "r", "n2") // The room is full: who was in it before stays.
	if got := sync(10, u); len(got) != 0 {
		t.Fatalf("differing %v", got)
	}
	b.want("room", b.room("r"), "other@n2 u@n")
	named := map[string]bool{}
	for !named["u"] || !named["other"] {
		msg, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, user := range msg.GetUserIds() {
			named[user] = true
		}
	}
	// One from before a later report is not taken, and says so.
	if got := sync(9); !slices.Equal(got, []uint32{uint32(slots.Of(hash))}) {
		t.Fatalf("differing %v", got)
	}
	b.want("room", b.room("r"), "other@n2 u@n")
	digests[slots.Of(hash)] = 0
	if got := sync(11); len(got) != 0 {
		t.Fatalf("differing %v", got)
	}
	b.want("room", b.room("r"), "other@n2")
}

func TestInvalidSyncs(t *testing.T) {
	b := start(t, Config{})
	wrong := uint32(slots.Of(slots.Hash("u", "r"))+1) % slots.Count
	for field, change := range map[string]func(*pubsub.SyncNodeRequest){
		"node_id":    func(in *pubsub.SyncNodeRequest) { in.NodeId = "" },
		"boot_id":    func(in *pubsub.SyncNodeRequest) { in.BootId = "\n" },
		"digests":    func(in *pubsub.SyncNodeRequest) { in.Digests = make([]uint64, 3) },
		"slots has":  func(in *pubsub.SyncNodeRequest) { in.Slots = make([]*pubsub.NodeSlot, slots.Count+1) },
		"slots.slot": func(in *pubsub.SyncNodeRequest) { in.Slots[0].Slot = slots.Count },
		"slots.slot is 5, a second": func(in *pubsub.SyncNodeRequest) {
			in.Slots = []*pubsub.NodeSlot{{Slot: 5, Seq: 1}, {Slot: 6, Seq: 2}, {Slot: 5, Seq: 3}}
		},
		"slots.memberships.user_id": func(in *pubsub.SyncNodeRequest) { in.Slots[0].Memberships[0].UserId = "" },
		"slots.memberships has":     func(in *pubsub.SyncNodeRequest) { in.Slots[0].Slot = wrong },
	} {
		in := &pubsub.SyncNodeRequest{NodeId: "n", BootId: "b", Slots: []*pubsub.NodeSlot{
			{Slot: uint32(slots.Of(slots.Hash("u", "r"))), Seq: 1, Memberships: []*pubsub.NodeMembership{{UserId: "u", RoomId: "r"}}},
		}}
		change(in)
		for i, s := range in.Slots {
			if s == nil {
				in.Slots[i] = &pubsub.NodeSlot{}
			}
		}
		if _, err := b.SyncNode(t.Context(), in); status.Code(err) != codes.InvalidArgument || !strings.HasPrefix(status.Convert(err).Message(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	if c := b.server.svc.store.Counts(); c != (Counts{}) {
		t.Errorf("stored all the same: %+v", c)
	}
}

// A million memberships are told to a Controller that has forgotten in the calls
// that a gateway makes of them.
func BenchmarkSetSlots(b *testing.B) {
	const memberships = 1_000_000
	lists := make([][]Join, slots.Count)
	for i := range memberships {
		j := Join{User: fmt.Sprint("user-", i), Room: fmt.Sprint("room-", i%10_000)}
		slot := slots.Of(slots.Hash(j.User, j.Room))
		lists[slot] = append(lists[slot], j)
	}
	for b.Loop() {
		s := NewMemory(0)
		for slot, members := range lists {
			if err := s.SetSlot(b.Context(), Reporter{Node: "n", Boot: "b", Seq: uint64(slot + 1)}, slot, members); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// found is a shared store that is reached only later.
type found struct {
	Shared

	id atomic.Pointer[string]
}

func (f *found) ID() string { return *f.id.Load() }

// A change stream of a store that has not been reached would be ended at once, and whoever follows would
// take the next one for that of a Controller that has lost everything.
func TestStoreThatHasNotBeenReachedIsNotBelieved(t *testing.T) {
	var none, here = "", "here"
	store := &found{}
	store.id.Store(&none)
	r, err := newRoster(Config{Store: store}.withDefaults())
	if err != nil {
		t.Fatal(err)
	}
	if r.believed() == nil {
		t.Error("it is believed")
	}
	s := &service{store: store, roster: r, draining: make(chan struct{})}
	type answer struct {
		of  *warmth
		err error
	}
	answers := make(chan answer, 1)
	early, late := time.NewTimer(50*time.Millisecond), time.NewTimer(time.Minute)
	defer early.Stop()
	defer late.Stop()
	go func() {
		w, err := s.warm(t.Context())
		answers <- answer{w, err}
	}()
	select {
	case a := <-answers:
		t.Fatalf("nobody waited for it: %v, %v", a.of, a.err)
	case <-early.C:
	}
	store.id.Store(&here)
	r.find(here)
	select {
	case a := <-answers:
		if a.err != nil || a.of.store != here {
			t.Errorf("%v, %v", a.of, a.err)
		}
	case <-late.C:
		t.Error("who waits is not told that there is a store")
	}
}
