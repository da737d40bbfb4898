package ingress

import "time"

// The memory of a PushStream goes in a circle: the reader takes calls and messages, the
// writer gives them back once they are answered and nothing can refer to them.

// message is one message of a PushStream: one push, or a batch of them.
type message struct {
	in inbound
	// Set by the reader, owned by the writer once the first push has finished.
	bytes int64    // of the stream's share
	left  int      // pushes without an answer
	inUse bool     // something may still refer to a push that is answered
	next  *message // in stream.freeMessages
}

// newMessage takes one that is free, or makes one.
func (st *stream) newMessage() *message {
	st.calls, st.messages = st.laidByCalls.Swap(nil), st.laidByMessages.Swap(nil)
	if st.messages == nil {
		st.spareBytes.Store(0)
		st.messages = st.freeMessages.Swap(nil)
	}
	m := st.messages
	if m == nil {
		return new(message)
	}
	st.messages, m.next = m.next, nil
	return m
}

// layBy puts down what the reader has of free calls and messages: while it waits for the next
// message the writer may throw it away.
func (st *stream) layBy() {
	st.laidByCalls.Store(st.calls)
	st.laidByMessages.Store(st.messages)
	st.calls, st.messages = nil, nil
}

// trim gives back what the stream has of the space and did not need lately, and throws away
// what it keeps of pushes if that was much. It is for the writer, and tells whether there
// is more to look at.
func (st *stream) trim() bool {
	much, more := st.share.trim()
	if much {
		st.laidByCalls.Store(nil)
		st.laidByMessages.Store(nil)
		st.free.Store(nil)
		st.freeMessages.Store(nil)
		st.spareCalls.Store(0)
		st.spareBytes.Store(0)
		st.order.Trim()
	}
	return more
}

// newCall takes one that is free, or makes one.
func (st *stream) newCall(m *message, now time.Time) *call {
	if st.calls == nil {
		st.spareCalls.Store(0)
		st.calls = st.free.Swap(nil)
	}
	c := st.calls
	if c == nil {
		c = new(call)
	} else {
		st.calls = c.next
		// Here and not by the writer: most of it is still in this core's cache.
		c.push.Reset()
		c.streamed = streamed{}
	}
	c.stream, c.message, c.push.Arrived = st, m, now
	return c
}

// chain is a list of calls that are free.
type chain struct {
	first, last *call
	n           int64
}

func (f *chain) add(c *call) {
	c.next = f.first
	f.first = c
	if f.last == nil {
		f.last = c
	}
	f.n++
}

// What is kept for use again, and as much once more in the reader's hands: a burst must
// not leave its memory to a stream for life.
const (
	spareCallsMost = 1024    // of 0.8 KiB
	spareBytesMost = 1 << 20 // of messages
)

// release ends the writer's use of an answered call, and puts it into free if it can be
// used again.
func (st *stream) release(c *call, free *chain) {
	m := c.message
	if c.push.Reusable() {
		if c.api == toUser {
			c.push.Forget()
			c.push.Options = nil
		} else {
			c.push.Reset() // the members of rooms are too much to hold on to, too
		}
		c.message = nil
		free.add(c)
	} else {
		m.inUse = true
	}
	if m.left--; m.left > 0 {
		return
	}
	st.answeredBytes.Add(int64(len(m.in.wire)))
	st.share.answered.Add(m.bytes)
	if m.inUse || st.spareBytes.Load()+int64(cap(m.in.wire)) > spareBytesMost {
		return
	}
	st.spareBytes.Add(int64(cap(m.in.wire)))
	for {
		m.next = st.freeMessages.Load()
		if st.freeMessages.CompareAndSwap(m.next, m) {
			return
		}
	}
}

// giveBack hands free calls to the reader.
func (st *stream) giveBack(free *chain) {
	if free.first == nil || st.spareCalls.Load()+free.n > spareCallsMost {
		return
	}
	st.spareCalls.Add(free.n)
	for {
		free.last.next = st.free.Load()
		if st.free.CompareAndSwap(free.last.next, free.first) {
			return
		}
	}
}
