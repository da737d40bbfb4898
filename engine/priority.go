package engine

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
//
// It holds for all bounds that know priorities: places in flight (gate.go), a link's queue,
// and the API's calls under way, open calls, streams and memory.
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
