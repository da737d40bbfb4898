package faultbench

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// How soon everything is well again after a node was away, again and again: TIMES
// repetitions for each way of being away.

// timesEnv is how often. Without it a few times, and then the figures are judged only by
// what a loaded machine allows.
const (
	timesEnv  = "TIMES"
	timesInCI = 3
)

// The bounds of what is promised. A node that stands still is found by the ack that it
// owes for a second, and by the clock that looks 40 times a second.
const (
	settledAfterEnd     = 100 * time.Millisecond
	settledAfterSilence = 1100 * time.Millisecond
	backInService       = 2 * time.Second
)

// late is how late a timer of ours may be before what is measured meanwhile says more
// about the machine than about the program.
const late = 50 * time.Millisecond

// outage is one way in which a node is away.
type outage struct {
	name    string
	settled time.Duration        // by when what was in flight has its outcome
	least   time.Duration        // how long it lasts, at least
	spread  time.Duration        // and how much longer it may
	begin   func()               // has taken effect when it returns
	end     func() time.Duration // returns since when the node can be reached
}

// repetition is what was measured of one outage.
type repetition struct {
	lasted   time.Duration // how long it was
	inFlight int           // pushes to the node when it began
	unknown  int           // of which are unknown
	settled  time.Duration // until the last of them was
	first    time.Duration // from its end until something is delivered there
	back     time.Duration // from its end until 99.9 % succeed
	calm     bool          // the machine let us run
	others   tally         // the pushes to the other node meanwhile
}

// recovery repeats an outage under load.
type recovery struct {
	*street
	m     *manager
	times int
	judge bool // by the promise, and not only by what a loaded machine allows
}

// newRecovery starts a Push-Manager for the nodes so far.
func (s *street) newRecovery() *recovery {
	s.t.Helper()
	r := &recovery{street: s, times: timesInCI}
	if text := os.Getenv(timesEnv); text != "" {
		var err error
		if r.times, err = strconv.Atoi(text); err != nil || r.times < 1 {
			s.t.Fatalf("%s is %q", timesEnv, text)
		}
		r.judge = true
	}
	r.m = s.manage(2, prompt()...)
	r.m.good(room("mixed"))
	r.m.rest()
	return r
}

// steady paces callers so that the machine has some air.
func steady(next func(*rand.Rand) request) func(*rand.Rand) request {
	return func(r *rand.Rand) request {
		wait(time.Duration(5+r.IntN(10)) * time.Millisecond)
		return next(r)
	}
}

// repeat makes the outage happen again and again, and reports.
func (r *recovery) repeat(o outage) {
	r.t.Helper()
	r.watch(late)
	since := r.ledger.now()
	loads := []*load{r.m.callers(12, steady(r.someBad)), r.m.callers(4, steady(r.someGood))}
	random := rand.New(rand.NewPCG(r.seed, 3))
	list := make([]repetition, r.times)
	for i := range list {
		for _, l := range loads {
			l.more(20)
		}
		list[i] = r.once(o, o.least+time.Duration(random.Int64N(int64(o.spread))))
	}
	for _, l := range loads {
		l.end()
	}
	r.m.good(room("mixed"))
	if r.judge {
		r.unharmedAtAll(since)
	} else {
		r.unharmedInQuiet(list)
	}
	r.m.atRest()
	r.report(o, list)
}

// unharmedAtAll is unharmed of all pushes, whether the machine let us run or not.
func (r *recovery) unharmedAtAll(since time.Duration) {
	r.t.Helper()
	all := r.ledger.tally(since, r.ledger.now(), forGood)
	r.t.Logf("I9: to the other node: %v", all)
	if all.pushes == 0 || all.success*1000 < all.pushes*999 {
		r.t.Errorf("the other node suffered: %v", all)
	}
}

// unharmedInQuiet is unharmed of the repetitions in which the machine let us run. One push
// that is late all the same is much of the few that there are.
func (r *recovery) unharmedInQuiet(list []repetition) {
	r.t.Helper()
	pushes, success := 0, 0
	for _, x := range list {
		if x.calm {
			pushes, success = pushes+x.others.pushes, success+x.others.success
		}
	}
	r.t.Logf("I9: to the other node while the machine let us run: %d pushes, %d a success", pushes, success)
	if success*100 < pushes*99 {
		r.t.Errorf("the other node suffered: of %d pushes %d were a success", pushes, success)
	}
}

// volley is how many pushes are asked for at the very moment of the fault, so that
// something is in flight.
const volley = 40

// once is one outage of some length.
func (r *recovery) once(o outage, lasts time.Duration) repetition {
	r.t.Helper()
	var shots sync.WaitGroup
	for i := range volley {
		shots.Go(func() { r.m.push(user(r.bad[i%len(r.bad)])) })
	}
	wait(time.Millisecond) // some of them have got through by then, and some not
	before := r.ledger.now()
	o.begin()
	began := r.ledger.now()
	r.ledger.note("%s begins", o.name)
	wait(lasts)
	shots.Wait()
	ended := o.end()
	r.ledger.note("%s is over", o.name)
	r.m.good(user(r.bad[0]))
	r.m.reaches(2)
	if watch := ended + backInService + 500*time.Millisecond - r.ledger.now(); r.judge && watch > 0 {
		wait(watch)
	}
	x := r.measure(before, began, ended)
	x.lasted = ended - before
	x.others = r.ledger.tally(before, r.ledger.now(), forGood)
	return x
}

