package pressure

import "github.com/push-manager/push-manager/engine"

// Watermarks of memory, of the limit. What has risen above one counts until it is well
// below it: at the mark itself it would come and go.
const (
	lowMark  = 0.85 // low priority is refused
	highMark = 0.95 // all but critical is
	markSlip = 0.03
)

// shed is how many priorities are to be refused with so much memory in use, of the limit,
// after so many were.
func shed(used float64, last int) int {
	most := engine.Critical.Rank() // all but critical
	switch {
	case used >= highMark || last == most && used >= highMark-markSlip:
		return most
	case used >= lowMark || last > 0 && used >= lowMark-markSlip:
		return engine.Normal.Rank() // low
	default:
		return 0
	}
}
