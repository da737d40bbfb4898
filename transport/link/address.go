package link

import (
	"math"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/wire"
)

// Field numbers of proto/connect_node.proto.
const (
	reqFirstSeq, reqDeliveries, reqForget, reqHeartbeat, reqDrain = 2, 3, 4, 5, 6
	reqCompressed, reqRawBytes                                    = 7, 8

	delContent, delRoom, delUsers, delAudience, delEverybody, delExcept, delTraceparent, delScope = 1, 2, 3, 4, 5, 6, 7, 8
	delRooms                                                                                      = 27

	audID, audVersion, audRoom, audJoin, audLeave, audRooms = 1, 2, 3, 4, 5, 6
)

// address says for whom a delivery is: exactly one of users, minus, audience,
// everybody and scope.
type address struct {
	users     []string // these
	minus     []string // of users, not these; sorted like users
	audience  audienceRef
	everybody bool
	scope     string // everybody whose id begins so
}

// audienceRef names an audience, with its definition or change if there is one.
type audienceRef struct {
	id, version uint32
	room        string   // with the definition, or
	rooms       []string // several
	join, leave []string
}

// plain tells that the audience is only named, as most are.
func (a *audienceRef) plain() bool {
	return a.room == "" && a.rooms == nil && len(a.join)+len(a.leave) == 0
}

func (a *audienceRef) size() int {
	n := wire.SizeUint(audID, uint64(a.id)) + wire.SizeUint(audVersion, uint64(a.version))
	if a.plain() {
		return n
	}
	return n + wire.SizeString(audRoom, a.room) + wire.SizeStrings(audJoin, a.join) + wire.SizeStrings(audLeave, a.leave) +
		wire.SizeStrings(audRooms, a.rooms)
}

func (a *audienceRef) append(b []byte) []byte {
	b = wire.AppendUint(b, audID, uint64(a.id))
	b = wire.AppendUint(b, audVersion, uint64(a.version))
	if a.plain() {
		return b
	}
	b = wire.AppendString(b, audRoom, a.room)
	b = wire.AppendStrings(b, audJoin, a.join)
	b = wire.AppendStrings(b, audLeave, a.leave)
	return wire.AppendStrings(b, audRooms, a.rooms)
}

// sizeDelivery is the length of the Delivery message for d.
func sizeDelivery(d *engine.Delivery, to *address) int {
	n := wire.SizeLen(delContent, len(d.Payload())) + wire.SizeString(delTraceparent, d.Traceparent())
	switch {
	case to.everybody:
		return n + wire.SizeUint(delEverybody, 1)
	case to.scope != "":
		return n + wire.SizeString(delScope, to.scope)
	case to.audience.id != 0:
		return n + wire.SizeLen(delAudience, to.audience.size()) + wire.SizeStrings(delExcept, d.Except())
	default:
		return n + wire.SizeString(delRoom, d.Room()) + wire.SizeStrings(delUsers, to.users) - wire.SizeStrings(delUsers, to.minus) +
			wire.SizeStrings(delRooms, d.Rooms())
	}
}

// appendDelivery encodes d as a field of the frame. size is sizeDelivery's.
func appendDelivery(b []byte, d *engine.Delivery, to *address, size int) []byte {
	b = wire.AppendLen(b, reqDeliveries, size)
	b = append(wire.AppendLen(b, delContent, len(d.Payload())), d.Payload()...)
	switch {
	case to.everybody:
		b = wire.AppendUint(b, delEverybody, 1)
	case to.scope != "":
		b = wire.AppendString(b, delScope, to.scope)
	case to.audience.id != 0:
		b = wire.AppendLen(b, delAudience, to.audience.size())
		b = to.audience.append(b)
		b = wire.AppendStrings(b, delExcept, d.Except())
	default:
		b = wire.AppendString(b, delRoom, d.Room())
		b = appendWithout(b, delUsers, to.users, to.minus)
		b = wire.AppendStrings(b, delRooms, d.Rooms())
	}
	return wire.AppendString(b, delTraceparent, d.Traceparent())
}

