package node

import (
	"container/heap"
	"errors"
	"fmt"
	"slices"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

// The times and bounds of reading the logs of rooms.
const (
	// Live messages of a room wait for a member that has joined until it has had what the log has. Not for longer than
	// logPatience without something out of the log, and holdMost in all.
	logPatience, holdMost = 2 * time.Second, 10 * time.Second
	// Members of a room who come back together are read for together: a read waits so long for others, and longer while
	// many come.
	gatherFirst, gatherNext = 20 * time.Millisecond, 100 * time.Millisecond
	// A read that is not answered in logReadTimeout has failed.
	logReadTimeout = 5 * time.Second
	// logReadsMost bounds the reads that are open. A manager takes no more of one stream.
	logReadsMost = 64
	// pageBytesMost bounds the pages that have come and were not handed over. What comes beyond it is asked for again.
	pageBytesMost = 32 << 20
	// pageEntriesMost bounds the messages of a page: a manager sends 100.
	pageEntriesMost = 1 << 10
	// A connection that has taken a part of a page is tried again takeRetry later. One that takes nothing, and a room that cannot be
	// read, after firstRetry, then twice as long each.
	takeRetry = 200 * time.Millisecond
	// lacksMost bounds the places of single messages that a member has missed. With more it has missed everything
	// behind the first.
	lacksMost = 64
	// unfair is how long a member waits while those who are farther behind are read for.
	unfair = time.Second
)

// catchUp is what a member that is behind is to be given.
type catchUp struct {
	index int // in logRoom.behind

	// all: everything behind place, which is set once placed. While that is read, low and high are the least and the
	// greatest place that the connection was not given live. Else: lacks alone, rising.
	all, placed bool
	place       uint64
	low, high   uint64
	lacks       []uint64

	goesOn   bool     // it has taken the last page, and needs more
	late     bool     // something was missed since the read under way was asked
	read     *logRead // that is under way for it
	hold     bool     // live messages wait
	joined   time.Time
	since    time.Time // when it was given something
	dueAt    time.Time // when to read for it
	failures int       // of giving, in a row
}

// logRead is a LogRead.
type logRead struct {
	// Static.
	gate    uint64
	room    *logRoom
	st      *stream
	at      time.Time
	after   []uint64
	members []*logMember

	page *logPage // has come; set under roomLogs.mu
}

// behindLocked makes m one that is behind.
func (r *roomLogs) behindLocked(m *logMember, now time.Time) *catchUp {
	if m.up == nil {
		m.up = &catchUp{index: len(m.room.behind), since: now, dueAt: now}
		m.room.behind = append(m.room.behind, m)
		if m.cursor.behind++; m.cursor.behind == 1 {
			r.behind++
		}
	}
	return m.up
}

// dropLocked forgets that m is behind.
func (r *roomLogs) dropLocked(m *logMember) {
	up, room := m.up, m.room
	if up == nil {
		return
	}
	m.releaseLocked()
	last := room.behind[len(room.behind)-1]
	room.behind[up.index], last.up.index = last, up.index
	room.behind[len(room.behind)-1] = nil
	room.behind = room.behind[:len(room.behind)-1]
	if len(room.behind) == 0 {
		room.behind = nil
		r.due.remove(room)
	}
	m.up = nil
	if m.cursor.behind--; m.cursor.behind == 0 {
		r.behind--
	}
}

// caughtUpLocked says that m has had everything.
func (r *roomLogs) caughtUpLocked(m *logMember, now time.Time) {
	r.dropLocked(m)
	r.dirtyLocked(m.cursor, now)
}

// releaseLocked lets live messages pass.
func (m *logMember) releaseLocked() {
	if m.up.hold {
		m.up.hold = false
		m.cursor.holding.Add(-1)
	}
}

func (up *catchUp) heldLongEnough(now time.Time) bool {
	return now.Sub(up.since) >= logPatience || now.Sub(up.joined) >= holdMost
}

// missLocked notes that m was not given the message at seq.
func (r *roomLogs) missLocked(m *logMember, seq uint64, now time.Time) {
	isNew := m.up == nil
	if seq <= m.had && (isNew || !m.up.all) {
		return
	}
	up := r.behindLocked(m, now)
	if up.all {
		up.later(seq)
	} else {
		at, is := slices.BinarySearch(up.lacks, seq)
		if !is {
			up.lacks = slices.Insert(up.lacks, at, seq)
		}
		up.late = true
		if len(up.lacks) > lacksMost {
			up.toAll(seq)
		}
	}
	if isNew {
		r.wantForLocked(m, now)
	}
}

// missedLocked notes that the messages at seqs, which rise, have not come to anybody.
func (r *roomLogs) missedLocked(room *logRoom, seqs []uint64, now time.Time) {
	r.server.count.logMissed.Add(len(seqs))
	for _, m := range room.members {
		if len(seqs) <= lacksMost {
			for _, seq := range seqs {
				r.missLocked(m, seq, now)
			}
			continue
		}
		at, _ := slices.BinarySearch(seqs, m.had+1)
		if m.up != nil && m.up.all {
			at = 0
		}
		if at == len(seqs) {
			continue
		}
		up := r.behindLocked(m, now)
		up.toAll(seqs[at] - 1)
		up.later(seqs[at])
		up.later(seqs[len(seqs)-1])
		r.wantForLocked(m, now)
	}
}

// later notes that the connection was not given seq while it is given everything.
func (up *catchUp) later(seq uint64) {
	if up.low == 0 || seq < up.low {
		up.low = seq
	}
	up.high = max(up.high, seq)
	up.late = true
}

// toAll makes it one that has missed everything behind place, or behind the first that it lacks.
func (up *catchUp) toAll(place uint64) {
	if up.all {
		return
	}
	if len(up.lacks) > 0 {
		place = min(place, up.lacks[0]-1)
		up.later(up.lacks[0])
		up.later(up.lacks[len(up.lacks)-1])
	}
	up.all, up.placed, up.place, up.lacks = true, true, place, nil
}

// start is the place behind which m is to be read for. known: in the partition of the room.
func (m *logMember) start() (place uint64, known bool) {
	switch up := m.up; {
	case !up.all:
		return up.lacks[0] - 1, true
	case up.placed:
		return up.place, true
	}
	return 0, false
}

// wantLocked has the room read when that is due for one of those who are behind.
func (r *roomLogs) wantLocked(room *logRoom, now time.Time) {
	if len(room.behind) == 0 {
		return
	}
	first := room.behind[0]
	for _, m := range room.behind[1:] {
		if m.up.dueAt.Before(first.up.dueAt) {
			first = m
		}
	}
	r.wantForLocked(first, now)
}

// wantForLocked has the room of a member that is behind read when that is due for it.
func (r *roomLogs) wantForLocked(m *logMember, now time.Time) {
	room := m.room
	if room.read != nil {
		return
	}
	gather := gatherFirst
	if now.Sub(room.lastRead) < time.Second {
		gather = gatherNext
	}
	r.wantAtLocked(room, latest(latest(m.up.dueAt, now.Add(gather)), room.readAt))
}

func (r *roomLogs) wantAtLocked(room *logRoom, at time.Time) {
	if room.dueIndex >= 0 && !at.Before(room.dueAt) {
		return // Who joins those who wait does not make them wait longer.
	}
	first := len(r.due) == 0 || at.Before(r.due[0].dueAt)
	r.due.set(room, at)
	if first {
		r.signal()
	}
}

// askLocked reads a room for those for whom it is due. There is a manager that is followed, and the node knows its place.
func (r *roomLogs) askLocked(room *logRoom, now time.Time) {
	members := make([]*logMember, 0, len(room.behind))
	var least, longest *logMember
	for _, m := range room.behind {
		up := m.up
		if up.all && !up.placed && (room.partition >= 0 || m.base() == nil) || now.Before(up.dueAt) {
			continue
		}
		members = append(members, m)
		place, _ := m.start()
		if least == nil {
			least, longest = m, m
			continue
		}
		if at, _ := least.start(); place < at {
			least = m
		}
		if up.since.Before(longest.up.since) {
			longest = m
		}
	}
	if least == nil {
		r.wantLocked(room, now)
		return
	}
	from, known := least.start()
	if place, is := longest.start(); is && place > from && now.Sub(longest.up.since) > unfair {
		from = place
		members = slices.DeleteFunc(members, func(m *logMember) bool { at, _ := m.start(); return at < from })
	}
	after := make([]uint64, r.partitions)
	if known {
		after[room.partition] = from
	} else {
		copy(after, members[0].base())
		for _, m := range members[1:] {
			for i, seq := range m.base() {
				after[i] = min(after[i], seq)
			}
		}
	}
	r.numbers++
	read := &logRead{gate: r.numbers, room: room, st: r.feeder, at: now, after: after, members: members}
	for _, m := range members {
		m.up.read, m.up.late, m.up.low, m.up.high = read, false, 0, 0
	}
	room.read, r.reads[read.gate] = read, read
	r.server.count.logReads.Inc()
	r.feeder.acks.askRead(&pubsub.LogRead{RoomId: room.name, Gate: read.gate, Epoch: r.epoch, After: after})
}

// endReadLocked forgets a read.
func (r *roomLogs) endReadLocked(read *logRead) {
	delete(r.reads, read.gate)
	if read.room.read == read {
		read.room.read = nil
	}
	for _, m := range read.members {
		if m.up != nil && m.up.read == read {
			m.up.read = nil
		}
	}
}

// failLocked ends a read that has failed: the room is read later.
func (r *roomLogs) failLocked(read *logRead, now time.Time) {
	room := read.room
	r.endReadLocked(read)
	r.server.count.logReadsFailed.Inc()
	room.readAt = now.Add(backoff(room.failures))
	room.failures++
	r.wantLocked(room, now)
}

func backoff(failures int) time.Duration { return min(firstRetry<<min(failures, 5), lastRetry) }

var errPage = errors.New("log page")

// logPage takes a LogPage apart.
func (st *stream) logPage(b []byte) (*logPage, error) {
	p := new(logPage)
	if err := p.parse(b); err != nil {
		return nil, err
	}
	if len(p.entries) > pageEntriesMost {
		return nil, fmt.Errorf("%w: %d entries", errPage, len(p.entries))
	}
	d := &st.delivery
	for _, e := range p.entries {
		if err := d.parse(e); err != nil {
			return nil, fmt.Errorf("%w: %w", errPage, err)
		}
		m := &Message{RoomID: d.room, Traceparent: d.traceparent}
		if err := m.parseContent(d.content); err != nil {
			return nil, fmt.Errorf("%w: %w", errPage, err)
		}
		d.wantAck = false // It stays in the log.
		d.hasReplay = false
		if len(d.matches) > 0 {
			return nil, fmt.Errorf("%w: %w", errPage, errPlaced)
		}
		m.Options = st.options(d)
		if m.Options == nil || m.Options.Log == nil {
			return nil, fmt.Errorf("%w: an entry without a place", errPage)
		}
		log := m.Options.Log
		if n := len(p.messages); log.Partition != p.partition || log.Seq == 0 || log.Seq > p.seq || n > 0 && log.Seq <= p.messages[n-1].Options.Log.Seq {
			return nil, fmt.Errorf("%w: %w", errPage, errMark)
		}
		log.Read = true
		p.messages = append(p.messages, m)
	}
	p.entries = nil
	return p, nil
}

// page takes a page that has come. An error ends the stream.
func (r *roomLogs) page(st *stream, p *logPage, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	read := r.reads[p.gate]
	if read == nil || read.st != st || read.page != nil {
		r.server.count.logIgnored.Inc() // It came too late, or was not asked for.
		return nil
	}
	room := read.room
	switch {
	case p.failure != "" || p.epoch != r.epoch || r.pageBytes+p.bytes > pageBytesMost:
		r.failLocked(read, now)
		return nil
	case int(p.partition) >= r.partitions:
		return fmt.Errorf("%w: %w: %d of %d", errPage, errPartition, p.partition, r.partitions)
	case room.partition >= 0 && room.partition != int(p.partition):
		was := room.partition
		r.endReadLocked(read)
		r.againLocked(room, now)
		return fmt.Errorf("%w: %w: a room of %d is in %d", errPage, errPartition, was, p.partition)
	case p.more && p.seq <= read.after[p.partition]:
		return fmt.Errorf("%w: more of it, and nothing in it", errPage)
	}
	for _, m := range p.messages {
		if m.RoomID != "" && m.RoomID != room.name {
			return fmt.Errorf("%w: an entry of another room", errPage)
		}
		m.RoomID = room.name
	}
	if room.partition < 0 && len(room.members) > 0 {
		r.inLocked(room, int(p.partition))
	}
	read.page = p
	r.pages = append(r.pages, read)
	r.pageBytes += p.bytes
	r.signal()
	return nil
}

// given is what became of a page for one member.
type given struct {
	to    *logMember
	after uint64   // where the page begins
	place uint64   // all: what it has had
	lacks []uint64 // else: what it lacked
	taken int      // messages
	full  bool     // the connection does not take more now
	upTo  uint64   // if full: the last that it has had
}

// handOut gives a page to those for whom it was read.
func (r *roomLogs) handOut(read *logRead) {
	after := read.after[read.page.partition]
	r.mu.Lock()
	list := make([]given, 0, len(read.members))
	for _, m := range read.members {
		if m.up == nil || m.up.read != read {
			continue
		}
		// What it has missed since, and stands before the page, is for the next read.
		place, known := m.start()
		lacks := slices.Clone(m.up.lacks)
		if !m.up.all {
			n, _ := slices.BinarySearch(lacks, after+1)
			lacks, place = lacks[n:], after
			known = len(lacks) > 0
		}
		if known && place >= after {
			list = append(list, given{to: m, after: after, place: place, lacks: lacks})
		}
	}
	r.mu.Unlock()
	for i := range list {
		r.handTo(read.page, &list[i])
	}
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pageBytes -= read.page.bytes
	if r.reads[read.gate] != read {
		return // The logs are others.
	}
	room := read.room
	for i := range list {
		g := &list[i]
		r.server.count.logMessages.Add(g.taken)
		if g.to.up != nil && g.to.up.read == read {
			r.advanceLocked(g, read.page, now)
		}
	}
	r.endReadLocked(read)
	room.failures, room.lastRead = 0, now
	r.wantLocked(room, now)
	goesOn := slices.ContainsFunc(room.behind, func(m *logMember) bool { return m.up.goesOn && !now.Before(m.up.dueAt) })
	switch {
	case goesOn && read.page.more:
		r.wantAtLocked(room, now)
	case goesOn: // Something was held meanwhile.
		r.wantAtLocked(room, now.Add(gatherFirst))
	}
}

func (r *roomLogs) handTo(p *logPage, g *given) {
	c := g.to.cursor
	g.upTo = g.place
	for _, m := range p.messages {
		log := m.Options.Log
		if g.lacks != nil {
			if _, is := slices.BinarySearch(g.lacks, log.Seq); !is {
				continue
			}
		} else if log.Seq <= g.place {
			continue
		}
		if !log.excludes(c.user) {
			if !r.give(c, m) {
				g.full = true
				return
			}
			g.taken++
		}
		g.upTo = log.Seq
	}
}

// advanceLocked notes what a member was given.
func (r *roomLogs) advanceLocked(g *given, p *logPage, now time.Time) {
	m, up := g.to, g.to.up
	upTo := max(g.place, p.seq)
	if g.full {
		upTo = g.upTo
	}
	if up.all != (g.lacks == nil) { // It has missed more meanwhile.
		up.dueAt = now
		return
	}
	if p.gap && g.before(p.firstSeq()) {
		r.gapLocked(m, now)
	}
	whole := !g.full && !p.more // All that was stored when the read came.
	was := up.place
	had := len(up.lacks)
	if up.all {
		up.place = max(up.place, upTo)
		m.had = min(up.place, p.seq) // less where the place that it has brought is none
		if whole && (!up.late || up.high <= p.seq) {
			r.caughtUpLocked(m, now)
			return
		}
	} else {
		up.lacks = slices.DeleteFunc(up.lacks, func(seq uint64) bool {
			_, was := slices.BinarySearch(g.lacks, seq)
			return was && seq <= upTo || whole && !up.late && seq > g.after
		})
		if len(up.lacks) == 0 {
			r.caughtUpLocked(m, now)
			return
		}
	}
	if up.place > was || len(up.lacks) < had {
		up.since = now
	}
	up.goesOn = !g.full
	switch {
	case !g.full:
		up.dueAt, up.failures = now, 0
	case g.taken > 0:
		up.dueAt, up.failures = now.Add(takeRetry), 0
	default:
		up.dueAt = now.Add(backoff(up.failures))
		up.failures++
	}
}

// before tells that something behind the place of the member stood before the first message of its page.
func (g *given) before(first uint64) bool {
	return first == 0 || g.lacks == nil && g.place < first || g.lacks != nil && g.lacks[0] < first
}

// firstSeq is the place of the first message, 0 without one.
func (p *logPage) firstSeq() uint64 {
	if len(p.messages) == 0 {
		return 0
	}
	return p.messages[0].Options.Log.Seq
}

// run is the loop: it reads rooms, gives what was read, and tells clients their positions. It sleeps until something is due.
func (r *roomLogs) run() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		now := time.Now()
		r.look(now)
		for {
			read := r.nextPage()
			if read == nil {
				break
			}
			r.handOut(read)
		}
		r.tell(time.Now())
		if wait, is := r.wait(time.Now()); is {
			timer.Reset(wait)
		} else {
			timer.Stop()
		}
		select {
		case <-r.stop:
			return
		case <-r.wake:
		case <-timer.C:
		}
	}
}

