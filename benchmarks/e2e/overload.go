package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"text/tabwriter"
	"time"
)

// What `pushbench overload` demands.
const (
	leastGoodput  = 0.9  // of peak, for rooms
	leastCritical = 0.99 // of the critical pushes offered
	mostRecovery  = 10 * time.Second
)

// calmRate is what is offered before and after the overload, of peak. Everything is normal
// from when on a share of calmSuccess is good, for calmFor.
const (
	calmRate    = 0.5
	calmSuccess = 0.99
	calmFor     = time.Second
)

// Goodput is what is done in the middle of a turn: as much is offered before and after it.
// Turns are short, and between two of them peak is measured anew, after a rest: the machine is
// not always equally fast. Floods have all of it, from calm to calm.
const (
	overTurns  = 10
	turnRest   = 300 * time.Millisecond
	turnPeak   = time.Second
	turnEdge   = 300 * time.Millisecond
	turnStorm  = 1200 * time.Millisecond
	overFloods = 3
	floodCalm  = time.Second
	floodStorm = 3 * time.Second
	floodWatch = mostRecovery + calmFor
)

// evenPeak is what the peak after a turn or a flood is of the one before, at the least, or the
// other way round. If it is less, something else has begun or ceased to use the machine: half of
// the one may be too much for the other. It is repeated then, but not more of them than are
// asked for: then it is not the machine. What became of its pushes counts all the same, and of
// floods it is told how many did not end in time.
const evenPeak = 0.65

// Overload is what came of floods of one kind.
type Overload struct {
	What   string
	Times  float64 // of peak
	Honest bool
	Turns  []Storm
	Floods []Storm
	Best   float64 // the peak before all of them
	Uneven int     // turns and floods that were repeated
	Never  int     // of those, the floods after which not all was normal while it was watched
	By     Flooded // all that was offered while there was too much
}

// Storm is one turn or flood. Rates are in pushes a second.
type Storm struct {
	Peak     float64 // mean of right before and right after
	Offered  float64
	Goodput  float64 // answered in that time, and delivered within a second
	Recovery time.Duration
	Returned bool // to normal, while it was watched
	// Cores at work: of Push-Manager, the generator and the nodes.
	Server, Generator, Nodes float64
}

// Bars are what is demanded of it.
func (o *Overload) Bars() []Bar {
	name := fmt.Sprintf("%s at %.0fx of peak, clients that %s", o.What, o.Times, map[bool]string{true: "obey", false: "do not obey"}[o.Honest])
	exactly := func(v float64) Figure { return Figure{v, v, v} }
	recovery, returned := o.recovery()
	bars := []Bar{
		{What: name + ": critical pushes that succeed", Figure: exactly(o.good(floodCritical)), Limit: leastCritical, Kind: AtLeast},
		{What: name + ": seconds until all is normal again", Figure: exactly(recovery.Seconds()), Limit: mostRecovery.Seconds(), Kind: AtMost},
	}
	if !returned {
		bars[1].Failure = "not while it was watched"
	}
	if o.What == "room" {
		bars = append(bars, Bar{What: name + ": goodput / peak", Figure: o.goodput(), Limit: leastGoodput, Kind: AtLeast})
	}
	return bars
}

// good is the share of a priority's pushes that is delivered in time.
func (o *Overload) good(priority int) float64 {
	return float64(o.By.Good[priority]) / float64(max(o.By.Offered[priority], 1))
}

// goodput is that of peak.
func (o *Overload) goodput() Figure {
	return o.median(func(s *Storm) float64 { return s.Goodput / s.Peak })
}

func (o *Overload) median(of func(*Storm) float64) Figure {
	return bootstrap(len(o.Turns), func(turns []int) float64 {
		values := make([]float64, len(turns))
		for i, t := range turns {
			values[i] = of(&o.Turns[t])
		}
		return median(values)
	})
}

// recovery is the longest.
func (o *Overload) recovery() (after time.Duration, returned bool) {
	returned = true
	for i := range o.Floods {
		after = max(after, o.Floods[i].Recovery)
		returned = returned && o.Floods[i].Returned
	}
	return after, returned
}

