package refgateway

import (
	"hash/maphash"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/push-manager/push-manager/transport/node"
)

// registry knows the connections of each user.
type registry struct {
	seed   maphash.Seed
	parts  [64]part
	online atomic.Int64 // users
	conns  atomic.Int64
}

type part struct {
	mu    sync.RWMutex
	users map[string][]*conn // Guarded by mu. The slices are never changed, only replaced.
	_     [32]byte           // two parts on one cache line would slow each other
}

func newRegistry() *registry {
	r := &registry{seed: maphash.MakeSeed()}
	for i := range r.parts {
		r.parts[i].users = make(map[string][]*conn)
	}
	return r
}

func (r *registry) part(user string) *part {
	return &r.parts[maphash.String(r.seed, user)%uint64(len(r.parts))]
}

func (r *registry) add(c *conn) {
	p := r.part(c.user)
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.users[c.user]
	if len(before) == 0 {
		r.online.Add(1)
	}
	p.users[c.user] = append(slices.Clip(before), c)
	r.conns.Add(1)
}

func (r *registry) remove(c *conn) {
	p := r.part(c.user)
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.users[c.user]
	i := slices.Index(before, c)
	if i < 0 {
		return
	}
	r.conns.Add(-1)
	if len(before) == 1 {
		delete(p.users, c.user)
		r.online.Add(-1)
		return
	}
	p.users[c.user] = slices.Concat(before[:i], before[i+1:])
}

func (r *registry) of(user string) []*conn {
	p := r.part(user)
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.users[user]
}

// each calls f for the connections of every user, without a lock.
func (r *registry) each(f func(conns []*conn)) {
	var users [][]*conn
	for i := range r.parts {
		p := &r.parts[i]
		p.mu.RLock()
		users = users[:0]
		for _, conns := range p.users {
			users = append(users, conns)
		}
		p.mu.RUnlock()
		for _, conns := range users {
			f(conns)
		}
	}
}

// sessions is the gateway as its node sees it.
type sessions struct{ *Gateway }

var _ node.Sessions = sessions{}

// Deliver implements node.Sessions. A push to a room is for the connections that are in
// it, which are those that have joined it and not left. A route that is out of date may
// name a user who has left: all connections are as good as not here.
func (s sessions) Deliver(user string, m *node.Message) node.Outcome {
	conns := s.registry.of(user)
	if len(conns) == 0 {
		return node.NotHere
	}
	return s.deliver(conns, m, m.RoomID, false)
}

// deliver hands m to the connections of one user that are in the room, or to all.
func (g *Gateway) deliver(conns []*conn, m *node.Message, room string, broadcast bool) node.Outcome {
	f, ok := m.Prepared.(*frame)
	if !ok {
		f = newPush(m, broadcast)
		m.Prepared = f
	}
	outcome, frames := node.NotHere, 0 // None may be in the room, all may just be closing.
	for _, c := range conns {
		switch c.send(f, room) {
		case queued:
			outcome = node.Delivered
			frames++
		case full:
			if outcome == node.NotHere {
				outcome = node.Failed
			}
		case gone, elsewhere:
		}
	}
	g.count.pushFrames.Add(frames)
	return outcome
}

// Broadcast implements node.Sessions.
func (s sessions) Broadcast(m *node.Message) (delivered, failed int) {
	s.registry.each(func(conns []*conn) {
		switch s.deliver(conns, m, "", true) {
		case node.Delivered:
			delivered++
		case node.Failed:
			failed++
		case node.NotHere:
		}
	})
	return delivered, failed
}

// Online implements node.Sessions.
func (s sessions) Online() int { return int(s.registry.online.Load()) }
