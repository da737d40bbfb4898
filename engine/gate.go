package engine

import "sync/atomic"

// gate counts the pushes in flight. Pushes are started on some cores and finished on
// others, so the two counts are apart: cores that meet at one would wait for each other
// at every push.
type gate struct {
	most   int64 // may be in flight, and as many more as enter at the same moment; static
	closed atomic.Bool

	_       [64]byte
	entered atomic.Int64
	seen    atomic.Int64 // what left was when somebody looked last

	_    [64]byte
	left atomic.Int64
	_    [64]byte
}

// enter counts a push in. False means that there are too many: it has to leave.
func (g *gate) enter() bool {
	n := g.entered.Add(1)
	if n-g.seen.Load() <= g.most {
		return true
	}
	left := g.left.Load()
	g.seen.Store(left)
	return n-left <= g.most
}

// leave counts a push out. Once the gate is closed, the last one is told so.
func (g *gate) leave() (last bool) {
	left := g.left.Add(1)
	return g.closed.Load() && g.entered.Load() == left
}

// inside is the number of pushes in flight.
func (g *gate) inside() int64 {
	left := g.left.Load() // first, so that the number is not negative
	return g.entered.Load() - left
}
