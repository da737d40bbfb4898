package link

import (
	"errors"
	"math"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// errNoTurn is why a link is down that has waited for its turn for the dial timeout.
var errNoTurn = errors.New("too many other nodes are being dialled")

// dials gives links their turn to dial. Two things are shared by all:
//
// The budget, of dials under way and dials a second. Links whose last attempt has failed
// come after all others, and get half of it at most: a thousand nodes that are gone must
// not be in the way of one that is back.
//
// What is known about an address. One link leads, the others that want to go there wait
// for what it finds: nobody, and all have failed; a node, and its links follow.
type dials struct {
	// Static after newDials.
	most               int
	pauseMin, pauseMax time.Duration

	mu sync.Mutex
	// Guarded by mu.
	places  map[string]*place
	lines   [2][]*turn // that wait for the budget: healthy and failing ones
	busy    [2]int     // under way
	all     *rate.Limiter
	failing *rate.Limiter
	timer   *time.Timer // of the next grant
}

// place is an address. Guarded by dials.mu.
type place struct {
	waiting []*turn       // for the leader's verdict, or for until
	leader  *turn         // whose dial is next or under way
	until   time.Time     // failing turns do not lead before
	pause   time.Duration // what until was last set to
	timer   *time.Timer   // of until
	found   error         // what the last leader has found, which holds for others until stale
	stale   time.Time
}

// verdict is what a leader has found just now about the node that a link wants, nil if
// nothing or that it is there.
func (p *place) verdict(id string) error {
	var wrong *wrongNodeError
	if p.found == nil || !time.Now().Before(p.stale) || errors.As(p.found, &wrong) && wrong.said == id {
		return nil
	}
	return p.found
}

// turn is one link's wish to dial.
type turn struct {
	link    *Link
	failing bool
	granted bool       // guarded by dials.mu
	verdict chan error // nil: dial; else what another link has found. Holds one
}

func (t *turn) line() int {
	if t.failing {
		return 1
	}
	return 0
}

func newDials(cfg *Config) *dials {
	limiter := func(share int) *rate.Limiter {
		perSecond := max(cfg.DialRate/share, 1)
		return rate.NewLimiter(rate.Limit(perSecond), max(perSecond/10, 1)) // a burst is what comes within 100 ms
	}
	return &dials{
		most: cfg.Dials, pauseMin: cfg.BackoffMin, pauseMax: cfg.BackoffMax,
		places: make(map[string]*place), all: limiter(1), failing: limiter(2),
	}
}

// place finds or makes what is known about an address.
func (d *dials) place(addr string) *place {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.places[addr]
	if p == nil {
		p = new(place)
		d.places[addr] = p
	}
	return p
}

// keep forgets the addresses that no node has, once they are as many as the others.
func (d *dials) keep(nodes []*node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.places) <= 2*len(nodes)+64 {
		return
	}
	places := make(map[string]*place, len(nodes))
	for _, n := range nodes {
		places[n.addr] = n.place
	}
	d.places = places
}

// waiting is the number of links that wait for their turn.
func (d *dials) waiting() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := len(d.lines[0]) + len(d.lines[1])
	for _, p := range d.places {
		n += len(p.waiting)
	}
	return n
}

// join asks for a turn. [dials.done] must follow when verdict has been nil, and
// [dials.leave] when nobody waits for it any more.
func (d *dials) join(l *Link, failing bool) *turn {
	t := &turn{link: l, failing: failing, verdict: make(chan error, 1)}
	d.mu.Lock()
	defer d.mu.Unlock()
	p := l.node.place
	if found := p.verdict(l.node.id); found != nil && !failing {
		t.verdict <- found
		return t
	}
	p.waiting = append(p.waiting, t)
	d.leadLocked(p)
	return t
}

// leave takes a turn back.
func (d *dials) leave(t *turn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := t.link.node.place
	remove(&p.waiting, t)
	remove(&d.lines[t.line()], t)
	if t.granted {
		d.busy[t.line()]--
	}
	if p.leader == t {
		p.leader = nil
	}
	d.leadLocked(p)
	d.grantLocked()
}

// hurry lets a turn's address be tried without delay: it has been announced anew.
func (d *dials) hurry(t *turn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := t.link.node.place
	p.until, p.pause, p.found = time.Time{}, 0, nil
	d.leadLocked(p)
}

