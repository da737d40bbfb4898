package refgateway

import (
	"container/list"
	"sync"

	"github.com/push-manager/push-manager/internal/remote"
)

// unverified are the connections whose token has not been verified. One has a goroutine and a few
// KiB for Config.TokenTimeout, whoever opened it, so they are bounded: of one network, and in all.
// One more costs the oldest its place. Who has a token shows it at once, also where many share an
// address with somebody who has none.
type unverified struct {
	// Static.
	most, mostOfNetwork int

	mu sync.Mutex
	// Guarded by mu.
	conns    list.List             // of *conn, the oldest first
	networks map[string]*list.List // the same by network; none is empty
}

// place is where a connection stands among the unverified. It is guarded by unverified.mu.
type place struct {
	network       string
	all, neighbor *list.Element // nil: it stands there no more
}

// add adds c. It returns the connection that has lost its place, if one has.
func (u *unverified) add(c *conn) (evicted *conn) {
	u.mu.Lock()
	defer u.mu.Unlock()
	c.place.network = remote.Network(c.net.RemoteAddr())
	neighbors := u.networks[c.place.network]
	if neighbors == nil {
		neighbors = list.New()
		u.networks[c.place.network] = neighbors
	}
	switch {
	case neighbors.Len() >= u.mostOfNetwork:
		evicted = neighbors.Front().Value.(*conn)
	case u.conns.Len() >= u.most:
		evicted = u.conns.Front().Value.(*conn)
	}
	c.place.all, c.place.neighbor = u.conns.PushBack(c), neighbors.PushBack(c)
	if evicted != nil {
		u.removeLocked(evicted)
	}
	return evicted
}

// remove tells whether c was there.
func (u *unverified) remove(c *conn) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.removeLocked(c)
}

func (u *unverified) removeLocked(c *conn) bool {
	if c.place.all == nil {
		return false
	}
	u.conns.Remove(c.place.all)
	neighbors := u.networks[c.place.network]
	if neighbors.Remove(c.place.neighbor); neighbors.Len() == 0 {
		delete(u.networks, c.place.network)
	}
	c.place.all, c.place.neighbor = nil, nil
	return true
}

func (u *unverified) len() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.conns.Len()
}

// each calls f for all of them, without a lock.
func (u *unverified) each(f func(c *conn)) {
	u.mu.Lock()
	conns := make([]*conn, 0, u.conns.Len())
	for e := u.conns.Front(); e != nil; e = e.Next() {
		conns = append(conns, e.Value.(*conn))
	}
	u.mu.Unlock()
	for _, c := range conns {
		f(c)
	}
}
