package node

import (
	"container/list"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/push-manager/push-manager/internal/position"
	pubsub "github.com/push-manager/push-manager/proto"
)

// The times and bounds of the logs of rooms.
const (
	// resumeEvery is how often a client is told its position at most, and resumeAge how old it may become.
	resumeEvery, resumeAge = time.Second, 10 * time.Minute
	// A client joins its rooms one after the other, each from the position that it has: it is told no other one until it has
	// begun joinQuiet ago, and joined none since.
	joinQuiet = 5 * time.Second
	// resumeTick is how often clients that are to be told something are looked at.
	resumeTick = 250 * time.Millisecond
	// A manager that is followed and says nothing for feederPatience is left for another one.
	feederPatience = 30 * time.Second
	// epochPause is how long an epoch lasts at least: what speaks of another one sooner is ignored.
	epochPause = 10 * time.Second
	// cameMost bounds the places of a room that have come live and stand in no mark yet, and cameMostOfAll those of
	// all rooms. What is forgotten is read once more.
	cameMost, cameMostOfAll = 1 << 14, 1 << 20
	// cursorRoomsMost bounds the rooms of one cursor. In those beyond it the client is told of a gap.
	cursorRoomsMost = 1 << 10
	// membersFactor times Config.MaxGates bounds the rooms of all cursors together.
	membersFactor = 4
)

// roomLogs know which members of rooms have had what of the logs of rooms. One manager is followed: its marks say
// what was written. What has not come live is read, for the members whom it has not reached.
//
// The node's place in a partition is that of the last mark. A member that is not behind has had everything of its room up to there, and
// whatever else has come. What has come is noted only after it was handed over, and a client is told only places that are behind it, so
// that a position never speaks of what stands in no queue.
//
// The lock is taken within those of connections, and within it that of a stream's acks.
type roomLogs struct {
	// Static.
	server *Server
	seed   maphash.Seed
	wake   chan struct{} // 1: there is something for the loop
	stop   chan struct{} // closed by close
	total  atomic.Int64  // cursors; changed under mu

	mu sync.Mutex
	// Guarded by mu.
	rooms   map[string]*logRoom
	members int
	behind  int       // cursors
	byAge   list.List // of *Cursor, the one that was told its position first in front
	looping bool
	closed  bool

	// Of the streams.
	streams offers
	numbers uint64
	feeder  *stream // that is followed
	turn    uint64  // which of the streams that is
	heard   time.Time

	// Of the logs.
	epoch      uint64
	hasEpoch   bool
	epochAt    time.Time
	partitions int  // 0: no mark has come
	placed     int  // partitions whose place is known
	ready      bool // all are: the node knows its place
	log        [position.MaxPartitions]logPartition
	came       int      // of all rooms
	places     []uint64 // those of log, shared; nil: to be made
	text       string   // of places

	// What is to be done.
	reads     map[uint64]*logRead // by gate
	due       dueRooms
	pages     []*logRead // have come
	pageBytes int
	dirty     []*Cursor // to be told their positions
	gaps      []*logMember
	tellAt    time.Time // when to look at dirty and gaps; zero: need not
}

// logPartition is one partition of the logs.
type logPartition struct {
	place uint64
	known bool
	begun bool                  // the manager that is followed has sent a mark
	fresh map[*logRoom]struct{} // rooms with came
}

// logRoom is a room with cursors.
type logRoom struct {
	name      string
	partition int          // -1: not known yet
	members   []*logMember // at their index
	came      []uint64     // places that have come live, and stand in no mark yet; rising

	behind   []*logMember // at their catchUp.index
	read     *logRead     // under way
	failures int          // of reads, in a row
	readAt   time.Time    // not before
	lastRead time.Time    // when the last one has ended
	dueAt    time.Time    // in roomLogs.due
	dueIndex int          // -1: is not there
}

