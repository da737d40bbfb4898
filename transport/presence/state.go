package presence

import (
	"cmp"
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
	// to is what makes next, which is of the same kind, out of the state. fits is false where that is too much more than most changes:
	// then nobody has been told of any.
	to(next state, of target, most int) (changes []*pubsub.PresenceChange, fits bool)
}

// roomState is where the members of a room are.
type roomState struct{ *route.Snapshot }

func (r roomState) size() int { return r.Users }

func (r roomState) entries(of target, yield func(*pubsub.PresenceEntry) bool) {
	shared := make([][]string, len(r.Shared)) // their nodes
	if len(shared) > 0 {
		for _, g := range r.Groups {
			for _, user := range g.Users {
				if i, is := slices.BinarySearch(r.Shared, user); is {
					shared[i] = append(shared[i], g.Node)
				}
			}
		}
	}
	for _, g := range r.Groups {
		own := []string{g.Node}
		for _, user := range g.Users {
			nodes := own
			if i, is := slices.BinarySearch(r.Shared, user); is {
				if nodes = shared[i]; nodes[0] != g.Node {
					continue // it has been named
				}
			}
			if !yield(&pubsub.PresenceEntry{UserId: user, RoomId: of.id, NodeIds: nodes}) {
				return
			}
		}
	}
	for _, user := range r.Unplaced {
		if !yield(&pubsub.PresenceEntry{UserId: user, RoomId: of.id}) {
			return
		}
	}
}

// nodesOf are the nodes of a member, ordered. It looks into each group.
func (r roomState) nodesOf(user string) []string {
	var nodes []string
	for _, g := range r.Groups {
		if g.Has(user) {
			nodes = append(nodes, g.Node)
		}
	}
	return nodes
}

// step is that a member has come to a node or left it, "" for none.
type step struct {
	user, node string
	came       bool
}

// to looks at the groups that are different. It looks for a member in other groups only if that is on more than one node.
func (r roomState) to(next state, of target, most int) (changes []*pubsub.PresenceChange, fits bool) {
	now, ok := next.(roomState)
	if !ok || now.Snapshot == r.Snapshot {
		return nil, true
	}
	var steps []step
	compare := func(node string, was, is []string) bool {
		return differ(was, is, func(user string, came bool) bool {
			steps = append(steps, step{user, node, came})
			return len(steps) <= 2*most // whoever moves to another node takes two
		})
	}
	fits = compare("", r.Unplaced, now.Unplaced)
	for _, g := range r.Groups {
		switch other := now.Group(g.Node); {
		case other == nil:
			fits = fits && compare(g.Node, g.Users, nil)
		case other != g: // a group that is the same has the same users
			fits = fits && compare(g.Node, g.Users, other.Users)
		}
	}
	for _, g := range now.Groups {
		if r.Group(g.Node) == nil {
			fits = fits && compare(g.Node, nil, g.Users)
		}
	}
	if !fits {
		return nil, false
	}
	slices.SortFunc(steps, func(a, b step) int { return cmp.Or(strings.Compare(a.user, b.user), strings.Compare(a.node, b.node)) })
	for len(steps) > 0 {
		user := steps[0].user
		var was, is bool
		var before, after []string
		for ; len(steps) > 0 && steps[0].user == user; steps = steps[1:] {
			at, nodes := &was, &before
			if steps[0].came {
				at, nodes = &is, &after
			}
			if *at = true; steps[0].node != "" {
				*nodes = append(*nodes, steps[0].node)
			}
		}
		_, shared := slices.BinarySearch(r.Shared, user)
		if _, isShared := slices.BinarySearch(now.Shared, user); shared || isShared { // also where nothing has changed
			was, is, before, after = r.Has(user), now.Has(user), r.nodesOf(user), now.nodesOf(user)
		}
		kind := pubsub.PresenceChangeKind_MOVED
		switch {
		case was && is && slices.Equal(before, after):
			continue
		case !was:
			kind = pubsub.PresenceChangeKind_JOINED
		case !is:
			kind = pubsub.PresenceChangeKind_LEFT
		}
		// The ids of a group share one block of memory, which a change must not keep.
		changes = append(changes, &pubsub.PresenceChange{Kind: kind, Entry: &pubsub.PresenceEntry{UserId: strings.Clone(user), RoomId: of.id, NodeIds: after}})
	}
	return changes, true
}

// differ calls yield with what stands in one of two ordered lists alone, until it returns false: inB says in which. It tells whether it
// has come to the end.
func differ(a, b []string, yield func(one string, inB bool) bool) bool {
	for len(a) > 0 || len(b) > 0 {
		order := -1
		switch {
		case len(a) == 0:
			order = 1
		case len(b) > 0:
			order = strings.Compare(a[0], b[0])
		}
		switch {
		case order == 0:
			a, b = a[1:], b[1:]
		case order < 0:
			if !yield(a[0], false) {
				return false
			}
			a = a[1:]
		default:
			if !yield(b[0], true) {
				return false
			}
			b = b[1:]
		}
	}
	return true
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
func (u userState) to(next state, of target, _ int) (changes []*pubsub.PresenceChange, fits bool) {
	now, ok := next.(userState)
	if !ok {
		return nil, true
	}
	change := func(kind pubsub.PresenceChangeKind, room string, nodes []string) {
		changes = append(changes, &pubsub.PresenceChange{Kind: kind, Entry: &pubsub.PresenceEntry{UserId: of.id, RoomId: room, NodeIds: nodes}})
	}
	switch {
	case len(u.nodes) == 0 && len(now.nodes) > 0:
		change(pubsub.PresenceChangeKind_CONNECTED, "", now.nodes)
	case len(now.nodes) > 0 && !slices.Equal(u.nodes, now.nodes):
		change(pubsub.PresenceChangeKind_MOVED, "", now.nodes)
	}
	differ(u.rooms, now.rooms, func(room string, joined bool) bool {
		kind := pubsub.PresenceChangeKind_LEFT
		if joined {
			kind = pubsub.PresenceChangeKind_JOINED
		}
		change(kind, room, nil)
		return true
	})
	if len(u.nodes) > 0 && len(now.nodes) == 0 {
		change(pubsub.PresenceChangeKind_DISCONNECTED, "", nil)
	}
	return changes, true
}
