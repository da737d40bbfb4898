package node

import (
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/push-manager/push-manager/transport/discovery"
)

// Disconnector is what Sessions also are that close connections when a Push-Manager asks for it. The node then says so, and keeps whom it
// is told to refuse: a gateway asks Server.Refused for each connection, and Server.RefusedRoom for each join, after it has added the
// connection to its own lists, or the room to the connection. So whoever comes while others are closed is found by one of the two.
//
// Without it Push-Manager tells its callers that this node cannot disconnect.
type Disconnector interface {
	// Disconnect closes connections, and returns how many. From its return on nothing more is put into their queues. What is there comes to
	// the client in front of the close frame, if the client takes it soon. It does not wait for clients, and may be called
	// from several goroutines.
	Disconnect(d *Disconnect) (connections int)
}

// Disconnect says which connections are to be closed: all of User, those of User with a Device, or those that are in Room. Ids have
// their tenant before them, as in a [Message].
type Disconnect struct {
	User, Device, Room string

	// Code and Reason are for the close frame: 4000 to 4999, and at most 120 bytes.
	Code   uint16
	Reason string
}

// Refusal is what somebody who is refused is told.
type Refusal struct {
	Code   uint16
	Reason string
}

const (
	// maxRefusals bounds those that are known, of about 500 bytes each. Push-Managers write 100,000 at most.
	maxRefusals = 100_000
	// tombstoneAge is how long it is remembered that a refusal was lifted: what was written before it may come later, over a stream.
	tombstoneAge = time.Minute
	// refuseAfter is how long connections of those whose refusal came from etcd live on. The manager that has written it tells the
	// node, too, and counts them.
	refuseAfter = time.Second
	// refusalsSweep is how often what is over is looked for.
	refusalsSweep = 10 * time.Second
)

// refusals are who is refused, as managers and etcd have told. Of what is said of one key the highest revision counts.
type refusals struct {
	// Static.
	close func(d *Disconnect) // closes connections

	size atomic.Int64 // of byKey: most nodes refuse nobody, and need no lock to know

	mu sync.RWMutex
	// Guarded by mu.
	byKey    map[string]refusal
	revision int64 // the highest that etcd has told
	swept    time.Time

	late []lateRefusal // owned by the goroutine of the watch
}

// refusal is one, or the memory of one that was lifted.
type refusal struct {
	discovery.KnownRefusal

	until  time.Time
	lifted bool
	closed bool // connections that were there have been closed
}

// lateRefusal is one whose connections are still to be closed.
type lateRefusal struct {
	key      string
	revision int64
	at       time.Time
}

var _ discovery.RefusalSink = (*refusals)(nil)

// refuse notes what a manager has asked for; the caller closes connections.
func (t *refusals) refuse(r discovery.KnownRefusal, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.putLocked(r.Key(), r, true, now)
}

// putLocked notes a refusal unless something newer is known. It tells whether connections are to be closed that nobody has closed.
func (t *refusals) putLocked(key string, r discovery.KnownRefusal, closed bool, now time.Time) (open bool) {
	t.sweepLocked(now)
	before, known := t.byKey[key]
	switch {
	case known && before.Revision > r.Revision:
		return false
	case known && before.Revision == r.Revision: // the end that was counted from the first news of it holds
		before.closed = before.closed || closed
		t.byKey[key] = before
		return !before.closed && !before.lifted
	case !known && len(t.byKey) >= maxRefusals:
		// Whoever may lift can lift what there is not, as often as they like: nobody may get in because of that.
		if maps.DeleteFunc(t.byKey, func(_ string, r refusal) bool { return r.lifted }); len(t.byKey) >= maxRefusals {
			return false
		}
	}
	t.byKey[key] = refusal{KnownRefusal: r, until: now.Add(time.Duration(r.Seconds) * time.Second), closed: closed}
	t.size.Store(int64(len(t.byKey)))
	return !closed
}

// sweepLocked forgets what is over, now and then.
func (t *refusals) sweepLocked(now time.Time) {
	if now.Sub(t.swept) > refusalsSweep {
		t.swept = now
		maps.DeleteFunc(t.byKey, func(_ string, r refusal) bool { return now.After(r.until) })
		t.size.Store(int64(len(t.byKey)))
	}
}

// lift ends a refusal that was written at or before a revision.
func (t *refusals) lift(key string, revision int64, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sweepLocked(now)
	if before, known := t.byKey[key]; known && before.Revision > revision || !known && len(t.byKey) >= maxRefusals {
		return
	}
	t.byKey[key] = refusal{KnownRefusal: discovery.KnownRefusal{Revision: revision}, until: now.Add(tombstoneAge), lifted: true}
	t.size.Store(int64(len(t.byKey)))
}

