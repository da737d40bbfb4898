package membership

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/slots"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	// leaveShare is how many joins may go before a leave that waits: who comes
	// waits for the answer, who goes does not, and must not wait for ever.
	leaveShare = 8

	// A call that was not answered may be executed yet. A Controller without
	// SyncNode cannot tell: the report after it is repeated, firstRepeat later and
	// then four times as long each, as often as repeats says.
	repeats     = 3
	firstRepeat = 2 * time.Second
)

// Errors of Join and Leave, in words for clients.
var (
	ErrTooManyRooms = errors.New("room_id: too many rooms on this connection")
	ErrNotInRoom    = errors.New("room_id: not in this room")
	ErrReserved     = errors.New("room_id: names that begin with " + Reserved + " are reserved")
	ErrGoing        = errors.New("node is going")
)

var errPanicked = errors.New("the call panicked")

// Reporter keeps the Controller's picture of this node's memberships equal to the
// truth. It does not queue events: for each user and room it knows what is and
// what the Controller has been told, and works on the difference, one call at a
// time for each. So its size is bounded by what the connections may hold, however
// long the Controller is away. Beside that it compares the whole with a Controller
// that can (see sync.go), and reports everything again to one that cannot.
type Reporter struct {
	// Static after New.
	cfg      Config
	presence string
	count    counters
	cc       *grpc.ClientConn
	client   pubsub.ControllerServiceClient
	compare  chan struct{} // holds a token when a comparison is due at once
	loops    sync.WaitGroup

	registration registration // Owned by clockLoop.

	mu   sync.Mutex
	work sync.Cond // there may be something to do

	// Guarded by mu.
	stop    context.CancelFunc
	all     map[membershipID]*membership
	rooms   map[string]int // memberships in each
	slots   []slot         // slots.Count
	joins   turns          // to be looked at: somebody is in the room
	leaves  turns          // to be looked at: nobody is
	taken   int            // joins taken since the last leave
	retry   []*membership  // to be looked at after their pause
	rejoin  []*membership  // to be reported again, paced
	seq     uint64         // of the latest report
	doubts  int            // how often everything is still to be reported again
	doubted time.Time      // when, next
	reaches int            // how often the Controller was reached anew
	ready   bool           // the Controller is reachable
	leaving bool           // nobody joins any more
	closed  bool
	empty   chan struct{} // closed when all is empty while leaving
	syncing syncState
}

type membershipID struct{ user, room string }

// membership is one user in one room. Guarded by Reporter.mu.
type membership struct {
	membershipID

	hash    uint64
	at      int // in its slot
	name    string
	holders []*Member // connections that are in the room
	joiners []*Member // to be told when the Controller knows
	leavers []*Member // to be told when the Controller has forgotten

	told      bool // the Controller may believe it
	confirmed bool // the Controller has said so
	again     bool // the Controller is to be told again, whatever it has said
	counted   bool // it is in its slot's digest
	busy      bool // a worker has it
	inJoins   bool // it stands in joins
	inLeaves  bool // it stands in leaves
	inRetry   bool // it stands in retry
	paused    bool // nothing is to be done for it before it is due
	failures  int
	repeats   int       // how often the last report is still to be repeated
	repeat    bool      // now
	due       time.Time // when in retry
}

// slot is the memberships whose hashes have a remainder in common.
type slot struct {
	members []*membership
	digest  uint64 // over those that are confirmed and held
	busy    int    // calls under way for them
}

// New makes a Reporter that does nothing until Start.
func New(cfg Config) (*Reporter, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("membership config: %w", err)
	}
	cfg = cfg.WithDefaults()
	cc, err := grpc.NewClient(cfg.Controller, append([]grpc.DialOption{
		grpc.WithTransportCredentials(cfg.Credentials),
		grpc.WithIdleTimeout(0), // Its connection tells whether the Controller was restarted.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 2 * time.Second,
		}),
	}, cfg.DialOptions...)...)
	if err != nil {
		return nil, fmt.Errorf("controller address: %w", err)
	}
	return newReporter(cfg, cc), nil
}

