package refcontroller

import (
	"cmp"
	"context"
	"crypto/rand"
	"maps"
	"math"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/push-manager/push-manager/internal/slots"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	// listMax is how many members a Join's reply lists: with more, a room that
	// fills would cost the square of its size.
	listMax = 1000
	// dropChunk is how many memberships of a dead node end in one hold of the lock.
	dropChunk = 1000
	// nodeMemory is how long the numbers of a node without memberships are kept: no
	// report is under way for longer.
	nodeMemory = 10 * time.Minute
	// sweepEvery is how often those nodes are looked for, at most.
	sweepEvery = time.Minute
	// groupSlots is how many slots of a node are made at once: a node with few
	// memberships has 1 KiB for each, and none of the 40 KiB of all slots.
	groupSlots = 32
)

// Memory is a Store in this process: what it knows ends with it.
type Memory struct {
	// Static after Notify.
	id       string
	maxUsers int
	tell     func(Change) // called while mu is held, in the hold that makes the change

	mu sync.RWMutex
	// Guarded by mu. No room or user is without a membership.
	rooms    map[string]*room
	users    map[string]*user
	nodes    map[string]*node
	swept    time.Time
	clock    uint64 // of the latest join
	revision uint64 // of the latest change
	count    int    // memberships
}

// membership is a user in a room on a node. It stands in three lists.
type membership struct {
	room *room
	user *user
	node *node
	hash uint64
	// Where it stands in room.members and in the members of its slot.
	inRoom, inSlot int
	clock          uint64 // when it was joined last
	// The number of the report that confirmed it last. It means nothing in another
	// era of the node.
	seq uint64
	era uint64
}

type room struct {
	id               string
	created, updated int64
	users            int // each once
	members          []*membership
	infos            []*pubsub.UserInfo // infos[i] of members[i]; each is immutable
}

type user struct {
	id      string
	members []*membership // the latest join last
}

// node is a Connect-Node. It is kept while it has memberships or reports.
type node struct {
	id     string
	count  int                                         // memberships
	groups [slots.Count / groupSlots]*[groupSlots]slot // nil where nothing was joined

	// The process that reports, empty for one that does not number its reports. A
	// new process begins a new era.
	boot  string
	era   uint64
	floor uint64    // every report below is old
	spoke time.Time // when it last reported with numbers
}

// slot is the memberships of a node that have their hashes in common.
type slot struct {
	members []*membership
	digest  uint64
	// The highest number of a report that has ended something here. A join below it
	// may be older than that: one number instead of one for each that has left.
	floor uint64
}

// slot is one to be written to.
func (n *node) slot(i int) *slot {
	group := &n.groups[i/groupSlots]
	if *group == nil {
		*group = new([groupSlots]slot)
	}
	return &(*group)[i%groupSlots]
}

// look is a slot to be read. Nobody changes what it holds.
func (n *node) look(i int) slot {
	if group := n.groups[i/groupSlots]; group != nil {
		return group[i%groupSlots]
	}
	return slot{}
}

// raise makes all reports for a slot old whose numbers are not above seq. A slot that has had
// nothing gets no memory for that: all reports of the node are old then, and who still wants
// one reports again.
func (n *node) raise(i int, seq uint64) {
	floor := &n.floor
	if n.groups[i/groupSlots] != nil {
		floor = &n.slot(i).floor
	}
	*floor = max(*floor, seq)
}

// fold gives back the memory of the slots of a node without memberships.
func (n *node) fold() {
	for i, group := range n.groups {
		if group != nil {
			for _, s := range group {
				n.floor = max(n.floor, s.floor)
			}
			n.groups[i] = nil
		}
	}
}

// NewMemory makes an empty store. maxUsers limits the users of each room, 0 for
// no limit.
func NewMemory(maxUsers int) *Memory {
	return &Memory{
		id:       rand.Text(),
		maxUsers: maxUsers,
		tell:     func(Change) {},
		rooms:    map[string]*room{},
		users:    map[string]*user{},
		nodes:    map[string]*node{},
	}
}

// Notify implements Store.
func (s *Memory) Notify(tell func(Change)) { s.tell = tell }

