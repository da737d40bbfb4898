package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"time"
)

const (
	clientTurn = time.Second
	clientIdle = 2 * time.Second // until memory after so many handshakes is what it will be
)

// crowds are the numbers of clients in a room.
func (b *Bench) crowds() (few, many int) {
	if b.opts.Short {
		return 5, 20
	}
	return 100, 1000
}

// stack is all that is between a push and the clients: the servers of one build.
type stack struct {
	name   string
	shared map[string]*child // by what they are
	rooms  map[int]*served   // by the number of clients
}

// served is an audience and its gateway, with the gateway's resident memory in bytes.
type served struct {
	Audience

	gateway             *child
	empty, idle, active float64
}

// clientLoads are the turns of a round: clients in the room, and pushes to it in a second.
func (b *Bench) clientLoads() []clientLoad {
	few, many := b.crowds()
	return []clientLoad{{few, 60}, {many, 60}, {many, 10}}
}

type clientLoad struct {
	clients int
	rate    float64
}

// of is the name of a stack's turns.
func (l clientLoad) of(stack string) string {
	return fmt.Sprintf("%d clients, %.0f/s: %s", l.clients, l.rate, stack)
}

// Clients measures the whole way to WebSocket clients, 100 and 1,000 in a room: Push-Manager, the
// reference Connect-Node and the reference Controller, a process each. base is another build of
// push-manager to hold them against, centrifugo a Centrifugo; both may be empty.
func (b *Bench) Clients(ctx context.Context, base, centrifugo string) ([]*Result, error) {
	clients, err := b.role("audience", none{})
	if err != nil {
		return nil, err
	}
	stacks, err := b.stacks(ctx, clients, base, centrifugo)
	if err != nil {
		return nil, err
	}
	if err := pause(ctx, b.span(clientIdle)); err != nil {
		return nil, err
	}
	for _, s := range stacks {
		for _, room := range s.rooms {
			if room.idle, err = resident(room.gateway.pid()); err != nil {
				return nil, err
			}
		}
	}
	var names []string
	turns := map[string]func() (*Turn, error){}
	for _, load := range b.clientLoads() {
		for i, s := range stacks {
			room := s.rooms[load.clients]
			turn := func() (*Turn, error) {
				return b.clientTurn(ctx, clients, s, room, Pushing{Rate: load.rate, Duration: b.span(clientTurn)})
			}
			own := []string{load.of(s.name)}
			if i == 0 { // the A/A control
				own = append(own, own[0]+" again")
			}
			for _, name := range own {
				turns[name] = turn
				names = append(names, name)
			}
			// The caches of routes are filled then, and memory was touched that all turns need.
			if _, err := turn(); err != nil {
				return nil, err
			}
		}
	}
	table, err := b.turns("clients", names, func(name string) (*Turn, error) { return turns[name]() })
	if err != nil {
		return nil, err
	}
	r := &Result{Suite: "clients"}
	for _, name := range names {
		if failed := table[name].check(); failed != nil { // the others stand
			err = errors.Join(err, fmt.Errorf("%s: %w", name, failed))
		}
		r.Rows = append(r.Rows, Row{name, perDelivery(func(of func(*Turn) float64) Figure { return Median(table[name], of) })})
	}
	for _, load := range b.clientLoads() {
		for _, s := range stacks {
			head, other := table[load.of("head")], s.name
			if s == stacks[0] {
				other += " again"
			}
			columns := perDelivery(func(of func(*Turn) float64) Figure { return Ratio(head, table[load.of(other)], of) })
			if s.name == "centrifugo" { // it is one process
				columns = slices.DeleteFunc(columns, func(c Column) bool { return c.Name == "push-manager-us" || c.Name == "controller-us" })
			}
			r.Ratios = append(r.Ratios, Row{load.of("head") + " / " + other, columns})
		}
	}
	return []*Result{r, b.memoryOf(stacks)}, err
}

