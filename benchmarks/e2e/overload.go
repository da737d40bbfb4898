package e2e

import (
	"context"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"
)

// What `pushbench overload` demands.
const (
	leastGoodput  = 0.9  // of peak, for rooms
	leastCritical = 0.99 // of the critical pushes offered
	mostRecovery  = 10 * time.Second
)

// steady is how much peak may change, or there is no figure.
const steady = 0.75

// calmRate is what is offered before and after the overload, of peak, and calmSuccess the
// share of it that must be good for everything to be normal.
const (
	calmRate    = 0.5
	calmSuccess = 0.99
)

// Overload is what came of one flood.
type Overload struct {
	What   string
	Times  float64 // of peak
	Honest bool

	Peak     float64 // pushes a second, right before
	After    float64 // the same, right after it
	Offered  float64 // the same
	Goodput  float64 // the same: delivered within a second
	Critical float64 // the share of them that was
	By       Flooded // all that was offered while there was too much
	Recovery time.Duration
	Returned bool // to normal, at all
}

// Bars are what is demanded of it.
func (o *Overload) Bars() []Bar {
	name := fmt.Sprintf("%s at %.0fx of peak, clients that %s", o.What, o.Times, map[bool]string{true: "obey", false: "do not obey"}[o.Honest])
	exactly := func(v float64) Figure { return Figure{v, v, v} }
	bars := []Bar{
		{What: name + ": critical pushes that succeed", Figure: exactly(o.Critical), Limit: leastCritical, Kind: AtLeast},
		{What: name + ": seconds until all is normal again", Figure: exactly(o.Recovery.Seconds()), Limit: mostRecovery.Seconds(), Kind: AtMost},
	}
	if !o.Returned {
		bars[1].Failure = "not while it was watched"
	}
	if o.What == "room" {
		bars = append(bars, Bar{What: name + ": goodput / peak", Figure: exactly(o.ratio()), Limit: leastGoodput, Kind: AtLeast})
	}
	if low, high := min(o.Peak, o.After), max(o.Peak, o.After); low < steady*high {
		for i := range bars {
			bars[i].Failure = fmt.Sprintf("the machine has other work: peak was %.0f before and %.0f after", o.Peak, o.After)
		}
	}
	return bars
}

// ratio is goodput by peak. The machine is not always equally fast, so peak is the mean of
// those before and after.
func (o *Overload) ratio() float64 { return o.Goodput / ((o.Peak + o.After) / 2) }

