package pressure

import (
	"time"

	"github.com/push-manager/push-manager/engine"
)

// Watermarks of memory, of the limit. What has risen above one counts until it is well
// below it: at the mark itself it would come and go.
const (
	lowMark  = 0.85 // low priority is refused
	highMark = 0.95 // all but critical is
	markSlip = 0.03
)

// How shedding for cores follows the readings, in parts of all priorities but critical.
const (
	// patience is how many bad readings in a row it takes: one collection, or a neighbour
	// on the machine, is no overload.
	patience = 3
	// worse is added at each bad reading: in a second, from nothing to all of a priority and more.
	worse = engine.BusyParts / 8
	// better is taken off at each good one, slowly: whoever was refused comes back.
	better = engine.BusyParts / 16
)

// reading is the state of the process.
type reading struct {
	memory   float64       // in use, of the limit; 0 without one
	wait     time.Duration // median wait for a core since the last reading
	inFlight int64
}

// control turns readings into what is to be refused.
type control struct {
	wait time.Duration
	few  int64

	bad    int // readings in a row
	busy   int
	memory int
}

func (c *control) next(now reading) engine.Shedding {
	c.followMemory(now.memory)
	c.followWait(now)
	return engine.Shedding{Memory: c.memory, Busy: c.busy}
}

func (c *control) followMemory(used float64) {
	most := engine.Critical.Rank() // all but critical
	switch {
	case used >= highMark || c.memory == most && used >= highMark-markSlip:
		c.memory = most
	case used >= lowMark || c.memory > 0 && used >= lowMark-markSlip:
		c.memory = engine.Normal.Rank() // low
	default:
		c.memory = 0
	}
}

func (c *control) followWait(now reading) {
	if c.wait == 0 || now.wait <= c.wait || now.inFlight < c.few {
		c.bad = 0
		c.busy = max(c.busy-better, 0)
		return
	}
	if c.bad++; c.bad >= patience {
		c.busy = min(c.busy+worse, engine.Critical.Rank()*engine.BusyParts)
	}
}