// stacks starts all of them, with their clients.
func (b *Bench) stacks(ctx context.Context, clients *child, base, centrifugo string) (all []*stack, err error) {
	for _, build := range []struct {
		name, binary string
		start        func(context.Context, *stack, string) error
	}{{"head", b.binary, b.startStack}, {"base", base, b.startStack}, {"centrifugo", centrifugo, b.startCentrifugo}} {
		if build.binary == "" {
			continue
		}
		s := &stack{name: build.name, shared: map[string]*child{}, rooms: map[int]*served{}}
		if err := build.start(ctx, s, build.binary); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
		for _, room := range s.rooms {
			if room.empty, err = resident(room.gateway.pid()); err != nil {
				return nil, err
			}
			if err := clients.call(ctx, "connect", room.Audience, nil); err != nil {
				return nil, fmt.Errorf("%s: %w", s.name, err)
			}
		}
		all = append(all, s)
	}
	return all, nil
}

// memoryOf is what the gateways have taken, all in all and for each of the clients that one has
// more than the other.
func (b *Bench) memoryOf(stacks []*stack) *Result {
	r := &Result{Suite: "memory of a gateway"}
	few, many := b.crowds()
	for _, s := range stacks {
		a, z := s.rooms[few], s.rooms[many]
		mib, kib := float64(1<<20), float64((many-few)<<10)
		var columns []Column
		for _, c := range []struct {
			name  string
			value float64
		}{
			{"MiB-empty", z.empty / mib}, {"MiB-few-idle", a.idle / mib}, {"MiB-many-idle", z.idle / mib},
			{"MiB-few-active", a.active / mib}, {"MiB-many-active", z.active / mib},
			{"KiB/idle-client", (z.idle - a.idle) / kib}, {"KiB/active-client", (z.active - a.active) / kib},
		} {
			columns = append(columns, Column{c.name, Figure{c.value, c.value, c.value}})
		}
		r.Rows = append(r.Rows, Row{s.name, columns})
	}
	return r
}

// perDelivery makes columns of what a delivery to a client costs. A stack without a process of a
// kind has 0 there.
func perDelivery(figure func(func(*Turn) float64) Figure) []Column {
	part := func(name string) func(*Turn) float64 {
		return func(t *Turn) float64 { return float64(t.Parts[name].Nanoseconds()) / 1e3 / t.Done }
	}
	quantile := func(q float64) func(*Turn) float64 {
		return func(t *Turn) float64 { return Series{t}.Quantile("", q) * 1e3 }
	}
	return []Column{
		{"deliveries/s", figure(Rate)}, {"CPU-us", figure(CPUPerRequest)}, {"gateway-us", figure(part("gateway"))},
		{"push-manager-us", figure(part("push-manager"))}, {"controller-us", figure(part("controller"))},
		{"clients-us", figure(LoadPerRequest)}, {"p50-ms", figure(quantile(0.5))}, {"p99-ms", figure(quantile(0.99))},
	}
}

// clientTurn pushes to a room, and takes the account of the servers on the way.
func (b *Bench) clientTurn(ctx context.Context, clients *child, s *stack, room *served, pushing Pushing) (*Turn, error) {
	processes := maps.Clone(s.shared)
	processes["gateway"], processes["clients"] = room.gateway, clients
	account := func() (map[string]time.Duration, error) {
		used := map[string]time.Duration{}
		for name, c := range processes {
			cpu, err := cpuTime(c.pid())
			if err != nil {
				return nil, err
			}
			used[name] = cpu
		}
		return used, nil
	}
	before, err := account()
	if err != nil {
		return nil, err
	}
	pushing.Room = room.Room
	var out Heard
	if err := clients.call(ctx, "push", pushing, &out); err != nil {
		return nil, err
	}
	if err := pause(ctx, settle); err != nil {
		return nil, err
	}
	after, err := account()
	if err != nil {
		return nil, err
	}
	missing := pushing.pushes()*room.Clients - out.Delivered
	if pushing.Users {
		missing = pushing.pushes() - out.Delivered
	}
	t := &Turn{
		Done: float64(out.Delivered), Failed: float64(out.Failed + missing), Error: out.Error, Elapsed: out.Elapsed,
		LoadCPU: after["clients"] - before["clients"], Parts: map[string]time.Duration{}, Latency: map[string]*Histogram{"client": out.Latency},
	}
	for name := range processes {
		if name != "clients" {
			t.Parts[name] = after[name] - before[name]
			t.CPU += t.Parts[name]
		}
	}
	now, err := resident(room.gateway.pid())
	room.active = max(room.active, now)
	return t, err
}

