package node

import (
	"slices"
	"strings"
)

// Rooms are the several rooms that one message was pushed to. All its users share them. They may be kept: unlike the message they share
// no memory with the frame.
type Rooms struct {
	list  []string
	place map[string]int
}

// NewRooms makes Rooms of a list, which it keeps.
func NewRooms(list []string) *Rooms {
	r := &Rooms{list: list, place: make(map[string]int, len(list))}
	for i, room := range slices.Backward(list) {
		r.place[room] = i
	}
	return r
}

// roomsOf are the rooms of a frame.
func roomsOf(list []string) *Rooms {
	kept := make([]string, len(list))
	for i, room := range list {
		kept[i] = strings.Clone(room)
	}
	return NewRooms(kept)
}

// List is the rooms in the order of the push. It must not be changed.
func (r *Rooms) List() []string { return r.list }

// Place is where a room stands in the list. False: it is none of the rooms. A client is shown the one of its rooms that stands
// first, see membership.Member.FirstOf.
func (r *Rooms) Place(room string) (place int, is bool) {
	place, is = r.place[room]
	return place, is
}
