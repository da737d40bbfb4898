package e2e

import (
	"context"
	"fmt"
	"slices"
	"strconv"
)

// payload is the data of a push, in bytes, where nothing else is said.
const payload = 128

// Suite is a set of servers, what they are asked, and the bars on it.
type Suite struct {
	Name string
	Help string
	Bars bool // it has bars
	Run  func(ctx context.Context, b *Bench) (*Result, error)
}

// Suites are all suites. Those with bars come first.
func Suites() []Suite {
	return []Suite{
		{"user", "PushToUser, unary, saturated: Push-Manager and all rivals", true, userSuite},
		{"stream", "PushStream, saturated, in batches and one by one, against unary echoes", true, streamSuite},
		{"room", "PushToRoom, saturated, 10 to 10,000 members on 3 nodes, against the naive design", true, roomSuite},
		{"counts", "pushes to a frame and writes per push, saturated", true, countsSuite},
		{"members", "bytes to the nodes per room push, 10 to 1,000,000 members on 100 nodes", true, membersSuite},
		{"tls", "PushToUser, saturated, in plain text, over TLS, with a client's certificate, with a token", true, tlsSuite},
		{"tlsstream", "PushStream, saturated, in plain text and over TLS", true, tlsStreamSuite},
		{"http", "PushToUser, saturated: gRPC with HTTP_PORT and without, and JSON", true, httpSuite},
		{"open10k", "10,000 mixed requests/s over 10 nodes, against the echo", true, openSuite(10_000)},
		{"open2k", "2,000 mixed requests/s over 10 nodes, against the echo", true, openSuite(2_000)},
		{"allocs", "allocations from the decoded push to its outcome, in this process", true, allocsSuite},
		{"memory", "resident memory with 100 nodes, 100,000 users, 10,000 rooms of 100", true, memorySuite},
		{"change", "bytes to a node when a room of 100,000 changes", true, changeSuite},
		{"nodes", "PushToUser at 10,000/s over 3 to 100 nodes", true, nodesSuite},
		{"tracing", "PushToUser, saturated, tracing off and at 0 %", true, tracingSuite},
		{"ids", "to WebSocket clients: with a message id on every push, and acknowledged by the clients", true, idsSuite},
		{"store", "PushToUser to users who are away, saturated: dropped, and stored by an embedded store", true, storeSuite},
		{"reconnects", "CPU for users who connect and have nothing stored", true, reconnectsSuite},
		{"payload", "PushToUser, saturated, 128 B to 256 KiB", false, payloadSuite},
		{"shards", "PushToUser, saturated, 1 to 64 shards", false, shardsSuite},
		{"inflight", "PushToUser, closed loop, 1 to 1,024 callers", false, inflightSuite},
	}
}

// The users and rooms of a world.

func (b *Bench) users() Work {
	return Work{Users: "u", UserN: b.userN(), Mix: [3]int{1, 0, 0}, Payload: payload}
}

func room(members int) Work {
	return Work{Rooms: "of" + strconv.Itoa(members), RoomN: 1, Mix: [3]int{0, 1, 0}, Payload: payload}
}

// userN is how many users are pushed to in turn.
func (b *Bench) userN() int {
	if b.opts.Short {
		return 32
	}
	return 4096
}

// lobby has the users of users; they are in one room.
func (b *Bench) lobby(nodes int) Room {
	return Room{ID: "lobby", Prefix: "u", Members: b.userN(), Nodes: nodes}
}

func roomOf(members int, nodes int) Room {
	kind := "of" + strconv.Itoa(members)
	return Room{ID: RoomID(kind, 0), Prefix: kind, Members: members, Nodes: nodes}
}

func (b *Bench) closed(work Work) Load {
	return Load{Mode: Closed, Work: work, InFlight: b.opts.InFlight, Duration: b.opts.Turn}
}

func (b *Bench) streaming(work Work) Load {
	return Load{Mode: Stream, Work: work, InFlight: b.opts.StreamInFlight, Streams: b.opts.Conns, Duration: b.opts.Turn}
}

// batching is streaming with many pushes in a message.
func (b *Bench) batching(work Work) Load {
	l := b.streaming(work)
	l.Batch = batchOf
	return l
}

// batchOf is how many pushes of the usual size make about a frame of HTTP/2.
const batchOf = 100

