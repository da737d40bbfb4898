package controller

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	// listMax is how many members a Join's reply lists: with more, a room that
	// fills would cost the square of its size.
	listMax = 1000
	// dropChunk is how many memberships of a dead node end in one hold of the lock.
	dropChunk = 1000
)

// Memory is a Store in this process: what it knows ends with it.
type Memory struct {
	// Static after Notify.
	maxUsers int
	tell     func(Change)

	mu sync.RWMutex
	// Guarded by mu. No room, user or node is without a membership.
	rooms map[string]*room
	users map[string]*user
	nodes map[string]*node
	seq   uint64 // of the latest join
	count int    // memberships
}

// membership is a user in a room on a node. It stands in three lists.
type membership struct {
	room *room
	user *user
	node *node
	// Where it stands in room.members and node.members.
	inRoom, inNode int
	seq            uint64
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

type node struct {
	id      string
	members []*membership
}

// NewMemory makes an empty store. maxUsers limits the users of each room, 0 for
// no limit.
func NewMemory(maxUsers int) *Memory {
	return &Memory{
		maxUsers: maxUsers,
		tell:     func(Change) {},
		rooms:    map[string]*room{},
		users:    map[string]*user{},
		nodes:    map[string]*node{},
	}
}

// Notify implements Store.
func (s *Memory) Notify(tell func(Change)) { s.tell = tell }

// Join implements Store.
func (s *Memory) Join(_ context.Context, j Join) (Joined, error) {
	joined, changed := s.join(j, time.Now().Unix())
	if changed {
		s.tell(Change{Rooms: []string{j.Room}, Users: []string{j.User}})
	}
	return joined, nil
}

func (s *Memory) join(j Join, now int64) (joined Joined, changed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, u := s.rooms[j.Room], s.users[j.User]
	m, here := u.find(j.Room, j.Node)
	if !here && r != nil && s.maxUsers > 0 && r.users >= s.maxUsers {
		return Joined{Full: true, Room: s.infoLocked(r, false)}, false
	}
	if m == nil {
		m = s.addLocked(j, r, u, now, here)
		changed = true
	} else {
		changed = s.renewLocked(m, j)
	}
	if changed {
		m.room.updated = now
	}
	return Joined{Room: s.infoLocked(m.room, len(m.room.members) <= listMax)}, changed
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

func (s *Memory) addLocked(j Join, r *room, u *user, now int64, here bool) *membership {
	if r == nil {
		r = &room{id: j.Room, created: now}
		s.rooms[r.id] = r
	}
	if u == nil {
		u = &user{id: j.User}
		s.users[u.id] = u
	}
	n := s.nodes[j.Node]
	if n == nil {
		n = &node{id: j.Node}
		s.nodes[n.id] = n
	}
	s.seq++
	m := &membership{room: r, user: u, node: n, inRoom: len(r.members), inNode: len(n.members), seq: s.seq}
	r.members = append(r.members, m)
	r.infos = append(r.infos, &pubsub.UserInfo{
		UserId: u.id, UserName: j.Name, NodeId: n.id, Metadata: maps.Clone(j.Metadata), JoinedAt: now,
	})
	u.members = append(u.members, m)
	n.members = append(n.members, m)
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
	s.seq++
	m.seq = s.seq
	old := m.room.infos[m.inRoom]
	if old.GetUserName() != j.Name || !maps.Equal(old.GetMetadata(), j.Metadata) {
		m.room.infos[m.inRoom] = &pubsub.UserInfo{
			UserId: old.GetUserId(), UserName: j.Name, NodeId: old.GetNodeId(), Metadata: maps.Clone(j.Metadata), JoinedAt: old.GetJoinedAt(),
		}
		changed = true
	}
	return changed
}

// Leave implements Store.
func (s *Memory) Leave(_ context.Context, userID, roomID, nodeID string) (bool, error) {
	if !s.leave(userID, roomID, nodeID, time.Now().Unix()) {
		return false, nil
	}
	s.tell(Change{Rooms: []string{roomID}, Users: []string{userID}})
	return true, nil
}

func (s *Memory) leave(userID, roomID, nodeID string, now int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.users[userID]
	if u == nil {
		return false
	}
	found := false
	for _, m := range slices.Clone(u.members) {
		if m.room.id == roomID && (nodeID == "" || m.node.id == nodeID) {
			s.endLocked(m, now)
			found = true
		}
	}
	return found
}

// endLocked takes m out of its three lists, and those that are empty then out of
// the store.
func (s *Memory) endLocked(m *membership, now int64) {
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

	last = len(n.members) - 1
	n.members[m.inNode] = n.members[last]
	n.members[m.inNode].inNode = m.inNode
	n.members[last] = nil
	n.members = n.members[:last]
	if last == 0 {
		delete(s.nodes, n.id)
	}
	s.count--
}

// DropNode implements Store.
func (s *Memory) DropNode(ctx context.Context, nodeID string) (int, error) {
	s.mu.RLock()
	until := s.seq // joins after the call are the node's new life
	s.mu.RUnlock()
	total := 0
	for {
		// Between two holds of the lock a leave may put a membership behind the
		// position reached, so passes follow until one finds nothing.
		n, err := s.dropPass(ctx, nodeID, until)
		total += n
		if n == 0 || err != nil {
			return total, err
		}
	}
}

func (s *Memory) dropPass(ctx context.Context, nodeID string, until uint64) (int, error) {
	dropped := 0
	for at := 0; at >= 0; {
		var change Change
		change, at = s.dropSome(nodeID, at, until, time.Now().Unix())
		if len(change.Users) > 0 {
			dropped += len(change.Users)
			s.tell(change)
		}
		if err := ctx.Err(); err != nil {
			return dropped, err
		}
	}
	return dropped, nil
}

// dropSome ends some of a node's memberships, from the one at a position on. It
// returns the position to go on from, -1 when the end is reached.
func (s *Memory) dropSome(nodeID string, at int, until uint64, now int64) (Change, int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var change Change
	n := s.nodes[nodeID]
	for range dropChunk {
		if n == nil || at >= len(n.members) {
			return change, -1
		}
		m := n.members[at]
		if m.seq > until {
			at++
			continue
		}
		change.Rooms = append(change.Rooms, m.room.id)
		change.Users = append(change.Users, m.user.id)
		s.endLocked(m, now) // puts another one at this position
	}
	return change, at
}

// Room implements Store.
func (s *Memory) Room(_ context.Context, roomID string) (*pubsub.RoomInfo, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r := s.rooms[roomID]
	if r == nil {
		return nil, nil //nolint:nilnil // nil is the answer: no such room
	}
	return s.infoLocked(r, true), nil
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

// Users implements Store.
func (s *Memory) Users(_ context.Context, ids []string) ([]Presence, error) {
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
func (s *Memory) Nodes(context.Context) ([]string, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Collect(maps.Keys(s.nodes)), nil
}

// Counts implements Store.
func (s *Memory) Counts() Counts {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return Counts{Rooms: len(s.rooms), Users: len(s.users), Memberships: s.count}
}