// Overload floods a Push-Manager that has one core to itself, so that it and not the
// generator is what cannot keep up: pushes to rooms of a hundred, and to single users, over
// three nodes.
func (b *Bench) Overload(ctx context.Context) ([]*Overload, error) {
	const nodes, members = 3, 100
	w, pm, err := b.pushManager(ctx, nodes, []Room{b.lobby(nodes), roomOf(members, nodes)}, "GOMAXPROCS=1")
	if err != nil {
		return nil, err
	}
	defer w.Close(context.WithoutCancel(ctx))
	var all []*Overload
	for _, test := range []struct {
		what string
		work Work
	}{{"room", room(members)}, {"user", b.users()}} {
		if err := pm.Warm(ctx, test.work); err != nil {
			return nil, err
		}
		for _, honest := range []bool{false, true} {
			for _, times := range []float64{2, 5} {
				o := &Overload{What: test.what, Times: times, Honest: honest}
				if o.Peak, err = b.peak(ctx, pm, test.work); err != nil {
					return nil, err
				}
				b.progress("# %s: peak %.0f pushes/s, %.0fx of it follows", test.what, o.Peak, times)
				if err := b.overload(ctx, pm, test.work, o); err != nil {
					return nil, err
				}
				if o.After, err = b.peak(ctx, pm, test.work); err != nil {
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

// peak is the median rate of a closed loop that keeps the server busy.
func (b *Bench) peak(ctx context.Context, pm *Server, work Work) (float64, error) {
	rates := make([]float64, 5)
	if b.opts.Short {
		rates = rates[:1]
	}
	for i := range rates {
		out, err := b.run(ctx, Load{Target: pm.Name, Mode: Closed, Work: work, InFlight: 512, Duration: b.span(time.Second)})
		if err != nil {
			return 0, err
		}
		rates[i] = float64(out.Done-out.Failed) / out.Elapsed.Seconds()
	}
	slices.Sort(rates)
	return rates[len(rates)/2], nil
}

// span shortens times for a test of the harness.
func (b *Bench) span(d time.Duration) time.Duration {
	if b.opts.Short {
		return d / 4 // enough that something comes of it on a busy machine
	}
	return d
}

func (b *Bench) overload(ctx context.Context, pm *Server, work Work, o *Overload) error {
	calm, storm, watch := b.span(2*time.Second), b.span(6*time.Second), b.span(12*time.Second)
	ctx, cancel := context.WithTimeout(ctx, maxRun+startTimeout)
	defer cancel()
	var buckets []Flooded
	err := b.load.call(ctx, "flood", Flood{Target: pm.Name, Work: work, Honest: o.Honest, Phases: []Phase{
		{Rate: calmRate * o.Peak, Duration: calm},
		{Rate: o.Times * o.Peak, Duration: storm},
		{Rate: calmRate * o.Peak, Duration: watch},
	}}, &buckets)
	if err != nil {
		return err
	}
	from, to := int(calm/floodBucket), int((calm+storm)/floodBucket)
	for i := from; i < to; i++ {
		o.By.add(&buckets[i])
	}
	o.Offered, o.Goodput = float64(sum(o.By.Offered))/storm.Seconds(), float64(sum(o.By.Good))/storm.Seconds()
	o.Critical = float64(o.By.Good[floodCritical]) / float64(max(o.By.Offered[floodCritical], 1))
	// Normal is from the last tenth of a second on that was not.
	last := to - 1
	for i := to; i < len(buckets); i++ {
		if offered := sum(buckets[i].Offered); float64(sum(buckets[i].Good)) < calmSuccess*float64(offered) {
			last = i
		}
	}
	o.Recovery = time.Duration(last+1-to) * floodBucket
	o.Returned = last < len(buckets)-2
	return nil
}

func (f *Flooded) add(o *Flooded) {
	for p := range floodPriorities {
		f.Offered[p] += o.Offered[p]
		f.Good[p] += o.Good[p]
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
	line("pushes to\toffered\tclients\tpeak/s\tpeak after\toffered/s\tgoodput/s\tgoodput/peak\tlow\tnormal\thigh\tcritical\trefused\tgiven up\theld\tlate\tfailed\tnormal after")
	for _, o := range all {
		clients := "raw"
		if o.Honest {
			clients = "honest"
		}
		after := "never"
		if o.Returned {
			after = o.Recovery.String()
		}
		b := &o.By
		good := [len(floodPriorities)]float64{}
		for p := range good {
			good[p] = 100 * float64(b.Good[p]) / float64(max(b.Offered[p], 1))
		}
		of := func(n [len(floodPriorities)]int) float64 {
			return 100 * float64(sum(n)) / float64(max(sum(b.Offered), 1))
		}
		line("%s\t%.0fx\t%s\t%.0f\t%.0f\t%.0f\t%.0f\t%.2f\t%.1f%%\t%.1f%%\t%.1f%%\t%.2f%%\t%.1f%%\t%.1f%%\t%.1f%%\t%.1f%%\t%.1f%%\t%s",
			o.What, o.Times, clients, o.Peak, o.After, o.Offered, o.Goodput, o.ratio(), good[0], good[1], good[2], good[3],
			of(b.Refused), of(b.GivenUp), of(b.Held), of(b.Late), of(b.Failed), after)
	}
	return t.Flush()
}