// appendWithout encodes users but for those in minus, a sorted part of them.
func appendWithout(b []byte, field protowire.Number, users, minus []string) []byte {
	for _, u := range users {
		if len(minus) > 0 && minus[0] == u {
			minus = minus[1:]
			continue
		}
		b = wire.AppendBytes(b, field, u)
	}
	return b
}

// audiences are the rooms that a stream's node knows. Owned by the stream's
// writer.
//
// The node applies a frame's deliveries first and its forget list afterwards. So
// the members of what is evicted count until a frame that forgets it has ended, and an
// audience that has been evicted is not named again.
type audiences struct {
	limit   int // members of all audiences together, as the node sees them
	members int // of all, those evicted and not forgotten yet included, and rooms of those of several
	evicted int // members of those
	lastID  uint32
	byRoom  map[string]*audience // by Delivery.RoomKey
	recent  audience             // its older is the one used last, its newer the one not used for longest
	before  *route.Group         // what the last change changed
	forget  []forgotten          // evicted: this frame forgets them, or one of the next
	join    []string             // scratch of diff
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
	room         string // Delivery.RoomKey; its own copy: that of a delivery is a part of the request
	rooms        int32  // how many it is of, 0 for one
	group        *route.Group
	newer, older *audience
}

// weight is as many members as it counts for. The node keeps each of several rooms as it keeps a member: the id, and its place in a list
// and in a map.
func (aud *audience) weight() int { return len(aud.group.Users) + int(aud.rooms) }

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
	g := d.Group()
	switch {
	case d.Everybody():
		return address{everybody: d.Scope() == "", scope: d.Scope()}
	case g == nil:
		return address{users: d.Users()}
	case d.Once():
		return address{users: g.Users, minus: d.Except()} // it would take the place of audiences that are used again
	}
	return a.addressGroup(d.RoomKey(), g, d.Except(), d.Rooms()...)
}

// addressGroup is address for the members of a room, or of several, but except. Its definition names the room, or the several.
func (a *audiences) addressGroup(room string, g *route.Group, except []string, rooms ...string) address {
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
	if !a.makeRoom(len(g.Users) + len(rooms)) {
		a.meters.audListed.Inc()
		return named
	}
	a.lastID++
	aud := &audience{id: a.lastID, version: 1, room: strings.Clone(room), rooms: int32(len(rooms)), group: g}
	a.byRoom[aud.room] = aud
	a.use(aud)
	a.members += aud.weight()
	a.meters.audDefined.Inc()
	ref := audienceRef{id: aud.id, version: 1, room: aud.room, join: g.Users}
	if len(rooms) > 0 {
		ref.room, ref.rooms = "", rooms
	}
	return address{audience: ref}
}

// undo takes back what address has just promised about a delivery to room: the
// frame does not contain it after all.
func (a *audiences) undo(room string, to *address) {
	ref := &to.audience
	if ref.id == 0 || len(ref.join) == 0 && len(ref.leave) == 0 {
		return
	}
	aud := a.byRoom[room]
	a.members -= len(ref.join) - len(ref.leave) + len(ref.rooms)
	if ref.version > 1 {
		aud.version--
		aud.group = a.before
		return
	}
	aud.unlink()
	delete(a.byRoom, room)
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

// makeRoom tells whether n more members fit into this frame. If not, it evicts what
// was not used for longest, so that they fit into the next one.
func (a *audiences) makeRoom(n int) bool {
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
	a.evicted += aud.weight()
	a.forget = append(a.forget, forgotten{aud.id, aud.weight()})
	a.meters.audForgotten.Inc()
}

// endFrame appends to a frame the ids that it forgets, as far as it has room for them
// below most bytes, and counts their members as gone.
func (a *audiences) endFrame(b []byte, most int) []byte {
	sent := 0
	for _, f := range a.forget {
		if len(b)+wire.SizeUint(reqForget, uint64(f.id)) > most {
			break
		}
		b = wire.AppendUint(b, reqForget, uint64(f.id))
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