// Overload floods a Push-Manager that has one core to itself, so that it and not the
// generator is what cannot keep up, and a generator that offers more does not take from it:
// pushes to rooms of a hundred, and to single users, over three nodes.
func (b *Bench) Overload(ctx context.Context) ([]*Overload, error) {
	const nodes, members = 3, 100
	b.opts.Conns = 0 // peak is that of as many connections
	for _, n := range floodConns {
		b.opts.Conns += n
	}
	w, pm, err := b.pushManager(ctx, nodes, []Room{b.lobby(nodes), roomOf(members, nodes)}, "GOMAXPROCS=1")
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	if err := pm.alone(); err != nil {
		return nil, err
	}
	var all []*Overload
	for _, test := range []struct {
		what string
		work Work
	}{{"room", room(members)}, {"user", b.users()}} {
		if err := pm.Warm(ctx, test.work); err != nil {
			return nil, err
		}
		full, best, err := b.fullLoad(ctx, pm, test.work)
		if err != nil {
			return nil, err
		}
		for _, honest := range []bool{false, true} {
			for _, times := range []float64{2, 5} {
				o := &Overload{What: test.what, Times: times, Honest: honest, Best: best}
				if err := b.storms(ctx, pm, full, o); err != nil {
					return nil, err
				}
				all = append(all, o)
				if b.opts.Short {
					return all, nil // the others run the same way
				}
			}
		}
	}
	return all, nil
}

// fullLoad is the closed loop that gets most out of a server, by the median of several turns:
// the best of single readings would be the one in which the machine was fastest.
func (b *Bench) fullLoad(ctx context.Context, pm *Server, work Work) (best Load, most float64, err error) {
	inFlight := []int{256, 384, 512, 768, 1024}
	rates := make([][]float64, len(inFlight))
	full := func(i int) Load {
		return Load{Target: pm.Name, Mode: Closed, Work: work, InFlight: inFlight[i], Duration: b.span(turnPeak)}
	}
	for range overTurns/2 - 1 {
		for i := range inFlight {
			rate, err := b.peak(ctx, full(i))
			if err != nil {
				return best, 0, err
			}
			rates[i] = append(rates[i], rate)
		}
		if b.opts.Short {
			break
		}
	}
	for i := range inFlight {
		if rate := median(rates[i]); rate > most {
			most, best = rate, full(i)
		}
	}
	b.progress("# peak is that of %d pushes under way: %.0f pushes/s", best.InFlight, most)
	return best, most, nil
}

// peak is the rate of a closed loop, after a rest.
func (b *Bench) peak(ctx context.Context, full Load) (float64, error) {
	if err := pause(ctx, b.span(turnRest)); err != nil {
		return 0, err
	}
	out, err := b.run(ctx, full)
	if err != nil {
		return 0, err
	}
	return float64(out.Done-out.Failed) / out.Elapsed.Seconds(), nil
}

func (b *Bench) storms(ctx context.Context, pm *Server, full Load, o *Overload) error {
	peak, err := b.peak(ctx, full)
	if err != nil {
		return err
	}
	for _, kind := range []struct {
		many                int
		outside             float64 // of peak, before and after
		before, over, after time.Duration
		storms              *[]Storm
	}{
		{overTurns, o.Times, turnEdge, turnStorm, turnEdge, &o.Turns},
		{overFloods, calmRate, floodCalm, floodStorm, floodWatch, &o.Floods},
	} {
		many, uneven := kind.many, 0
		if b.opts.Short {
			many = 1
		}
		for len(*kind.storms) < many {
			b.progress("# %s: peak %.0f pushes/s, %.0fx of it follows", o.What, peak, o.Times)
			s, err := b.storm(ctx, pm, Flood{Target: pm.Name, Work: full.Work, Honest: o.Honest, Phases: []Phase{
				{Rate: kind.outside * peak, Duration: b.span(kind.before)},
				{Rate: o.Times * peak, Duration: b.span(kind.over)},
				{Rate: kind.outside * peak, Duration: b.span(kind.after)},
			}}, &o.By)
			if err != nil {
				return err
			}
			after, err := b.peak(ctx, full)
			if err != nil {
				return err
			}
			s.Peak = (peak + after) / 2
			if min(peak, after) >= evenPeak*max(peak, after) || uneven == many || b.opts.Short {
				*kind.storms = append(*kind.storms, s)
			} else {
				uneven++
				if kind.storms == &o.Floods && !s.Returned {
					o.Never++
				}
			}
			peak = after
		}
		o.Uneven += uneven
	}
	return nil
}

// span shortens times for a test of the harness.
func (b *Bench) span(d time.Duration) time.Duration {
	if b.opts.Short {
		return d / 4 // enough that something comes of it on a busy machine
	}
	return d
}