func newReporter(cfg Config, cc *grpc.ClientConn) *Reporter {
	r := &Reporter{
		cfg:      cfg.WithDefaults(),
		presence: Reserved + cfg.NodeID,
		cc:       cc,
		client:   pubsub.NewControllerServiceClient(cc),
		compare:  make(chan struct{}, 1),
		stop:     func() {},
		all:      make(map[membershipID]*membership),
		rooms:    make(map[string]int),
		slots:    make([]slot, slots.Count),
	}
	r.work.L = &r.mu
	r.count = newCounters(r)
	return r
}

// Start begins to report, unless the Reporter is closed. The Controller need not be there yet.
func (r *Reporter) Start() {
	ctx, stop := context.WithCancel(context.Background())
	r.mu.Lock()
	closed := r.closed
	r.stop = stop
	r.mu.Unlock()
	if closed {
		stop()
		return
	}
	r.keep(ctx, func() { r.watchLoop(ctx) })
	r.keep(ctx, func() { r.clockLoop(ctx) })
	r.keep(ctx, func() { r.syncLoop(ctx) })
	for range r.cfg.Workers {
		r.keep(ctx, r.workLoop)
	}
}

// keep runs a loop until it returns. After a panic it begins again: what a Controller
// brings about by a mistake of ours must not end the process.
func (r *Reporter) keep(ctx context.Context, loop func()) {
	r.loops.Go(func() {
		for !r.caught(loop) && pause(ctx, time.Second) {
		}
	})
}

// caught calls f, and tells whether f has returned.
func (r *Reporter) caught(f func()) (returned bool) {
	defer func() {
		if v := recover(); v != nil {
			r.count.panics.Inc()
			r.cfg.Logger.Error("panic caught", slog.String("goroutine", "memberships"), slog.Any("panic", v), slog.String("stack", string(debug.Stack())))
		}
	}()
	f()
	return true
}

// Close ends everything at once and waits for it. What was not reported is not reported.
func (r *Reporter) Close() {
	r.mu.Lock()
	r.closed = true
	stop := r.stop
	r.work.Broadcast()
	r.mu.Unlock()
	stop()
	_ = r.cc.Close() // Ends the calls that are under way.
	r.loops.Wait()
}

func (r *Reporter) slotOf(m *membership) *slot { return &r.slots[slots.Of(m.hash)] }

// join puts c into the room. c is told when the Controller knows. A leave of c that waits for
// its answer gets it first: what a client is told last about a room is what is.
func (r *Reporter) join(c *Member, room string) error {
	r.mu.Lock()
	m, known, err := r.joinLocked(c, room)
	left := 0
	if err == nil {
		left = len(m.leavers)
		m.leavers = slices.DeleteFunc(m.leavers, func(l *Member) bool { return l == c })
		left -= len(m.leavers)
	}
	r.mu.Unlock()
	for range left {
		c.client.Left(c.shown(room))
	}
	if known {
		c.client.Joined(c.shown(m.room))
	}
	return err
}

// joinLocked returns known=true when the Controller knows already.
func (r *Reporter) joinLocked(c *Member, room string) (m *membership, known bool, err error) {
	if r.leaving {
		return nil, false, ErrGoing
	}
	if room != r.presence {
		if strings.HasPrefix(room[len(c.scope):], Reserved) {
			return nil, false, ErrReserved
		}
		if !c.In(room) && c.count() > r.cfg.MaxRooms { // Presence is one of them.
			return nil, false, ErrTooManyRooms
		}
	}
	id := membershipID{c.user, room}
	m = r.all[id]
	if m == nil {
		m = &membership{membershipID: id, hash: slots.Hash(c.user, room)}
		s := r.slotOf(m)
		m.at = len(s.members)
		s.members = append(s.members, m)
		r.all[id] = m
		r.rooms[room]++
	}
	c.enter(room)
	if !slices.Contains(m.holders, c) {
		m.holders = append(m.holders, c)
	}
	m.name = c.name
	r.countLocked(m)
	if !m.busy && r.doneLocked(m) {
		return m, true, nil
	}
	if !slices.Contains(m.joiners, c) {
		m.joiners = append(m.joiners, c)
	}
	r.listLocked(m)
	return m, false, nil
}