// ID implements Store.
func (s *Memory) ID() string { return s.id }

// Join implements Store.
func (s *Memory) Join(_ context.Context, j Join) (Joined, error) {
	now, hash := time.Now(), slots.Hash(j.User, j.Room)
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.reporterLocked(j.Reporter, now)
	if err != nil {
		return Joined{}, err
	}
	var changed bool
	r, u := s.rooms[j.Room], s.users[j.User]
	m, here := u.find(j.Room, j.Node)
	switch {
	case m == nil && j.Boot != "" && j.Seq <= max(n.floor, n.look(slots.Of(hash)).floor):
		return Joined{}, ErrOld
	case m != nil && j.Boot != "" && m.era == n.era && j.Seq < m.seq:
		return Joined{Room: s.joinedLocked(m.room, j)}, nil
	case m == nil && !here && r != nil && s.maxUsers > 0 && r.users >= s.maxUsers:
		return Joined{Full: true, Room: s.infoLocked(r, false)}, nil
	case m == nil:
		m = s.addLocked(j, hash, now.Unix(), here)
		changed = true
	default:
		changed = s.renewLocked(m, j)
	}
	if j.Boot != "" {
		m.era, m.seq = n.era, j.Seq
	}
	if changed {
		m.room.updated = now.Unix()
		s.tellLocked([]Move{{Room: j.Room, User: j.User, Node: j.Node}})
	}
	return Joined{Room: s.joinedLocked(m.room, j)}, nil
}

func (s *Memory) joinedLocked(r *room, j Join) *pubsub.RoomInfo {
	return s.infoLocked(r, !j.WithoutUsers && len(r.members) <= listMax)
}

// tellLocked numbers a change and tells it.
func (s *Memory) tellLocked(moves []Move) {
	if len(moves) > 0 {
		s.revision++
		s.tell(Change{Moves: moves, Revision: s.revision})
	}
}

// reporterLocked is the node that reports, nil when it is not known and does not
// number its reports.
func (s *Memory) reporterLocked(by Reporter, now time.Time) (*node, error) {
	n := s.nodes[by.Node]
	if by.Boot == "" {
		return n, nil
	}
	if n == nil {
		n = s.newNodeLocked(by.Node, now)
	}
	if n.boot == "" {
		n.begin(by.Boot)
	}
	if n.boot != by.Boot {
		return nil, ErrOtherBoot
	}
	n.spoke = now
	return n, nil
}

func (s *Memory) newNodeLocked(id string, now time.Time) *node {
	if now.Sub(s.swept) >= sweepEvery {
		s.swept = now
		maps.DeleteFunc(s.nodes, func(_ string, n *node) bool { return n.count == 0 && now.Sub(n.spoke) > nodeMemory })
	}
	n := &node{id: id}
	s.nodes[id] = n
	return n
}

// begin starts a new era of the node. What was reported in the one before is
// still there, and its numbers mean nothing any more.
func (n *node) begin(boot string) {
	n.boot, n.floor = boot, 0
	n.era++
	for _, group := range n.groups {
		if group != nil {
			for i := range group {
				group[i].floor = 0
			}
		}
	}
}

// find is the membership of a room on a node, nil when there is none. here tells
// whether there is one of that room on any node.
func (u *user) find(room, node string) (m *membership, here bool) {
	if u == nil {
		return nil, false
	}
	for _, m := range u.members {
		if m.room.id != room {
			continue
		}
		if m.node.id == node {
			return m, true
		}
		here = true
	}
	return nil, here
}

func (s *Memory) addLocked(j Join, hash uint64, now int64, here bool) *membership {
	r, u, n := s.rooms[j.Room], s.users[j.User], s.nodes[j.Node]
	if r == nil {
		r = &room{id: j.Room, created: now}
		s.rooms[r.id] = r
	}
	if u == nil {
		u = &user{id: j.User}
		s.users[u.id] = u
	}
	if n == nil {
		n = s.newNodeLocked(j.Node, time.Unix(now, 0))
	}
	at := n.slot(slots.Of(hash))
	s.clock++
	m := &membership{room: r, user: u, node: n, hash: hash, inRoom: len(r.members), inSlot: len(at.members), clock: s.clock}
	r.members = append(r.members, m)
	r.infos = append(r.infos, &pubsub.UserInfo{
		UserId: u.id, UserName: j.Name, NodeId: n.id, Metadata: maps.Clone(j.Metadata), JoinedAt: now,
	})
	u.members = append(u.members, m)
	at.members = append(at.members, m)
	at.digest += hash
	n.count++
	if !here {
		r.users++
	}
	s.count++
	return m
}