// logMember is one cursor's part in one room.
type logMember struct {
	cursor *Cursor
	room   *logRoom
	index  int      // -1: has left
	up     *catchUp // nil: not behind
	gap    bool     // in roomLogs.gaps
	// Where the client is, by partition, of one who has come without a position: where the node was when it asked to come in. Else nil,
	// and it is where Cursor.base says. Shared, not changed.
	from []uint64
	had  uint64 // up to here it was given everything out of the log, or has brought the place
}

var (
	errPartition = errors.New("a partition that cannot be")
	errMark      = errors.New("its places do not rise")
)

func newRoomLogs(s *Server) *roomLogs {
	return &roomLogs{
		server: s, seed: maphash.MakeSeed(), wake: make(chan struct{}, 1), stop: make(chan struct{}),
		rooms: make(map[string]*logRoom), reads: make(map[uint64]*logRead), turn: rand.Uint64(), // spreads nodes over managers
	}
}

// close ends the loop. It may be called again.
func (r *roomLogs) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.closed = true
		close(r.stop)
	}
}

func (r *roomLogs) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// cursor makes a cursor.
func (r *roomLogs) cursor(user string, conn LogConn, text string, now time.Time) (*Cursor, error) {
	c := &Cursor{logs: r, user: user, conn: conn}
	c.settled = now.Add(-resumeEvery)
	if text != "" {
		given, err := position.Parse(text)
		if err != nil {
			return nil, err //nolint:wrapcheck // It says all.
		}
		c.given, c.has, c.joined = &given, true, now
	}
	if !r.server.does.roomLog {
		return nil, nil //nolint:nilnil // A nil Cursor keeps no position.
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if int(r.total.Load()) >= r.server.cfg.MaxGates {
		r.server.count.cursorsRefused.Inc()
		return nil, nil //nolint:nilnil // likewise
	}
	if !r.looping {
		if !r.server.goUntilClose(r.run) {
			return nil, nil //nolint:nilnil // likewise
		}
		r.looping = true
	}
	r.total.Add(1)
	c.byAge = r.byAge.PushBack(c)
	r.followLocked(now)
	r.resolveLocked(c)
	if r.total.Load() == 1 {
		r.signal() // The loop sleeps until the oldest needs something.
	}
	return c, nil
}

// resolveLocked sets where c's client is, once the node knows its own place.
func (r *roomLogs) resolveLocked(c *Cursor) {
	if !r.ready || c.base != nil {
		return
	}
	c.base = r.placesLocked()
	if c.given == nil {
		return
	}
	if c.given.Epoch != r.epoch {
		c.broken = true
	} else {
		base := slices.Clone(c.base)
		for _, at := range c.given.Places {
			if int(at.Partition) < len(base) {
				base[at.Partition] = at.Seq
			}
		}
		c.base = base
	}
	c.given = nil
}

// placesLocked are the node's.
func (r *roomLogs) placesLocked() []uint64 {
	if r.places == nil {
		r.places = make([]uint64, r.partitions)
		for i := range r.places {
			r.places[i] = r.log[i].place
		}
		r.text = r.textOf(r.places)
	}
	return r.places
}

func (r *roomLogs) textOf(places []uint64) string {
	p := position.Position{Epoch: r.epoch, Places: make([]position.Place, len(places))}
	for i, seq := range places {
		p.Places[i] = position.Place{Partition: uint32(i), Seq: seq}
	}
	return p.String()
}

// leave forgets c.
func (r *roomLogs) leave(c *Cursor) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	r.total.Add(-1)
	r.byAge.Remove(c.byAge)
	for _, m := range c.rooms {
		r.partLocked(m)
	}
	c.rooms, c.expected = nil, nil
}

func (c *cursorState) find(room string) (int, bool) {
	return slices.BinarySearchFunc(c.rooms, room, func(m *logMember, name string) int { return strings.Compare(m.room.name, name) })
}

// expect is Expect.
func (r *roomLogs) expect(c *Cursor, name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, is := c.find(name)
	_, again := c.expected[name]
	if is || again || c.closed || len(c.expected) >= cursorRoomsMost {
		return
	}
	if c.expected == nil {
		c.expected = make(map[string][]uint64)
	}
	c.expected[strings.Clone(name)] = r.fromLocked(c)
}