func (r *roomLogs) nextPage() *logRead {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.pages) == 0 || r.closed {
		r.pages = nil
		return nil
	}
	read := r.pages[0]
	r.pages = r.pages[1:]
	return read
}

// look asks for what is due, and gives up what was not answered.
func (r *roomLogs) look(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, read := range r.reads {
		if read.page == nil && now.Sub(read.at) >= logReadTimeout {
			r.failLocked(read, now)
		}
	}
	if r.feeder != nil && len(r.streams) > 1 && now.Sub(r.heard) >= feederPatience {
		r.turn++
		r.feeder = nil
		r.followLocked(now)
	}
	for r.feeder != nil && r.ready && len(r.reads) < logReadsMost && len(r.due) > 0 && !now.Before(r.due[0].dueAt) {
		room := r.due[0]
		r.due.remove(room)
		if room.read == nil {
			r.askLocked(room, now)
		}
	}
	if front := r.byAge.Front(); front != nil && r.ready {
		for e := front; e != nil; e = e.Next() {
			c := e.Value.(*Cursor)
			if now.Sub(c.settled) < resumeAge {
				break
			}
			r.dirtyLocked(c, now)
		}
	}
}

// wait is how long the loop may sleep. False: until it is woken.
func (r *roomLogs) wait(now time.Time) (wait time.Duration, is bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var at time.Time
	sooner := func(t time.Time) {
		if !is || t.Before(at) {
			at, is = t, true
		}
	}
	for _, read := range r.reads {
		sooner(read.at.Add(logReadTimeout))
	}
	if r.feeder != nil && len(r.streams) > 1 {
		sooner(r.heard.Add(feederPatience))
	}
	if r.feeder != nil && r.ready && len(r.reads) < logReadsMost && len(r.due) > 0 {
		sooner(r.due[0].dueAt)
	}
	if !r.tellAt.IsZero() {
		sooner(r.tellAt)
	}
	if front := r.byAge.Front(); front != nil && r.ready {
		if c := front.Value.(*Cursor); !c.dirty {
			sooner(c.settled.Add(resumeAge))
		}
	}
	return max(at.Sub(now), 0), is
}