// renewLocked makes m the user's latest join and takes over name and metadata.
func (s *Memory) renewLocked(m *membership, j Join) (changed bool) {
	if last := len(m.user.members) - 1; m.user.members[last] != m {
		i := slices.Index(m.user.members, m)
		m.user.members = append(slices.Delete(m.user.members, i, i+1), m)
		changed = true
	}
	s.clock++
	m.clock = s.clock
	return s.renameLocked(m, j) || changed
}

// renameLocked takes over name and metadata.
func (s *Memory) renameLocked(m *membership, j Join) (changed bool) {
	old := m.room.infos[m.inRoom]
	if old.GetUserName() == j.Name && maps.Equal(old.GetMetadata(), j.Metadata) {
		return false
	}
	m.room.infos[m.inRoom] = &pubsub.UserInfo{
		UserId: old.GetUserId(), UserName: j.Name, NodeId: old.GetNodeId(), Metadata: maps.Clone(j.Metadata), JoinedAt: old.GetJoinedAt(),
	}
	return true
}

// Leave implements Store.
func (s *Memory) Leave(_ context.Context, l Leave) (bool, error) {
	now, hash := time.Now(), slots.Hash(l.User, l.Room)
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.reporterLocked(l.Reporter, now)
	if err != nil {
		return false, err
	}
	if l.Boot != "" {
		n.raise(slots.Of(hash), l.Seq) // A join from before this leave may still come.
	}
	u := s.users[l.User]
	if u == nil {
		return false, nil
	}
	var moves []Move
	for _, m := range slices.Clone(u.members) {
		if m.room.id != l.Room || l.Node != "" && m.node.id != l.Node {
			continue
		}
		if l.Boot != "" && m.era == n.era && m.seq > l.Seq {
			return false, ErrOld
		}
		moves = append(moves, s.endLocked(m, now.Unix()))
	}
	s.tellLocked(moves)
	return len(moves) > 0, nil
}

// endLocked takes m out of its three lists, and those that are empty then out of
// the store. It returns what is to be told of it.
func (s *Memory) endLocked(m *membership, now int64) Move {
	r, u, n := m.room, m.user, m.node
	u.members = slices.DeleteFunc(u.members, func(x *membership) bool { return x == m })
	if len(u.members) == 0 {
		delete(s.users, u.id)
	}

	last := len(r.members) - 1
	r.members[m.inRoom], r.infos[m.inRoom] = r.members[last], r.infos[last]
	r.members[m.inRoom].inRoom = m.inRoom
	r.members[last], r.infos[last] = nil, nil
	r.members, r.infos = r.members[:last], r.infos[:last]
	r.updated = now
	if _, here := u.find(r.id, ""); !here {
		r.users--
	}
	if last == 0 {
		delete(s.rooms, r.id)
	}

	at := n.slot(slots.Of(m.hash))
	last = len(at.members) - 1
	at.members[m.inSlot] = at.members[last]
	at.members[m.inSlot].inSlot = m.inSlot
	at.members[last] = nil
	at.members = at.members[:last]
	at.digest -= m.hash
	if n.count--; n.count == 0 {
		n.fold()
		if n.boot == "" {
			delete(s.nodes, n.id)
		}
	}
	s.count--
	return Move{Room: r.id, User: u.id, Node: n.id, Left: true}
}

// Begin implements Store.
func (s *Memory) Begin(ctx context.Context, by Reporter) (int, error) {
	now := time.Now()
	s.mu.Lock()
	n := s.nodes[by.Node]
	if n == nil {
		n = s.newNodeLocked(by.Node, now)
	}
	fresh := n.boot != by.Boot
	if fresh {
		n.begin(by.Boot)
	}
	n.floor, n.spoke = max(n.floor, by.Seq), now
	era := n.era
	s.mu.Unlock()
	if !fresh && by.Boot != "" && by.Seq == 0 {
		return 0, nil // Nothing can be below.
	}
	return s.drop(ctx, by.Node, func(m *membership) bool {
		return by.Boot == "" || m.era != era || m.seq < by.Seq
	})
}

