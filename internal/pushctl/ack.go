package pushctl

import (
	"hash/maphash"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/lxzan/gws"
)

// An acknowledgement is for all that came before it, so one answers many: after ackEvery pushes,
// or ackWithin after the first of them.
const (
	ackWithin = 50 * time.Millisecond
	ackEvery  = 16
)

// acks acknowledges what one connection has brought.
type acks struct {
	owed chan struct{} // static; has one when the first push since the last acknowledgement was handled

	mu sync.Mutex
	// Guarded by mu.
	last uint64 // number that was handled
	open int    // pushes since the last acknowledgement
}

func newAcks() *acks { return &acks{owed: make(chan struct{}, 1)} }

// handled notes that a push was printed. A number of 0 needs no acknowledgement.
func (a *acks) handled(conn *gws.Conn, number uint64) {
	if number == 0 {
		return
	}
	a.mu.Lock()
	a.last = max(a.last, number)
	a.open++
	open := a.open
	a.mu.Unlock()
	switch open {
	case 1:
		select {
		case a.owed <- struct{}{}:
		default: // the timer runs already
		}
	case ackEvery:
		a.flush(conn)
	}
}

// flush acknowledges what was handled. When it cannot be written the reader has noticed, too.
func (a *acks) flush(conn *gws.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.open == 0 {
		return
	}
	a.open = 0
	_ = conn.WriteMessage(gws.OpcodeText, append(strconv.AppendUint([]byte(`{"type":"ack","ack":`), a.last, 10), '}'))
}

// hadMost is how many messages a client remembers: those that may come again after it has connected
// anew, to a Connect-Node that does not know what it has had. Positions come once a second, so that may be what rooms say in a second.
const hadMost = 4096

// had remembers the last messages with an id, so that one that comes again is not shown again.
type had struct {
	seed maphash.Seed
	ring []uint64
	next int
}

// before tells whether the push has come before, and remembers it. Callers choose ids without knowing
// each other's, so an id that comes with another content is another message.
func (h *had) before(f *frame) bool {
	if f.ID == "" {
		return false
	}
	if h.ring == nil {
		h.seed, h.ring = maphash.MakeSeed(), make([]uint64, 0, hadMost)
	}
	content := f.Data.Base64
	if f.Data.Content != nil {
		content = *f.Data.Content
	}
	key := maphash.Comparable(h.seed, [2]string{f.ID, content})
	switch {
	case slices.Contains(h.ring, key):
		return true
	case len(h.ring) < hadMost:
		h.ring = append(h.ring, key)
	default:
		h.ring[h.next] = key
		h.next = (h.next + 1) % hadMost
	}
	return false
}
