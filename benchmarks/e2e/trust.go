package e2e

import (
	"context"
)

// The bars on trust: what a push costs by one in plain text that nobody asks for credentials. All that is compared are
// processes of their own, each with its own layout in memory. So there are two in plain text: they are the control, and a
// ratio is to both.

// way is how pushes come in.
type way struct {
	name string
	entrance
}

// ways starts a Push-Manager for each way and two in plain text, which come first, and makes slots of them.
func (w *World) ways(ctx context.Context, load Load, others ...way) (slots []Slot, err error) {
	for _, one := range append([]way{{name: "plain"}, {name: "plain again"}}, others...) {
		pm, err := w.pushManager(ctx, "pm", w.bench.binary, one.env, one.as)
		if err != nil {
			return nil, err
		}
		slots = append(slots, Slot{one.name, pm, load})
	}
	return slots, nil
}

// both are the turns of two servers in the same rounds, as if they were one's.
func both(a, b Series) Series {
	sum := make(Series, min(len(a), len(b)))
	for i := range sum {
		sum[i] = &Turn{Done: a[i].Done + b[i].Done, Failed: a[i].Failed + b[i].Failed, Error: a[i].Error + b[i].Error, CPU: a[i].CPU + b[i].CPU}
	}
	return sum
}

// tlsSuite has an entrance for each kind of credentials. What a credential adds in allocations is held against the same
// call without a look at it: gRPC keeps a header in memory of its own, whoever reads it.
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
	const tls, certificate, token, unread = "TLS", "TLS, client certificate", "TLS, cached JWT", "TLS, a JWT nobody reads"
	slots, err := w.ways(ctx, b.closed(b.users()), way{tls, e.tls}, way{certificate, e.certificate}, way{token, e.token}, way{unread, e.unread})
	if err != nil {
		return nil, err
	}
	r, t, err := b.measure(ctx, "tls", slots)
	if err != nil {
		return nil, err
	}
	r.control("plain", t)
	plain := both(t["plain"], t["plain again"])
	for _, bar := range []struct {
		name  string
		limit float64
	}{{tls, 1.05}, {certificate, 1.10}, {token, 1.15}} {
		r.bar(Bar{What: "PushToUser: CPU over " + bar.name + " / plain text", Figure: Ratio(t[bar.name], plain, CPUPerRequest), Limit: bar.limit, Kind: AtMost}, t[bar.name], plain)
	}
	for _, pair := range [][2]string{{certificate, tls}, {token, unread}} {
		with, without := t[pair[0]], t[pair[1]]
		more := make([]float64, min(len(with), len(without)))
		for i := range more {
			more[i] = Allocations(with[i]) - Allocations(without[i])
		}
		r.bar(Bar{What: "PushToUser: allocations, " + pair[0] + " - " + pair[1], Figure: medianOf(more), Limit: 0.5, Kind: AtMost}, with, without)
	}
	return r, nil
}

// tlsStreamSuite does the same to PushStream. Who calls is asked for once in the life of a stream.
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
	batches, err := w.ways(ctx, b.batching(b.users()), way{"TLS", e.tls})
	if err != nil {
		return nil, err
	}
	const each = ", a message each"
	slots := batches
	for _, s := range batches {
		slots = append(slots, Slot{s.Name + each, s.Server, b.streaming(b.users())})
	}
	r, t, err := b.measure(ctx, "tlsstream", slots)
	if err != nil {
		return nil, err
	}
	for _, load := range []string{"", each} {
		one, other, tls := t["plain"+load], t["plain again"+load], t["TLS"+load]
		plain := both(one, other)
		r.bar(Bar{What: "A/A control: CPU of plain" + load + " / another", Figure: Ratio(other, one, CPUPerRequest), Limit: 1, Kind: Includes}, one, other)
		what := "PushStream" + map[string]string{"": ", batches", each: each}[load] + ": CPU over TLS / plain text"
		r.bar(Bar{What: what, Figure: Ratio(tls, plain, CPUPerRequest), Limit: 1.03, Kind: AtMost}, tls, plain)
	}
	return r, nil
}
