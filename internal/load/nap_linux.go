package load

import (
	"syscall"
	"time"
)

// nap sleeps for d on the thread. The runtime's timers wake up to a millisecond late
// when the program is idle; the kernel's are a tenth of that.
func nap(d time.Duration) {
	ts := syscall.NsecToTimespec(int64(d))
	_ = syscall.Nanosleep(&ts, nil) // woken early: whoever naps looks at the clock
}
