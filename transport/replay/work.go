package replay

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/transport/store"
)

// What a replay ends with, and what Replay and Forget return. Each says with engine's words what kind of error it is.
var (
	// ErrStore: the store cannot be read.
	ErrStore = fmt.Errorf("store: %w", engine.ErrSpoolDown)
	// ErrBusy: too many replays are open, or wait.
	ErrBusy = fmt.Errorf("%w: too many replays", engine.ErrOverloaded)
	// ErrClosed: this Push-Manager goes.
	ErrClosed = engine.ErrDraining
	// ErrNotTaken: the node has not taken a message. The text says why.
	ErrNotTaken = errors.New("not taken by the node")

	errAway     = fmt.Errorf("%w: the user is not there", ErrNotTaken)
	errUntaken  = errors.New("the client takes nothing")
	errInternal = errors.New("internal error")
)

// work does what there is to do until nothing is left.
func (s *Service) work() {
	for {
		batch, r := s.next()
		switch {
		case batch != nil:
			s.guard(batch, func() { s.look(batch) })
		case r != nil:
			s.guard([]*replay{r}, func() { s.advance(r) })
		default:
			return
		}
	}
}

// guard ends replays, instead of the process, for a fault of our own or of the store.
func (s *Service) guard(replays []*replay, f func()) {
	defer func() {
		if v := recover(); v != nil {
			s.panicked(v)
			for _, r := range replays {
				s.end(r, resultStore, errInternal)
			}
		}
	}()
	f()
}

func (s *Service) panicked(v any) {
	s.meters.panics.Inc()
	s.cfg.Logger.Error("panic in a replay", "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
}

// next is what a worker does next: a batch to look at, or a replay. With neither of them the worker ends. One
// worker looks at a time, so that the next batch gathers meanwhile.
func (s *Service) next() (batch []*replay, r *replay) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.looking && s.fresh.Len() > 0 {
		s.looking = true
		batch = make([]*replay, min(s.fresh.Len(), lookMost))
		for i := range batch {
			batch[i] = s.frontLocked(&s.fresh)
		}
		return batch, nil
	}
	if s.ready.Len() > 0 {
		return nil, s.frontLocked(&s.ready)
	}
	s.workers--
	return nil, nil
}

// frontLocked takes the first of a list, which is not empty.
func (s *Service) frontLocked(l *list.List) *replay {
	r, _ := l.Front().Value.(*replay)
	s.takeLocked(r)
	return r
}

// look asks for which of batch anything may be stored. The others have nothing to wait for.
func (s *Service) look(batch []*replay) {
	some, err := s.ask(batch)
	s.mu.Lock()
	s.looking = false
	if err == nil {
		for i, r := range batch {
			if some[i] && !r.ended {
				s.putLocked(r, &s.ready)
			}
		}
	}
	s.mu.Unlock()
	for i, r := range batch {
		switch {
		case err != nil:
			s.end(r, resultStore, err)
		case !some[i]:
			s.answered(r)
			s.end(r, resultEmpty, nil)
		}
	}
}

// ask tells for each of batch whether anything may be stored.
func (s *Service) ask(batch []*replay) (some []bool, err error) {
	defer func() {
		if v := recover(); v != nil { // looking has to go on
			err = errInternal
			s.panicked(v)
		}
	}()
	users := make([]string, len(batch))
	for i, r := range batch {
		users[i] = r.user
	}
	ctx, cancel := context.WithTimeout(s.ctx, storeTimeout)
	defer cancel()
	if some, err = s.cfg.Store.Any(ctx, users); err == nil && len(some) != len(users) {
		err = errors.New("an answer for other users")
	}
	return some, storeError(err)
}