// told is what one client is told.
type told struct {
	c      *Cursor
	joined time.Time // what it was then
	epoch  uint64
	places []uint64
	text   string
}

// tell tells clients their positions, and where something is missing.
func (r *roomLogs) tell(now time.Time) {
	r.mu.Lock()
	if r.tellAt.IsZero() || now.Before(r.tellAt) {
		r.mu.Unlock()
		return
	}
	r.tellAt = time.Time{}
	gaps := r.gaps
	r.gaps = nil
	var list []told
	kept := r.dirty[:0]
	for _, c := range r.dirty {
		switch {
		case c.closed:
		case now.Sub(c.settled) < resumeEvery || now.Sub(c.joined) < joinQuiet || len(c.expected) > 0:
			kept = append(kept, c)
			continue
		default:
			if places, text, is := r.positionLocked(c); is {
				list = append(list, told{c, c.joined, r.epoch, places, text})
			}
			c.settled = now
			r.byAge.MoveToBack(c.byAge)
		}
		c.dirty = false
	}
	clear(r.dirty[len(kept):])
	if r.dirty = kept; len(kept) > 0 {
		r.tellLocked(now)
	} else {
		r.dirty = nil
	}
	r.mu.Unlock()
	for _, m := range gaps {
		r.tellGap(m, now)
	}
	for _, t := range list {
		ok := r.resume(t.c, t.text)
		r.mu.Lock()
		if !ok {
			r.dirtyLocked(t.c, now)
		} else if t.c.base != nil && t.epoch == r.epoch && t.c.joined.Equal(t.joined) { // The logs are the same, and so are the rooms.
			t.c.base, t.c.has, t.c.broken = t.places, true, false
		}
		r.mu.Unlock()
	}
}

