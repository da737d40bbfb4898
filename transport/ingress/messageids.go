package ingress

import (
	"context"
	"errors"
	"hash/maphash"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/label"
)

const (
	// idsMost is how many message ids are remembered, if each has gone to one target. They and their
	// targets have an entry of about 210 bytes each: 42 MB at the most.
	idsMost = 100_000
	// idsKept is how long an id is remembered after its last use: as long as a client may
	// reasonably retry.
	idsKept = 5 * time.Minute
)

var (
	// errIDReused refuses a push whose message id named another content.
	errIDReused = errors.New("the message id was used for another content")
	// errEarlierUnsent refuses a push of a PushStream that has waited for an earlier one with its
	// id, of which nothing was sent.
	errEarlierUnsent = errors.New("an earlier push with the message id ended before it was sent")
	// errEarlierOpen ends a push whose deadline has passed while it waited for an earlier one with
	// its id, which may have been sent.
	errEarlierOpen = errors.New("an earlier push with the message id is not finished")
)

// messageIDs remembers the message ids of pushes that this instance has had lately, so that a
// retry that nobody needs is not sent, and an id does not name two contents. Nodes do the same for each
// connection, over all instances; what is forgotten here costs deliveries that they drop.
//
// There are two kinds of entry. One is for the id: of which content it is. The other is for
// the id, a target, and what the push asks to be confirmed: whether such a push is under way, and its result
// if nobody was left over. Both live in one list by their last use.
type messageIDs struct {
	// Static after newMessageIDs.
	seed   maphash.Seed
	most   int // entries
	counts [idResults]*metrics.Counter

	mu sync.Mutex
	// Guarded by mu.
	entries map[uint64]*idEntry
	recent  idEntry // the head of a ring: next is the last used one
	erased  uint64  // how often something was erased from the store
}

// idEntry is one of messageIDs. It may be pushed out while it is under way: whoever has it then changes
// what nobody sees.
type idEntry struct {
	key     uint64
	payload uint32
	used    time.Time

	// Of an id.
	underway int  // pushes with it
	sent     bool // one of them may have been sent, so the payload stands

	// Of an id and a target.
	open    bool                   // a push is under way
	waiting map[*idWaiter]struct{} // for it; nil for nobody
	done    bool                   // result is that of a push that has left nobody over
	result  idResult
	erased  uint64       // messageIDs.erased when it was sent
	place   engine.Place // in the log of its room, zero for none
	expires time.Time    // what it has stored; zero: when the store says

	next, prev *idEntry
}

// idResult is what is kept of a Result that has left nobody over: such a one names no failures.
type idResult struct {
	targets, delivered, stored, unsure, acked, absent int32
	found                                             bool
}

// idWaiter waits for a push that is under way.
type idWaiter struct {
	// told is called once, from any goroutine, with what became of that push. It must not block.
	told func(engine.Result, error)
}

// What became of a push with a message id.
const (
	idFirst    uint8 = iota // nothing was known of it
	idAgain                 // an earlier one had left somebody over
	idAnswered              // by what an earlier one has reached
	idWaited                // for an earlier one
	idReused                // refused: it named another content
	idResults
)

var idResultNames = [idResults]string{"first", "again", "answered", "waited", "reused"}

func newMessageIDs(most int, set *metrics.Set) *messageIDs {
	m := &messageIDs{seed: maphash.MakeSeed(), most: 2 * most, entries: make(map[uint64]*idEntry)}
	m.recent.next, m.recent.prev = &m.recent, &m.recent
	for i, name := range idResultNames {
		m.counts[i] = set.GetOrCreateCounter(label.Name("push_manager_message_ids_total", "result", name))
	}
	set.GetOrCreateGauge("push_manager_message_ids", func() float64 {
		m.mu.Lock()
		defer m.mu.Unlock()
		return float64(len(m.entries))
	})
	return m
}

// idClaim is a push that is under way with its message id. It owes a finish.
type idClaim struct {
	id, target *idEntry
	async      bool // its clients' word comes later, see confirm
	finished   bool // guarded by messageIDs.mu
}

// verdict is what to do with a push that has a message id: to send it, if there is a claim; to wait,
// if there is a waiter; otherwise to answer it with the result.
type verdict struct {
	claim  *idClaim
	waiter *idWaiter
	result engine.Result
}

// keys are those of the entries of a push.
func (m *messageIDs) keys(p *engine.Push) (id, target uint64) {
	var h maphash.Hash
	h.SetSeed(m.seed)
	part := func(s string) {
		_, _ = h.WriteString(s) // it never fails
		_ = h.WriteByte(0)      // which is in no id
	}
	o := p.Options
	part(p.Scope)
	part(o.Sender)
	part(o.MessageID)
	id = h.Sum64()
	policy := byte(p.Kind) << 3 // as the caller has it: it is asked before the engine
	for i, asks := range [...]bool{o.ClientAck, o.Store, o.Async} {
		if asks {
			policy |= 1 << i
		}
	}
	_ = h.WriteByte(policy)
	part(p.Room)
	part(p.User)
	for _, user := range p.Users {
		part(user)
	}
	for _, room := range p.Rooms.IDs() {
		part(room)
	}
	_ = h.WriteByte(1) // which ends a list: it is in no id
	for _, user := range p.Exclude {
		part(user)
	}
	for i := range o.Filter { // who has got it through one filter has not through another
		m := &o.Filter[i]
		part(m.Key)
		for _, value := range m.Values {
			part(value)
		}
		if m.Not {
			_ = h.WriteByte(1) // which is in no value either
		}
		_ = h.WriteByte(0)
	}
	return id, h.Sum64()
}

