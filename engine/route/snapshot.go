package route

import (
	"hash/maphash"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// Group is the part of a snapshot that one node holds. It is immutable: the same
// pointer means the same users.
type Group struct {
	Node  string
	Users []string // sorted, without duplicates, never empty

	hash  uint64 // order-independent fingerprint of the members as the Controller listed them
	twice bool   // it listed somebody twice
	loose int    // how many have come or left since Users was made of one block
}

// Has tells whether user is in the group. In nil nobody is.
func (g *Group) Has(user string) bool {
	_, ok := slices.BinarySearch(g.members(), user)
	return ok
}

func (g *Group) members() []string {
	if g == nil {
		return nil
	}
	return g.Users
}

// Snapshot is what the Controller said about one room or user. What it exports is
// immutable.
type Snapshot struct {
	Found bool // the room exists; the user has a connection

	// When the cache began to answer with it, 0 before.
	published atomic.Int64

	Users    int      // members, each counted once; 1 for a user
	Groups   []*Group // ordered by node
	Shared   []string // members on more than one node, sorted
	Unplaced []string // members for whom the Controller names no node, sorted
	Stale    *Stale   // nil but for an answer that serves in place of a newer one
	// Doubted: the Controller may just have started, and not know all yet. Where it has
	// somebody is true, that it has not is not. Only a refresh is told such an answer.
	Doubted bool
}

// Stale is said of an answer that serves although the Controller could not confirm it.
type Stale struct {
	Known   time.Time // up to when it was true for certain
	Changed bool      // the Controller has announced that it is not true any more

	of *Snapshot // the answer, as it was told
}

// stale is s as an answer that was true until known.
func (s *Snapshot) stale(known time.Time, changed bool) *Snapshot {
	return &Snapshot{
		Found: s.Found, Users: s.Users, Groups: s.Groups, Shared: s.Shared, Unplaced: s.Unplaced,
		Stale: &Stale{Known: known, Changed: changed, of: s},
	}
}

// told is the answer that s serves again, s itself unless it is stale.
func (s *Snapshot) told() *Snapshot {
	if s.Stale != nil {
		return s.Stale.of
	}
	return s
}

// placed is how many members are on a node.
func (s *Snapshot) placed() int { return s.Users - len(s.Unplaced) }

// Published is when the cache began to answer with s, on the clock of
// Directory.Nanos: a query from then on gets s, or a newer one.
func (s *Snapshot) Published() int64 {
	if at := s.published.Load(); at != 0 {
		return at
	}
	return never
}

// Group returns the group of a node, nil when there is none or s is nil.
func (s *Snapshot) Group(node string) *Group {
	if s == nil {
		return nil
	}
	i, ok := slices.BinarySearchFunc(s.Groups, node, func(g *Group, n string) int { return strings.Compare(g.Node, n) })
	if !ok {
		return nil
	}
	return s.Groups[i]
}

// Has tells whether user is a member on any node or without one.
func (s *Snapshot) Has(user string) bool {
	for _, g := range s.Groups {
		if g.Has(user) {
			return true
		}
	}
	_, ok := slices.BinarySearch(s.Unplaced, user)
	return ok
}

// builder gathers the members of a room into groups. It packs their ids into buffers
// that serve for the next look-up again: only what is new in a snapshot is allocated,
// in one piece for the ids of each group and no larger than they are.
type builder struct {
	// Static after newBuilder.
	seed  maphash.Seed
	names *names

	byNode  map[string]int // of parts
	parts   []part
	last    int      // members of one node tend to come together
	members []member // in the order of their coming
	ids     []byte   // theirs, one after another

	// What it comes to.
	groups   []*Group
	unplaced []string
}

// part is what has come for one node, or for none.
type part struct {
	node  string
	count int
	bytes int // of the ids
	hash  uint64

	group *Group // of the old snapshot, if nothing has changed
	block strings.Builder
	users []string // parts of block
}

// member is one member's place in the buffers.
type member struct {
	end  int // of its id
	part int
}

const (
	// builderKeep bounds what a builder keeps for the next look-up: the members of most
	// rooms, and not those of the largest ever seen.
	builderKeep = 16 << 10
	idsKeep     = builderKeep * 32
)

func newBuilder(seed maphash.Seed, names *names) *builder {
	return &builder{seed: seed, names: names, byNode: make(map[string]int), last: -1}
}

// reset makes b ready for another room. False means that it has grown too large to be
// kept.
func (b *builder) reset() bool {
	if cap(b.members) > builderKeep || cap(b.ids) > idsKeep {
		return false
	}
	clear(b.byNode)
	clear(b.parts) // the snapshots have what is in them
	b.parts, b.last = b.parts[:0], -1
	b.members, b.ids = b.members[:0], b.ids[:0]
	b.groups, b.unplaced = nil, nil
	return true
}

func (b *builder) add(user, node []byte) {
	if b.last < 0 || b.parts[b.last].node != string(node) {
		i, ok := b.byNode[string(node)]
		if !ok {
			i = len(b.parts)
			name := b.names.of(node)
			b.byNode[name] = i
			b.parts = append(b.parts, part{node: name})
		}
		b.last = i
	}
	p := &b.parts[b.last]
	p.count++
	p.bytes += len(user)
	p.hash += maphash.Bytes(b.seed, user)
	b.ids = append(b.ids, user...)
	b.members = append(b.members, member{end: len(b.ids), part: b.last})
}

// seal makes groups and unplaced of what was added. Groups of old that are
// unchanged stay.
func (b *builder) seal(old *Snapshot) {
	for i := range b.parts {
		p := &b.parts[i]
		if known := old.Group(p.node); known != nil && known.hash == p.hash {
			p.group = known
			continue
		}
		p.users = make([]string, 0, p.count)
		p.block.Grow(p.bytes)
	}
	at := 0
	for _, m := range b.members {
		if p := &b.parts[m.part]; p.group == nil {
			p.keep(b.ids[at:m.end])
		}
		at = m.end
	}
	b.groups = make([]*Group, 0, len(b.parts))
	for i := range b.parts {
		p := &b.parts[i]
		slices.Sort(p.users)
		switch users := slices.Compact(p.users); {
		case p.node == "":
			b.unplaced = users
		case p.group == nil:
			b.groups = append(b.groups, &Group{Node: p.node, Users: users, hash: p.hash, twice: len(users) < p.count})
		default:
			b.groups = append(b.groups, p.group)
		}
	}
	slices.SortFunc(b.groups, func(x, y *Group) int { return strings.Compare(x.Node, y.Node) })
	b.dropPlaced()
}

// keep appends a member to users. Its id is cut from block, which has room for all.
func (p *part) keep(id []byte) {
	from := p.block.Len()
	p.block.Write(id)
	p.users = append(p.users, p.block.String()[from:])
}

// snapshot seals what was added, reusing the groups of old that are unchanged and
// old itself when all of it is.
func (b *builder) snapshot(found bool, old *Snapshot) *Snapshot {
	b.seal(old)
	if old != nil && old.Found == found && slices.Equal(old.Groups, b.groups) && slices.Equal(old.Unplaced, b.unplaced) {
		return old
	}
	s := &Snapshot{Found: found, Groups: b.groups, Unplaced: b.unplaced, Shared: b.shared()}
	s.Users = len(s.Unplaced)
	for _, g := range s.Groups {
		s.Users += len(g.Users)
	}
	s.Users -= b.surplus(s.Shared)
	return s
}

// dropPlaced removes from unplaced whom some node holds after all.
func (b *builder) dropPlaced() {
	b.unplaced = slices.DeleteFunc(b.unplaced, func(user string) bool { return holders(b.groups, user) > 0 })
}

// shared finds the users that stand in more than one group. Hashes find the
// candidates cheaply, the groups themselves decide.
func (b *builder) shared() []string {
	if len(b.groups) < 2 {
		return nil
	}
	n := 0
	for _, g := range b.groups {
		n += len(g.Users)
	}
	seen := make(map[uint64]struct{}, n)
	var shared []string
	for _, g := range b.groups {
		for _, user := range g.Users {
			h := maphash.String(b.seed, user)
			if _, dup := seen[h]; !dup {
				seen[h] = struct{}{}
			} else if holders(b.groups, user) > 1 {
				shared = append(shared, user)
			}
		}
	}
	slices.Sort(shared)
	return slices.Compact(shared)
}

// surplus is how often the shared users were counted beyond once.
func (b *builder) surplus(shared []string) int {
	n := 0
	for _, user := range shared {
		n += holders(b.groups, user) - 1
	}
	return n
}

// userSnapshot makes the snapshot of a user held by nodes, reusing old if equal.
func (n *names) userSnapshot(user string, nodes []string, old *Snapshot) *Snapshot {
	if len(nodes) != 1 {
		nodes = slices.Compact(slices.Sorted(slices.Values(nodes)))
	}
	if len(nodes) > 0 && nodes[0] == "" {
		nodes = nodes[1:]
	}
	if old != nil && slices.EqualFunc(old.Groups, nodes, func(g *Group, node string) bool { return g.Node == node }) {
		return old
	}
	if len(nodes) == 1 {
		return singleSnapshot(user, n.of([]byte(nodes[0])))
	}
	s := &Snapshot{Found: len(nodes) > 0, Users: 1}
	users := []string{user}
	for _, node := range nodes {
		s.Groups = append(s.Groups, &Group{Node: n.of([]byte(node)), Users: users})
	}
	if s.Found {
		s.Shared = users
	} else {
		s.Unplaced = users
	}
	return s
}

// singleSnapshot is the snapshot of a user on one node. Nearly all are, and there is
// one for each user: all that it consists of is one object.
func singleSnapshot(user, node string) *Snapshot {
	var s struct {
		Snapshot

		group  Group
		groups [1]*Group
		users  [1]string
	}
	s.users[0] = user
	s.group = Group{Node: node, Users: s.users[:]}
	s.groups[0] = &s.group
	s.Found, s.Snapshot.Users, s.Groups = true, 1, s.groups[:]
	return &s.Snapshot
}