// positionLocked is what c's client is to be told, if there is something new.
func (r *roomLogs) positionLocked(c *Cursor) (places []uint64, text string, is bool) {
	if !r.ready {
		return nil, "", false
	}
	r.resolveLocked(c)
	places = r.placesLocked()
	text = r.text
	if c.behind > 0 {
		places = slices.Clone(places)
		for _, m := range c.rooms {
			if m.up == nil {
				continue
			}
			place, known := m.start()
			if !known {
				return nil, "", false // It is told once that room is read.
			}
			places[m.room.partition] = min(places[m.room.partition], place)
		}
		text = r.textOf(places)
	}
	if c.has && !c.broken && slices.Equal(places, c.base) {
		return nil, "", false
	}
	return places, text, true
}

func (r *roomLogs) resume(c *Cursor, text string) (ok bool) {
	defer func() {
		if v := recover(); v != nil {
			r.server.panicked("Resume", v)
		}
	}()
	return c.conn.Resume(text)
}

func (r *roomLogs) tellGap(m *logMember, now time.Time) {
	ok := func() (ok bool) {
		defer func() {
			if v := recover(); v != nil {
				r.server.panicked("Gap", v)
				ok = true
			}
		}()
		return m.cursor.conn.Gap(m.room.name)
	}()
	r.mu.Lock()
	defer r.mu.Unlock()
	m.gap = false
	if ok {
		r.server.count.logGaps.Inc()
	} else {
		r.gapLocked(m, now)
	}
}

