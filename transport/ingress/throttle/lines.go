package throttle

import "github.com/push-manager/push-manager/engine"

// roomLocked tells whether a connection of priority p may be let in: what its share of the bound
// leaves is for those above, whose connections are not always in line at that moment.
func (t *Throttle) roomLocked(p engine.Priority) bool {
	w := t.windowsAt(t.now())
	return w.calls() < int64(p.Share(int(t.limit))) && w.reads() < t.cores
}

// letIn lets in whoever waits, if there is room now.
func (t *Throttle) letIn() {
	if t.waiting.Load() > 0 {
		t.mu.Lock()
		t.letInLocked()
		t.mu.Unlock()
	}
}

func (t *Throttle) letInLocked() {
	for rank := len(t.lines) - 1; rank >= 0; rank-- {
		for q := &t.lines[rank]; q.head() != nil; {
			if !t.closed.Load() && !t.roomLocked(engine.Priorities()[rank]) {
				return
			}
			t.letInFirstLocked(q)
		}
	}
}

func (t *Throttle) letInFirstLocked(q *line) {
	c := q.pop()
	c.lined = false
	t.waiting.Add(-1)
	c.startLocked() // its reader waits
	c.turn <- struct{}{}
}

// tick lets in those that have waited for too long, and whom there is room for because calls do not
// count any more.
func (t *Throttle) tick() {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	for range 1 + t.waiting.Load()/100 {
		var longest *line
		for i := range t.lines {
			if q := &t.lines[i]; q.head() != nil && (longest == nil || q.first.since < longest.first.since) {
				longest = q
			}
		}
		if longest == nil || now-longest.first.since < maxHold {
			break
		}
		t.letInFirstLocked(longest)
	}
	t.letInLocked()
	if t.waiting.Load() > 0 {
		t.timer.Reset(tick)
	}
}

// line is the connections of one priority that wait, the first of them first. It is guarded by
// the Throttle's lock.
type line struct{ first, last *Conn }

func (q *line) push(c *Conn) {
	c.next = nil
	if q.first == nil {
		q.first, q.last = c, c
	} else {
		q.last.next, q.last = c, c
	}
}

// head is the first that still waits, nil for none.
func (q *line) head() *Conn {
	for q.first != nil && !q.first.lined {
		q.pop() // closed meanwhile
	}
	return q.first
}

func (q *line) pop() *Conn {
	c := q.first
	q.first, c.next = c.next, nil // one that is closed holds no other
	if q.first == nil {
		q.last = nil
	}
	return c
}