func (b *Bench) open(work Work, rate float64) Load {
	return Load{Mode: Open, Work: work, InFlight: 512, Rate: rate, Duration: b.opts.Turn}
}

// warm prepares all slots: their caches, their code, their connections.
func warm(ctx context.Context, slots []Slot) error {
	for _, s := range slots {
		if err := s.Server.Warm(ctx, s.Load.Work); err != nil {
			return err
		}
		if _, err := s.Turn(ctx); err != nil {
			return fmt.Errorf("warm %s: %w", s.Name, err)
		}
	}
	return nil
}

// measure warms the slots, lets them take turns and makes rows.
func (b *Bench) measure(ctx context.Context, suite string, slots []Slot) (*Result, Table, error) {
	if err := warm(ctx, slots); err != nil {
		return nil, nil, err
	}
	table, err := b.Rounds(ctx, suite, slots)
	if err != nil {
		return nil, nil, err
	}
	return result(suite, slots, table), table, nil
}

// control adds the A/A bar: twice the same server must show no difference.
func (r *Result) control(name string, table Table) {
	a, again := table[name], table[name+" again"]
	r.bar(Bar{What: "A/A control: CPU of " + name + " / the same", Figure: Ratio(again, a, CPUPerRequest), Limit: 1, Kind: Includes}, a, again)
}

func userSuite(ctx context.Context, b *Bench) (*Result, error) {
	nodes := 3
	w, pm, err := b.pushManager(ctx, nodes, []Room{b.lobby(nodes)})
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	load := b.closed(b.users())
	slots := []Slot{{"pm", pm, load}, {"pm again", pm, load}}
	for _, role := range []string{"echo", "floor", "naive"} {
		s, err := w.Rival(ctx, role)
		if err != nil {
			return nil, err
		}
		slots = append(slots, Slot{role, s, load})
		if role == "echo" {
			slots = append(slots, Slot{"echo again", s, load})
		}
	}
	r, t, err := b.measure(ctx, "user", slots)
	if err != nil {
		return nil, err
	}
	r.control("pm", t)
	r.control("echo", t)
	r.bar(Bar{What: "PushToUser: CPU / stock echo", Figure: Ratio(t["pm"], t["echo"], CPUPerRequest), Limit: 0.9, Kind: AtMost}, t["pm"], t["echo"])
	floor := Ratio(t["pm"], t["floor"], CPUPerRequest)
	r.bar(Bar{What: "PushToUser: CPU / tuned echo (the floor)", Figure: floor, Limit: 1.85, Kind: AtMost}, t["pm"], t["floor"])
	r.bar(Bar{What: "PushToUser: CPU / tuned echo (the floor)", Figure: floor, Limit: 1.6, Kind: Stretch}, t["pm"], t["floor"])
	r.bar(Bar{What: "PushToUser: throughput / naive", Figure: Ratio(t["pm"], t["naive"], Rate), Limit: 5.5, Kind: AtLeast}, t["pm"], t["naive"])
	r.bar(Bar{What: "PushToUser: CPU / naive", Figure: Ratio(t["pm"], t["naive"], CPUPerRequest), Limit: 0.22, Kind: AtMost}, t["pm"], t["naive"])
	return r, nil
}

// countsSuite measures what repeats from run to run where times do not.
func countsSuite(ctx context.Context, b *Bench) (*Result, error) {
	nodes := 3
	w, pm, err := b.pushManager(ctx, nodes, []Room{b.lobby(nodes)})
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	slots := []Slot{
		{"PushToUser", pm, b.closed(b.users())}, {"PushStream", pm, b.streaming(b.users())},
		{"PushStream, batches", pm, b.batching(b.users())},
	}
	r, t, err := b.measure(ctx, "counts", slots)
	if err != nil {
		return nil, err
	}
	for _, slot := range slots {
		s := t[slot.Name]
		r.bar(Bar{What: slot.Name + ": pushes per frame, saturated", Figure: Median(s, PushesPerFrame), Limit: 5, Kind: AtLeast}, s)
		r.bar(Bar{What: slot.Name + ": writes per push, saturated", Figure: Median(s, Writes), Limit: 0.3, Kind: AtMost}, s)
	}
	return r, nil
}