// leadLocked chooses who leads at an address, if nobody does.
func (d *dials) leadLocked(p *place) {
	healthy := slices.IndexFunc(p.waiting, func(t *turn) bool { return !t.failing })
	if p.leader != nil {
		if healthy < 0 || p.leader.granted || !p.leader.failing {
			return
		}
		// It stands in the longer line: the other one finds out sooner.
		remove(&d.lines[1], p.leader)
		p.waiting = append(p.waiting, p.leader)
	}
	if len(p.waiting) == 0 {
		return
	}
	first := max(healthy, 0)
	if wait := time.Until(p.until); healthy < 0 && wait > 0 {
		if p.timer != nil {
			p.timer.Stop()
		}
		p.timer = time.AfterFunc(wait, func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.leadLocked(p)
		})
		return
	}
	p.leader = p.waiting[first]
	p.waiting = slices.Delete(p.waiting, first, first+1)
	line := &d.lines[p.leader.line()]
	*line = append(*line, p.leader)
	d.grantLocked()
}

// grantLocked gives away what is left of the budget.
func (d *dials) grantLocked() {
	for d.busy[0]+d.busy[1] < d.most {
		line := 0
		if len(d.lines[0]) == 0 {
			line = 1
		}
		if len(d.lines[line]) == 0 || line == 1 && d.busy[1] >= (d.most+1)/2 {
			return
		}
		limits := []*rate.Limiter{d.all, d.failing}[:1+line]
		now, wait := time.Now(), time.Duration(0)
		for _, limit := range limits {
			if tokens := limit.TokensAt(now); tokens < 1 {
				wait = max(wait, time.Duration(math.Ceil((1-tokens)/float64(limit.Limit())*float64(time.Second))))
			}
		}
		if wait > 0 {
			if d.timer != nil {
				d.timer.Stop()
			}
			d.timer = time.AfterFunc(wait, func() {
				d.mu.Lock()
				defer d.mu.Unlock()
				d.grantLocked()
			})
			return
		}
		for _, limit := range limits {
			limit.AllowN(now, 1)
		}
		t := d.lines[line][0]
		d.lines[line] = slices.Delete(d.lines[line], 0, 1)
		d.busy[line]++
		t.granted = true
		t.verdict <- nil
	}
}

// done ends a granted turn with what its dial has found after it took so long; the
// others who wait at the address get their part of it.
func (d *dials) done(t *turn, took time.Duration, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.busy[t.line()]--
	t.granted = false
	p := t.link.node.place
	if p.leader == t {
		p.leader = nil
		d.tellLocked(t, p, took, err)
	}
	d.leadLocked(p)
	d.grantLocked()
}

// tellLocked passes the leader's verdict on. Whom it concerns depends on what it says.
func (d *dials) tellLocked(t *turn, p *place, took time.Duration, err error) {
	var wrong *wrongNodeError
	follows := func(*turn) bool { return false }
	fails := func(*turn) bool { return true }
	switch {
	case err == nil:
		follows = func(o *turn) bool { return o.link.node.id == t.link.node.id }
		err = &wrongNodeError{said: t.link.node.id} // for the others
		p.until, p.pause = time.Time{}, 0
		p.found, p.stale = err, time.Now().Add(d.pauseMax)
	case errors.Is(err, errUnimplemented): // a node that does not say who it is
		follows = func(*turn) bool { return true }
		p.until, p.pause, p.found = time.Time{}, 0, nil
	case errors.As(err, &wrong):
		follows = func(o *turn) bool { return o.link.node.id == wrong.said }
		d.backOff(p, 0)
		p.found, p.stale = err, p.until
	case errors.Is(err, errNobody):
		d.backOff(p, took)
		p.found, p.stale = err, p.until
	default:
		p.found = nil
		// Somebody is there and does not want this stream. Another one may have more
		// luck, unless it has had none before.
		follows = func(o *turn) bool { return !o.failing && o.link.node.id == t.link.node.id }
		fails = func(*turn) bool { return false }
		d.backOff(p, 0)
	}
	waiting := p.waiting
	p.waiting = nil
	for _, o := range waiting {
		switch {
		case follows(o):
			o.failing = false
			d.lines[0] = append(d.lines[0], o)
		case !o.failing && fails(o):
			o.verdict <- err
		default:
			p.waiting = append(p.waiting, o) // it is down already, and stays in line
		}
	}
}

// backOff makes an address wait; what an attempt without an answer has taken counts as
// part of it. One that can be reached again just after its begin then waits for the dial
// timeout only.
func (d *dials) backOff(p *place, took time.Duration) {
	p.pause = min(max(2*p.pause, d.pauseMin), d.pauseMax)
	p.until = time.Now().Add(max(jitter(p.pause)-took, min(jitter(d.pauseMin), d.pauseMax)))
}

func remove(list *[]*turn, t *turn) {
	*list = slices.DeleteFunc(*list, func(o *turn) bool { return o == t })
}
