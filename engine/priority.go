package engine

import "math/rand/v2"

// Priority says which pushes are given up first when there is too much to do: the
// lowest. It does not change the order of what is sent.
type Priority int8

// The priorities, the lowest first. The zero value is Normal.
const (
	Low Priority = iota - 1
	Normal
	High
	Critical
)

const priorities = 4

// Priorities lists all priorities, the lowest first.
func Priorities() [priorities]Priority { return [...]Priority{Low, Normal, High, Critical} }

// ParsePriority reads the name of a priority, which is in lower case.
func ParsePriority(name string) (p Priority, ok bool) {
	switch name {
	case "low":
		return Low, true
	case "normal":
		return Normal, true
	case "high":
		return High, true
	case "critical":
		return Critical, true
	default:
		return Normal, false
	}
}

// String is the name that ParsePriority reads.
func (p Priority) String() string {
	switch p {
	case Low:
		return "low"
	case High:
		return "high"
	case Critical:
		return "critical"
	default:
		return "normal"
	}
}

// Rank is the place of p in Priorities, from 0.
func (p Priority) Rank() int { return int(p - Low) }

// Share is the part of a bound, rounded up, that pushes of priority p may fill: half of it
// for low, 7/8 for normal, 15/16 for high, all for critical. What is left is for those
// above. A bound of a few is whole for all but low.
func (p Priority) Share(bound int) int {
	const parts = 16
	n := parts
	switch p {
	case Low:
		n = parts / 2
	case Normal:
		n = parts - 2
	case High:
		n = parts - 1
	default:
	}
	return (bound*n + parts - 1) / parts
}

// Shedding says which pushes are refused although there is room for them. The zero value
// refuses none.
type Shedding struct {
	// Memory is how many priorities, from the lowest, are refused because memory runs out.
	Memory int
	// Busy is how many are refused because goroutines wait too long for a core, in parts of
	// BusyParts: that many and a half are all of some priorities and every second push of
	// the next.
	Busy int
}

// BusyParts is how finely Shedding.Busy divides a priority.
const BusyParts = 64

// refuses tells whether a push of priority p is refused, and why.
func (s Shedding) refuses(p Priority) error {
	if p.Rank() < s.Memory {
		return ErrMemory
	}
	switch left := s.Busy - p.Rank()*BusyParts; {
	case left <= 0:
		return nil
	case left >= BusyParts || rand.IntN(BusyParts) < left:
		return ErrBusy
	default:
		return nil
	}
}
