package engine

import (
	"fmt"
	"runtime/debug"
	"time"

	"github.com/push-manager/push-manager/engine/route"
)

// A push to a room with Options.Store is written into the room's log before it goes anywhere:
//
//	Start ─▶ Spool.AppendLog ─▶ logged ─▶ turn in its Order ─▶ route, stage, Link.Send: as any other
//
// While it is being written it waits as for a look-up, so that its deadline, its TTL and its caller
// end it in the same way. It does not wait long: live delivery does not hang on the store. A
// push that is not written in time goes without a place, and is like one without Options.Store but for
// the failure that its account names. So may the message stand in the log although nobody is told so.
//
// Whoever reads the log finds the message there, so nobody is named to the Spool, looked up again or
// nudged: of a room of any size those whom the push did not reach are counted, not listed.

// logs tells whether the push is written into the log of its room.
func (p *Push) logs() bool { return p.Kind == ToRoom && p.stores() }

// comesLater has a push to a room, or to several, be routed later: if it is to be written into the room's log first,
// or has to wait for others of its Order. False: nothing is in its way.
func (p *Push) comesLater() bool {
	if !p.logs() {
		o := p.Order
		return o != nil && (p.Kind == ToRooms || o.lined.Load() > 0) && o.lineUp(p, 0)
	}
	if p.Order == nil {
		p.await(1)
	} else {
		p.Order.lineUp(p, 1)
	}
	p.log()
	return true
}

// log hands the push to the Spool, and waits for its answer no longer than storeTime and half of
// the push's time.
func (p *Push) log() {
	l, o := p.lasting, p.Options
	if o.Place != (Place{}) {
		l.logged(o.Place, nil)
		return
	}
	m := p.stored()
	if p.slow != nil {
		m.Exclude = p.slow.except
	}
	wait := min(storeTime, time.Until(p.expires())/2)
	by := time.Now().Add(wait)
	l.mu.Lock()
	l.timer = time.AfterFunc(wait, func() { l.logged(Place{}, errNoAnswer) })
	l.mu.Unlock()
	defer func() {
		if v := recover(); v != nil {
			p.engine.panics.Add(1)
			p.engine.logger.Error("panic while a push was written into a log", "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
			l.logged(Place{}, errNoAnswer)
		}
	}()
	p.engine.spool.AppendLog(m, by, l.logged)
}

// logged goes on with a push that stands in its room's log at a place, or does not, and why. Only
// the first call counts.
func (l *lasting) logged(at Place, err error) {
	p := l.push
	l.mu.Lock()
	if l.noted {
		l.mu.Unlock()
		return
	}
	l.noted, l.place, l.unasked = true, at, err
	switch {
	case err != nil:
		l.place = Place{}
	case at == Place{}:
		l.unasked = errNoAnswer
	}
	if l.timer != nil {
		l.timer.Stop()
	}
	l.mu.Unlock()
	p.engine.offload(l.shard, func() {
		if p.Order != nil {
			p.Order.turn(p, 1)
		} else {
			p.routeLate()
		}
	})
}

// routeLate is route for a push that has waited since its start. It may have ended meanwhile, see stage.
func (p *Push) routeLate() {
	defer func() {
		if v := recover(); v != nil {
			p.engine.panicked(p, v)
		}
	}()
	if u := p.union; u != nil {
		if s := u.Cached(p.Arrived); s != nil {
			p.Routed([]string{u.ID}, []*route.Snapshot{s}, nil)
			return
		}
		u.Ask(p.Arrived, p)
		return
	}
	rooms, keys := p.engine.directory.Rooms, []string{p.Room}
	if s := rooms.Cached(p.shard, p.Room, p.Arrived); s != nil {
		p.Routed(keys, []*route.Snapshot{s}, nil)
		return
	}
	rooms.Ask(p.shard, keys, p.Arrived, p)
}

// Log is where the message stands in the log of its room, and who of the room does not get it, sorted.
// The zero Place: it stands in none. It may be called once the link has the delivery.
func (d *Delivery) Log() (at Place, exclude []string) {
	l := d.push.lasting
	if l == nil || l.place == (Place{}) {
		return Place{}, nil
	}
	if d.push.slow != nil {
		exclude = d.push.slow.except
	}
	return l.place, exclude
}

// logSize is what Log adds to Size.
func (d *Delivery) logSize() (n int) {
	at, exclude := d.Log()
	if at == (Place{}) {
		return 0
	}
	for _, user := range exclude {
		n += len(user) + 3
	}
	return n + 32
}
