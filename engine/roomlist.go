package engine

import (
	"slices"
	"strings"
	"sync/atomic"
	"weak"

	"github.com/push-manager/push-manager/engine/route"
)

// RoomList is several rooms to push to. It may be of any number of pushes, at the same time too: what a push finds out about a list
// serves the next one with it. Its methods may be called on nil, which is no rooms.
type RoomList struct {
	// Static.
	ids []string
	one bool // there is one room, perhaps several times

	checked atomic.Bool                               // all ids are within the limits
	union   atomic.Pointer[weak.Pointer[route.Union]] // of the rooms; it is the directory's to keep
	scoped  atomic.Pointer[scopedRooms]
}

// scopedRooms is a list with something before each id.
type scopedRooms struct {
	scope string
	list  *RoomList
}

// NewRoomList makes a list of ids, which stay as they are.
func NewRoomList(ids []string) *RoomList {
	return &RoomList{ids: ids, one: len(ids) > 0 && !slices.ContainsFunc(ids, func(id string) bool { return id != ids[0] })}
}

// IDs are the rooms. The slice is shared: nobody changes it.
func (l *RoomList) IDs() []string {
	if l == nil {
		return nil
	}
	return l.ids
}

// Len is how many ids there are.
func (l *RoomList) Len() int { return len(l.IDs()) }

// Scoped is the list with scope before each id. The latest one is kept.
func (l *RoomList) Scoped(scope string) *RoomList {
	if known := l.scoped.Load(); known != nil && known.scope == scope {
		return known.list
	}
	ids := make([]string, len(l.ids))
	for i, id := range l.ids {
		ids[i] = scope + id
	}
	list := NewRoomList(ids)
	l.scoped.Store(&scopedRooms{strings.Clone(scope), list})
	return list
}

// unionIn finds the union of the rooms in a directory, which is the same in all calls.
func (l *RoomList) unionIn(d *route.Directory) *route.Union {
	if known := l.union.Load(); known != nil {
		if u := known.Value(); u != nil && u.Kept() {
			return u
		}
	}
	u := d.Union(l.ids)
	p := weak.Make(u)
	l.union.Store(&p)
	return u
}
