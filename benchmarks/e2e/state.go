package e2e

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/push-manager/push-manager/benchmarks/micro"
	"github.com/push-manager/push-manager/engine"
)

// memorySuite fills the caches and keeps up the rate until the memory has settled.
func memorySuite(ctx context.Context, b *Bench) (*Result, error) {
	nodes, userN, roomN, seconds, rate := 100, 100_000, 10_000, 15, 10_000.0
	if b.opts.Short {
		nodes, userN, roomN, seconds, rate = 5, 1000, 100, 1, 500.0
	}
	// Ten neighbours share a node, so that a room of 100 is on 10 or 11 nodes; each
	// user is in ten rooms.
	rooms := make([]Room, roomN)
	for i := range rooms {
		rooms[i] = Room{ID: RoomID("m", i), Prefix: "u", First: i * 10, Members: 100, Of: userN, Block: 10, Nodes: nodes}
	}
	w, pm, err := b.pushManager(ctx, nodes, rooms)
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	work := Work{Users: "u", UserN: userN, Rooms: "m", RoomN: roomN, Mix: [3]int{80, 19, 1}, Payload: payload}
	if err := pm.Warm(ctx, work); err != nil {
		return nil, err
	}
	var most float64
	var s Series
	slot := Slot{"memory", pm, Load{Mode: Open, Work: work, InFlight: 512, Rate: rate, Duration: time.Second}}
	for range seconds {
		turn, err := slot.Turn(ctx)
		if err != nil {
			return nil, err
		}
		s = append(s, turn)
		now, err := resident(pm.child.pid())
		if err != nil {
			return nil, err
		}
		most = max(most, now)
	}
	m, err := pm.metrics(ctx)
	if err != nil {
		return nil, err
	}
	cached := func(what string) float64 { return m[`push_manager_route_cached{what="`+what+`"}`] }
	r := result("memory", []Slot{slot}, Table{slot.Name: s})
	mib := most / (1 << 20)
	r.bar(Bar{
		What:   fmt.Sprintf("resident MiB, %d nodes, %d users, %d rooms of 100, %.0f req/s", nodes, userN, roomN, rate),
		Figure: Figure{mib, mib, mib}, Limit: 256, Kind: AtMost,
		Note: fmt.Sprintf("cached: %.0f users, %.0f rooms, %.0f members; MiB: %.0f heap at most, %.0f stacks, %.0f of the program's file",
			cached("users"), cached("rooms"), cached("members"), m["go_memstats_next_gc_bytes"]/(1<<20),
			m["go_memstats_stack_inuse_bytes"]/(1<<20), m["process_resident_memory_file_bytes"]/(1<<20)),
	}, s)
	return r, nil
}

// allocsSuite counts in this process, where nothing else runs: the engine with a
// network that acknowledges at once.
func allocsSuite(ctx context.Context, b *Bench) (*Result, error) {
	n := 100_000
	if b.opts.Short {
		n = 1000
	}
	rig, err := micro.New()
	if err != nil {
		return nil, err
	}
	r := &Result{Suite: "allocs"}
	for _, push := range []struct {
		name string
		kind engine.Kind
	}{{"PushToUser", engine.ToUser}, {"PushToRoom", engine.ToRoom}, {"BroadcastMessage", engine.ToAll}} {
		per, err := rig.Allocations(push.kind, n)
		if err != nil {
			return nil, err
		}
		per = float64(int(per*100+0.5)) / 100 // the runtime has a few of its own
		r.bar(Bar{What: push.name + ": allocations on the warm path after decoding", Figure: Figure{per, per, per}, Kind: AtMost})
	}
	return r, rig.Close(ctx)
}

// changeSuite measures the bytes that a change of a large room takes. All are
// counts: nothing else is under way.
func changeSuite(ctx context.Context, b *Bench) (*Result, error) {
	members, changes := 100_000, []int{1, 10, 100, 1000}
	if b.opts.Short {
		members, changes = 1000, changes[:2]
	}
	nodes := 3
	w, pm, err := b.pushManager(ctx, nodes, []Room{roomOf(members, nodes)}, "LOOKUP_TIMEOUT=5s")
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	work := room(members)
	if err := pm.Warm(ctx, work); err != nil {
		return nil, err
	}
	push := func() (float64, error) {
		slot := Slot{"change", pm, Load{Mode: Count, Work: work, InFlight: 1, Count: 1}}
		turn, err := slot.Turn(ctx)
		if err != nil {
			return 0, err
		}
		return turn.FrameBytes, Series{turn}.check()
	}
	plain, err := push()
	if err != nil {
		return nil, err
	}
	r := &Result{Suite: "change"}
	id := float64(len(UserID("new", 0)))
	for _, n := range changes {
		for _, leave := range []bool{false, true} {
			change := Change{Room: RoomID("of"+strconv.Itoa(members), 0), Prefix: "new", Count: n, Node: NodeID(0), Leave: leave}
			before, err := pm.changes(ctx)
			if err != nil {
				return nil, err
			}
			if err := w.controller.call(ctx, "change", change, nil); err != nil {
				return nil, err
			}
			if err := pm.forgotten(ctx, before); err != nil {
				return nil, err
			}
			bytes, err := push()
			if err != nil {
				return nil, err
			}
			per := (bytes - plain) / float64(n)
			what := map[bool]string{false: "join", true: "leave"}[leave]
			// An id, its tag and length, and for few of them the version; heartbeats may come between.
			r.bar(Bar{
				What:   fmt.Sprintf("%d of %d members %s: bytes more to a node, per change", n, members, what),
				Figure: Figure{per, per, per}, Limit: id + 12, Kind: AtMost,
			})
		}
	}
	return r, nil
}

// forgotten waits until the change stream has brought what happened since before,
// and brings no more.
func (s *Server) forgotten(ctx context.Context, before float64) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	last := before
	for {
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return fmt.Errorf("no change has come: %w", err)
		}
		now, err := s.changes(ctx)
		if err != nil {
			return err
		}
		if now > before && now == last {
			return nil
		}
		last = now
	}
}

func (s *Server) changes(ctx context.Context) (float64, error) {
	m, err := s.metrics(ctx)
	return m["push_manager_controller_changes_total"] + m["push_manager_controller_deltas_total"], err
}
