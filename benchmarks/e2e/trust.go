package e2e

import "context"

// The bars on trust: what a push costs by one in plain text that nobody asks for credentials. What is compared are processes
// of their own, each with its own layout in memory, which is worth a few percent. So there are two of each, and a ratio is
// one of both to both.

// way is how pushes come in.
type way struct {
	name string
	entrance
}

// twice has each way a second time.
func twice(ways ...way) (all []way) {
	for _, one := range ways {
		all = append(all, one, way{one.name + " again", one.entrance})
	}
	return all
}

// ways starts a Push-Manager for each way and makes slots of them.
func (w *World) ways(ctx context.Context, load Load, ways []way) (slots []Slot, err error) {
	for _, one := range ways {
		pm, err := w.pushManager(ctx, "pm", w.bench.binary, one.env, one.as)
		if err != nil {
			return nil, err
		}
		slots = append(slots, Slot{one.name, pm, load})
	}
	return slots, nil
}

// both are the turns of a slot and its second, as if they were one's.
func (t Table) both(name string) Series {
	a, b := t[name], t[name+" again"]
	sum := make(Series, min(len(a), len(b)))
	for i := range sum {
		sum[i] = &Turn{Done: a[i].Done + b[i].Done, Failed: a[i].Failed + b[i].Failed, Error: a[i].Error + b[i].Error, CPU: a[i].CPU + b[i].CPU}
	}
	return sum
}

// tlsSuite has an entrance for each kind of credentials. What a credential adds in allocations is held against the same
// call without a look at it: gRPC keeps each header in memory of its own, whoever reads it.
func tlsSuite(ctx context.Context, b *Bench) (*Result, error) {
	nodes := 3
	w, err := b.World(ctx, nodes, []Room{b.lobby(nodes)})
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	e, err := b.entrances()
	if err != nil {
		return nil, err
	}
	const plain, tls, certificate, token, unread = "plain", "TLS", "TLS, client certificate", "TLS, cached JWT", "TLS, a JWT nobody reads" //nolint:gosec // no credentials, but names of slots
	ways := twice(way{name: plain}, way{tls, e.tls}, way{certificate, e.certificate}, way{token, e.token})
	slots, err := w.ways(ctx, b.closed(b.users()), append(ways, way{unread, e.unread}))
	if err != nil {
		return nil, err
	}
	r, t, err := b.measure(ctx, "tls", slots)
	if err != nil {
		return nil, err
	}
	r.control(plain, t)
	for _, bar := range []struct {
		name  string
		limit float64
	}{{tls, 1.05}, {certificate, 1.10}, {token, 1.15}} {
		r.overPlain("PushToUser", t.both(bar.name), t.both(plain), bar.name, bar.limit)
	}
	for _, pair := range [][2]string{{certificate, tls}, {token, unread}} {
		with, without := t[pair[0]], t[pair[1]]
		more := make([]float64, min(len(with), len(without)))
		for i := range more {
			more[i] = Allocations(with[i]) - Allocations(without[i])
		}
		// Half of one is none: the runtime has a few of its own, more or less of them to a push.
		r.bar(Bar{What: "PushToUser: allocations, " + pair[0] + " - " + pair[1], Figure: medianOf(more), Limit: 0.5, Kind: AtMost}, with, without)
	}
	return r, nil
}

// tlsStreamSuite does the same to PushStream, where the credential is looked at once for each stream.
func tlsStreamSuite(ctx context.Context, b *Bench) (*Result, error) {
	nodes := 3
	w, err := b.World(ctx, nodes, []Room{b.lobby(nodes)})
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	e, err := b.entrances()
	if err != nil {
		return nil, err
	}
	slots, err := w.ways(ctx, b.batching(b.users()), twice(way{name: "plain"}, way{"TLS", e.tls}))
	if err != nil {
		return nil, err
	}
	const each = "a message each, "
	for _, s := range slots { // as they are before
		slots = append(slots, Slot{each + s.Name, s.Server, b.streaming(b.users())})
	}
	r, t, err := b.measure(ctx, "tlsstream", slots)
	if err != nil {
		return nil, err
	}
	for _, load := range []struct{ prefix, what string }{{"", "PushStream, batches"}, {each, "PushStream, a message each"}} {
		r.control(load.prefix+"plain", t)
		r.overPlain(load.what, t.both(load.prefix+"TLS"), t.both(load.prefix+"plain"), "TLS", 1.03)
	}
	return r, nil
}

// overPlain adds the bar of what pushes cost by those in plain text.
func (r *Result) overPlain(what string, s, plain Series, over string, limit float64) {
	r.bar(Bar{What: what + ": CPU over " + over + " / plain text", Figure: Ratio(s, plain, CPUPerRequest), Limit: limit, Kind: AtMost}, s, plain)
}

// httpSuite holds gRPC beside a port for HTTP against gRPC alone, and JSON against gRPC: when the server is saturated, and
// packs the replies of many gRPC calls into one write, and when it has calls one by one.
func httpSuite(ctx context.Context, b *Bench) (*Result, error) {
	nodes := 3
	w, err := b.World(ctx, nodes, []Room{b.lobby(nodes)})
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	const off, on, json, seldom, rate = "gRPC alone", "gRPC beside HTTP", "JSON", ", 2000/s", 2000
	usual := b.closed(b.users())
	slots, err := w.ways(ctx, usual, twice(way{name: off}))
	if err != nil {
		return nil, err
	}
	for _, again := range []string{"", " again"} {
		beside, err := w.overHTTP(ctx, access{})
		if err != nil {
			return nil, err
		}
		text, err := w.overHTTP(ctx, access{JSON: true})
		if err != nil {
			return nil, err
		}
		slots = append(slots,
			Slot{on + again, beside, usual}, Slot{on + seldom + again, beside, b.open(b.users(), rate)},
			Slot{json + again, text, b.closed(b.users().inJSON())}, Slot{json + seldom + again, text, b.open(b.users().inJSON(), rate)})
	}
	r, t, err := b.measure(ctx, "http", slots)
	if err != nil {
		return nil, err
	}
	r.control(off, t)
	for _, bar := range []struct {
		what, one, other string
		limit            float64
	}{
		{"PushToUser: CPU beside HTTP / without", on, off, 1.02},
		{"PushToUser at 2,000/s: CPU in JSON / gRPC", json + seldom, on + seldom, 2},
		{"PushToUser, saturated: CPU in JSON / gRPC", json, on, 2},
	} {
		one, other := t.both(bar.one), t.both(bar.other)
		r.bar(Bar{What: bar.what, Figure: Ratio(one, other, CPUPerRequest), Limit: bar.limit, Kind: AtMost}, one, other)
	}
	return r, nil
}

// overHTTP starts a Push-Manager that serves HTTP as well.
func (w *World) overHTTP(ctx context.Context, as access) (*Server, error) {
	_, port, err := freePort(ctx)
	if err != nil {
		return nil, err
	}
	return w.pushManager(ctx, "pm", w.bench.binary, []string{"HTTP_PORT=" + port}, as)
}
