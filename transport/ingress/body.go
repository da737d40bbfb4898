package ingress

import (
	"errors"
	"sync"
	"time"

	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

// errSlow refuses a request that has not come in while it had space.
var errSlow = errors.New("the request comes too slowly")

// maxBodyWait is for how long a message may take that has space while others wait for some:
// half of what those may wait, so that who waits is let in and not refused.
const maxBodyWait = maxSpaceWait / 2

// bodyLooks is how often a bodyWatch looks within maxBodyWait.
const bodyLooks = 4

// bodyWatch bounds for how long a message is read that has space: whoever announces one and
// dawdles would keep the space from others, at no cost. Time in which we did not read the
// connection, or did not run, is not held against it: what counts is how often we looked.
type bodyWatch struct {
	// Static.
	space  *space
	conn   *throttle.Conn
	most   time.Duration
	giveUp func() // is called once, and must end the read

	mu      sync.Mutex
	timer   *time.Timer
	reading bool
	late    bool          // giveUp has been called
	took    time.Duration // by our looks
}

func (b *bodyWatch) step() time.Duration { return min(b.most, maxBodyWait) / bodyLooks }

// begin is called when a message has space. It owes an end.
func (b *bodyWatch) begin() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reading, b.took = true, 0
	if b.timer == nil {
		b.timer = time.AfterFunc(b.step(), b.look)
	} else {
		b.timer.Reset(b.step())
	}
}

// end tells whether the message has come in time. After it giveUp is not called any more, nor
// under way.
func (b *bodyWatch) end() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reading = false
	b.timer.Stop()
	return !b.late
}

func (b *bodyWatch) look() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.reading {
		return
	}
	if !b.conn.Waiting() {
		b.took += b.step()
	}
	if b.took < b.most && (b.took < maxBodyWait || !b.space.wanted()) {
		b.timer.Reset(b.step())
		return
	}
	b.reading, b.late = false, true
	b.giveUp()
}
