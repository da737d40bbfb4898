package ingress

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

const (
	// shareFree is what a PushStream may have under way without asking: a dozen of the usual
	// pushes. It is a part of streamBytes.
	shareFree = 16 << 10
	// shareStep is what is asked for at least, so that not every message asks.
	shareStep = 64 << 10
	// shareLook is how often a PushStream that has asked looks whether it has too much.
	shareLook = 250 * time.Millisecond
)

// share is what a PushStream has of the space: for its messages that are not answered, and as
// much once more in what it keeps of them for use again.
type share struct {
	space    *space
	holder   *throttle.Conn
	priority engine.Priority
	began    func()       // is called when something is reserved; it may lock nothing
	answered atomic.Int64 // of taken

	mu    sync.Mutex
	taken int64 // bytes reckoned for all messages so far
	peak  int64 // the most that was under way since the last look
	held  int64 // reserved
}

// tryTake takes bytes for a message, if they can be had at once.
func (sh *share) tryTake(bytes int64) bool {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	under := sh.taken + bytes - sh.answered.Load()
	if more := under - shareFree - sh.held; more > 0 {
		got := sh.space.try(sh.holder, sh.priority, max(more, shareStep))
		if got == 0 {
			return false
		}
		sh.held += got
		sh.began()
	}
	sh.taken += bytes
	sh.peak = max(sh.peak, under)
	return true
}

// wait takes bytes for a message when there are some, and nothing else is under way. It has
// nothing while it waits: those who have and want more would wait for each other.
func (sh *share) wait(ctx context.Context, bytes int64) error {
	sh.giveBack()
	got, err := sh.space.reserve(ctx, sh.holder, sh.priority, bytes, 0)
	if err != nil {
		return err
	}
	sh.mu.Lock()
	defer sh.mu.Unlock()
	sh.held += got
	sh.began()
	sh.taken += bytes
	sh.peak = max(sh.peak, bytes)
	return nil
}

// untake is for a message that turned out to need fewer bytes than were taken for it.
func (sh *share) untake(bytes int64) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	sh.taken -= bytes
}

// trim gives back what was not needed since the last look, and tells whether that was much, and
// whether there is more to look at.
func (sh *share) trim() (much, more bool) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	under := sh.taken - sh.answered.Load()
	excess := sh.held - max(under-shareFree, sh.peak-shareFree, 0)
	sh.peak = under
	if excess < min(shareStep, sh.held) { // what was asked for last may not be used up
		return false, sh.held > 0
	}
	sh.held -= excess
	sh.space.release(sh.holder, excess)
	return true, sh.held > 0
}

// holds tells whether anything is reserved.
func (sh *share) holds() bool {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return sh.held > 0
}

// giveBack gives everything back. It may be called again.
func (sh *share) giveBack() {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	sh.space.release(sh.holder, sh.held)
	sh.held = 0
}
