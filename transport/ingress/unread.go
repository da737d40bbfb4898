package ingress

import (
	"errors"
	"sync/atomic"
	"time"
)

// errUnread ends a PushStream whose replies are not read.
var errUnread = errors.New("the replies are not read")

// replyStep is how often a replyWatch looks.
const replyStep = maxBodyWait / bodyLooks

// replyWatch bounds for how long a PushStream keeps space whose client does not read its replies:
// a push has its space until its reply is written. When others have waited for space for
// maxBodyWait, in which no reply could be written, the stream is ended. Time in which we did
// not read the connection does not count: what the client allows us to write comes on it.
type replyWatch struct {
	st *stream

	looks atomic.Bool // a look is due, or the stream was ended

	// Owned by the look that is due.
	answered int64         // at the last look
	stuck    time.Duration // by our looks, since a reply was written
}

// begin is called when the stream has taken space. It looks from then on, until there is none.
func (w *replyWatch) begin() {
	if !w.looks.CompareAndSwap(false, true) {
		return
	}
	w.stuck = 0
	time.AfterFunc(replyStep, w.look)
}

func (w *replyWatch) look() {
	st := w.st
	if !st.share.holds() {
		w.looks.Store(false)
		if st.share.holds() { // since then
			w.begin()
		}
		return
	}
	answered := st.answered.Load()
	switch {
	case !st.writing.Load() || answered != w.answered:
		w.stuck = 0
	case !st.conn.Waiting() && st.srv.space.wanted():
		w.stuck += replyStep
	}
	w.answered = answered
	if w.stuck < maxBodyWait {
		time.AfterFunc(replyStep, w.look)
		return
	}
	st.srv.metrics.countRefusal(st.share.priority, errUnread)
	// It ends the write, and with it the stream.
	_ = st.wire.WriteStatus(st.srv.statuses.unread)
}