func streamSuite(ctx context.Context, b *Bench) (*Result, error) {
	nodes := 3
	w, pm, err := b.pushManager(ctx, nodes, []Room{b.lobby(nodes)})
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	echo, err := w.Rival(ctx, "echo")
	if err != nil {
		return nil, err
	}
	load := b.batching(b.users())
	slots := []Slot{
		{"pm", pm, load}, {"pm again", pm, load}, {"pm, a message each", pm, b.streaming(b.users())},
		{"echo", echo, b.closed(b.users())},
	}
	r, t, err := b.measure(ctx, "stream", slots)
	if err != nil {
		return nil, err
	}
	r.control("pm", t)
	r.bar(Bar{What: "PushStream, batches: pushes/s / stock unary echo requests/s", Figure: Ratio(t["pm"], t["echo"], Rate), Limit: 10, Kind: AtLeast}, t["pm"], t["echo"])
	r.bar(Bar{What: "PushStream, batches: CPU us per push", Figure: Median(t["pm"], CPUPerRequest), Limit: 1.5, Kind: AtMost}, t["pm"])
	return r, nil
}

// roomRate is what nodes can take of a room of 10,000.
const roomRate = 4000

func roomSuite(ctx context.Context, b *Bench) (*Result, error) {
	nodes, sizes := 3, []int{10, 100, 1000, 10_000}
	var rooms []Room
	for _, n := range sizes {
		rooms = append(rooms, roomOf(n, nodes))
	}
	w, pm, err := b.pushManager(ctx, nodes, rooms)
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	naive, err := w.Rival(ctx, "naive")
	if err != nil {
		return nil, err
	}
	var slots []Slot
	for _, n := range sizes {
		slots = append(slots, Slot{"pm of " + strconv.Itoa(n), pm, b.closed(room(n))})
	}
	slots = append(slots, Slot{"pm of 100 again", pm, b.closed(room(100))})
	// What members cost is compared at one rate: nodes that are busy with 10,000 members
	// take fewer pushes, and fewer pushes share less.
	at := func(n int) string { return "pm of " + strconv.Itoa(n) + ", at a rate" }
	for _, n := range sizes {
		slots = append(slots, Slot{at(n), pm, b.open(room(n), roomRate)})
	}
	for _, n := range sizes[:3] {
		slots = append(slots, Slot{"naive of " + strconv.Itoa(n), naive, b.closed(room(n))})
	}
	r, t, err := b.measure(ctx, "room", slots)
	if err != nil {
		return nil, err
	}
	r.control("pm of 100", t)
	for _, bar := range []struct {
		members string
		limit   float64
	}{{"100", 14}, {"1000", 36}} {
		pm, naive := t["pm of "+bar.members], t["naive of "+bar.members]
		r.bar(Bar{What: "PushToRoom of " + bar.members + ": throughput / naive", Figure: Ratio(pm, naive, Rate), Limit: bar.limit, Kind: AtLeast}, pm, naive)
	}
	for _, n := range sizes[1:] {
		a, ten := t[at(n)], t[at(10)]
		what := fmt.Sprintf("PushToRoom of %d at %d/s: CPU / of 10, at most", n, roomRate)
		r.bar(Bar{What: what, Figure: Ratio(a, ten, CPUPerRequest), Limit: 1.1, Kind: AtMost}, a, ten)
	}
	return r, nil
}

func membersSuite(ctx context.Context, b *Bench) (*Result, error) {
	sizes, count := []int{10, 100, 1000, 10_000, 100_000, 1_000_000}, 200
	nodes := 100
	if b.opts.Short {
		sizes, count, nodes = sizes[:3], 10, 10
	}
	var rooms []Room
	for _, n := range sizes {
		rooms = append(rooms, roomOf(n, nodes))
	}
	w, pm, err := b.pushManager(ctx, nodes, rooms, "LOOKUP_TIMEOUT=20s", "PUSH_TIMEOUT=30s")
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	r := &Result{Suite: "members"}
	var per []float64
	for _, n := range sizes {
		if err := pm.Warm(ctx, room(n)); err != nil {
			return nil, err
		}
		slot := Slot{"of " + strconv.Itoa(n), pm, Load{Mode: Count, Work: room(n), InFlight: 1, Count: count}}
		turn, err := slot.Turn(ctx)
		if err != nil {
			return nil, err
		}
		s := Series{turn}
		if err := s.check(); err != nil {
			return nil, fmt.Errorf("%s: %w", slot.Name, err)
		}
		r.Rows = append(r.Rows, row(slot.Name, s))
		per = append(per, turn.FrameBytes/turn.Deliveries)
		b.progress("# members: %d: %.1f B to each node", n, per[len(per)-1])
	}
	spread := slices.Max(per) / slices.Min(per)
	r.bar(Bar{What: fmt.Sprintf("room push: bytes to each node, %d to %d members, most / least", sizes[0], sizes[len(sizes)-1]),
		Figure: Figure{spread, spread, spread}, Limit: 1.1, Kind: AtMost, Note: fmt.Sprintf("+-5 %%: %.0f to %.0f B", slices.Min(per), slices.Max(per))})
	return r, nil
}

