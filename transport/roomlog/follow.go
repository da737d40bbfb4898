package roomlog

import (
	"context"
	"slices"
	"time"

	"github.com/push-manager/push-manager/internal/pause"
	"github.com/push-manager/push-manager/transport/link"
	"github.com/push-manager/push-manager/transport/store"
)

const (
	// settle is how old a message is when a mark names it, and markEvery the pause between two looks.
	settle, markEvery = 500 * time.Millisecond, 500 * time.Millisecond
	// markPause is the least pause after a look, where nodes begin to follow.
	markPause = 50 * time.Millisecond
	// marksMost is how many marks of a partition a stream gets in a look.
	marksMost = 32
	// quiet is after how long a stream that has had no mark gets an empty one, and stuck after how long without a follower it
	// does not: then the node shall follow another instance.
	quiet, stuck = 5 * time.Second, 5 * time.Second
	// warm is from how far before the end a partition is followed at first, so that nodes go on where the instance before this
	// one has ended.
	warm = 1024
)

// generation is what is known of the logs in one epoch.
type generation struct {
	// Static.
	epoch  uint64
	ctx    context.Context //nolint:containedctx // of its followers and fills
	cancel context.CancelFunc

	// Guarded by Service.mu.
	parts   []*partition
	tails   tails
	fills   map[string]*fill // by room
	line    []*fill          // those of fills that wait for a reader
	readers int
}

// heads asks for the ends of the logs: for reads, each of which has a call that begins after it came, and to find a new epoch.
func (s *Service) heads() {
	wait := firstPause
	for {
		s.mu.Lock()
		batch := s.fresh
		s.fresh = nil
		if s.gen != nil {
			for _, p := range s.gen.parts {
				p.floor = max(p.head, p.to)
			}
		}
		s.mu.Unlock()
		var epoch uint64
		var heads []uint64
		err := s.guard(func() (err error) {
			ctx, cancel := context.WithTimeout(s.ctx, storeTimeout)
			defer cancel()
			epoch, heads, err = s.cfg.Logs.Heads(ctx)
			if err == nil && len(heads) == 0 {
				err = errInternal
			}
			return err
		})
		if s.ctx.Err() != nil {
			return
		}
		var out []answer
		if err == nil {
			err = s.guard(func() error {
				s.locked(func() {
					s.answers++
					out = append(s.adoptLocked(epoch, heads), s.resolveLocked(batch)...)
				})
				return nil
			})
		}
		known := false
		s.locked(func() {
			if err != nil {
				s.meters.errors[callHeads].Inc()
				for _, r := range batch {
					if r.at != nil {
						out = append(out, s.failLocked(r, resultStore, err))
					}
				}
			} else {
				wait = firstPause
			}
			known = s.gen != nil
		})
		send(out)
		next := headsEvery
		if !known {
			next = pause.Jitter(wait)
			wait = min(2*wait, lastPause)
		}
		timer := time.NewTimer(next)
		select {
		case <-s.asked:
		case <-timer.C:
		case <-s.ctx.Done():
		}
		timer.Stop()
	}
}

// adoptLocked notes where the logs end. A new generation begins with another epoch, or where the store has lost what it had told.
func (s *Service) adoptLocked(epoch uint64, heads []uint64) (out []answer) {
	if g := s.gen; g != nil {
		same := g.epoch == epoch && len(g.parts) == len(heads)
		for i := range heads {
			same = same && heads[i] >= g.parts[i].floor
		}
		if same {
			for i := range heads {
				g.parts[i].head = heads[i]
				g.parts[i].checkLocked(time.Now())
			}
			return nil
		}
		g.cancel()
		s.meters.renewals.Inc()
		s.cfg.Logger.Warn("the logs of rooms have begun anew", "epoch", epoch, "before", g.epoch)
	}
	if s.closed {
		return nil
	}
	old := s.gen
	g := &generation{epoch: epoch, fills: map[string]*fill{}}
	g.ctx, g.cancel = context.WithCancel(s.ctx)
	g.tails = tails{byRoom: map[string]*tail{}, most: s.cfg.TailBytes}
	for i, head := range heads {
		p := newPartition(i, len(heads), head-min(head, warm))
		p.head = head
		g.parts = append(g.parts, p)
		s.goroutines.Go(func() { s.follow(g, p) })
	}
	s.gen = g
	if old != nil {
		for _, r := range old.pending() {
			if r.part < len(g.parts) {
				out = append(out, s.gapLocked(g, r))
			} else {
				out = append(out, s.failLocked(r, resultStore, errInternal))
			}
		}
	}
	signal(s.told)
	return out
}

