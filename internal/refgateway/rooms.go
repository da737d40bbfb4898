package refgateway

import "sync"

// rooms are the rooms of one connection. reports changes them, under its own lock,
// too; everybody may look.
type rooms struct {
	mu  sync.RWMutex
	all map[string]struct{} // Guarded by mu.

	// Rooms that the connection has left and has not been told so. Guarded by the lock
	// of reports.
	leaving map[string]struct{}
}

func (r *rooms) has(room string) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	_, ok := r.all[room]
	return ok
}

func (r *rooms) len() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.all)
}

func (r *rooms) enter(room string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all == nil {
		r.all = make(map[string]struct{})
	}
	r.all[room] = struct{}{}
}

func (r *rooms) exit(room string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.all, room)
}

// exitAll takes the connection out of all rooms, which it returns.
func (r *rooms) exitAll() map[string]struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := r.all
	r.all = nil
	return all
}

// leaveLocked notes that the connection waits for the word that it has left.
func (r *rooms) leaveLocked(room string) {
	if r.leaving == nil {
		r.leaving = make(map[string]struct{})
	}
	r.leaving[room] = struct{}{}
}