// leave takes c out of the room. c is told when the Controller knows.
func (r *Reporter) leave(c *Member, room string) error {
	r.mu.Lock()
	if !c.holds(room) {
		r.mu.Unlock()
		return ErrNotInRoom
	}
	c.exit(room)
	m := r.dropLocked(c, room)
	if m != nil && len(m.holders) == 0 && r.all[m.membershipID] == m && (m.busy || !r.doneLocked(m)) {
		if !slices.Contains(m.leavers, c) {
			m.leavers = append(m.leavers, c)
			if c.leaving == nil {
				c.leaving = make(map[string]struct{})
			}
			c.leaving[room] = struct{}{}
		}
		r.mu.Unlock()
		return nil
	}
	r.mu.Unlock()
	// Another connection of the user stays, or the Controller was never told.
	c.client.Left(c.shown(room))
	return nil
}

// drop takes c, which has ended, out of all its rooms.
func (r *Reporter) drop(c *Member) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for room := range c.leaving {
		if m := r.all[membershipID{c.user, room}]; m != nil {
			m.leavers = remove(m.leavers, c)
		}
	}
	c.leaving = nil
	c.mu.Lock()
	rooms := c.rooms
	c.rooms = nil
	c.mu.Unlock()
	for _, room := range rooms {
		r.dropLocked(c, room)
	}
}

// dropLocked notes that c is out of the room.
func (r *Reporter) dropLocked(c *Member, room string) *membership {
	m := r.all[membershipID{c.user, room}]
	if m == nil {
		return nil
	}
	m.holders = remove(m.holders, c)
	m.joiners = remove(m.joiners, c)
	r.countLocked(m)
	if len(m.holders) > 0 {
		return m
	}
	if !m.busy && !m.told && m.repeats == 0 {
		r.deleteLocked(m)
		return m
	}
	r.listLocked(m)
	return m
}

func remove(holders []*Member, c *Member) []*Member {
	if i := slices.Index(holders, c); i >= 0 {
		return slices.Delete(holders, i, i+1)
	}
	return holders
}

// deleteLocked forgets m. retry may still have it, and skips it: it is done.
func (r *Reporter) deleteLocked(m *membership) {
	if r.all[m.membershipID] != m {
		return
	}
	delete(r.all, m.membershipID)
	if m.inJoins {
		m.inJoins = false
		r.joins.remove(m)
	}
	if m.inLeaves {
		m.inLeaves = false
		r.leaves.remove(m)
	}
	s := r.slotOf(m)
	last := s.members[len(s.members)-1]
	s.members[m.at], last.at = last, m.at
	s.members[len(s.members)-1] = nil
	s.members = s.members[:len(s.members)-1]
	if r.rooms[m.room]--; r.rooms[m.room] <= 0 {
		delete(r.rooms, m.room)
	}
	if r.leaving && len(r.all) == 0 && r.empty != nil {
		close(r.empty)
		r.empty = nil
	}
}

// countLocked keeps the digest of m's slot: what the Controller should have.
func (r *Reporter) countLocked(m *membership) {
	counts := m.confirmed && len(m.holders) > 0
	switch {
	case counts == m.counted:
	case counts:
		r.slotOf(m).digest += m.hash
	default:
		r.slotOf(m).digest -= m.hash
	}
	m.counted = counts
}

// doneLocked tells that the Controller's picture of m is the truth.
func (r *Reporter) doneLocked(m *membership) bool {
	if len(m.holders) == 0 {
		return !m.told
	}
	return m.told && m.confirmed && !m.again
}

// listLocked makes a worker look at m: in the line of what is to be done for it.
func (r *Reporter) listLocked(m *membership) {
	switch joins := len(m.holders) > 0; {
	case m.busy || m.paused: // Whoever has it looks again.
		return
	case joins && !m.inJoins:
		m.inJoins = true
		r.joins.push(m)
	case !joins && !m.inLeaves:
		m.inLeaves = true
		r.leaves.push(m)
	}
	r.work.Signal()
}

// workLoop reports until close.
func (r *Reporter) workLoop() {
	for {
		m := r.next()
		if m == nil {
			return
		}
		r.report(m)
	}
}