// DropNode implements Store.
func (s *Memory) DropNode(ctx context.Context, nodeID string) (int, error) {
	return s.drop(ctx, nodeID, func(*membership) bool { return true })
}

// drop ends memberships of a node, little by little, as far as they exist now:
// what is joined later is the node's new life.
func (s *Memory) drop(ctx context.Context, nodeID string, which func(*membership) bool) (int, error) {
	s.mu.RLock()
	until := s.clock
	s.mu.RUnlock()
	total := 0
	for {
		// Between two holds of the lock a leave may put a membership behind the
		// position reached, so passes follow until one finds nothing.
		n, err := s.dropPass(ctx, nodeID, func(m *membership) bool { return m.clock <= until && which(m) })
		total += n
		if n == 0 || err != nil {
			return total, err
		}
	}
}

func (s *Memory) dropPass(ctx context.Context, nodeID string, which func(*membership) bool) (int, error) {
	dropped := 0
	for at := (position{}); at.slot < slots.Count; {
		var n int
		n, at = s.dropSome(nodeID, at, time.Now().Unix(), which)
		dropped += n
		if err := ctx.Err(); err != nil {
			return dropped, err
		}
	}
	return dropped, nil
}

// position is one among the memberships of a node.
type position struct{ slot, index int }

// dropSome looks at some of a node's memberships, from a position on, and ends
// some of them. It returns how many, and the position to go on from.
func (s *Memory) dropSome(nodeID string, at position, now int64, which func(*membership) bool) (int, position) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var moves []Move
	n := s.nodes[nodeID]
	if n == nil {
		return 0, position{slot: slots.Count}
	}
	for looked := 0; looked < dropChunk && at.slot < slots.Count; {
		members := n.look(at.slot).members
		if at.index >= len(members) {
			at = position{slot: at.slot + 1}
			continue
		}
		looked++
		m := members[at.index]
		if !which(m) {
			at.index++
			continue
		}
		moves = append(moves, s.endLocked(m, now)) // puts another one at this position
	}
	s.tellLocked(moves)
	return len(moves), at
}

// SetSlot implements Store.
func (s *Memory) SetSlot(_ context.Context, by Reporter, slot int, members []Join) error {
	now := time.Now()
	type key struct{ user, room string }
	listed := make(map[key]int, len(members))
	for i, j := range members {
		listed[key{j.User, j.Room}] = i
	}
	var moves []Move

	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.reporterLocked(by, now)
	if err != nil {
		return err
	}
	if by.Seq <= max(n.floor, n.look(slot).floor) {
		return ErrOld
	}
	if len(members) > 0 {
		n.slot(slot) // It is needed in any case, and has its own floor then.
	}
	n.raise(slot, by.Seq)
	for _, m := range slices.Clone(n.look(slot).members) {
		k := key{m.user.id, m.room.id}
		i, ok := listed[k]
		delete(listed, k)
		switch {
		case m.era == n.era && m.seq > by.Seq: // A later report has made it.
		case !ok:
			moves = append(moves, s.endLocked(m, now.Unix()))
		default:
			m.era, m.seq = n.era, by.Seq
			if s.renameLocked(m, members[i]) {
				m.room.updated = now.Unix()
				moves = append(moves, Move{Room: k.room, User: k.user, Node: by.Node})
			}
		}
	}
	for k, i := range listed {
		j := members[i]
		j.Node = by.Node
		_, here := s.users[k.user].find(k.room, by.Node)
		m := s.addLocked(j, slots.Hash(k.user, k.room), now.Unix(), here)
		m.era, m.seq = n.era, by.Seq
		m.room.updated = now.Unix()
		moves = append(moves, Move{Room: k.room, User: k.user, Node: by.Node})
	}
	s.tellLocked(moves)
	return nil
}