// openSuite is a fixed rate of 80 % users, 19 % rooms of 100 and 1 % broadcasts.
func openSuite(rate float64) func(ctx context.Context, b *Bench) (*Result, error) {
	return func(ctx context.Context, b *Bench) (*Result, error) {
		nodes := 10
		rooms := []Room{b.lobby(nodes)}
		for i := range 100 {
			rooms = append(rooms, Room{ID: RoomID("mix", i), Prefix: "mix" + strconv.Itoa(i), Members: 100, Nodes: nodes})
		}
		w, err := b.World(ctx, nodes, rooms)
		if err != nil {
			return nil, err
		}
		defer w.Close(context.WithoutCancel(ctx))
		pm, err := w.PushManager(ctx)
		if err != nil {
			return nil, err
		}
		echo, err := w.Rival(ctx, "echo")
		if err != nil {
			return nil, err
		}
		load := b.open(Work{Users: "u", UserN: b.userN(), Rooms: "mix", RoomN: 100, Mix: [3]int{80, 19, 1}, Payload: payload}, rate)
		slots := []Slot{{"pm", pm, load}, {"pm again", pm, load}, {"echo", echo, load}}
		r, t, err := b.measure(ctx, fmt.Sprintf("open%.0fk", rate/1000), slots)
		if err != nil {
			return nil, err
		}
		r.control("pm", t)
		r.openBars(rate, t)
		return r, nil
	}
}

func (r *Result) openBars(rate float64, t Table) {
	pm, echo := t["pm"], t["echo"]
	at := fmt.Sprintf("%.0f mixed requests/s: ", rate)
	if rate >= 10_000 {
		r.bar(Bar{What: at + "CPU / stock echo", Figure: Ratio(pm, echo, CPUPerRequest), Limit: 1.15, Kind: AtMost}, pm, echo)
		r.bar(Bar{What: at + "cores", Figure: Median(pm, Cores), Limit: 0.8, Kind: AtMost}, pm)
		return
	}
	p99 := func(s Series, class string) Figure {
		return bootstrap(len(s), func(rounds []int) float64 { return s.Quantile(class, 0.99, rounds...) * 1e3 })
	}
	for _, bar := range []struct {
		class string
		limit float64
	}{{"user", 10}, {"room", 50}, {"broadcast", 100}} {
		r.bar(Bar{What: at + "p99 ms of " + bar.class, Figure: p99(pm, bar.class), Limit: bar.limit, Kind: AtMost}, pm)
	}
	ratio := bootstrap(min(len(pm), len(echo)), func(rounds []int) float64 {
		return pm.Quantile("user", 0.99, rounds...) / echo.Quantile("user", 0.99, rounds...)
	})
	r.bar(Bar{What: at + "p99 of user / stock echo", Figure: ratio, Limit: 2, Kind: AtMost}, pm, echo)
}

