package ingress

import (
	"bytes"
	"hash/maphash"
	"sync/atomic"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/wire"
)

const (
	// listHead is how much of a list decides where it is kept: some ids.
	listHead = 96
	// listWays is how many lists that begin alike are kept, listSets how often there are so many: callers have few lists.
	listWays, listSets = 4, 32
	// listLeast is how many rooms make it worth it, listBytes how long a list may be that is kept: all of them take 16 MiB at most.
	listLeast, listBytes = 4, 64 << 10
)

// roomLists are the lists of rooms of the latest requests, found by their bytes: a list that comes again is neither taken apart
// nor checked again, and the engine knows its union. It is safe for concurrent use.
type roomLists struct {
	seed maphash.Seed
	next atomic.Uint32
	sets [listSets][listWays]atomic.Pointer[keptList]
}

// keptList is a list and how it stands in a request, all entries one after another.
type keptList struct {
	wire string
	list *engine.RoomList
}

func (l *roomLists) setOf(b []byte) *[listWays]atomic.Pointer[keptList] {
	return &l.sets[maphash.Bytes(l.seed, b[:min(len(b), listHead)])%listSets]
}

// find is the list with which b begins, and its length there. It is nil where none is known.
func (l *roomLists) find(b []byte) (*engine.RoomList, int) {
	if len(b) < listHead {
		return nil, 0 // it takes no time
	}
	set := l.setOf(b)
	for i := range set {
		k := set[i].Load()
		if k == nil || len(b) < len(k.wire) || string(b[:len(k.wire)]) != k.wire {
			continue
		}
		if len(b) > len(k.wire) && b[len(k.wire)] == roomsTag {
			continue // it goes on
		}
		return k.list, len(k.wire)
	}
	return nil, 0
}

// roomsTag is what each entry of a list of rooms begins with: field 1, bytes.
const roomsTag = 1<<3 | 2

// add makes the list of n rooms that b consists of, and keeps it if it is worth it.
func (l *roomLists) add(b []byte, n int) *engine.RoomList {
	if n < listLeast || len(b) < listHead || len(b) > listBytes {
		return engine.NewRoomList(collect(b, 0, 1, n))
	}
	b = bytes.Clone(b) // it is kept longer than the request
	list := engine.NewRoomList(collect(b, 0, 1, n))
	l.setOf(b)[l.next.Add(1)%listWays].Store(&keptList{wire.String(b), list})
	return list
}