// begin tells what to do with a push that has a message id. One that stands in the log of its room already is given its
// place there, so that it is not written again though it is sent again. wait makes the waiter, if it comes to that. The error is
// errIDReused.
func (m *messageIDs) begin(p *engine.Push, wait func() *idWaiter) (verdict, error) {
	idKey, targetKey := m.keys(p)
	payload := p.Options.PayloadHash
	m.mu.Lock()
	defer m.mu.Unlock()
	m.expireLocked(p.Arrived)
	for _, key := range [...]uint64{idKey, targetKey} {
		if e := m.entries[key]; e != nil && e.payload != payload {
			m.counts[idReused].Inc()
			return verdict{}, errIDReused
		}
	}
	id := m.touchLocked(idKey, payload, p.Arrived)
	target := m.touchLocked(targetKey, payload, p.Arrived) // it does not push id out, which was used last
	switch {
	case target.open:
		w := wait()
		if target.waiting == nil {
			target.waiting = make(map[*idWaiter]struct{})
		}
		target.waiting[w] = struct{}{}
		m.counts[idWaited].Inc()
		return verdict{waiter: w}, nil
	case target.done && m.holdsLocked(target, p.Arrived):
		m.counts[idAnswered].Inc()
		return verdict{result: target.again()}, nil
	case id.sent:
		m.counts[idAgain].Inc()
	default:
		m.counts[idFirst].Inc()
	}
	target.open, target.done, target.erased = true, false, m.erased
	if target.place == (engine.Place{}) || target.expired(p.Arrived) {
		target.place, target.expires = engine.Place{}, time.Time{}
		if ttl := p.Options.TTL; ttl > 0 {
			target.expires = p.Arrived.Add(ttl)
		}
	}
	p.Options.Place = target.place
	id.underway++
	return verdict{claim: &idClaim{id: id, target: target, async: p.Options.Async}}, nil
}

// leave takes back a wait for the push p. Whoever is told all the same must not mind.
func (m *messageIDs) leave(p *engine.Push, w *idWaiter) {
	_, key := m.keys(p)
	m.mu.Lock()
	defer m.mu.Unlock()
	if target := m.entries[key]; target != nil {
		delete(target.waiting, w)
	}
}

// finish ends a push that was sent, or refused with an error, and tells those who wait for it. Only the first finish of
// a claim counts.
func (m *messageIDs) finish(claim *idClaim, res engine.Result, err error) {
	m.mu.Lock()
	if claim.finished {
		m.mu.Unlock()
		return
	}
	claim.finished = true
	id, target := claim.id, claim.target
	id.underway--
	id.sent = id.sent || err == nil || errors.Is(err, errMayBeSent)
	target.open = false
	waiting := target.waiting
	target.waiting = nil
	if err == nil {
		target.place = res.Place
	}
	switch {
	case err == nil && !claim.async && leftNobody(&res):
		target.done, target.result = true, newIDResult(&res)
	case !id.sent:
		m.dropLocked(target)
		if id.underway == 0 { // so that a push that was refused can be corrected
			m.dropLocked(id)
		}
	}
	m.mu.Unlock()
	for w := range waiting {
		w.told(res, err)
	}
}

// confirm is told the final result of a push that was answered before its clients had acknowledged.
func (m *messageIDs) confirm(p *engine.Push, res *engine.Result) {
	if !leftNobody(res) {
		return
	}
	_, key := m.keys(p)
	m.mu.Lock()
	defer m.mu.Unlock()
	if target := m.entries[key]; target != nil && target.payload == p.Options.PayloadHash {
		target.done, target.result = true, newIDResult(res)
	}
}

// erase is told that messages have been erased from the store. Whose they were is known to nobody here: no result that
// counts on the store is answered again.
func (m *messageIDs) erase() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.erased++
}

// holdsLocked tells whether the store still has what it had when a push was done. The logs of rooms keep what they have
// when a user is erased.
func (m *messageIDs) holdsLocked(e *idEntry, now time.Time) bool {
	if e.place != (engine.Place{}) {
		return !e.expired(now)
	}
	return e.result.stored == 0 || e.erased == m.erased && !e.expired(now)
}

// expired tells whether the TTL has passed of what a push has stored.
func (e *idEntry) expired(now time.Time) bool { return !e.expires.IsZero() && !now.Before(e.expires) }

// leftNobody tells whether a push has reached all whom it was for, or has stored it for them.
func leftNobody(res *engine.Result) bool { return res.Success() && res.Offline == res.Stored }