// startStack starts an etcd, a Controller, a Connect-Node for each room and a Push-Manager.
func (b *Bench) startStack(ctx context.Context, s *stack, binary string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*startTimeout)
	defer cancel()
	w := &World{bench: b, nodes: map[string]string{}}
	etcd, err := b.role("etcd", none{})
	if err != nil {
		return err
	}
	if w.etcd, err = ask[string](ctx, etcd, "address"); err != nil {
		return err
	}
	env := []string{"GRPC_PORT=0", "HTTP_PORT=0", "METRICS_PORT=0", "LOG_FORMAT=json", "ETCD_ENDPOINTS=" + w.etcd}
	var at struct{ GRPC, HTTP string }
	s.shared["controller"], err = b.program(ctx, "controller", binary, env, &at)
	if err != nil {
		return err
	}
	w.address = at.GRPC
	few, many := b.crowds()
	for _, n := range []int{few, many} {
		room := &served{Audience: Audience{Room: s.name + "-" + strconv.Itoa(n), Clients: n}}
		own := append(slices.Clip(env), "NODE_ID="+room.Room, "CONTROLLER_ADDRESS="+w.address)
		if room.gateway, err = b.program(ctx, "connect-node", binary, own, &at); err != nil {
			return err
		}
		room.Gateway = at.HTTP
		w.nodes[room.Room] = at.GRPC
		s.rooms[n] = room
	}
	pm, err := w.pushManager(ctx, s.name, binary, nil, access{})
	if err != nil {
		return err
	}
	s.shared["push-manager"] = pm.child
	for _, room := range s.rooms {
		room.API = pm.where.API
	}
	return nil
}

// startCentrifugo starts a Centrifugo with its memory engine for each room.
func (b *Bench) startCentrifugo(ctx context.Context, s *stack, binary string) error {
	few, many := b.crowds()
	for _, n := range []int{few, many} {
		l, err := listen(ctx)
		if err != nil {
			return err
		}
		address := l.Addr().String()
		_ = l.Close() // it wants to listen itself
		host, port, _ := net.SplitHostPort(address)
		c, err := b.child(s.name, binary, []string{
			"CENTRIFUGO_HTTP_SERVER_ADDRESS=" + host, "CENTRIFUGO_HTTP_SERVER_PORT=" + port, "CENTRIFUGO_LOG_LEVEL=error",
			"CENTRIFUGO_CLIENT_INSECURE=true", "CENTRIFUGO_HTTP_API_INSECURE=true",
			"CENTRIFUGO_CHANNEL_WITHOUT_NAMESPACE_ALLOW_SUBSCRIBE_FOR_CLIENT=true", "CENTRIFUGO_HEALTH_ENABLED=true",
		})
		if err != nil {
			return err
		}
		for deadline := time.Now().Add(startTimeout); ; {
			if _, err := get(ctx, b.client, "http://"+address+"/health"); err == nil {
				break
			} else if time.Now().After(deadline) {
				return fmt.Errorf("it does not start: %w%s", err, c.stderr)
			}
			if err := pause(ctx, 20*time.Millisecond); err != nil {
				return err
			}
		}
		s.rooms[n] = &served{gateway: c, Audience: Audience{
			Room: s.name + "-" + strconv.Itoa(n), Clients: n, Gateway: address, API: address, Centrifugo: true,
		}}
	}
	return nil
}

// program starts a command of push-manager, and waits until it says where it is.
func (b *Bench) program(ctx context.Context, command, binary string, env []string, at any) (*child, error) {
	c, err := b.child(command, binary, env, command)
	if err != nil {
		return nil, err
	}
	return c, c.runs(ctx, command+" runs", at)
}

// child starts a program.
func (b *Bench) child(name, program string, env []string, args ...string) (*child, error) {
	c, err := b.spawner.startChild(name, program, b.dir, env, args...)
	if err == nil {
		b.children = append(b.children, c)
	}
	return c, err
}

// runs reads the log, as JSON, until its line says msg. That line says where the program listens.
func (c *child) runs(ctx context.Context, msg string, at any) error {
	for {
		select {
		case line := <-c.stderr.lines:
			var entry struct{ Msg string }
			if _ = json.Unmarshal(line, &entry); entry.Msg == msg { // other lines may be anything
				return json.Unmarshal(line, at)
			}
		case <-c.exited:
			return fmt.Errorf("%s ended%s", c.name, c.stderr)
		case <-ctx.Done():
			return fmt.Errorf("%s does not start: %w%s", c.name, ctx.Err(), c.stderr)
		}
	}
}
