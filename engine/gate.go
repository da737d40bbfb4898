package engine

import "sync/atomic"

// gate counts the pushes in flight. Pushes are started on some cores and finished on
// others, so the two counts are apart: cores that meet at one would wait for each other
// at every push.
type gate struct {
	// Static: by rank, how many may be in flight for a push to be let in, and as many more
	// as enter at the same moment.
	most   [priorities]int64
	idle   chan struct{} // has room for one; told when nothing is in flight
	closed atomic.Bool

	_       [64]byte
	entered atomic.Int64
	seen    atomic.Int64 // what left was when somebody looked last

	_    [64]byte
	left atomic.Int64
	_    [64]byte
}

// bounds are those of a gate for so many pushes in all.
func bounds(pushes int) (most [priorities]int64) {
	for _, p := range Priorities() {
		most[p.Rank()] = int64(p.Share(pushes))
	}
	return most
}

// enter counts a push in. False means that there are too many for its priority: it has to
// leave.
func (g *gate) enter(p Priority) bool { return g.fits(g.entered.Add(1), p) }

// room tells whether one more push would be let in. It counts nothing.
func (g *gate) room(p Priority) bool { return g.fits(g.entered.Load()+1, p) }

// fits tells whether the n-th push to enter is not one too many.
func (g *gate) fits(n int64, p Priority) bool {
	most := g.most[p.Rank()]
	if n-g.seen.Load() <= most {
		return true
	}
	left := g.left.Load()
	g.seen.Store(left)
	return n-left <= most
}

// leave counts a push out. Once the gate is closed, the last one tells who waits for that.
func (g *gate) leave() {
	if left := g.left.Add(1); g.closed.Load() && g.entered.Load() == left {
		g.tellIdle()
	}
}

func (g *gate) tellIdle() {
	select {
	case g.idle <- struct{}{}:
	default:
	}
}

// inside is the number of pushes in flight.
func (g *gate) inside() int64 {
	left := g.left.Load() // first, so that the number is not negative
	return g.entered.Load() - left
}