// next waits for the Controller and for something to tell it. Joins go first.
func (r *Reporter) next() *membership {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		for !r.closed && (!r.ready || r.joins.n+r.leaves.n == 0) {
			r.work.Wait()
		}
		if r.closed {
			return nil
		}
		var m *membership
		if r.joins.n == 0 || r.leaves.n > 0 && r.taken >= leaveShare {
			r.taken = 0
			m = r.leaves.pop()
			m.inLeaves = false
		} else {
			r.taken++
			m = r.joins.pop()
			m.inJoins = false
		}
		if m.busy || m.paused || m.inJoins || m.inLeaves {
			continue // Somebody looks at it, or it has changed its line.
		}
		m.busy = true
		r.slotOf(m).busy++
		return m
	}
}

// report makes at most one call for m and says to whom it matters what came of it.
func (r *Reporter) report(m *membership) {
	r.mu.Lock()
	joins, name, repeat := len(m.holders) > 0, m.name, m.repeat
	call := repeat || !r.doneLocked(m)
	m.repeat = false
	if call {
		r.seq++
		m.told = m.told || joins // From here on the Controller may believe it.
		m.again = false
	}
	seq := r.seq
	r.mu.Unlock()

	var refused string
	var err error
	if call {
		err = errPanicked
		r.caught(func() { refused, err = r.call(m.membershipID, name, joins, seq) })
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	var news []func()
	switch {
	case err != nil:
	case refused != "":
		m.told, m.confirmed = false, false
		news = r.refuseLocked(m, refused)
	case call:
		m.failures = 0
		m.told, m.confirmed = joins, joins
		if repeat && m.repeats > 0 {
			m.repeats--
		}
	}
	r.countLocked(m)
	if err == nil {
		news = append(news, r.newsLocked(m)...)
	}
	// Nobody else reports m before all is told, so that the last word is the last one. Who
	// joins or leaves meanwhile is told then.
	for ; len(news) > 0; news = r.newsLocked(m) {
		r.mu.Unlock()
		for _, tell := range news {
			r.caught(tell) // One client is no reason to leave out the others.
		}
		r.mu.Lock()
	}
	m.busy = false
	r.slotOf(m).busy--
	if err != nil {
		r.failLocked(m, err)
	} else {
		r.settleLocked(m)
	}
}

// failLocked is for a call that did not succeed, and may have been executed.
func (r *Reporter) failLocked(m *membership, err error) {
	m.again = true
	m.failures++
	if status.Code(err) == codes.Aborted {
		// Not executed. Another number may do at once; if not, another process of this
		// node reports, and a comparison settles which of them does.
		if m.failures < 3 {
			r.listLocked(m)
			return
		}
		r.compareNow()
	} else if !r.syncing.can && !r.leaving {
		m.repeats = repeats
	}
	m.paused = true
	r.retryLocked(m, min(50*time.Millisecond<<min(m.failures, 10), 5*time.Second))
}

// newsLocked takes what is to be told once m is done.
func (r *Reporter) newsLocked(m *membership) (news []func()) {
	if !r.doneLocked(m) {
		return nil
	}
	for _, c := range m.leavers {
		delete(c.leaving, m.room)
		news = append(news, func() { c.client.Left(c.shown(m.room)) })
	}
	for _, c := range m.joiners {
		news = append(news, func() { c.client.Joined(c.shown(m.room)) })
	}
	m.leavers, m.joiners = nil, nil
	return news
}

// settleLocked looks at m after a call: it is done, or there is more to do.
func (r *Reporter) settleLocked(m *membership) {
	if !r.doneLocked(m) {
		r.listLocked(m)
		return
	}
	if r.syncing.can || r.leaving {
		m.repeats = 0
	}
	switch {
	case m.repeats > 0 && !m.inRetry:
		r.retryLocked(m, firstRepeat<<(2*(repeats-m.repeats)))
	case m.repeats == 0 && len(m.holders) == 0:
		r.deleteLocked(m)
	}
}

// refuseLocked takes everybody out of a room that the Controller does not let the
// user into.
func (r *Reporter) refuseLocked(m *membership, why string) (news []func()) {
	for _, c := range m.holders {
		c.exit(m.room)
		news = append(news, func() { c.client.Refused(c.shown(m.room), why) })
	}
	m.holders, m.joiners = nil, nil
	return news
}

// retryLocked looks at m again after a while.
func (r *Reporter) retryLocked(m *membership, d time.Duration) {
	m.due = time.Now().Add(d)
	if !m.inRetry {
		m.inRetry = true
		r.retry = append(r.retry, m)
	}
}

// call tells the Controller. refused is its own final no; an error may pass.
func (r *Reporter) call(id membershipID, name string, joins bool, seq uint64) (refused string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), r.cfg.Timeout)
	defer cancel()
	var message string
	ok := true
	if joins {
		reply, callErr := r.client.JoinRoom(ctx, &pubsub.JoinRoomRequest{
			UserId: id.user, RoomId: id.room, UserName: name, NodeId: r.cfg.NodeID, Seq: seq, BootId: r.cfg.BootID, WithoutUsers: true,
		})
		ok, message, err = reply.GetSuccess(), reply.GetMessage(), callErr
	} else {
		// success=false says that the user was not there: just as well.
		_, err = r.client.LeaveRoom(ctx, &pubsub.LeaveRoomRequest{UserId: id.user, RoomId: id.room, NodeId: r.cfg.NodeID, Seq: seq, BootId: r.cfg.BootID})
	}
	r.count.report(joins, ok, err)
	switch status.Code(err) { //nolint:exhaustive // What is not listed may pass.
	case codes.OK:
		if !ok {
			return strings.TrimSpace("refused by the controller " + message), nil
		}
		return "", nil
	case codes.Unimplemented:
		return "", nil // A Controller that learns memberships in another way.
	case codes.InvalidArgument, codes.PermissionDenied, codes.FailedPrecondition, codes.OutOfRange, codes.NotFound:
		if joins {
			return status.Convert(err).Message(), nil
		}
		return "", nil
	}
	return "", fmt.Errorf("report to controller: %w", err)
}

