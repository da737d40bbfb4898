package load

import (
	"sync"
)

// place is one of the pushes that may be under way on a stream.
type place struct {
	// Written by the sender before the push is under way, read under the table's lock.
	kind Kind
	held bool
	due  moment
	sent moment

	// Owned by the sender; gRPC reads it until the push is answered.
	head    []byte
	request *request

	// Guarded by the table's lock.
	id      uint64 // of the push under way; 0: free
	expired bool   // counted as ended, the answer still to come
}

// table finds the push that a reply belongs to. An id is the place's index and how
// often it was used, so a reply that comes twice or late finds nothing.
type table struct {
	freed chan struct{} // for the sender, one token: a place became free

	mu     sync.Mutex // guards the following
	places []place
	free   []int32
	uses   uint64
}

func newTable(size int) *table {
	t := &table{freed: make(chan struct{}, 1), places: make([]place, size)}
	for i := range t.places {
		t.free = append(t.free, int32(size-1-i))
	}
	return t
}

// tryTake takes a place. The sender has it until it calls launch.
func (t *table) tryTake() (index int, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	last := len(t.free) - 1
	if last < 0 {
		return 0, false
	}
	index = int(t.free[last])
	t.free = t.free[:last]
	return index, true
}

// launch gives the push at a place its id.
func (t *table) launch(index int, kind Kind, due, sent moment, held bool) (id uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.uses++
	p := &t.places[index]
	p.kind, p.due, p.sent, p.held = kind, due, sent, held
	p.expired = false
	p.id = t.uses<<20 | uint64(index) // MaxInFlight is 1<<20
	return p.id
}

// settle frees the place of a push and fills e with what is known of it. false: there
// is no such push under way, or it is counted already.
func (t *table) settle(id uint64, e *ended) bool {
	index := int(id & (1<<20 - 1))
	t.mu.Lock()
	defer t.mu.Unlock()
	if id == 0 || index >= len(t.places) || t.places[index].id != id {
		return false
	}
	p := &t.places[index]
	p.fill(e)
	p.id = 0
	t.free = append(t.free, int32(index))
	select {
	case t.freed <- struct{}{}:
	default:
	}
	return !p.expired
}

func (p *place) fill(e *ended) {
	e.kind, e.held, e.due, e.sent = p.kind, p.held, p.due, p.sent
}

// expire returns the pushes that were sent before a moment and have no answer. Their
// places stay taken: the server is still busy with them.
func (t *table) expire(before moment) []ended {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []ended
	for i := range t.places {
		p := &t.places[i]
		if p.id != 0 && !p.expired && p.sent < before {
			p.expired = true
			all = append(all, ended{})
			p.fill(&all[len(all)-1])
		}
	}
	return all
}

// clear frees all places after the stream has broken and returns the pushes that have
// no answer and will get none. What gRPC may still read is left to it.
func (t *table) clear() []ended {
	all := t.expire(1<<63 - 1)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.free = t.free[:0]
	for i := range t.places {
		t.places[i] = place{}
		t.free = append(t.free, int32(len(t.places)-1-i))
	}
	return all
}
