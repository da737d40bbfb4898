package controller

import (
	"maps"
	"slices"
	"sync"

	"github.com/VictoriaMetrics/metrics"

	pubsub "github.com/push-manager/push-manager/proto"
)

// frameNames is how many names one message of the change stream has at most:
// 256 KiB at the limit of ids.
const frameNames = 1000

// hub passes changes on to the watchers.
type hub struct {
	// Static.
	most      int // names that may be pending for one watcher
	overflows *metrics.Counter
	changes   *metrics.Counter

	mu       sync.RWMutex
	watchers map[*watcher]struct{}
}

// watcher is one change stream. Names that change again before they are sent are
// sent once.
type watcher struct {
	// Holds a token while something is pending. Never closed.
	wake chan struct{}

	mu           sync.Mutex
	rooms, users map[string]struct{}
	all          bool // too much for names
}

// join adds a watcher: every change told from now on reaches it.
func (h *hub) join() *watcher {
	w := &watcher{wake: make(chan struct{}, 1), rooms: map[string]struct{}{}, users: map[string]struct{}{}}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watchers[w] = struct{}{}
	return w
}

func (h *hub) leave(w *watcher) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.watchers, w)
}

func (h *hub) len() int {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return len(h.watchers)
}

// tell notes a change for all watchers. It does not block.
func (h *hub) tell(c Change) {
	h.changes.Inc()
	h.mu.RLock()
	defer h.mu.RUnlock()
	for w := range h.watchers {
		if w.note(c, h.most) {
			h.overflows.Inc()
		}
	}
}

// note adds a change to what is pending, and tells whether that was too much.
func (w *watcher) note(c Change, most int) (overflow bool) {
	w.mu.Lock()
	if !w.all {
		for _, room := range c.Rooms {
			w.rooms[room] = struct{}{}
		}
		for _, user := range c.Users {
			w.users[user] = struct{}{}
		}
		if overflow = len(w.rooms)+len(w.users) > most; overflow {
			w.all = true
			w.rooms, w.users = map[string]struct{}{}, map[string]struct{}{}
		}
	}
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
	return overflow
}

// take empties what is pending into messages.
func (w *watcher) take() []*pubsub.WatchRoutesResponse {
	w.mu.Lock()
	all, rooms, users := w.all, w.rooms, w.users
	w.all, w.rooms, w.users = false, map[string]struct{}{}, map[string]struct{}{}
	w.mu.Unlock()
	if all {
		return []*pubsub.WatchRoutesResponse{{All: true}}
	}
	var frames []*pubsub.WatchRoutesResponse
	for names := range slices.Chunk(slices.Collect(maps.Keys(rooms)), frameNames) {
		frames = append(frames, &pubsub.WatchRoutesResponse{RoomIds: names})
	}
	for names := range slices.Chunk(slices.Collect(maps.Keys(users)), frameNames) {
		if last := len(frames) - 1; last >= 0 && len(frames[last].UserIds) == 0 && len(frames[last].RoomIds)+len(names) <= frameNames {
			frames[last].UserIds = names // the usual case: one join, one message
			continue
		}
		frames = append(frames, &pubsub.WatchRoutesResponse{UserIds: names})
	}
	return frames
}
