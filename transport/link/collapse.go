package link

import (
	"slices"

	"github.com/push-manager/push-manager/engine"
)

// collapseKey names deliveries of which only the latest is worth anything while it waits. Its strings are
// those of a delivery in the queue.
type collapseKey struct{ user, room, key string }

// collapseKeyOf is the key of a delivery to one user, or to a room. It is zero for one that others do not
// replace: without a key, out of the store (it may be older than what waits), to several users or to everybody. Nor do they
// where the message stands in the log of its room: it would be read there all the same, behind the newer one.
func collapseKeyOf(d *engine.Delivery, o *engine.Options) collapseKey {
	if o.CollapseKey == "" {
		return collapseKey{}
	}
	at, _ := d.Log()
	switch {
	case o.Replay != nil || d.Everybody() || at != engine.Place{}:
	case d.Group() != nil:
		return collapseKey{room: d.RoomKey(), key: o.CollapseKey}
	case len(d.Users()) == 1:
		return collapseKey{user: d.Users()[0], room: d.RoomKey(), key: o.CollapseKey}
	}
	return collapseKey{}
}

// latestOf is the entry that d, with this key, replaces: the latest with the key, if it is for the same users and connections. It is nil
// if there is none.
func (q *queue) latestOf(key collapseKey, d *engine.Delivery) *entry {
	at, ok := q.latest[key]
	if !ok {
		return nil
	}
	older := q.slot(int(at - q.base))
	if older.d.Group() != d.Group() || !slices.Equal(older.d.Except(), d.Except()) || !slices.EqualFunc(older.d.Options().Filter, d.Options().Filter, sameMatch) {
		return nil // somebody would get neither
	}
	return older
}

func sameMatch(a, b engine.Match) bool {
	return a.Key == b.Key && a.Not == b.Not && slices.Equal(a.Values, b.Values)
}

// replace puts e, with this key, in the place of older, and with its age: that is how long the link has not written what
// waits there. It returns what was there.
func (q *queue) replace(older *entry, e entry, key collapseKey) *engine.Delivery {
	d, at := older.d, q.latest[key]
	delete(q.latest, key) // its strings are of d
	q.latest[key] = at
	q.load.bytes += e.size - older.size
	e.at = older.at
	*older = e
	q.due = min(q.due, e.deadline)
	return d
}

// pushLatest is push for an entry with a key.
func (q *queue) pushLatest(e entry, key collapseKey) {
	if q.latest == nil {
		q.latest = make(map[collapseKey]uint64)
	}
	q.push(e)
	delete(q.latest, key) // for the same reason
	q.latest[key] = q.base + uint64(q.len-1)
}

// leaves forgets the place of the first entry, which leaves the queue.
func (q *queue) leaves(d *engine.Delivery) {
	o := d.Options()
	if o == nil {
		return
	}
	if key := collapseKeyOf(d, o); q.latest[key] == q.base {
		delete(q.latest, key)
	}
	if len(q.latest) == 0 {
		q.latest = nil
	}
}

// returns notes the place of the first entry, which is back and has this key. It may have been overtaken meanwhile.
func (q *queue) returns(key collapseKey) {
	if _, ok := q.latest[key]; ok || key == (collapseKey{}) {
		return
	}
	if q.latest == nil {
		q.latest = make(map[collapseKey]uint64)
	}
	q.latest[key] = q.base
}

// index works out all places anew.
func (q *queue) index() {
	q.latest = nil
	for i := range q.len {
		d := q.slot(i).d
		o := d.Options()
		if o == nil {
			continue
		}
		if key := collapseKeyOf(d, o); key != (collapseKey{}) {
			if q.latest == nil {
				q.latest = make(map[collapseKey]uint64)
			}
			delete(q.latest, key) // its strings are of the one before
			q.latest[key] = q.base + uint64(i)
		}
	}
}