// storm offers what it is told to, and adds what was offered in the middle phase.
func (b *Bench) storm(ctx context.Context, pm *Server, f Flood, by *Flooded) (s Storm, err error) {
	ctx, cancel := context.WithTimeout(ctx, maxRun+startTimeout)
	defer cancel()
	calm, storm := f.Phases[0].Duration, f.Phases[1].Duration
	var watching sync.WaitGroup
	var watched error
	watching.Go(func() { s, watched = b.watch(ctx, pm, calm+floodBucket, storm-2*floodBucket) })
	var buckets []Flooded
	err = b.load.call(ctx, "flood", f, &buckets)
	if err != nil {
		cancel()
	}
	watching.Wait()
	if err := errors.Join(err, watched); err != nil {
		return s, err
	}
	from, to := int(calm/floodBucket), int((calm+storm)/floodBucket)
	var all Flooded
	for i := from; i < to; i++ {
		all.add(&buckets[i])
	}
	by.add(&all)
	s.Offered, s.Goodput = float64(sum(all.Offered))/storm.Seconds(), float64(sum(all.Done))/storm.Seconds()
	s.Recovery, s.Returned = recovery(buckets[to:], int(b.span(calmFor)/floodBucket))
	return s, nil
}

// watch tells how many cores are at work, after a while and for a while.
func (b *Bench) watch(ctx context.Context, pm *Server, after, during time.Duration) (s Storm, err error) {
	if err := pause(ctx, after); err != nil {
		return s, err
	}
	first, err := pm.cores()
	if err != nil {
		return s, err
	}
	if err := pause(ctx, during); err != nil {
		return s, err
	}
	last, err := pm.cores()
	used := func(first, last time.Duration) float64 { return (last - first).Seconds() / during.Seconds() }
	s.Server, s.Generator, s.Nodes = used(first.server, last.server), used(first.load, last.load), used(first.nodes, last.nodes)
	return s, err
}

// recovery is how long it takes from an overload's end until everything is normal: for the
// next so many buckets, and for all that follow.
func recovery(buckets []Flooded, calm int) (after time.Duration, returned bool) {
	normal := func(buckets []Flooded) bool {
		var all Flooded
		for i := range buckets {
			all.add(&buckets[i])
		}
		offered := sum(all.Offered)
		return offered > 0 && float64(sum(all.Good)) >= calmSuccess*float64(offered)
	}
	for from := range len(buckets) - calm {
		if normal(buckets[from:from+calm]) && normal(buckets[from:]) {
			return time.Duration(from) * floodBucket, true
		}
	}
	return 0, false
}

func (f *Flooded) add(o *Flooded) {
	for p := range floodPriorities {
		f.Offered[p] += o.Offered[p]
		f.Good[p] += o.Good[p]
		f.Done[p] += o.Done[p]
		f.Late[p] += o.Late[p]
		f.Refused[p] += o.Refused[p]
		f.Failed[p] += o.Failed[p]
		f.GivenUp[p] += o.GivenUp[p]
		f.Held[p] += o.Held[p]
	}
}

func sum(all [len(floodPriorities)]int) (n int) {
	for _, v := range all {
		n += v
	}
	return n
}

// WriteOverloads prints one table.
func WriteOverloads(out io.Writer, all []*Overload) error {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	line := func(format string, args ...any) { _, _ = fmt.Fprintf(t, format+"\t\n", args...) } // Flush tells
	line("pushes to\toffered\tclients\tbest/s\tpeak/s\toffered/s\tgoodput/s\tgoodput/peak\tlow\tnormal\thigh\tcritical\trefused\tgiven up\theld\tlate\tfailed\tnormal after\trepeated\tnever\tcores: push-manager\tgenerator\tnodes")
	for _, o := range all {
		clients := "raw"
		if o.Honest {
			clients = "honest"
		}
		after := "never"
		if recovery, returned := o.recovery(); returned {
			after = recovery.String()
		}
		good := [len(floodPriorities)]float64{}
		for p := range good {
			good[p] = 100 * o.good(p)
		}
		of := func(n [len(floodPriorities)]int) float64 {
			return 100 * float64(sum(n)) / float64(max(sum(o.By.Offered), 1))
		}
		mid := func(of func(*Storm) float64) float64 { return o.median(of).Value }
		b := &o.By
		line("%s\t%.0fx\t%s\t%.0f\t%.0f\t%.0f\t%.0f\t%s\t%.1f%%\t%.1f%%\t%.1f%%\t%.2f%%\t%.1f%%\t%.1f%%\t%.1f%%\t%.1f%%\t%.1f%%\t%s\t%d\t%d\t%.2f\t%.2f\t%.2f",
			o.What, o.Times, clients, o.Best, mid(func(s *Storm) float64 { return s.Peak }), mid(func(s *Storm) float64 { return s.Offered }),
			mid(func(s *Storm) float64 { return s.Goodput }), o.goodput(), good[0], good[1], good[2], good[3],
			of(b.Refused), of(b.GivenUp), of(b.Held), of(b.Late), of(b.Failed), after, o.Uneven, o.Never,
			mid(func(s *Storm) float64 { return s.Server }), mid(func(s *Storm) float64 { return s.Generator }), mid(func(s *Storm) float64 { return s.Nodes }))
	}
	return t.Flush()
}