func newIDResult(res *engine.Result) idResult {
	n := func(v int) int32 { return int32(int32Of(v)) }
	return idResult{n(res.Targets), n(res.Delivered), n(res.Stored), n(res.Unsure), n(res.Acked), n(res.RoomsNotFound), res.Found}
}

// again is the result for a push that is not sent, because an earlier one has reached all.
func (e *idEntry) again() engine.Result {
	r := &e.result
	return engine.Result{
		Found: r.found, Place: e.place,
		Targets: int(r.targets), Delivered: int(r.delivered), Offline: int(r.stored), Stored: int(r.stored),
		Unsure: int(r.unsure), Acked: int(r.acked), Duplicates: int(r.delivered), RoomsNotFound: int(r.absent),
	}
}

// touchLocked makes the entry of a key the last used one, and makes one if there is none.
func (m *messageIDs) touchLocked(key uint64, payload uint32, now time.Time) *idEntry {
	e := m.entries[key]
	if e == nil {
		for len(m.entries) >= m.most {
			m.dropLocked(m.recent.prev)
		}
		e = &idEntry{key: key, payload: payload}
		m.entries[key] = e
	} else {
		e.unlink()
	}
	e.used = now
	e.prev, e.next = &m.recent, m.recent.next
	e.prev.next, e.next.prev = e, e
	return e
}

func (m *messageIDs) expireLocked(now time.Time) {
	for last := m.recent.prev; last != &m.recent && now.Sub(last.used) > idsKept; last = m.recent.prev {
		m.dropLocked(last)
	}
}

func (m *messageIDs) dropLocked(e *idEntry) {
	if m.entries[e.key] == e { // it may have been pushed out
		delete(m.entries, e.key)
		e.unlink()
	}
}

func (e *idEntry) unlink() { e.prev.next, e.next.prev = e.next, e.prev }

// once is engine.Do for a push that has a message id. A call that waits for an earlier one, and finds that somebody was
// left over or that nothing was sent, takes its place: who gives up hurts nobody else.
func (m *messageIDs) once(ctx context.Context, e *engine.Engine, p *engine.Push) (engine.Result, error) {
	var timeout *time.Timer
	for {
		told := (chan engine.Result)(nil)
		v, err := m.begin(p, func() *idWaiter {
			told = make(chan engine.Result, 1)
			return &idWaiter{func(res engine.Result, _ error) { told <- res }} // with an error it is zero
		})
		switch {
		case err != nil:
			return engine.Result{}, err
		case v.claim != nil:
			return m.do(ctx, v.claim, e, p)
		case v.waiter == nil:
			return v.result, nil
		}
		if timeout == nil { // several others may take their turn
			timeout = time.NewTimer(time.Until(p.Arrived.Add(e.Timeout())))
			defer timeout.Stop()
		}
		select {
		case res := <-told:
			if leftNobody(&res) {
				res.Duplicates = res.Delivered
				return res, nil
			}
			continue
		case <-ctx.Done():
		case <-timeout.C:
		}
		m.leave(p, v.waiter)
		return engine.Result{}, errEarlierOpen
	}
}

// do has the engine do a push. A panic ends the claim, too.
func (m *messageIDs) do(ctx context.Context, claim *idClaim, e *engine.Engine, p *engine.Push) (res engine.Result, err error) {
	err = errMayBeSent
	defer func() { m.finish(claim, res, err) }()
	return e.Do(ctx, p)
}

// startOnce starts the push of a PushStream that has a message id. One that waits for an earlier push is never sent: by
// then it would come behind those that were sent after it. It is answered with what became of the earlier one.
func (c *call) startOnce() error {
	s := c.stream.srv
	v, err := s.messageIDs.begin(&c.push, func() *idWaiter { return &idWaiter{c.earlierDone} })
	switch {
	case err != nil:
		return err
	case v.claim != nil:
		c.claim = v.claim
	case v.waiter != nil:
		return nil // it may be answered by now
	default:
		c.answer(v.result)
		return nil
	}
	defer func() {
		if p := recover(); p != nil {
			s.messageIDs.finish(v.claim, engine.Result{}, errMayBeSent)
			panic(p)
		}
	}()
	if err := s.cfg.Engine.Start(&c.push, c); err != nil {
		s.messageIDs.finish(v.claim, engine.Result{}, err)
		return err
	}
	return nil
}

// earlierDone answers a push that has waited for an earlier one.
func (c *call) earlierDone(res engine.Result, err error) {
	switch {
	case err == nil:
		res.Duplicates = res.Delivered
		c.answer(res)
		return
	case errors.Is(err, engine.ErrCanceled), errors.Is(err, engine.ErrDeadline):
		c.err = errEarlierUnsent // it was that one's caller
	default:
		c.err = err
	}
	c.stream.complete(c)
}

// answer completes a push of a PushStream that the engine does not get.
func (c *call) answer(res engine.Result) {
	c.answered, c.result = true, res
	c.stream.complete(c)
}