// dueRooms are the rooms that are to be read, a heap by time.
type dueRooms []*logRoom

func (d *dueRooms) Len() int           { return len(*d) }
func (d *dueRooms) Less(i, j int) bool { return (*d)[i].dueAt.Before((*d)[j].dueAt) }

func (d *dueRooms) Swap(i, j int) {
	(*d)[i], (*d)[j] = (*d)[j], (*d)[i]
	(*d)[i].dueIndex, (*d)[j].dueIndex = i, j
}

// Push implements heap.Interface.
func (d *dueRooms) Push(room any) {
	r := room.(*logRoom)
	r.dueIndex = len(*d)
	*d = append(*d, r)
}

// Pop implements heap.Interface.
func (d *dueRooms) Pop() any {
	last := len(*d) - 1
	room := (*d)[last]
	(*d)[last] = nil
	*d = (*d)[:last]
	room.dueIndex = -1
	return room
}

func (d *dueRooms) set(room *logRoom, at time.Time) {
	room.dueAt = at
	if room.dueIndex < 0 {
		heap.Push(d, room)
	} else {
		heap.Fix(d, room.dueIndex)
	}
}

func (d *dueRooms) remove(room *logRoom) {
	if room.dueIndex >= 0 {
		heap.Remove(d, room.dueIndex)
	}
}
