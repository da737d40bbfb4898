package roomlog

import (
	"container/list"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/push-manager/push-manager/transport/link"
	"github.com/push-manager/push-manager/transport/store"
)

// read is one that is open. Guarded by Service.mu.
type read struct {
	// Static.
	stream *stream
	gate   uint64
	room   string
	part   int
	epoch  uint64
	since  time.Time

	after uint64
	names bool          // the node has named a place in the partition
	want  uint64        // the page speaks of everything up to here at least
	at    *list.Element // in Service.open, nil once it has ended
}

// answer is a page for whom it is. It is sent without a lock.
type answer struct {
	to   link.LogAsker
	page *link.LogPage
}

func send(out []answer) {
	for _, a := range out {
		a.to.Page(a.page)
	}
}

// Read implements link.RoomLogs.
func (s *Service) Read(a link.LogAsker, ask link.LogRead) {
	r := &read{gate: ask.Gate, room: ask.Room, epoch: ask.Epoch, since: time.Now()}
	why := s.guard(func() error { r.part = s.cfg.Logs.Partition(ask.Room); return nil })
	if r.names = why == nil && r.part < len(ask.After); r.names {
		r.after = ask.After[r.part]
	}
	s.mu.Lock()
	st := s.streamLocked(a)
	switch {
	case st.reads[ask.Gate] != nil:
		s.mu.Unlock()
		s.meters.violations.Inc() // its answer is on its way
		return
	case why != nil:
	case s.closed:
		why = errClosed
	case s.open.Len() >= maxReads:
		why = errBusy
	default:
		r.stream = st
		st.reads[r.gate] = r
		r.at = s.open.PushBack(r)
		s.fresh = append(s.fresh, r)
	}
	s.mu.Unlock()
	if why != nil {
		s.meters.ended[resultRefused].Inc()
		a.Page(&link.LogPage{Gate: ask.Gate, Error: why.Error()})
		return
	}
	signal(s.asked)
}

// endLocked ends a read. Whoever finds it in a list later leaves it alone.
func (s *Service) endLocked(r *read, how result) {
	s.open.Remove(r.at)
	r.at = nil
	delete(r.stream.reads, r.gate)
	s.meters.ended[how].Inc()
	if how < resultGone {
		s.meters.wait.Update(time.Since(r.since).Seconds())
	}
}

func (s *Service) failLocked(r *read, how result, why error) answer {
	s.endLocked(r, how)
	return answer{r.stream.asker, &link.LogPage{Gate: r.gate, Error: why.Error()}}
}

// gapLocked answers that what the node has missed is not known.
func (s *Service) gapLocked(g *generation, r *read) answer {
	s.endLocked(r, resultGap)
	return answer{r.stream.asker, &link.LogPage{
		Gate: r.gate, Epoch: g.epoch, Partition: uint32(r.part), Seq: g.parts[r.part].head, Gap: true,
	}}
}

// sweepLocked ends reads that have waited for too long.
func (s *Service) sweepLocked(now time.Time) (out []answer) {
	for at := s.open.Front(); at != nil; at = s.open.Front() {
		r, _ := at.Value.(*read)
		if now.Sub(r.since) < readTimeout {
			break
		}
		out = append(out, s.failLocked(r, resultLate, errLate))
	}
	if len(out) > 0 {
		ended := func(r *read) bool { return r.at == nil }
		s.fresh = slices.DeleteFunc(s.fresh, ended)
		if s.gen != nil {
			for _, p := range s.gen.parts {
				p.waiting = slices.DeleteFunc(p.waiting, ended)
			}
		}
	}
	return out
}