// pending are the reads that wait in a generation.
func (g *generation) pending() (list []*read) {
	for _, p := range g.parts {
		list = append(list, p.waiting...)
		p.waiting = nil
	}
	for _, f := range g.fills {
		list = append(list, f.reads...)
		f.reads = nil
	}
	return slices.DeleteFunc(list, func(r *read) bool { return r.at == nil })
}

// follow follows a partition for as long as the generation lives.
func (s *Service) follow(g *generation, p *partition) {
	wait := firstPause
	for g.ctx.Err() == nil {
		ctx, cancel := context.WithCancel(g.ctx)
		s.mu.Lock()
		after := p.to
		p.stop = cancel
		s.mu.Unlock()
		err := s.guard(func() error {
			return s.cfg.Logs.Follow(ctx, int(p.number), after,
				func(e store.LogEntry) bool { return s.tell(g, p, &e) },
				func(seq uint64) { s.caughtUp(g, p, seq) })
		})
		stopped := ctx.Err() != nil
		cancel()
		if g.ctx.Err() != nil {
			return
		}
		if stopped {
			err = errLate
		}
		s.meters.errors[callFollow].Inc()
		s.mu.Lock()
		if p.to > after || p.broken.IsZero() {
			wait = firstPause
		}
		first := p.broken.IsZero()
		if first {
			p.broken = time.Now()
		}
		s.mu.Unlock()
		if first {
			s.cfg.Logger.Warn("the logs of rooms are not followed", "partition", p.number, "error", err)
		}
		signal(s.asked) // it may be another epoch
		pause.For(g.ctx, pause.Jitter(wait))
		wait = min(2*wait, lastPause)
	}
}

// tell takes the next message of a partition. False: it is of another epoch.
func (s *Service) tell(g *generation, p *partition, e *store.LogEntry) bool {
	if e.Message == nil || e.Place.Epoch != g.epoch {
		return false
	}
	var out []answer
	s.locked(func() {
		if s.followedLocked(p); e.Place.Seq > p.to {
			p.add(e.Message.Room, e.Place.Seq, time.Now())
			g.tails.add(e)
			out = s.arrivedLocked(g, p)
		}
	})
	send(out)
	return true
}

// caughtUp notes that a partition has come as far as a place.
func (s *Service) caughtUp(g *generation, p *partition, seq uint64) {
	var out []answer
	s.locked(func() {
		s.followedLocked(p)
		p.to = max(p.to, seq)
		out = s.arrivedLocked(g, p)
	})
	send(out)
}

// followedLocked notes that a partition is followed.
func (s *Service) followedLocked(p *partition) {
	if !p.broken.IsZero() {
		s.cfg.Logger.Info("the logs of rooms are followed again", "partition", p.number, "after", time.Since(p.broken))
		p.broken = time.Time{}
	}
}

// following is the place of a stream that follows. Owned by mark, but for the first three fields, which are static.
type following struct {
	epoch uint64   // of after
	after []uint64 // as the node has said
	asked uint64   // answers of Heads before it came

	gen    *generation // of places; nil at first
	places []place     // by partition
	last   time.Time   // of the last mark
}

// place is up to where a stream has been told.
type place struct {
	seq   uint64
	begun bool // there has been a mark
}

// Follow implements link.RoomLogs.
func (s *Service) Follow(a link.LogAsker, epoch uint64, after []uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	st := s.streamLocked(a)
	if st.follow == nil {
		signal(s.told)
	} // who changes its mind waits for the ticker
	st.follow = &following{epoch: epoch, after: after, asked: s.answers}
}