// advance does for a replay what there is to do: it trims what is taken, and sends a page if nothing is on its way.
func (s *Service) advance(r *replay) {
	if !r.looked {
		if time.Since(r.since) > storeTimeout {
			s.end(r, resultRefused, ErrBusy)
			return
		}
		s.answered(r)
	}
	s.mu.Lock()
	to := r.trimmable()
	s.mu.Unlock()
	if to > 0 {
		ctx, cancel := context.WithTimeout(s.ctx, storeTimeout)
		err := s.cfg.Store.Trim(ctx, r.user, to)
		cancel()
		if err != nil {
			s.end(r, resultStore, storeError(err))
			return
		}
	}
	s.mu.Lock()
	r.trimmed = max(r.trimmed, to)
	next := r.taken >= r.delivered && r.trimmable() == 0 // more may have been taken meanwhile
	s.mu.Unlock()
	if next && !r.gone.Load() && !s.page(r) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case r.ended:
	case r.trimmable() > 0, !r.gone.Load() && r.taken >= r.delivered:
		s.putLocked(r, &s.ready)
	case r.gone.Load():
		s.forgetLocked(r)
	default:
		r.rests = time.Now()
		s.putLocked(r, &s.waiting)
	}
}

// answered notes the end of the wait for the store.
func (s *Service) answered(r *replay) {
	r.looked = true
	s.meters.wait.Update(time.Since(r.since).Seconds())
}

// page reads a page and sends it. False means that the replay has ended.
func (s *Service) page(r *replay) bool {
	most := s.cfg.Page
	if r.window > 0 {
		most = min(most, r.window)
	}
	r.forgotten.Store(false) // before the read: what is forgotten from now on may be in it
	ctx, cancel := context.WithTimeout(s.ctx, storeTimeout)
	entries, more, err := s.cfg.Store.Read(ctx, r.user, r.passed, most, pageBytes)
	cancel()
	switch {
	case err != nil:
		s.end(r, resultStore, storeError(err))
		return false
	case len(entries) == 0 && more:
		s.end(r, resultStore, storeError(errors.New("an empty page that is not the last")))
		return false
	case len(entries) == 0:
		s.end(r, resultComplete, nil)
		return false
	}
	messages, how, why := s.deliver(r, entries)
	s.meters.messages.Add(messages)
	s.mu.Lock()
	if r.asker == nil {
		r.taken = r.delivered // the push has waited for the client
	}
	call := r.call
	if messages > 0 || why == nil {
		r.call = nil
	}
	s.mu.Unlock()
	if call != nil && (messages > 0 || why == nil) {
		call <- answer{messages: messages}
	}
	if why != nil {
		s.end(r, how, why)
	}
	return why == nil
}

// deliver sends a page, and says how many messages the node has taken, and why not all.
func (s *Service) deliver(r *replay, page []store.Entry) (messages int, how result, why error) {
	for len(page) > 0 {
		sent := s.send(r, page)
		over := false // one of sent was passed over, so the node may have refused those behind it
		rest := page[len(sent):]
		delivered, passed := r.delivered, r.passed
	settle:
		for i := range sent {
			m := &sent[i]
			switch {
			case m.taken:
				messages++
				delivered, passed = page[i].Seq, page[i].Seq
			case m.never:
				s.meters.over.Inc()
				over, passed = true, page[i].Seq
			case over && !errors.Is(m.why, errAway):
				rest = page[i:] // once more, as what follows the last one that was taken
				break settle
			default:
				how, why = resultNode, m.why
				switch {
				case errors.Is(why, errAway):
					how = resultAway
				case !errors.Is(why, engine.ErrDraining) && !errors.Is(why, engine.ErrOverloaded):
					why = fmt.Errorf("%w: %w", ErrNotTaken, why)
				}
				break settle
			}
		}
		s.mu.Lock()
		r.delivered, r.passed = delivered, passed
		s.mu.Unlock()
		if why != nil || r.gone.Load() || r.forgotten.Load() || s.ctx.Err() != nil {
			return messages, how, why
		}
		page = rest
	}
	return messages, how, nil
}

// message is a stored message on its way.
type message struct {
	// Static.
	push    engine.Push
	options engine.Options
	place   engine.Replay
	expires time.Time
	round   *round

	// Written before settled is set, or by the sender of a message that was not started.
	taken bool // the node has it
	never bool // no other try can deliver it
	why   error

	settled atomic.Bool
}

