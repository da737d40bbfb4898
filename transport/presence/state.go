package presence

import (
	"slices"
	"strings"

	"github.com/push-manager/push-manager/engine/route"
	pubsub "github.com/push-manager/push-manager/proto"
)

// state is what is known of a room or a user. It is immutable.
type state interface {
	// entries calls yield with all there is, until it returns false.
	entries(of target, yield func(*pubsub.PresenceEntry) bool)
	size() int
	// to is what makes next, which is of the same kind, out of the state.
	to(next state, of target) []*pubsub.PresenceChange
}

// roomState is where the members of a room are.
type roomState struct{ *route.Snapshot }

func (r roomState) size() int { return r.Users }

func (r roomState) entries(of target, yield func(*pubsub.PresenceEntry) bool) {
	for _, g := range r.Groups {
		for _, user := range g.Users {
			nodes := []string{g.Node}
			if _, shared := slices.BinarySearch(r.Shared, user); shared {
				if nodes = r.nodesOf(user); nodes[0] != g.Node {
					continue // it has been named
				}
			}
			if !yield(&pubsub.PresenceEntry{UserId: user, RoomId: of.id, NodeIds: nodes}) {
				return
			}
		}
	}
	for _, user := range r.Unplaced {
		if len(r.nodesOf(user)) == 0 && !yield(&pubsub.PresenceEntry{UserId: user, RoomId: of.id}) {
			return
		}
	}
}

// nodesOf are the nodes of a member, ordered.
func (r roomState) nodesOf(user string) []string {
	var nodes []string
	for _, g := range r.Groups {
		if g.Has(user) {
			nodes = append(nodes, g.Node)
		}
	}
	return nodes
}

func (r roomState) to(next state, of target) []*pubsub.PresenceChange {
	now, ok := next.(roomState)
	if !ok || now.Snapshot == r.Snapshot {
		return nil
	}
	var users []string // whose place may be another one
	differ(r.Unplaced, now.Unplaced, func(user string) { users = append(users, user) })
	for _, g := range r.Groups {
		if other := now.Group(g.Node); other == nil {
			users = append(users, g.Users...)
		} else if other != g { // a group that is the same has the same users
			differ(g.Users, other.Users, func(user string) { users = append(users, user) })
		}
	}
	for _, g := range now.Groups {
		if r.Group(g.Node) == nil {
			users = append(users, g.Users...)
		}
	}
	slices.Sort(users)
	var changes []*pubsub.PresenceChange
	for _, user := range slices.Compact(users) {
		was, is := r.Has(user), now.Has(user)
		before, after := r.nodesOf(user), now.nodesOf(user)
		kind := pubsub.PresenceChangeKind_MOVED
		switch {
		case !was && !is, was && is && slices.Equal(before, after):
			continue
		case !was:
			kind = pubsub.PresenceChangeKind_JOINED
		case !is:
			kind = pubsub.PresenceChangeKind_LEFT
		}
		// The ids of a group share one block of memory, which a change must not keep.
		changes = append(changes, &pubsub.PresenceChange{Kind: kind, Entry: &pubsub.PresenceEntry{UserId: strings.Clone(user), RoomId: of.id, NodeIds: after}})
	}
	return changes
}

// differ calls yield with what stands in one of two ordered lists alone.
func differ(a, b []string, yield func(string)) {
	for len(a) > 0 && len(b) > 0 {
		switch strings.Compare(a[0], b[0]) {
		case -1:
			yield(a[0])
			a = a[1:]
		case 1:
			yield(b[0])
			b = b[1:]
		default:
			a, b = a[1:], b[1:]
		}
	}
	for _, one := range append(slices.Clip(a), b...) {
		yield(one)
	}
}

// userState is where a user is. Both lists are ordered, and each has everything once.
type userState struct{ nodes, rooms []string }

func (u userState) size() int { return len(u.nodes) + len(u.rooms) }

func (u userState) entries(of target, yield func(*pubsub.PresenceEntry) bool) {
	if len(u.nodes) == 0 || !yield(&pubsub.PresenceEntry{UserId: of.id, NodeIds: u.nodes}) {
		return
	}
	for _, room := range u.rooms {
		if !yield(&pubsub.PresenceEntry{UserId: of.id, RoomId: room}) {
			return
		}
	}
}

// to has the first connection before what is joined with it, and the last one behind what is left.
func (u userState) to(next state, of target) []*pubsub.PresenceChange {
	now, ok := next.(userState)
	if !ok {
		return nil
	}
	var changes []*pubsub.PresenceChange
	change := func(kind pubsub.PresenceChangeKind, room string, nodes []string) {
		changes = append(changes, &pubsub.PresenceChange{Kind: kind, Entry: &pubsub.PresenceEntry{UserId: of.id, RoomId: room, NodeIds: nodes}})
	}
	switch {
	case len(u.nodes) == 0 && len(now.nodes) > 0:
		change(pubsub.PresenceChangeKind_CONNECTED, "", now.nodes)
	case len(now.nodes) > 0 && !slices.Equal(u.nodes, now.nodes):
		change(pubsub.PresenceChangeKind_MOVED, "", now.nodes)
	}
	differ(u.rooms, now.rooms, func(room string) {
		if _, is := slices.BinarySearch(now.rooms, room); is {
			change(pubsub.PresenceChangeKind_JOINED, room, nil)
		} else {
			change(pubsub.PresenceChangeKind_LEFT, room, nil)
		}
	})
	if len(u.nodes) > 0 && len(now.nodes) == 0 {
		change(pubsub.PresenceChangeKind_DISCONNECTED, "", nil)
	}
	return changes
}