func tracingSuite(ctx context.Context, b *Bench) (*Result, error) {
	nodes := 3
	w, err := b.World(ctx, nodes, []Room{b.lobby(nodes)})
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	load := b.closed(b.users())
	var slots []Slot
	for _, kind := range []struct {
		name string
		env  []string
	}{
		{"off", nil},
		{"off too", nil}, // A/A of two processes: each has its own layout in memory
		{"at 0 %", []string{"TRACING_ENABLED=true", "TRACING_SAMPLE_RATE=0", "TRACING_ENDPOINT=127.0.0.1:1"}},
	} {
		pm, err := w.PushManager(ctx, kind.env...)
		if err != nil {
			return nil, err
		}
		slots = append(slots, Slot{kind.name, pm, load})
	}
	r, t, err := b.measure(ctx, "tracing", slots)
	if err != nil {
		return nil, err
	}
	r.bar(Bar{What: "A/A control: CPU of two processes, tracing off", Figure: Ratio(t["off too"], t["off"], CPUPerRequest), Limit: 1, Kind: Includes})
	r.bar(Bar{What: "PushToUser: CPU with tracing at 0 % / off", Figure: Ratio(t["at 0 %"], t["off"], CPUPerRequest), Limit: 1.02, Kind: AtMost}, t["off"], t["at 0 %"])
	return r, nil
}

// nodesSuite has a world for each number of nodes, all at once.
func nodesSuite(ctx context.Context, b *Bench) (*Result, error) {
	counts := []int{3, 10, 30, 100}
	if b.opts.Short {
		counts = []int{3, 10}
	}
	var slots []Slot
	for _, n := range counts {
		nodes := n
		w, err := b.World(ctx, n, []Room{b.lobby(nodes)})
		if err != nil {
			return nil, err
		}
		defer w.Close(context.WithoutCancel(ctx))
		pm, err := w.PushManager(ctx)
		if err != nil {
			return nil, err
		}
		slots = append(slots, Slot{strconv.Itoa(n) + " nodes", pm, b.open(b.users(), 10_000)})
	}
	slots = append(slots, Slot{slots[0].Name + " again", slots[0].Server, slots[0].Load})
	r, t, err := b.measure(ctx, "nodes", slots)
	if err != nil {
		return nil, err
	}
	few, many := slots[0].Name, slots[len(counts)-1].Name
	r.control(few, t)
	r.bar(Bar{What: "PushToUser at 10,000/s: CPU with " + many + " / " + few, Figure: Ratio(t[many], t[few], CPUPerRequest), Limit: 1.5, Kind: AtMost}, t[few], t[many])
	return r, nil
}

// The curves, without bars.

func payloadSuite(ctx context.Context, b *Bench) (*Result, error) {
	return b.curve(ctx, "payload", []int{128, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10}, func(n int, l *Load) []string {
		l.Work.Payload, l.Work.UserN = n, min(l.Work.UserN, 64) // the generator holds them all
		if n >= 16<<10 {
			l.InFlight = 64
		}
		if n >= 256<<10 {
			l.InFlight = 16 // all of them fit into the queue of one stream (LINK_QUEUE_BYTES)
		}
		return nil
	})
}

func shardsSuite(ctx context.Context, b *Bench) (*Result, error) {
	return b.curve(ctx, "shards", []int{1, 2, 4, 8, 16, 64}, func(n int, _ *Load) []string {
		return []string{"SHARDS=" + strconv.Itoa(n)}
	})
}

func inflightSuite(ctx context.Context, b *Bench) (*Result, error) {
	return b.curve(ctx, "inflight", []int{1, 4, 16, 64, 256, 1024}, func(n int, l *Load) []string {
		l.InFlight = n
		return nil
	})
}

// curve is PushToUser with one thing varied. set changes the load or returns the
// environment that a Push-Manager of its own gets.
func (b *Bench) curve(ctx context.Context, suite string, values []int, set func(int, *Load) []string) (*Result, error) {
	nodes := 3
	w, pm, err := b.pushManager(ctx, nodes, []Room{b.lobby(nodes)})
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	if b.opts.Short {
		values = values[:2]
	}
	var slots []Slot
	for _, v := range values {
		load, server := b.closed(b.users()), pm
		if env := set(v, &load); env != nil {
			if server, err = w.PushManager(ctx, env...); err != nil {
				return nil, err
			}
		}
		slots = append(slots, Slot{suite + "=" + strconv.Itoa(v), server, load})
	}
	r, t, err := b.measure(ctx, suite, slots)
	if err != nil {
		return nil, err
	}
	for _, s := range slots {
		if err := t[s.Name].check(); err != nil {
			return nil, fmt.Errorf("%s: %s: %w", suite, s.Name, err)
		}
	}
	return r, nil
}
