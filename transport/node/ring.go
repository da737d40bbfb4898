package node

// ringMost is how many ids a connection remembers.
const ringMost = 64

// ring remembers the last ids that a connection has been given, and what their contents were. It grows
// as needed: 8, 16, 32, 64. The zero value remembers none.
type ring struct {
	ids     []uint64 // 0: forgotten
	payload []uint32
	next    int // where the next one goes
}

// find returns where key stands, or -1.
func (r *ring) find(key uint64) int {
	for i, id := range r.ids {
		if id == key {
			return i
		}
	}
	return -1
}

// add remembers a key that is not there, in the place of the oldest if need be.
func (r *ring) add(key uint64, payload uint32) {
	switch n := len(r.ids); {
	case n < cap(r.ids):
		r.ids, r.payload = append(r.ids, key), append(r.payload, payload)
		return
	case n < ringMost:
		grown := max(2*n, 8)
		r.ids = append(append(make([]uint64, 0, grown), r.ids...), key)
		r.payload = append(append(make([]uint32, 0, grown), r.payload...), payload)
		return
	}
	r.ids[r.next], r.payload[r.next] = key, payload
	r.next = (r.next + 1) % ringMost
}

// forget forgets a key.
func (r *ring) forget(key uint64) {
	if i := r.find(key); i >= 0 {
		r.ids[i] = 0
	}
}
