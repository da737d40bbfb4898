// Package reload has files read again and again while a program runs.
//
// The goroutine of a [Loop] ends with Close.
package reload

import (
	"sync"
	"time"
)

// retryAfter is the pause after files that have just become bad: the rest of them is likely to be on its way.
const retryAfter = time.Second

// Loop calls a function.
type Loop struct {
	now  chan struct{} // one token: read now
	stop chan struct{}
	end  sync.WaitGroup
}

// Start calls read each interval until Close, one call at a time. read tells whether something is wrong that was not
// before; then it is called again within a second.
func Start(interval time.Duration, read func() (worse bool)) *Loop {
	l := &Loop{now: make(chan struct{}, 1), stop: make(chan struct{})}
	l.end.Go(func() { l.run(interval, read) })
	return l
}

// Now has read called soon. It does not wait.
func (l *Loop) Now() {
	select {
	case l.now <- struct{}{}:
	default:
	}
}

// Close returns when read is not called any more. It is called once.
func (l *Loop) Close() {
	close(l.stop)
	l.end.Wait()
}

func (l *Loop) run(interval time.Duration, read func() (worse bool)) {
	timer := time.NewTimer(interval)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-l.now:
		case <-l.stop:
			return
		}
		pause := interval
		if read() {
			pause = min(pause, retryAfter)
		}
		timer.Reset(pause)
	}
}