// fromLocked is logMember.from of one who asks to come in now.
func (r *roomLogs) fromLocked(c *Cursor) []uint64 {
	if c.has || !r.ready {
		return nil
	}
	return r.placesLocked()
}

// come ends the expectation of a room. from is nil if there was none.
func (c *cursorState) come(name string) (from []uint64) {
	from = c.expected[name]
	if delete(c.expected, name); len(c.expected) == 0 {
		c.expected = nil
	}
	return from
}

// enter is Join.
func (r *roomLogs) enter(c *Cursor, name string, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	from := c.come(name)
	if from == nil {
		from = r.fromLocked(c)
	}
	at, is := c.find(name)
	if c.closed || is {
		return
	}
	if len(c.rooms) >= cursorRoomsMost || r.members >= membersFactor*r.server.cfg.MaxGates {
		r.server.count.cursorsRefused.Inc()
		r.gapLocked(&logMember{cursor: c, room: &logRoom{name: name}}, now)
		return
	}
	room := r.rooms[name]
	if room == nil {
		room = &logRoom{name: strings.Clone(name), partition: -1, dueIndex: -1}
		r.rooms[room.name] = room
	}
	m := &logMember{cursor: c, room: room, index: len(room.members), from: from}
	room.members = append(room.members, m)
	c.rooms = slices.Insert(c.rooms, at, m)
	r.members++
	if c.has {
		c.joined = now
	} else if from == nil { // The node does not know its place yet: what comes live is all that there is.
		r.dirtyLocked(c, now)
		return
	}
	up := r.behindLocked(m, now)
	up.all, up.hold, up.joined = true, true, now
	c.holding.Add(1)
	r.beginLocked(m, now)
}

// beginLocked sets from where on a member that has joined is to be given what the log has, once the node knows its place.
func (r *roomLogs) beginLocked(m *logMember, now time.Time) {
	r.resolveLocked(m.cursor)
	switch {
	case m.cursor.base == nil:
		return
	case m.cursor.broken:
		r.gapLocked(m, now)
		if m.up.low == 0 {
			r.caughtUpLocked(m, now)
			return
		}
		m.up.place, m.up.placed = m.up.low-1, true // What was held meanwhile there is.
	}
	r.placeLocked(m)
	r.wantForLocked(m, now)
}

// base is where m's client is, by partition: nil while the node does not know its own place.
func (m *logMember) base() []uint64 {
	if m.from != nil {
		return m.from
	}
	return m.cursor.base
}

// placeLocked sets where a member that is behind stands, once the partition of its room is known.
func (r *roomLogs) placeLocked(m *logMember) {
	if p, base := m.room.partition, m.base(); m.up.all && !m.up.placed && p >= 0 && p < len(base) {
		m.up.place, m.up.placed = base[p], true
	}
}

// exit is Leave.
func (r *roomLogs) exit(c *Cursor, name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.come(name)
	at, is := c.find(name)
	if !is {
		return
	}
	m := c.rooms[at]
	c.rooms = slices.Delete(c.rooms, at, at+1)
	r.partLocked(m)
	r.dirtyLocked(c, time.Now())
}

// partLocked takes a member out of its room.
func (r *roomLogs) partLocked(m *logMember) {
	room := m.room
	r.dropLocked(m)
	last := room.members[len(room.members)-1]
	room.members[m.index], last.index = last, m.index
	room.members[len(room.members)-1] = nil
	room.members = room.members[:len(room.members)-1]
	m.index = -1
	r.members--
	if len(room.members) > 0 {
		return
	}
	r.forgetCameLocked(room)
	r.due.remove(room)
	delete(r.rooms, room.name)
}