// resolveLocked goes on with reads for which Heads was called after they came.
func (s *Service) resolveLocked(batch []*read) (out []answer) {
	g := s.gen
	for _, r := range batch {
		switch {
		case r.at == nil:
		case r.part >= len(g.parts):
			out = append(out, s.failLocked(r, resultStore, errInternal))
		case r.epoch != g.epoch, r.after > g.parts[r.part].head:
			out = append(out, s.gapLocked(g, r))
		case !r.names:
			p := g.parts[r.part]
			s.endLocked(r, resultNothing)
			out = append(out, answer{r.stream.asker, &link.LogPage{Gate: r.gate, Epoch: g.epoch, Partition: p.number, Seq: p.head}})
		default:
			p := g.parts[r.part]
			if r.want = p.head; p.to < r.want {
				p.waiting = append(p.waiting, r)
			} else {
				out = s.serveLocked(g, r, out)
			}
		}
	}
	return out
}

// arrivedLocked goes on with reads for which a partition has come far enough.
func (s *Service) arrivedLocked(g *generation, p *partition) (out []answer) {
	if len(p.waiting) == 0 {
		return nil
	}
	waiting := p.waiting
	p.waiting = nil
	for _, r := range waiting {
		switch {
		case r.at == nil:
		case r.want > p.to:
			p.waiting = append(p.waiting, r)
		default:
			out = s.serveLocked(g, r, out)
		}
	}
	return out
}

// serveLocked answers a read whose partition has come far enough, or has the log read for it.
func (s *Service) serveLocked(g *generation, r *read, out []answer) []answer {
	p := g.parts[r.part]
	page := &link.LogPage{Gate: r.gate, Epoch: g.epoch, Partition: p.number, Seq: p.to}
	if r.after >= p.from && p.lastOf(r.room) <= r.after {
		s.endLocked(r, resultNothing)
		return append(out, answer{r.stream.asker, page})
	}
	if t := g.tails.of(r.room); t != nil && t.from <= r.after {
		page.Entries = pageOf(t.entries, r.after)
		cut(page, t.entries)
		s.endLocked(r, resultTail)
		return append(out, answer{r.stream.asker, page})
	}
	s.fillLocked(g, r)
	return out
}

// pageOf is what of a list is behind a place, as much as a page has.
func pageOf(list []link.LogEntry, after uint64) []link.LogEntry {
	start, _ := slices.BinarySearchFunc(list, after, func(e link.LogEntry, seq uint64) int {
		if e.Place.Seq <= seq {
			return -1
		}
		return 1
	})
	list = list[start:]
	n, bytes := 0, 0
	for n < min(len(list), pageMost) {
		if bytes += sizeOf(list[n].Message); n > 0 && bytes > pageBytes {
			break
		}
		n++
	}
	return list[:n:n]
}

// cut has a page end where its messages do, if more of list stands behind them.
func cut(page *link.LogPage, list []link.LogEntry) {
	n := len(page.Entries)
	if n == 0 {
		return
	}
	last := page.Entries[n-1].Place.Seq
	if last < list[len(list)-1].Place.Seq {
		page.Seq, page.More = last, true
	}
	page.Seq = max(page.Seq, last) // ReadLog may be ahead of the follower
}

// fill is a call of ReadLog, with the reads that wait for it. Guarded by Service.mu.
type fill struct {
	gen   *generation
	room  string
	part  int
	reads []*read
	tail  *tail  // nil until it is under way
	after uint64 // it reads behind, once it is under way
	to    uint64 // where the partition was then
	last  uint64 // the last place of the room that the index knew then, 0 for none behind after
}

// fillLocked has the log read for r. Those that wait for the same room share it.
func (s *Service) fillLocked(g *generation, r *read) {
	f := g.fills[r.room]
	if f == nil {
		f = &fill{gen: g, room: r.room, part: r.part}
		g.fills[r.room] = f
		g.line = append(g.line, f)
		if g.readers < readers && !s.closed {
			g.readers++
			s.goroutines.Go(func() { s.fill(g) })
		}
	}
	f.reads = append(f.reads, r)
}