// mark tells streams what was written, and ends reads that have waited for too long.
func (s *Service) mark() {
	ticker := time.NewTicker(markEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-s.told:
		case <-s.ctx.Done():
			return
		}
		_ = s.guard(func() error {
			s.look(time.Now())
			return nil
		})
		if !pause.For(s.ctx, markPause) {
			return
		}
	}
}

// marking is a mark on its way to a stream.
type marking struct {
	to   *stream
	f    *following
	mark *link.LogMark
}

// look does what there is to do at a moment.
func (s *Service) look(now time.Time) {
	var out []answer
	var marks []marking
	s.locked(func() {
		out = s.sweepLocked(now)
		if s.gen != nil {
			marks = s.marksLocked(s.gen, now)
		}
	})
	send(out)
	var refused *marking // what follows it for the same stream and partition has to wait, too
	for i := range marks {
		m := &marks[i]
		at := &m.f.places[m.mark.Partition]
		if refused != nil && refused.f == m.f && refused.mark.Partition == m.mark.Partition {
			continue
		}
		if !m.to.asker.Mark(m.mark) {
			refused = m
			s.meters.marksRefused.Inc()
			continue
		}
		s.meters.marks.Inc()
		*at, m.f.last = place{seq: m.mark.Seq, begun: true}, now
	}
}

// from is a place in a partition from which marks go on.
type from struct {
	partition int
	seq       uint64
}

// marksLocked makes the marks for all streams. Those at the same place share them.
func (s *Service) marksLocked(g *generation, now time.Time) (list []marking) {
	ready, healthy := make([]uint64, len(g.parts)), true
	for i, p := range g.parts {
		ready[i] = p.settled(now.Add(-settle))
		healthy = healthy && (p.broken.IsZero() || now.Sub(p.broken) < stuck)
	}
	made := map[from][]*link.LogMark{}
	for _, st := range s.streams {
		f := st.follow
		if f == nil {
			continue
		}
		if !s.beginLocked(f, g, ready) {
			continue
		}
		some := false
		for i, p := range g.parts {
			at := f.places[i]
			after := max(at.seq, p.from) // what was before is not known any more
			if at.begun && at.seq >= ready[i] {
				continue
			}
			key := from{i, after}
			marks, ok := made[key]
			if !ok {
				marks = p.marks(g, after, max(after, ready[i]))
				made[key] = marks
			}
			for _, m := range marks {
				list = append(list, marking{st, f, m})
				some = true
			}
		}
		if !some && healthy && now.Sub(f.last) >= quiet {
			key := from{0, f.places[0].seq}
			if made[key] == nil {
				made[key] = []*link.LogMark{g.parts[0].mark(g.epoch, len(g.parts), key.seq, key.seq)}
			}
			list = append(list, marking{st, f, made[key][0]})
		}
	}
	return list
}

// beginLocked gives f places in this generation: those that the node knows, or the ends. Where the node knows more than this
// instance, the store is asked whether it has lost it. False: it has not answered yet.
func (s *Service) beginLocked(f *following, g *generation, ready []uint64) bool {
	if f.gen == g {
		return true
	}
	epoch, after := f.epoch, f.after
	if f.gen != nil { // it was told of another one since
		epoch, after = f.gen.epoch, nil
		for _, at := range f.places {
			after = append(after, at.seq)
		}
	}
	places := make([]place, len(g.parts))
	for i, p := range g.parts {
		places[i].seq = ready[i]
		switch {
		case epoch != g.epoch || i >= len(after):
		case after[i] <= max(p.head, p.to):
			places[i].seq = after[i]
		case f.gen == nil && s.answers < f.asked+2: // one of the two was asked after the node
			signal(s.asked)
			return false
		}
	}
	f.gen, f.places = g, places
	return true
}

// marks are those between two places, so many at most.
func (p *partition) marks(g *generation, after, to uint64) (list []*link.LogMark) {
	for {
		m := p.mark(g.epoch, len(g.parts), after, to)
		list = append(list, m)
		if after = m.Seq; after >= to || len(list) == marksMost {
			return list
		}
	}
}