// measure reads one outage from the ledger.
func (r *recovery) measure(before, began, ended time.Duration) repetition {
	now := r.ledger.now()
	x := repetition{calm: r.ledger.calm(before, now), first: now - ended, back: now - ended}
	r.ledger.mu.Lock()
	defer r.ledger.mu.Unlock()
	good, all := 0, 0
	for _, p := range slices.Backward(r.ledger.pushes) {
		if p.start < before-defaultDeadline {
			break // all that follow are older
		}
		if !forBad(p) || !p.done {
			continue
		}
		if p.start <= began && p.end >= began {
			x.inFlight++
			x.unknown += int(min(p.summary.GetUnknown(), 1))
			x.settled = max(x.settled, p.end-max(p.start, before))
		}
		if p.success && p.end >= ended {
			x.first = min(x.first, p.end-ended)
		}
		if p.start < ended {
			continue
		}
		all++
		if p.success {
			good++
		}
		if good*1000 >= all*999 {
			x.back = p.start - ended
		}
	}
	return x
}

// report prints the table and judges it.
func (r *recovery) report(o outage, list []repetition) {
	r.t.Helper()
	quiet := slices.DeleteFunc(slices.Clone(list), func(x repetition) bool { return !x.calm })
	inFlight, unknown := 0, 0
	for _, x := range list {
		inFlight, unknown = inFlight+x.inFlight, unknown+x.unknown
	}
	r.t.Logf("%s: %d times, %d of them while the machine let us run; %d pushes in flight, %d of them unknown", o.name, len(list), len(quiet), inFlight, unknown)
	if r.judge && len(quiet)*4 < len(list) {
		r.t.Error("the machine was too busy for figures that say anything: run it again")
	}
	for i, x := range list {
		if max(x.first, x.back) > backInService || x.settled > o.settled {
			r.t.Logf("%s, time %d: %+v", o.name, i, x)
		}
	}
	if inFlight == 0 {
		r.t.Error("nothing was in flight: the outage proves nothing")
	}
	for _, what := range []struct {
		name  string
		bound time.Duration
		of    func(repetition) time.Duration
	}{
		{"what was in flight is settled", o.settled, func(x repetition) time.Duration { return x.settled }},
		{"first delivery after its end", backInService, func(x repetition) time.Duration { return x.first }},
		{"99.9 % success after its end", backInService, func(x repetition) time.Duration { return x.back }},
	} {
		all, calm := spread(list, what.of), spread(quiet, what.of)
		r.t.Logf("| %s | %s | bound %v | calm: %v | all: %v |", o.name, what.name, what.bound, calm, all)
		if r.judge && calm.max > what.bound || calm.max > what.bound+slackForCI {
			r.t.Errorf("%s, %s: %v, the bound is %v", o.name, what.name, calm, what.bound)
		}
		if r.judge && all.max > what.bound+slackForCI { // else only patience bounds those that were not calm
			r.t.Errorf("%s, %s: %v, the bound is %v", o.name, what.name, all, what.bound)
		}
	}
}

// quantiles are the median and the maximum of a list.
type quantiles struct{ median, max time.Duration }

func spread[T any](list []T, of func(T) time.Duration) quantiles {
	if len(list) == 0 {
		return quantiles{}
	}
	times := make([]time.Duration, len(list))
	for i, x := range list {
		times[i] = of(x)
	}
	slices.Sort(times)
	return quantiles{times[len(times)/2], times[len(times)-1]}
}

func (q quantiles) String() string {
	return fmt.Sprintf("median %v, max %v", q.median.Round(time.Millisecond), q.max.Round(time.Millisecond))
}

// TestRecoveryFromKill kills a node and starts it again at its old address. Nothing in
// etcd changes: nothing but the links' own attempts brings it back.
func TestRecoveryFromKill(t *testing.T) {
	s := newStreet(t)
	bad := s.child("bad", s.bad...)
	s.child("good", s.good...)
	s.newRecovery().repeat(outage{
		name: "node killed", settled: settledAfterEnd, least: 50 * time.Millisecond, spread: 3 * time.Second,
		begin: func() { bad.signal(syscall.SIGKILL) },
		end: func() time.Duration {
			bad.kill() // all that it has said is read
			bad = newChildWith(t, s.ledger, "bad", bad.address, "", s.bad)
			s.children[0] = bad
			return s.ledger.now()
		},
	})
}

// TestRecoveryFromStop stops a node, for shorter and for longer than it takes until its
// streams are closed.
func TestRecoveryFromStop(t *testing.T) {
	s := newStreet(t)
	bad := s.child("bad", s.bad...)
	s.child("good", s.good...)
	s.newRecovery().repeat(outage{
		name: "node stopped", settled: settledAfterSilence, least: 1500 * time.Millisecond, spread: 3500 * time.Millisecond,
		begin: bad.stop,
		end: func() time.Duration {
			at := s.ledger.now()
			bad.cont()
			return at
		},
	})
}