// holds is Cursor.Holds.
func (r *roomLogs) holds(c *Cursor, name string, log *LogPlace, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	at, is := c.find(name)
	if !is {
		return false
	}
	m := c.rooms[at]
	if m.up == nil || !m.up.hold {
		return false
	}
	if m.up.heldLongEnough(now) {
		m.releaseLocked()
		return false
	}
	if r.learnLocked(m.room, log) {
		r.missLocked(m, log.Seq, now)
	}
	return true
}

// live takes a message that stands in a log, and was handed over to the users it names. It goes to all others with a cursor in the
// room, and is noted.
func (r *roomLogs) live(m *Message) {
	if r.total.Load() == 0 {
		return
	}
	log := m.Options.Log
	r.mu.Lock()
	room := r.rooms[m.RoomID]
	if room == nil {
		r.mu.Unlock()
		return
	}
	members := slices.Clone(room.members)
	r.mu.Unlock()
	missed := members[:0]
	for _, to := range members {
		if !log.excludes(to.cursor.user) && !r.give(to.cursor, m) {
			missed = append(missed, to)
		}
	}
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.learnLocked(room, log) {
		return
	}
	for _, to := range missed {
		if to.index >= 0 {
			r.missLocked(to, log.Seq, now)
		}
	}
	r.cameLocked(room, log.Seq)
}

func (p *LogPlace) excludes(user string) bool {
	_, is := slices.BinarySearch(p.Exclude, user)
	return is
}

// give hands a message to a connection. False: it has not taken it, and might later.
func (r *roomLogs) give(c *Cursor, m *Message) (taken bool) {
	defer func() {
		if v := recover(); v != nil {
			r.server.panicked("DeliverLasting", v)
		}
	}()
	switch c.conn.DeliverLasting(m, nil) {
	case Delivered, Pending, Duplicate, Reused, Expired:
		return true
	default:
		return false
	}
}

// learnLocked takes from a live message in which partition its room is. False: its place means nothing here.
func (r *roomLogs) learnLocked(room *logRoom, log *LogPlace) bool {
	if !r.hasEpoch {
		r.epoch, r.hasEpoch = log.Epoch, true
	}
	p := int(log.Partition)
	known := r.epoch == log.Epoch && log.Seq > 0 && (r.partitions == 0 || p < r.partitions) && (room.partition < 0 || room.partition == p)
	if !known {
		r.server.count.logIgnored.Inc()
		return false
	}
	if room.partition < 0 {
		r.inLocked(room, p)
	}
	return true
}

// inLocked says in which partition a room is.
func (r *roomLogs) inLocked(room *logRoom, partition int) {
	room.partition = partition
	for _, m := range room.behind {
		r.placeLocked(m)
	}
}

// cameLocked notes that seq has come live.
func (r *roomLogs) cameLocked(room *logRoom, seq uint64) {
	p := &r.log[room.partition]
	if len(room.members) == 0 || p.known && seq <= p.place || r.came >= cameMostOfAll {
		return
	}
	at, is := slices.BinarySearch(room.came, seq)
	if is {
		return
	}
	room.came = slices.Insert(room.came, at, seq)
	r.came++
	if len(room.came) > cameMost {
		room.came = slices.Delete(room.came, 0, 1)
		r.came--
	}
	if p.fresh == nil {
		p.fresh = make(map[*logRoom]struct{})
	}
	p.fresh[room] = struct{}{}
}

func (r *roomLogs) forgetCameLocked(room *logRoom) {
	if room.partition >= 0 {
		delete(r.log[room.partition].fresh, room)
	}
	r.came -= len(room.came)
	room.came = nil
}

// join makes st known as one that can be followed.
func (r *roomLogs) join(st *stream, hello *pubsub.Hello, now time.Time) {
	if !r.server.does.roomLog || !slices.Contains(hello.GetFeatures(), pubsub.Feature_FEATURE_ROOM_LOG) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.numbers++
	r.streams.add(st, hello, r.seed, r.numbers)
	r.followLocked(now)
}

