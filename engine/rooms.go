package engine

import "slices"

// A push to several rooms is one to their union (route.Union), which has an id, a shard, and audiences of its own.
// With that it is like a push to a room. Its rooms have other shards, and other links to the same node, so nothing
// keeps its order against pushes to one of these rooms. The Order does, for the pushes of a PushStream:
//
//   - A push to several rooms waits until all pushes before it have left the Order that are to one of its rooms, or
//     to other several rooms with one of them: each of their deliveries is settled.
//   - So does a push to a room behind one to several rooms with that room.
//   - A push to the same several rooms, in the same order, does not wait: it has the same link, as pushes to one room have.
//     If the one before it waits, it stands behind that in the line of their union, and is routed right after it.
//
// A push waits only for pushes before it, so there are no circles, and until its deadline at most. Where a stream has
// pushes to rooms and to several rooms of them mixed, each of these costs a way to the nodes and back.

// roomSet is what pushes to the same several rooms are for.
type roomSet struct {
	rooms []uint64 // keys of the rooms, sorted
	under int      // pushes under way
}

func (p *Push) roomKeys() []uint64 {
	return p.union.Keys(func(room string) uint64 { return roomKey(p.engine.shards.Hash(room)) })
}

// enterSetLocked notes that a push to several rooms is under way.
func (o *Order) enterSetLocked(p *Push) {
	key := p.mark[0].key
	set := o.sets[key]
	if set == nil {
		if o.sets == nil {
			o.sets = make(map[uint64]*roomSet)
		}
		set = &roomSet{rooms: p.roomKeys()}
		o.sets[key] = set
	}
	set.under++
	o.lined.Add(1)
}

func (o *Order) leaveSetLocked(p *Push) {
	key := p.mark[0].key
	if set := o.sets[key]; set.under > 1 {
		set.under--
	} else {
		delete(o.sets, key)
	}
	o.lined.Add(-1)
}

// crossingLocked lists the pushes under way that p, which is to be started now, has to wait for: to rooms that p is for,
// and not by p's own link.
func (o *Order) crossingLocked(p *Push) (crossing []*Push) {
	if p.Kind != ToRooms && len(o.sets) == 0 {
		return nil
	}
	o.indexLocked(p)
	own := p.mark[0].key
	all := func(key uint64) {
		for m := o.marks[key]; m != nil; m = m.before {
			if m.push != p {
				crossing = append(crossing, m.push)
			}
		}
	}
	var rooms []uint64
	if p.Kind == ToRooms {
		rooms = p.roomKeys()
		if len(o.marks) < len(rooms) {
			for key := range o.marks {
				if _, is := slices.BinarySearch(rooms, key); is {
					all(key)
				}
			}
		} else {
			for _, key := range rooms {
				all(key)
			}
		}
	} else {
		rooms = []uint64{own}
	}
	for key, set := range o.sets {
		if key != own && meet(rooms, set.rooms) {
			all(key)
		}
	}
	return crossing
}

// meet tells whether two sorted lists have something in common.
func meet(a, b []uint64) bool {
	if len(a) > len(b) {
		a, b = b, a
	}
	if len(a) == 1 {
		_, is := slices.BinarySearch(b, a[0])
		return is
	}
	for len(a) > 0 && len(b) > 0 {
		switch {
		case a[0] < b[0]:
			a = a[1:]
		case b[0] < a[0]:
			b = b[1:]
		default:
			return true
		}
	}
	return false
}

// turn is the place of a push in the line of its room, or of its several rooms.
type turn struct {
	push  *Push
	waits int // for so many things; it may be routed once it is the first, and there are none
}

// lineKey is whose line a push to a room or to several stands in.
func (p *Push) lineKey() string {
	if p.union != nil {
		return p.union.ID
	}
	return p.Room
}

// lineUp puts p, which waits for so many things of its own, behind those of its line that have not been routed, and
// has it wait for the pushes that cross it. False means that there is nothing to wait for. A line is of one
// shard, whose backlog routes those in it one after the other.
func (o *Order) lineUp(p *Push, waits int) bool {
	key := p.lineKey()
	o.mu.Lock()
	must := waits > 0 || len(o.lines[key]) > 0 || len(o.crossingLocked(p)) > 0
	o.mu.Unlock()
	if !must {
		return false
	}
	p.await(1)
	o.mu.Lock()
	crossing := o.crossingLocked(p) // some may have left meanwhile
	for _, before := range crossing {
		seq := before.seq.Load() &^ inIndex
		if o.crossed == nil {
			o.crossed = make(map[uint64][]*Push)
		}
		o.crossed[seq] = append(o.crossed[seq], p)
	}
	waits += len(crossing)
	if o.lines == nil {
		o.lines = make(map[string][]turn)
	}
	o.lines[key] = append(o.lines[key], turn{push: p, waits: waits})
	o.lined.Add(1)
	o.mu.Unlock()
	if waits == 0 {
		p.engine.offload(p.shard, func() { o.turn(p, 0) })
	}
	return true
}

// turn notes that p waits for so many things less, and routes those in line who may. It runs in the backlog of their
// shard.
func (o *Order) turn(p *Push, less int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	key := p.lineKey()
	for i := range o.lines[key] {
		if t := &o.lines[key][i]; t.push == p {
			t.waits -= less
			break
		}
	}
	for len(o.lines[key]) > 0 && o.lines[key][0].waits == 0 {
		first := o.lines[key][0].push
		o.mu.Unlock()
		first.routeLate()
		o.mu.Lock()
		o.lines[key][0] = turn{}
		if o.lines[key] = o.lines[key][1:]; len(o.lines[key]) == 0 {
			delete(o.lines, key)
		}
		o.lined.Add(-1)
	}
}
