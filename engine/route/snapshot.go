package route

import (
	"hash/maphash"
	"slices"
	"strings"
	"sync/atomic"
)

// Group is the part of a snapshot that one node holds. It is immutable: the same
// pointer means the same users.
type Group struct {
	Node  string
	Users []string // sorted, without duplicates, never empty

	raw  int    // members as the Controller listed them, duplicates included
	hash uint64 // order-independent fingerprint of the same
}

// Has tells whether user is in the group.
func (g *Group) Has(user string) bool {
	_, ok := slices.BinarySearch(g.Users, user)
	return ok
}

// Snapshot is what the Controller said about one room or user. It is immutable
// but for the counters of the fence.
type Snapshot struct {
	Found    bool     // the room exists; the user has a connection
	Groups   []*Group // ordered by node
	Users    int      // members, each counted once; 1 for a user
	Shared   []string // members on more than one node, sorted
	Unplaced []string // members for whom the Controller names no node, sorted

	// The fence, see package doc. prev leads to snapshots of the same key that
	// pushes may still be using.
	table   *table
	key     string
	held    atomic.Int64
	retired atomic.Bool
	prev    atomic.Pointer[Snapshot]
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

// Release ends the hold that an ordered query has on s: its push is finished.
func (s *Snapshot) Release() {
	if s.held.Add(-1) == 0 && s.retired.Load() {
		s.table.unfence(s.key)
	}
}

// tryHold marks s as in use by an ordered push. False means that s has been
// replaced: the order of the two steps here and of those in table.retireLocked
// makes sure that a hold is seen by everybody who checks the fence afterwards.
func (s *Snapshot) tryHold() bool {
	s.held.Add(1)
	if !s.retired.Load() {
		return true
	}
	s.Release()
	return false
}

// fenced tells whether an ordered push still uses a predecessor of s.
func (s *Snapshot) fenced() bool {
	for p := s.prev.Load(); p != nil; p = p.prev.Load() {
		if p.held.Load() > 0 {
			return true
		}
	}
	return false
}

// inUse returns s, or the latest of its predecessors, that an ordered push still
// uses, and unties the others: nobody comes back to a snapshot that is retired.
func (s *Snapshot) inUse() *Snapshot {
	for s != nil && s.held.Load() == 0 {
		s = s.prev.Load()
	}
	for p := s; p != nil; p = p.prev.Load() {
		next := p.prev.Load()
		for next != nil && next.held.Load() == 0 {
			next = next.prev.Load()
		}
		p.prev.Store(next)
	}
	return s
}

// builder gathers the members of a room into groups.
type builder struct {
	seed     maphash.Seed
	byNode   map[string]int
	groups   []*Group
	last     int // members of one node tend to come together
	unplaced []string
}

func newBuilder(seed maphash.Seed) *builder {
	return &builder{seed: seed, byNode: make(map[string]int), last: -1}
}

func (b *builder) add(user, node string) {
	if node == "" {
		b.unplaced = append(b.unplaced, user)
		return
	}
	if b.last < 0 || b.groups[b.last].Node != node {
		i, ok := b.byNode[node]
		if !ok {
			i = len(b.groups)
			b.byNode[node] = i
			b.groups = append(b.groups, &Group{Node: node})
		}
		b.last = i
	}
	g := b.groups[b.last]
	g.Users = append(g.Users, user)
	g.raw++
	g.hash += maphash.String(b.seed, user)
}

// snapshot seals what was added, reusing the groups of old that are unchanged and
// old itself when all of it is.
func (b *builder) snapshot(found bool, old *Snapshot) *Snapshot {
	slices.SortFunc(b.groups, func(x, y *Group) int { return strings.Compare(x.Node, y.Node) })
	slices.Sort(b.unplaced)
	b.unplaced = slices.Compact(b.unplaced)
	same := old != nil && old.Found == found && len(old.Groups) == len(b.groups)
	for i, g := range b.groups {
		if known := old.group(g.Node); known != nil && known.raw == g.raw && known.hash == g.hash {
			b.groups[i] = known
			same = same && old.Groups[i] == known
			continue
		}
		same = false
		slices.Sort(g.Users)
		g.Users = slices.Compact(g.Users)
	}
	b.dropPlaced()
	if same && slices.Equal(old.Unplaced, b.unplaced) {
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
	b.unplaced = slices.DeleteFunc(b.unplaced, func(user string) bool { return b.holders(user) > 0 })
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
			} else if b.holders(user) > 1 {
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
		n += b.holders(user) - 1
	}
	return n
}

func (b *builder) holders(user string) int {
	n := 0
	for _, g := range b.groups {
		if g.Has(user) {
			n++
		}
	}
	return n
}

// group returns the group of a node, nil when there is none or s is nil.
func (s *Snapshot) group(node string) *Group {
	if s == nil {
		return nil
	}
	i, ok := slices.BinarySearchFunc(s.Groups, node, func(g *Group, n string) int { return strings.Compare(g.Node, n) })
	if !ok {
		return nil
	}
	return s.Groups[i]
}

// userSnapshot makes the snapshot of a user held by nodes, reusing old if equal.
func userSnapshot(user string, nodes []string, old *Snapshot) *Snapshot {
	sorted := slices.DeleteFunc(slices.Clone(nodes), func(n string) bool { return n == "" })
	slices.Sort(sorted)
	sorted = slices.Compact(sorted)
	if old != nil && slices.EqualFunc(old.Groups, sorted, func(g *Group, n string) bool { return g.Node == n }) {
		return old
	}
	s := &Snapshot{Found: len(sorted) > 0, Users: 1, Groups: make([]*Group, len(sorted))}
	users := []string{user}
	for i, node := range sorted {
		s.Groups[i] = &Group{Node: node, Users: users}
	}
	if len(sorted) > 1 {
		s.Shared = users
	}
	if len(sorted) == 0 {
		s.Unplaced = users
	}
	return s
}