// look tells whether a key is refused.
func (t *refusals) look(r *discovery.Refusal) (Refusal, bool) {
	key := r.Key()
	t.mu.RLock()
	defer t.mu.RUnlock()
	known, ok := t.byKey[key]
	if !ok || known.lifted || time.Now().After(known.until) {
		return Refusal{}, false
	}
	return Refusal{known.Code, known.Reason}, true
}

// List implements discovery.RefusalSink.
func (t *refusals) List(all map[string]discovery.KnownRefusal, revision int64) {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	// An etcd that has gone back was restored: what it says is all that counts. Else what a manager has told since stays.
	wentBack := revision < t.revision
	maps.DeleteFunc(t.byKey, func(key string, r refusal) bool {
		_, listed := all[key]
		return wentBack || !listed && !r.lifted && r.Revision <= revision
	})
	t.revision = revision
	t.size.Store(int64(len(t.byKey)))
	for key, r := range all {
		if t.putLocked(key, r, false, now) {
			t.late = append(t.late, lateRefusal{key, r.Revision, now})
		}
	}
}

// Put implements discovery.RefusalSink.
func (t *refusals) Put(key string, r discovery.KnownRefusal) {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.revision = max(t.revision, r.Revision)
	if t.putLocked(key, r, false, now) {
		t.late = append(t.late, lateRefusal{key, r.Revision, now})
	}
}

// Delete implements discovery.RefusalSink: a refusal was lifted, or is over.
func (t *refusals) Delete(key string, revision int64) {
	t.mu.Lock()
	t.revision = max(t.revision, revision)
	t.mu.Unlock()
	t.lift(key, revision, time.Now())
}

// Tick implements discovery.RefusalSink: it closes the connections of those whose refusal no manager has told in time.
func (t *refusals) Tick() {
	now := time.Now()
	for len(t.late) > 0 && now.Sub(t.late[0].at) >= refuseAfter {
		l := t.late[0]
		t.late = t.late[1:]
		t.mu.Lock()
		r, known := t.byKey[l.key]
		due := known && r.Revision == l.revision && !r.lifted && !r.closed && now.Before(r.until)
		if due {
			r.closed = true
			t.byKey[l.key] = r
		}
		t.mu.Unlock()
		if due {
			t.close(&Disconnect{User: r.User, Device: r.Device, Room: r.Room, Code: r.Code, Reason: r.Reason})
		}
	}
	if len(t.late) == 0 {
		t.late = nil
	}
}

// Refused tells whether a connection of a user must be closed, and with which words: because of the user, or of the
// device, which is "" for a connection that has named none. The user's id has the tenant before it. It is cheap enough for each connection, and is
// asked after the connection was added to those that Disconnect closes.
func (s *Server) Refused(user, device string) (Refusal, bool) {
	if s.refusals.size.Load() == 0 {
		return Refusal{}, false
	}
	if r, refused := s.refusals.look(&discovery.Refusal{User: user}); refused || device == "" {
		return r, refused
	}
	return s.refusals.look(&discovery.Refusal{User: user, Device: device})
}

// RefusedRoom tells whether nobody may join a room, whose id has the tenant before it.
func (s *Server) RefusedRoom(room string) (Refusal, bool) {
	if s.refusals.size.Load() == 0 {
		return Refusal{}, false
	}
	return s.refusals.look(&discovery.Refusal{Room: room})
}

// disconnect has the gateway close connections. Its panic is not ours: it has failed then, and may have closed some.
func (s *Server) disconnect(d *Disconnect) (connections int, failed bool) {
	defer func() {
		if v := recover(); v != nil {
			s.panicked("Disconnect", v)
			failed = true
		}
		s.count.disconnected.Add(connections)
	}()
	return s.disconnector.Disconnect(d), false
}

// disconnects takes what a frame says of connections to close. Each is answered; one that cannot be is a broken stream.
func (st *stream) disconnects(r *request) error {
	s := st.server
	if s.disconnector == nil {
		return nil
	}
	for _, b := range r.disconnects {
		var d disconnect
		if err := d.parse(b); err != nil {
			return err
		}
		if st.acks.toDisconnect() > maxDisconnected {
			return errTooManyUnacked
		}
		now := time.Now()
		switch {
		case d.allowAgain:
			s.refusals.lift(d.Key(), d.revision, now)
			st.acks.disconnected(d.token, 0, false)
			continue
		case d.Seconds > 0:
			s.refusals.refuse(discovery.KnownRefusal{Refusal: d.Refusal, Revision: d.revision}, now)
		}
		answer := func() {
			n, failed := s.disconnect(&Disconnect{User: d.User, Device: d.Device, Room: d.Room, Code: d.Code, Reason: d.Reason})
			st.acks.disconnected(d.token, clampUint32(n), failed)
		}
		if d.Room == "" {
			answer()
			continue
		}
		st.closing.Go(func() { // a gateway may look at all its connections, and pushes go on meanwhile
			s.closesRoom.Lock() // one after the other
			defer s.closesRoom.Unlock()
			answer()
		})
	}
	return nil
}
