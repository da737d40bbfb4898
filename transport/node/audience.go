package node

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

var errAudience = errors.New("audience")

// audiences is what one stream has been told about rooms. Owned by the stream's
// reader.
type audiences struct {
	byID       map[uint32]*audience
	members    int // of all together
	maxMembers int
	skip       []int32 // reused
}

// audience is a set of users with a name. at is where each one stands in
// members, whose order means nothing.
type audience struct {
	version uint32
	room    string
	rooms   *Rooms // several in place of room, nil for none
	members []string
	at      map[string]int32
}

// apply brings the audience that d names to the version of d. Any error is a
// broken stream: the two sides no longer mean the same.
func (a *audiences) apply(d *delivery) (*audience, error) {
	if d.id == 0 {
		return nil, fmt.Errorf("%w: id 0", errAudience)
	}
	au := a.byID[d.id]
	if au == nil {
		return a.define(d)
	}
	change := len(d.join) > 0 || len(d.leave) > 0
	switch {
	case d.audRoom != "" || len(d.audRooms) > 0:
		return nil, fmt.Errorf("%w %d: defined twice", errAudience, d.id)
	case d.version == au.version && !change:
		return au, nil
	case d.version == au.version+1 && change:
		au.version++
		return au, a.change(au, d)
	}
	return nil, fmt.Errorf("%w %d: version %d after %d", errAudience, d.id, d.version, au.version)
}

func (a *audiences) define(d *delivery) (*audience, error) {
	switch {
	case d.version != 1:
		return nil, fmt.Errorf("%w %d: not defined, version %d", errAudience, d.id, d.version)
	case len(d.leave) > 0:
		return nil, fmt.Errorf("%w %d: leave in a definition", errAudience, d.id)
	case d.audRoom != "" && len(d.audRooms) > 0:
		return nil, fmt.Errorf("%w %d: room_id and room_ids", errAudience, d.id)
	}
	if err := a.room(len(d.join)); err != nil {
		return nil, err
	}
	au := &audience{
		version: 1,
		room:    strings.Clone(d.audRoom),
		members: make([]string, 0, len(d.join)),
		at:      make(map[string]int32, len(d.join)),
	}
	if len(d.audRooms) > 0 {
		au.rooms = roomsOf(d.audRooms)
	}
	a.byID[d.id] = au
	return au, a.change(au, d)
}

// room checks that there is room for n more members.
func (a *audiences) room(n int) error {
	if a.maxMembers <= 0 {
		return fmt.Errorf("%w: this node keeps none", errAudience)
	}
	if n > a.maxMembers-a.members {
		return fmt.Errorf("%w: more than %d members on this stream", errAudience, a.maxMembers)
	}
	return nil
}

func (a *audiences) change(au *audience, d *delivery) error {
	for _, user := range d.leave {
		i, ok := au.at[user]
		if !ok {
			return fmt.Errorf("%w %d: %q leaves and is no member", errAudience, d.id, user)
		}
		last := len(au.members) - 1
		if moved := au.members[last]; int(i) != last {
			au.members[i] = moved
			au.at[moved] = i
		}
		au.members[last] = ""
		au.members = au.members[:last]
		delete(au.at, user)
		a.members--
	}
	if err := a.room(len(d.join)); err != nil {
		return err
	}
	for _, user := range d.join {
		if _, ok := au.at[user]; ok {
			return fmt.Errorf("%w %d: %q joins and is a member", errAudience, d.id, user)
		}
		user = strings.Clone(user) // It outlives the frame.
		au.at[user] = int32(len(au.members))
		au.members = append(au.members, user)
		a.members++
	}
	return nil
}

// skipped returns where the excepted users stand in members, ascending. The list
// is good until the next call.
func (a *audiences) skipped(au *audience, except []string) ([]int32, error) {
	a.skip = a.skip[:0]
	for _, user := range except {
		i, ok := au.at[user]
		if !ok {
			return nil, fmt.Errorf("%w: %q is excepted and is no member", errAudience, user)
		}
		a.skip = append(a.skip, i)
	}
	slices.Sort(a.skip)
	a.skip = slices.Compact(a.skip)
	return a.skip, nil
}

// forget frees an audience. Unknown ids are none to free.
func (a *audiences) forget(id uint32) {
	if au := a.byID[id]; au != nil {
		a.members -= len(au.members)
		delete(a.byID, id)
	}
}