// round is a number of messages that are waited for together.
type round struct {
	left atomic.Int32
	done chan struct{}
}

func (w *round) leave() {
	if w.left.Add(-1) == 0 {
		close(w.done)
	}
}

// send starts the messages of a page in order, and waits for them. It stops at the first that is refused at once, and
// where the replay is not wanted any more: what it returns may be shorter than the page.
func (s *Service) send(r *replay, page []store.Entry) []message {
	s.mu.Lock()
	r.sent = page[len(page)-1].Seq
	s.mu.Unlock()
	w := &round{done: make(chan struct{})}
	w.left.Store(1)
	sent, after := make([]message, len(page)), r.delivered
	for i := range page {
		m := &sent[i]
		if r.gone.Load() || r.forgotten.Load() || s.ctx.Err() != nil {
			sent = sent[:i]
			break
		}
		m.prepare(r, &page[i], after, w)
		if m.expired() {
			m.never = true
			continue
		}
		w.left.Add(1)
		if err := s.cfg.Start(&m.push, m); err != nil {
			w.left.Add(-1)
			_, invalid := errors.AsType[*engine.InvalidError](err)
			m.never, m.why = invalid, err
			m.settled.Store(true)
		}
		refused := m.settled.Load() && !m.taken
		if refused && !m.never {
			sent = sent[:i+1]
			break
		}
		if !refused {
			after = page[i].Seq
		}
	}
	w.leave()
	<-w.done // each push ends by its deadline
	return sent
}

// prepare makes the push of an entry that stands behind place after.
func (m *message) prepare(r *replay, e *store.Entry, after uint64, w *round) {
	now := time.Now()
	m.expires, m.round = e.Expires, w
	m.place = engine.Replay{Node: r.node, Gate: r.gate, Seq: e.Seq, After: after, Room: e.Message.Room}
	m.options = engine.Options{
		MessageID: e.Message.MessageID, Sender: e.Message.Sender, PayloadHash: e.Message.PayloadHash, CollapseKey: e.Message.CollapseKey,
		TTL: e.Expires.Sub(now), Replay: &m.place,
	}
	m.push.Request = engine.Request{
		Kind: engine.ToUser, User: r.user, Options: &m.options, Timeout: sendTimeout, Arrived: now,
		// It was checked when it was taken, by the limits of then.
		Payload: e.Message.Payload, Content: engine.Content{Present: true},
	}
	if len(r.user) > ids.MaxBytes { // with a tenant before it
		tenant, _, _ := strings.Cut(r.user, string(ids.Separator))
		m.push.Scope = ids.Scope(tenant)
	}
	if r.gate == 0 { // nobody says what the client takes, but a receipt
		m.options.ClientAck, m.options.AckTimeout = true, ackTimeout
		m.push.Timeout = sendTimeout + ackTimeout
	}
}

// expired tells whether the message is worth nothing any more. A node is told milliseconds, so it may find so earlier.
func (m *message) expired() bool { return time.Until(m.expires) < 10*time.Millisecond }

// Complete implements engine.Completer.
func (m *message) Complete(p *engine.Push) {
	defer m.round.leave()
	defer m.settled.Store(true)
	result, err := p.Result()
	switch {
	case err != nil:
		m.why = err
	case result.Delivered == 1:
		m.taken = true
		return
	case result.Offline == 1:
		m.why = errAway
	default:
		m.why = errors.New("unknown outcome")
		if len(result.NodeFailures) > 0 {
			m.why = errors.New(result.NodeFailures[0].Reason)
			m.never = strings.HasSuffix(result.NodeFailures[0].Reason, engine.DropReused.String())
		}
	}
	m.never = m.never || m.expired()
}

// storeError is an error of the store as others see it, nil for none.
func storeError(err error) error {
	switch {
	case err == nil || errors.Is(err, ErrStore) || errors.Is(err, errInternal):
		return err
	case errors.Is(err, engine.ErrSpoolDown):
		return fmt.Errorf("store: %w", err)
	default:
		return fmt.Errorf("%w: %w", ErrStore, err)
	}
}