// Differing implements Store.
func (s *Memory) Differing(_ context.Context, by Reporter, digests []uint64) ([]uint32, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.reporterLocked(by, time.Now())
	if err != nil {
		return nil, err
	}
	var differing []uint32
	for i, d := range digests {
		if n.look(i).digest != d {
			differing = append(differing, uint32(i))
		}
	}
	return differing, nil
}

// Room implements Store.
func (s *Memory) Room(_ context.Context, roomID string) (*pubsub.RoomInfo, Revision, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	at := Revision{Store: s.id, Number: s.revision}
	r := s.rooms[roomID]
	if r == nil {
		return nil, at, nil
	}
	return s.infoLocked(r, true), at, nil
}

func (s *Memory) infoLocked(r *room, list bool) *pubsub.RoomInfo {
	info := &pubsub.RoomInfo{
		RoomId:    r.id,
		Metadata:  &pubsub.RoomMetadata{Name: r.id, MaxUsers: int32(min(s.maxUsers, 1<<31-1))},
		CreatedAt: r.created,
		UpdatedAt: r.updated,
	}
	if list {
		info.Users = slices.Clone(r.infos)
	}
	return info
}

// Members implements Store. It goes through the room from its end to its beginning: a member who
// leaves is replaced by the last one, who has had a turn, and who comes stands behind the first page.
func (s *Memory) Members(_ context.Context, roomID string, from Cursor, most int) (Page, error) {
	if from.Store != "" && from.Store != s.id {
		return Page{}, ErrOtherStore
	}
	left := math.MaxInt
	if from.Store != "" {
		n, err := strconv.Atoi(from.At)
		if err != nil || n <= 0 {
			return Page{}, ErrCursor
		}
		left = n
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	r := s.rooms[roomID]
	if r == nil {
		return Page{}, nil
	}
	left = min(left, len(r.infos))
	n := min(left, most)
	page := Page{Members: slices.Clone(r.infos[left-n : left]), Users: r.users}
	if left > n {
		page.Next = Cursor{Store: s.id, At: strconv.Itoa(left - n)}
	}
	return page, nil
}

// Users implements Store.
func (s *Memory) Users(_ context.Context, ids []string, rooms bool) ([]Presence, error) {
	presences := make([]Presence, len(ids))
	s.mu.RLock()
	defer s.mu.RUnlock()
	for i, id := range ids {
		u := s.users[id]
		if u == nil {
			continue
		}
		presences[i].Room = u.members[len(u.members)-1].room.id
		for _, m := range slices.Backward(u.members) {
			if !slices.Contains(presences[i].Nodes, m.node.id) {
				presences[i].Nodes = append(presences[i].Nodes, m.node.id)
			}
			if rooms {
				presences[i].Rooms = append(presences[i].Rooms, m.room.id)
			}
		}
		if rooms {
			slices.Sort(presences[i].Rooms)
			presences[i].Rooms = slices.Compact(presences[i].Rooms)
		}
	}
	return presences, nil
}

// Rooms implements Store, ordered by id.
func (s *Memory) Rooms(context.Context) ([]*pubsub.RoomStats, error) {
	stats := s.roomStats()
	slices.SortFunc(stats, func(a, b *pubsub.RoomStats) int { return cmp.Compare(a.GetRoomId(), b.GetRoomId()) })
	return stats, nil
}

func (s *Memory) roomStats() []*pubsub.RoomStats {
	s.mu.RLock()
	defer s.mu.RUnlock()
	stats := make([]*pubsub.RoomStats, 0, len(s.rooms))
	for _, r := range s.rooms {
		stats = append(stats, &pubsub.RoomStats{RoomId: r.id, UserCount: int32(min(r.users, 1<<31-1)), CreatedAt: r.created})
	}
	return stats
}

// Nodes implements Store.
func (s *Memory) Nodes(context.Context) (map[string]string, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	nodes := make(map[string]string, len(s.nodes))
	for id, n := range s.nodes {
		if n.count > 0 {
			nodes[id] = n.boot
		}
	}
	return nodes, nil
}

// Counts implements Store.
func (s *Memory) Counts() Counts {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return Counts{Rooms: len(s.rooms), Users: len(s.users), Memberships: s.count}
}