// part forgets st. If it was followed, another one is.
func (r *roomLogs) part(st *stream, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.streams.remove(st) {
		return
	}
	if r.feeder == st {
		r.feeder = nil
		r.followLocked(now)
	}
	for _, read := range r.reads {
		if read.st == st && read.page == nil {
			r.endReadLocked(read)
			r.wantLocked(read.room, now)
		}
	}
}

// followLocked follows a manager, if none is and there is a cursor.
func (r *roomLogs) followLocked(now time.Time) {
	if r.feeder != nil || r.total.Load() == 0 {
		return
	}
	st := r.streams.pick(r.turn)
	if st == nil {
		return
	}
	r.feeder, r.heard = st, now
	for i := range r.log {
		r.log[i].begun = false
	}
	f := &pubsub.LogFollow{}
	if r.ready {
		f.Epoch, f.After = r.epoch, r.placesLocked()
	}
	st.acks.follow(f)
	r.signal() // Rooms may wait to be read.
}

// mark takes a LogMark. An error ends the stream.
func (r *roomLogs) mark(st *stream, k *logMark, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if st != r.feeder {
		r.server.count.logIgnored.Inc() // It was followed before.
		return nil
	}
	switch {
	case k.partitions == 0 || k.partitions > position.MaxPartitions || k.partition >= k.partitions:
		return fmt.Errorf("log mark: %w: %d of %d", errPartition, k.partition, k.partitions)
	case k.seq < k.after:
		return fmt.Errorf("log mark: %w: from %d to %d", errMark, k.after, k.seq)
	case r.hasEpoch && k.epoch != r.epoch:
		if !r.epochAt.IsZero() && now.Sub(r.epochAt) < epochPause {
			r.server.count.logIgnored.Inc()
			return nil
		}
		r.restartLocked(now)
	case r.partitions > 0 && int(k.partitions) != r.partitions:
		return fmt.Errorf("log mark: %w: %d partitions, there were %d", errPartition, k.partitions, r.partitions)
	}
	r.heard = now
	r.server.count.logMarks.Inc()
	if r.partitions == 0 {
		r.epoch, r.hasEpoch, r.epochAt, r.partitions = k.epoch, true, now, int(k.partitions)
		for _, room := range r.rooms {
			if room.partition >= r.partitions {
				r.againLocked(room, now)
			}
		}
	}
	p := &r.log[k.partition]
	switch {
	case !p.known:
		p.place, p.known = k.after, true
		r.placed++
	case k.after > p.place:
		r.holeLocked(int(k.partition), p.place, k.after, now)
	case k.seq < p.place, k.after < p.place && !p.begun: // The log has lost its end, or does not reach as far as that of the manager before.
		p.place, r.places = k.after, nil
		for _, room := range r.rooms {
			for _, m := range room.members {
				m.had = min(m.had, k.after)
			}
		}
	}
	p.begun = true
	if err := r.namedLocked(k, now); err != nil {
		return err
	}
	if k.seq != p.place || r.places == nil {
		p.place, r.places = k.seq, nil
	}
	for room := range p.fresh {
		n, _ := slices.BinarySearch(room.came, k.seq+1)
		room.came = slices.Delete(room.came, 0, n)
		r.came -= n
		if len(room.came) == 0 {
			r.forgetCameLocked(room)
		}
	}
	if r.placed == r.partitions {
		r.readyLocked(now)
	}
	return nil
}

// readyLocked begins what has waited until the node knew its place.
func (r *roomLogs) readyLocked(now time.Time) {
	if r.ready {
		return
	}
	r.ready = true
	r.signal() // likewise
	for e := r.byAge.Front(); e != nil; e = e.Next() {
		c := e.Value.(*Cursor)
		unresolved := c.base == nil
		r.resolveLocked(c)
		if !unresolved {
			continue
		}
		for _, m := range c.rooms {
			if m.up != nil && m.up.all && !m.up.placed {
				r.beginLocked(m, now)
			} else if m.up != nil {
				r.wantLocked(m.room, now)
			}
		}
		r.dirtyLocked(c, now)
	}
}

