//go:build !unix

package load

import "time"

// cpuTime is not known here: a report without it has 0.
func cpuTime() time.Duration { return 0 }