// clockLoop brings back what was put aside, ten times a second.
func (r *Reporter) clockLoop(ctx context.Context) {
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			if r.cfg.Registered != nil && r.registration.regained(r.cfg.Registered()) {
				r.again() // A Controller that watches etcd may have given this node up.
			}
			r.tick(now)
		}
	}
}

func (r *Reporter) tick(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.retry = slices.DeleteFunc(r.retry, func(m *membership) bool {
		due := !m.due.After(now)
		if due {
			m.repeat = m.repeats > 0 && !m.paused
			m.inRetry, m.paused = false, false
			r.listLocked(m)
		}
		return due
	})
	if len(r.retry) == 0 {
		r.retry = nil
	}
	if r.syncing.can || r.leaving {
		r.doubts = 0
	}
	if r.doubts > 0 && now.After(r.doubted) {
		r.doubts--
		r.doubted = now.Add(firstRepeat << (2 * (repeats - r.doubts)))
		r.againLocked()
	}
	if !r.ready {
		return
	}
	n := min(len(r.rejoin), max(r.cfg.RejoinPerSecond/10, 1))
	for _, m := range r.rejoin[:n] {
		r.listLocked(m)
	}
	if r.rejoin = r.rejoin[n:]; len(r.rejoin) == 0 {
		r.rejoin = nil
	}
}

// watchLoop follows the connection to the Controller. The first time that it is
// there the Controller may know what a process before this one has left behind;
// each time it may be a new one that knows nothing.
func (r *Reporter) watchLoop(ctx context.Context) {
	cleared := false
	for {
		state := r.cc.GetState()
		if state == connectivity.Idle {
			r.cc.Connect()
		}
		if state == connectivity.Ready {
			cleared = cleared || r.clear(ctx)
			if !cleared || r.greet(ctx) != nil {
				if !pause(ctx, 100*time.Millisecond) {
					return
				}
				continue
			}
		}
		r.reached(state == connectivity.Ready)
		if !r.cc.WaitForStateChange(ctx, state) {
			return
		}
	}
}

