package e2e

import (
	"context"
	"fmt"
	"slices"
)

// named is one of the usual loads: what is profiled, and what two builds are compared
// with. Those of a rival, and those over TLS, are for a profile alone.
type named struct {
	name, rival string
	tls         bool
	Load
}

// special tells whether a load is for a profile alone, when it is asked for by name.
func (n *named) special() bool { return n.rival != "" || n.tls || n.Work.JSON }

// usual is the world of the usual loads.
func (b *Bench) usual(ctx context.Context) (*World, error) {
	nodes := 3
	return b.World(ctx, nodes, []Room{b.lobby(nodes), roomOf(100, nodes), roomOf(1000, nodes)})
}

func (b *Bench) usualLoads() []named {
	mixed := Work{Users: "u", UserN: b.userN(), Rooms: "of100", RoomN: 1, Mix: [3]int{80, 19, 1}, Payload: payload}
	return []named{
		{name: "user", Load: b.closed(b.users())},
		{name: "stream", Load: b.streaming(b.users())},
		{name: "batch", Load: b.batching(b.users())},
		{name: "room", Load: b.closed(room(1000))},
		{name: "open", Load: b.open(mixed, 10_000)},
		{name: "echo", rival: "echo", Load: b.closed(b.users())},
		{name: "floor", rival: "floor", Load: b.closed(b.users())},
		{name: "json", Load: b.closed(b.users().inJSON())},
		{name: "tlsuser", tls: true, Load: b.closed(b.users())},
		{name: "tlsstream", tls: true, Load: b.streaming(b.users())},
		{name: "tlsbatch", tls: true, Load: b.batching(b.users())},
	}
}

// Compare holds Push-Manager against another build of it, base, under each of the
// usual loads or those named. The stock echo takes part, to tell what a difference is
// worth.
func (b *Bench) Compare(ctx context.Context, base string, names []string) ([]*Result, error) {
	w, err := b.usual(ctx)
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	pm, err := w.PushManager(ctx)
	if err != nil {
		return nil, err
	}
	old, err := w.pushManager(ctx, "base", base, nil, access{})
	if err != nil {
		return nil, err
	}
	echo, err := w.Rival(ctx, "echo")
	if err != nil {
		return nil, err
	}
	var results []*Result
	for _, load := range b.usualLoads() {
		if load.special() || len(names) > 0 && !slices.Contains(names, load.name) {
			continue
		}
		r, err := b.compare(ctx, load, pm, old, echo)
		if err != nil {
			return results, fmt.Errorf("compare %s: %w", load.name, err)
		}
		results = append(results, r)
	}
	return results, nil
}

func (b *Bench) compare(ctx context.Context, load named, pm, base, echo *Server) (*Result, error) {
	slots := []Slot{{"pm", pm, load.Load}, {"base", base, load.Load}, {"base again", base, load.Load}, {"echo", echo, load.Load}}
	if load.Mode == Stream {
		slots[3].Load = b.closed(b.users())
	}
	r, t, err := b.measure(ctx, load.name, slots)
	if err != nil {
		return nil, err
	}
	for _, pair := range [][2]string{{"pm", "base"}, {"base again", "base"}, {"pm", "echo"}, {"base", "echo"}} {
		r.ratios(pair[0], pair[1], t)
	}
	return r, nil
}

// ratios adds a row of what one slot costs by another.
func (r *Result) ratios(one, other string, t Table) {
	var columns []Column
	for _, m := range []struct {
		name string
		of   func(*Turn) float64
	}{{"req/s", Rate}, {"CPU", CPUPerRequest}, {"allocs", Allocations}, {"writes", Writes}, {"pushes/frame", PushesPerFrame}} {
		columns = append(columns, Column{m.name, Ratio(t[one], t[other], m.of)})
	}
	r.Ratios = append(r.Ratios, Row{one + " / " + other, columns})
}
