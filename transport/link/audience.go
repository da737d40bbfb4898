package link

import (
	"math"
	"strings"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
)

// audiences are the rooms that a stream's node knows. Owned by the stream's
// writer.
//
// The node applies a frame's deliveries first and its forget list afterwards. So
// the members of what is evicted count until a frame that forgets it has ended, and an
// audience that has been evicted is not named again.
type audiences struct {
	limit   int // members of all audiences together, as the node sees them
	members int // of all, those evicted and not forgotten yet included
	evicted int // members of those
	lastID  uint32
	byRoom  map[string]*audience
	recent  audience     // its older is the one used last, its newer the one not used for longest
	before  *route.Group // what the last change changed
	forget  []forgotten  // evicted: this frame forgets them, or one of the next
	join    []string     // scratch of diff
	leave   []string

	meters *meters
}

// forgotten is what is left of an audience that was evicted.
type forgotten struct {
	id      uint32
	members int
}

// audience is what a node knows of one room. The members are those of the directory;
// there is one for each node of each room, so it holds nothing else that is large.
type audience struct {
	id, version  uint32
	room         string // its own copy: that of a delivery is a part of the request
	group        *route.Group
	newer, older *audience
}

// audienceWeight is as many members as an audience itself takes the memory of, here and
// on the node. It bounds how many there may be of a few members each.
const audienceWeight = 8

func newAudiences(limit int, m *meters) *audiences {
	a := &audiences{limit: limit, byRoom: make(map[string]*audience), meters: m}
	a.recent.newer, a.recent.older = &a.recent, &a.recent
	return a
}

// use makes aud the one used last.
func (a *audiences) use(aud *audience) {
	aud.newer, aud.older = &a.recent, a.recent.older
	aud.newer.older, aud.older.newer = aud, aud
}

// unlink takes aud out of the order of use.
func (aud *audience) unlink() {
	aud.newer.older, aud.older.newer = aud.older, aud.newer
}

// address decides how d is addressed and commits to it: what the answer defines or
// changes counts as known to the node. A delivery that has been addressed must
// therefore be sent, or the stream be given up, unless [audiences.undo] is
// called for it right away. The answer is valid until the next call.
func (a *audiences) address(d *engine.Delivery) address {
	if d.Everybody() {
		return address{everybody: true}
	}
	g := d.Group()
	if g == nil {
		return address{users: d.Users()}
	}
	return a.addressGroup(d.Room(), g, d.Except())
}

// addressGroup is address for the members of a room but except.
func (a *audiences) addressGroup(room string, g *route.Group, except []string) address {
	named := address{users: g.Users, minus: except}
	if len(except) > len(g.Users)/2 {
		return named // the list is the shorter way to say it
	}
	if aud, ok := a.byRoom[room]; ok {
		aud.unlink()
		a.use(aud)
		if aud.group == g {
			return address{audience: audienceRef{id: aud.id, version: aud.version}}
		}
		if ref, ok := a.change(aud, g); ok {
			return address{audience: ref}
		}
		a.evict(aud)
	}
	if !a.room(len(g.Users)) {
		a.meters.audListed.Inc()
		return named
	}
	return address{audience: a.define(room, g)}
}

// undo takes back what address has just promised about a delivery to room: the
// frame does not contain it after all.
func (a *audiences) undo(room string, to *address) {
	ref := &to.audience
	if ref.id == 0 || len(ref.join) == 0 && len(ref.leave) == 0 {
		return
	}
	aud := a.byRoom[room]
	a.members -= len(ref.join) - len(ref.leave)
	if ref.version > 1 {
		aud.version--
		aud.group = a.before
		return
	}
	aud.unlink()
	delete(a.byRoom, room)
}

// define makes room's audience known.
func (a *audiences) define(room string, g *route.Group) audienceRef {
	a.lastID++
	aud := &audience{id: a.lastID, version: 1, room: strings.Clone(room), group: g}
	a.byRoom[aud.room] = aud
	a.use(aud)
	a.members += len(g.Users)
	a.meters.audDefined.Inc()
	return audienceRef{id: aud.id, version: 1, room: aud.room, join: g.Users}
}

// change brings aud to g by a delta. False means that a new definition is
// shorter, or that the members that join find no room.
func (a *audiences) change(aud *audience, g *route.Group) (audienceRef, bool) {
	if !a.diff(aud.group.Users, g.Users, len(g.Users)) {
		return audienceRef{}, false
	}
	if len(a.join) == 0 && len(a.leave) == 0 {
		aud.group = g
		return audienceRef{id: aud.id, version: aud.version}, true
	}
	if a.members+len(a.join)-len(a.leave) > a.limit {
		return audienceRef{}, false
	}
	a.members += len(a.join) - len(a.leave)
	aud.version++
	aud.group, a.before = g, aud.group
	a.meters.audChanged.Inc()
	return audienceRef{id: aud.id, version: aud.version, join: a.join, leave: a.leave}, true
}

// room tells whether n more members fit into this frame. If not, it evicts what
// was not used for longest, so that they fit into the next one.
func (a *audiences) room(n int) bool {
	if n > a.limit || a.lastID == math.MaxUint32 {
		return false
	}
	if len(a.byRoom) > a.limit/audienceWeight {
		a.evict(a.recent.newer)
	}
	if a.members+n <= a.limit {
		return true
	}
	for aud := a.recent.newer; aud != &a.recent && a.members-a.evicted+n > a.limit; aud = a.recent.newer {
		a.evict(aud)
	}
	return false
}

// evict forgets an audience with the frames that come.
func (a *audiences) evict(aud *audience) {
	aud.unlink()
	delete(a.byRoom, aud.room)
	a.evicted += len(aud.group.Users)
	a.forget = append(a.forget, forgotten{aud.id, len(aud.group.Users)})
	a.meters.audForgotten.Inc()
}

// endFrame appends to a frame the ids that it forgets, as far as it has room for them
// below most bytes, and counts their members as gone.
func (a *audiences) endFrame(b []byte, most int) []byte {
	sent := 0
	for _, f := range a.forget {
		if len(b)+sizeUint(uint64(f.id)) > most {
			break
		}
		b = appendUint(b, reqForget, uint64(f.id))
		a.members -= f.members
		a.evicted -= f.members
		sent++
	}
	a.forget = a.forget[:copy(a.forget, a.forget[sent:])]
	// An id keeps the ids of its whole group alive.
	a.join, a.leave = letGo(a.join), letGo(a.leave)
	a.before = nil
	return b
}

// diff fills join and leave with what leads from the sorted old to the sorted
// now. It gives up, false, when that has more names than most.
func (a *audiences) diff(old, now []string, most int) bool {
	a.join, a.leave = a.join[:0], a.leave[:0]
	for len(old) > 0 || len(now) > 0 {
		var order int
		switch {
		case len(old) == 0:
			order = 1
		case len(now) == 0:
			order = -1
		default:
			order = strings.Compare(old[0], now[0])
		}
		switch {
		case order < 0:
			a.leave = append(a.leave, old[0])
			old = old[1:]
		case order > 0:
			a.join = append(a.join, now[0])
			now = now[1:]
		default:
			old, now = old[1:], now[1:]
			continue
		}
		if len(a.join)+len(a.leave) >= most {
			return false
		}
	}
	return true
}

// letGo empties a scratch list with everything it has ever held since the last time. A
// large one is rare, and given up.
func letGo(list []string) []string {
	if cap(list) > 1024 {
		return nil
	}
	clear(list[:cap(list)])
	return list[:0]
}