// clear ends all memberships that were reported of this node id before, in one
// call. A Controller that does not understand it has said so, and that is an
// answer, too.
func (r *Reporter) clear(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
	defer cancel()
	r.mu.Lock()
	r.seq++
	request := &pubsub.LeaveRoomRequest{NodeId: r.cfg.NodeID, Seq: r.seq, BootId: r.cfg.BootID}
	r.mu.Unlock()
	_, err := r.client.LeaveRoom(ctx, request)
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Aborted:
		// It may be executed yet, and end what is reported meanwhile.
		r.mu.Lock()
		r.doubts, r.doubted = repeats, time.Now().Add(firstRepeat)
		r.mu.Unlock()
		return false
	default:
		return true
	}
}

// pause waits; false means that ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// reached is called after every change of the connection's state.
func (r *Reporter) reached(ready bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ready != ready {
		r.cfg.Logger.Info("controller connection", slog.Bool("ready", ready))
	}
	r.ready = ready
	if !ready {
		return
	}
	r.reaches++
	for _, m := range r.retry {
		if m.again {
			m.due = time.Time{} // It failed because the Controller was away.
		}
	}
	if r.syncing.can {
		r.compareNow()
	} else {
		r.againLocked()
		if r.reaches > 1 {
			r.count.rejoins.Inc()
		}
	}
	r.work.Broadcast()
}

// again tells the Controller everything once more.
func (r *Reporter) again() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.syncing.can {
		r.compareNow()
		return
	}
	r.againLocked()
	r.count.rejoins.Inc()
}

// againLocked reports all memberships again.
func (r *Reporter) againLocked() {
	r.rejoin = r.rejoin[:0]
	for _, m := range r.all {
		if m.told && len(m.holders) > 0 {
			m.again = true
			r.rejoin = append(r.rejoin, m)
		}
	}
}

// Drain takes everybody out of everything and waits until the Controller has
// been told, or ctx ends.
func (r *Reporter) Drain(ctx context.Context) error {
	empty := make(chan struct{})
	r.mu.Lock()
	r.leaving = true
	atOnce := r.ready && r.syncing.can
	for _, m := range r.all {
		for _, c := range m.holders {
			c.exit(m.room)
		}
		m.holders, m.joiners, m.leavers, m.repeats = nil, nil, nil, 0
		r.countLocked(m)
		if !m.busy && !m.told {
			r.deleteLocked(m)
			continue
		}
		if !atOnce {
			r.listLocked(m)
		}
	}
	left := len(r.all)
	r.empty = empty
	if left == 0 {
		r.empty = nil
		close(empty)
	}
	r.mu.Unlock()
	// A Controller that knows numbers ends all in one call, and what comes late
	// changes nothing any more.
	if atOnce {
		cleared := r.clear(ctx)
		r.mu.Lock()
		for _, m := range r.all {
			switch {
			case !cleared:
				r.listLocked(m)
			case !m.busy:
				r.deleteLocked(m)
			}
		}
		r.mu.Unlock()
		if cleared {
			return nil
		}
	}
	select {
	case <-empty:
		return nil
	case <-ctx.Done():
	}
	// Too many for the time there is: the one call that ends them all is understood
	// by the reference Controller, not by every one.
	if r.Ready() && r.clear(context.WithoutCancel(ctx)) {
		return nil
	}
	return fmt.Errorf("report leaves: %d of %d left: %w", r.Stats().Memberships, left, ctx.Err())
}

// Stats are the numbers of a moment.
type Stats struct {
	Memberships int // users in rooms, the node's own included
	Rooms       int // the node's own is none
	Pending     int // reports that the Controller has not taken
}

// Stats counts.
func (r *Reporter) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	rooms := len(r.rooms)
	if r.rooms[r.presence] > 0 {
		rooms--
	}
	return Stats{Memberships: len(r.all), Rooms: rooms, Pending: r.joins.n + r.leaves.n + len(r.retry) + len(r.rejoin)}
}

// Ready tells whether the Controller is reached.
func (r *Reporter) Ready() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ready
}

// registration remembers whether the node stood in etcd.
type registration struct{ ever, lost bool }

// regained tells that the node is back after it was lost.
func (s *registration) regained(up bool) bool {
	back := up && s.lost
	s.lost = !up && s.ever
	s.ever = s.ever || up
	return back
}