// fill reads logs until nobody waits for one.
func (s *Service) fill(g *generation) {
	for {
		f := s.nextFill(g)
		if f == nil {
			return
		}
		var page store.LogPage
		err := s.guard(func() (err error) {
			ctx, cancel := context.WithTimeout(g.ctx, storeTimeout)
			defer cancel()
			page, err = s.cfg.Logs.ReadLog(ctx, f.room, f.after, tailMost, tailBytes)
			if err == nil {
				err = f.check(&page)
			}
			return err
		})
		s.meters.fills.Inc()
		var out []answer
		fill := func() error {
			s.locked(func() { out = s.filledLocked(f, &page, err) })
			return nil
		}
		if failed := s.guard(fill); failed != nil { // Those who are left must not wait for ever.
			err = failed
			_ = s.guard(fill)
		}
		send(out)
	}
}

// nextFill takes the next of the line for which somebody waits.
func (s *Service) nextFill(g *generation) *fill {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(g.line) > 0 && g.ctx.Err() == nil {
		f := g.line[0]
		g.line = g.line[1:]
		f.reads = slices.DeleteFunc(f.reads, func(r *read) bool { return r.at == nil })
		if len(f.reads) == 0 {
			delete(g.fills, f.room)
			continue
		}
		p := g.parts[f.part]
		f.after, f.to = f.reads[0].after, p.to
		for _, r := range f.reads {
			f.after = min(f.after, r.after)
		}
		if f.last = p.lastOf(f.room); f.last <= f.after {
			f.last = 0
		}
		if f.tail = g.tails.of(f.room); f.tail == nil {
			f.tail = g.tails.make(f.room, p.to)
		}
		return f
	}
	g.readers--
	return nil
}

// check says what is wrong with a page, and completes what it says of where it ends. It must not panic later.
func (f *fill) check(page *store.LogPage) error {
	last := f.after
	for i := range page.Entries {
		e := &page.Entries[i]
		if e.Message == nil || e.Place.Seq <= last || e.Place.Epoch != f.gen.epoch {
			return fmt.Errorf("%w: a page out of order", errInternal)
		}
		last = e.Place.Seq
	}
	if page.More && max(page.Last, last) == f.after {
		return fmt.Errorf("%w: an empty page that is not the last", errInternal)
	}
	page.Last = max(page.Last, last)
	if !page.More {
		if page.Last < f.last && !page.Gap {
			return errLate // of a replica that lags
		}
		page.Last = max(page.Last, f.to)
	}
	return nil
}

// filledLocked answers those who have waited for a page.
func (s *Service) filledLocked(f *fill, page *store.LogPage, err error) (out []answer) {
	g := f.gen
	delete(g.fills, f.room)
	if err != nil {
		s.meters.errors[callRead].Inc()
		for _, r := range f.reads {
			if r.at != nil {
				out = append(out, s.failLocked(r, resultStore, err))
			}
		}
		return out
	}
	entries := make([]link.LogEntry, len(page.Entries))
	for i := range page.Entries {
		entries[i] = entryOf(&page.Entries[i])
	}
	from := f.after
	if page.Gap { // who comes from further back must hear of it, too
		if from = page.Last; len(entries) > 0 {
			from = entries[0].Place.Seq - 1
		}
	}
	if t := f.tail; g.tails.byRoom[f.room] == t && from < t.from && t.from <= page.Last {
		g.tails.put(t, from, entries)
	}
	for _, r := range f.reads {
		switch {
		case r.at == nil:
		case r.after < f.after || r.after >= page.Last && (page.More || page.Last < r.want): // it came while this was under way
			out = s.serveLocked(g, r, out)
		default:
			p := &link.LogPage{Gate: r.gate, Epoch: g.epoch, Partition: uint32(f.part), Seq: page.Last, More: page.More || page.Last < r.want}
			p.Gap = page.Gap && r.after < from
			p.Entries = pageOf(entries, r.after)
			cut(p, entries)
			s.endLocked(r, resultStored)
			out = append(out, answer{r.stream.asker, p})
		}
	}
	return out
}