// namedLocked takes what a mark names.
func (r *roomLogs) namedLocked(k *logMark, now time.Time) error {
	var named markedRoom
	for _, b := range k.rooms {
		if err := named.parse(b); err != nil {
			return err
		}
		before := k.after
		for _, seq := range named.seqs {
			if seq <= before || seq > k.seq {
				return fmt.Errorf("log mark: %w: %d behind %d, up to %d", errMark, seq, before, k.seq)
			}
			before = seq
		}
		room := r.rooms[named.room]
		if room == nil || len(named.seqs) == 0 {
			continue
		}
		switch room.partition {
		case -1:
			r.inLocked(room, int(k.partition))
		case int(k.partition):
		default:
			was := room.partition
			r.againLocked(room, now)
			return fmt.Errorf("log mark: %w: a room of %d is in %d", errPartition, was, k.partition)
		}
		place := r.log[k.partition].place
		r.missedLocked(room, slices.DeleteFunc(named.seqs, func(seq uint64) bool {
			_, is := slices.BinarySearch(room.came, seq)
			return is || seq <= place
		}), now)
		for _, m := range room.members {
			r.dirtyLocked(m.cursor, now)
		}
	}
	return nil
}

// holeLocked puts all members of a partition behind: what stands between two places was named by no mark.
func (r *roomLogs) holeLocked(partition int, from, to uint64, now time.Time) {
	for _, room := range r.rooms {
		if room.partition >= 0 && room.partition != partition {
			continue
		}
		for _, m := range room.members {
			if up := m.up; up != nil && up.all {
				up.later(to)
				continue
			}
			up := r.behindLocked(m, now)
			up.toAll(max(from, m.had))
			up.later(to)
			if room.partition < 0 {
				up.placed = false
				r.placeLocked(m)
			}
		}
		r.wantLocked(room, now)
	}
}

// againLocked forgets in which partition a room is: its members get it from where their clients are.
func (r *roomLogs) againLocked(room *logRoom, now time.Time) {
	r.forgetCameLocked(room)
	room.partition = -1
	for _, m := range room.members {
		up := r.behindLocked(m, now)
		up.toAll(0)
		up.placed, m.had = false, 0
	}
	r.wantLocked(room, now)
}

// restartLocked forgets all places: the logs are others. Clients are told that something is missing.
func (r *roomLogs) restartLocked(now time.Time) {
	for _, read := range r.reads {
		r.endReadLocked(read)
	}
	for _, room := range r.rooms {
		r.forgetCameLocked(room)
		room.partition = -1
		for _, m := range room.members {
			r.dropLocked(m)
			r.gapLocked(m, now)
			m.had, m.from = 0, nil
		}
	}
	for e := r.byAge.Front(); e != nil; e = e.Next() {
		c := e.Value.(*Cursor)
		c.base, c.given, c.broken = nil, nil, c.has
		for name := range c.expected {
			c.expected[name] = nil
		}
	}
	clear(r.log[:])
	r.hasEpoch, r.partitions, r.placed, r.ready, r.places = false, 0, 0, false, nil
}

// dirtyLocked has c told its position.
func (r *roomLogs) dirtyLocked(c *Cursor, now time.Time) {
	if c.dirty || c.closed {
		return
	}
	c.dirty = true
	r.dirty = append(r.dirty, c)
	r.tellLocked(now)
}

// gapLocked has m's client told that something of the room is missing.
func (r *roomLogs) gapLocked(m *logMember, now time.Time) {
	if m.gap || m.cursor.closed {
		return
	}
	m.gap = true
	r.gaps = append(r.gaps, m)
	r.tellLocked(now)
}

func (r *roomLogs) tellLocked(now time.Time) {
	if r.tellAt.IsZero() {
		r.tellAt = now.Add(resumeTick)
		r.signal()
	}
}

// sizes are for the gauges.
func (r *roomLogs) sizes() (behind, reads int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.behind, len(r.reads)
}
