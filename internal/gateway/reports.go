package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// presencePrefix begins the room in which a node keeps all its users, so that a
// user without a room is found by the Controller, too. Clients do not see it.
const presencePrefix = "@node:"

var (
	errTooManyRooms = errors.New("room_id: too many rooms on this connection")
	errNotInRoom    = errors.New("room_id: not in this room")
	errGoing        = errors.New("node is going")
)

// reports keeps the Controller's picture of this node's memberships equal to the
// truth. It does not queue events: for each user and room it knows what is and
// what the Controller has been told, and works on the difference, one call at a
// time for each. So its size is bounded by what the connections may hold, however
// long the Controller is away.
type reports struct {
	// Static after newReports.
	cfg      Config
	presence string
	count    *counters
	cc       *grpc.ClientConn
	client   pubsub.ControllerServiceClient

	mu   sync.Mutex
	work sync.Cond // there may be something to do

	// Guarded by mu.
	all     map[membershipID]*membership
	rooms   map[string]int // memberships in each
	todo    []*membership  // to be looked at, oldest first
	retry   []*membership  // to be looked at after their pause
	rejoin  []*membership  // to be reported again, paced
	epoch   uint64         // grows each time the Controller is reached anew; 0: never yet
	ready   bool           // the Controller is reachable
	leaving bool           // nobody joins any more
	closed  bool
	empty   chan struct{} // closed when all is empty while leaving
}

type membershipID struct{ user, room string }

// membership is one user in one room. Guarded by reports.mu.
type membership struct {
	membershipID

	name     string
	holders  []*conn // connections that are in the room
	joiners  []*conn // to be told when the Controller knows
	leavers  []*conn // to be told when the Controller has forgotten
	told     bool    // the Controller may believe it
	epoch    uint64  // in which the Controller confirmed it
	busy     bool    // a worker has it
	listed   bool    // it stands in todo or retry
	failures int
	due      time.Time // when in retry
}

func newReports(cfg Config, cc *grpc.ClientConn, count *counters) *reports {
	r := &reports{
		cfg:      cfg,
		presence: presencePrefix + cfg.NodeID,
		count:    count,
		cc:       cc,
		client:   pubsub.NewControllerServiceClient(cc),
		all:      make(map[membershipID]*membership),
		rooms:    make(map[string]int),
	}
	r.work.L = &r.mu
	return r
}

// join puts c into the room. c is told when the Controller knows.
func (r *reports) join(c *conn, room string) error {
	r.mu.Lock()
	m, known, err := r.joinLocked(c, room)
	r.mu.Unlock()
	if known {
		c.joined(m.room)
	}
	return err
}

// joinLocked returns known=true when the Controller knows already.
func (r *reports) joinLocked(c *conn, room string) (m *membership, known bool, err error) {
	if r.leaving {
		return nil, false, errGoing
	}
	if !c.in(room) && room != r.presence && len(c.allRooms()) > r.cfg.MaxRooms { // Presence is one of them.
		return nil, false, errTooManyRooms
	}
	id := membershipID{c.user, room}
	m = r.all[id]
	if m == nil {
		m = &membership{membershipID: id}
		r.all[id] = m
		r.rooms[room]++
	}
	c.enterLocked(room)
	if !slices.Contains(m.holders, c) {
		m.holders = append(m.holders, c)
	}
	m.name = c.name
	if !m.busy && !m.listed && r.doneLocked(m) {
		return m, true, nil
	}
	if !slices.Contains(m.joiners, c) {
		m.joiners = append(m.joiners, c)
	}
	r.listLocked(m)
	return m, false, nil
}

// leave takes c out of the room. c is told when the Controller knows.
func (r *reports) leave(c *conn, room string) error {
	r.mu.Lock()
	if !c.in(room) {
		r.mu.Unlock()
		return errNotInRoom
	}
	m := r.dropLocked(c, room)
	if m != nil && len(m.holders) == 0 && r.all[m.membershipID] == m {
		m.leavers = append(m.leavers, c)
		r.mu.Unlock()
		return nil
	}
	r.mu.Unlock()
	// Another connection of the user stays, or the Controller was never told.
	c.left(room)
	return nil
}

// drop takes c, which has ended, out of all its rooms.
func (r *reports) drop(c *conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for room := range c.allRooms() {
		r.dropLocked(c, room)
	}
}

func (r *reports) dropLocked(c *conn, room string) *membership {
	c.exitLocked(room)
	m := r.all[membershipID{c.user, room}]
	if m == nil {
		return nil
	}
	m.holders = remove(m.holders, c)
	m.joiners = remove(m.joiners, c)
	if len(m.holders) > 0 {
		return m
	}
	if !m.busy && !m.told {
		r.deleteLocked(m)
		return m
	}
	r.listLocked(m)
	return m
}

func remove(conns []*conn, c *conn) []*conn {
	if i := slices.Index(conns, c); i >= 0 {
		return slices.Delete(conns, i, i+1)
	}
	return conns
}

// deleteLocked forgets m. A list that still has it skips it: it is done.
func (r *reports) deleteLocked(m *membership) {
	if r.all[m.membershipID] != m {
		return
	}
	delete(r.all, m.membershipID)
	if r.rooms[m.room]--; r.rooms[m.room] <= 0 {
		delete(r.rooms, m.room)
	}
	if r.leaving && len(r.all) == 0 && r.empty != nil {
		close(r.empty)
		r.empty = nil
	}
}

// doneLocked tells that the Controller's picture of m is the truth.
func (r *reports) doneLocked(m *membership) bool {
	if len(m.holders) == 0 {
		return !m.told
	}
	return m.told && m.epoch == r.epoch
}

// listLocked makes a worker look at m.
func (r *reports) listLocked(m *membership) {
	if m.busy || m.listed { // Whoever has it looks again.
		return
	}
	m.listed = true
	r.todo = append(r.todo, m)
	r.work.Signal()
}

// workLoop reports until close.
func (r *reports) workLoop() {
	for {
		m := r.next()
		if m == nil {
			return
		}
		r.report(m)
	}
}

// next waits for the Controller and for something to tell it.
func (r *reports) next() *membership {
	r.mu.Lock()
	defer r.mu.Unlock()
	for !r.closed && (!r.ready || len(r.todo) == 0) {
		r.work.Wait()
	}
	if r.closed {
		return nil
	}
	m := r.todo[0]
	r.todo[0] = nil
	r.todo = r.todo[1:]
	m.listed, m.busy = false, true
	return m
}

// report makes at most one call for m and says to whom it matters what came of it.
func (r *reports) report(m *membership) {
	r.mu.Lock()
	joins, epoch, name, done := len(m.holders) > 0, r.epoch, m.name, r.doneLocked(m)
	if joins && !done {
		m.told = true // From here on the Controller may believe it.
	}
	r.mu.Unlock()

	var refused string
	var err error
	if !done {
		refused, err = r.call(m.membershipID, name, joins)
	}

	r.mu.Lock()
	m.busy = false
	var news []func()
	switch {
	case err != nil:
		r.pauseLocked(m)
	case refused != "":
		m.told = false
		news = r.refuseLocked(m, refused)
	case !done:
		m.failures = 0
		m.told, m.epoch = joins, epoch
	}
	if err == nil {
		news = append(news, r.settleLocked(m)...)
	}
	r.mu.Unlock()
	for _, tell := range news {
		tell()
	}
}

// settleLocked looks at m after a call: it is done, or there is more to do.
func (r *reports) settleLocked(m *membership) (news []func()) {
	if !r.doneLocked(m) {
		r.listLocked(m)
		return nil
	}
	for _, c := range m.leavers {
		news = append(news, func() { c.left(m.room) })
	}
	for _, c := range m.joiners {
		news = append(news, func() { c.joined(m.room) })
	}
	m.leavers, m.joiners = nil, nil
	if len(m.holders) == 0 {
		r.deleteLocked(m)
	}
	return news
}

// refuseLocked takes everybody out of a room that the Controller does not let the
// user into.
func (r *reports) refuseLocked(m *membership, why string) (news []func()) {
	for _, c := range m.holders {
		c.exitLocked(m.room)
		news = append(news, func() { c.refused(m.room, why) })
	}
	m.holders, m.joiners = nil, nil
	return news
}

// pauseLocked puts m aside after a failure that may pass.
func (r *reports) pauseLocked(m *membership) {
	if m.listed {
		return
	}
	m.due = time.Now().Add(min(100*time.Millisecond<<min(m.failures, 10), 5*time.Second))
	m.failures++
	m.listed = true
	r.retry = append(r.retry, m)
}

// call tells the Controller. refused is its own final no; an error may pass.
func (r *reports) call(id membershipID, name string, joins bool) (refused string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), r.cfg.ControllerTimeout)
	defer cancel()
	var message string
	ok := true
	if joins {
		reply, callErr := r.client.JoinRoom(ctx, &pubsub.JoinRoomRequest{UserId: id.user, RoomId: id.room, UserName: name, NodeId: r.cfg.NodeID})
		ok, message, err = reply.GetSuccess(), reply.GetMessage(), callErr
	} else {
		// success=false says that the user was not there: just as well.
		_, err = r.client.LeaveRoom(ctx, &pubsub.LeaveRoomRequest{UserId: id.user, RoomId: id.room, NodeId: r.cfg.NodeID})
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
func (r *reports) clockLoop(ctx context.Context) {
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			r.tick(now)
		}
	}
}

func (r *reports) tick(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.retry = slices.DeleteFunc(r.retry, func(m *membership) bool {
		due := !m.due.After(now)
		if due {
			m.listed = false
			r.listLocked(m)
		}
		return due
	})
	if len(r.retry) == 0 {
		r.retry = nil
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

// watchLoop follows the connection to the Controller. Each time it is there anew
// the Controller may be a new one that knows nothing. The first time it may know
// what a process before this one has left behind.
func (r *reports) watchLoop(ctx context.Context) {
	cleared := false
	for {
		state := r.cc.GetState()
		if state == connectivity.Idle {
			r.cc.Connect()
		}
		if state == connectivity.Ready && !cleared {
			if cleared = r.clear(ctx); !cleared && pause(ctx, 100*time.Millisecond) {
				continue
			}
		}
		r.reached(state == connectivity.Ready && cleared)
		if !r.cc.WaitForStateChange(ctx, state) {
			return
		}
	}
}

// clear ends all memberships of this node id in one call. A Controller that does
// not understand it has said so, and that is an answer, too.
func (r *reports) clear(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.ControllerTimeout)
	defer cancel()
	_, err := r.client.LeaveRoom(ctx, &pubsub.LeaveRoomRequest{NodeId: r.cfg.NodeID})
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
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
func (r *reports) reached(ready bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ready != ready {
		r.cfg.Logger.Info("controller connection", slog.Bool("ready", ready))
	}
	r.ready = ready
	if ready {
		r.againLocked()
	}
}

// again reports all memberships again.
func (r *reports) again() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.againLocked()
}

func (r *reports) againLocked() {
	r.epoch++
	r.rejoin = r.rejoin[:0]
	for _, m := range r.all {
		if m.told && !r.doneLocked(m) {
			r.rejoin = append(r.rejoin, m)
		}
	}
	if r.epoch > 1 {
		r.count.rejoins.Inc()
	}
	r.work.Broadcast()
}

// leaveAll takes everybody out of everything and waits until the Controller has
// been told, or ctx ends.
func (r *reports) leaveAll(ctx context.Context) error {
	empty := make(chan struct{})
	r.mu.Lock()
	r.leaving = true
	for _, m := range r.all {
		for _, c := range m.holders {
			c.exitLocked(m.room)
		}
		m.holders, m.joiners, m.leavers = nil, nil, nil
		if !m.busy && !m.told {
			r.deleteLocked(m)
			continue
		}
		r.listLocked(m)
	}
	left := len(r.all)
	r.empty = empty
	if left == 0 {
		r.empty = nil
		close(empty)
	}
	r.mu.Unlock()
	select {
	case <-empty:
		return nil
	case <-ctx.Done():
	}
	// Too many for the time there is: the one call that ends them all is understood
	// by the reference Controller, not by every one.
	if r.isReady() && r.clear(context.WithoutCancel(ctx)) {
		return nil
	}
	return fmt.Errorf("report leaves: %d of %d left: %w", r.memberships(), left, ctx.Err())
}

// close ends the workers after the calls they are in.
func (r *reports) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.work.Broadcast()
}

func (r *reports) memberships() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

func (r *reports) roomCount() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(r.rooms)
	if r.rooms[r.presence] > 0 {
		n--
	}
	return n
}

func (r *reports) pending() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.todo) + len(r.retry) + len(r.rejoin)
}

func (r *reports) isReady() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ready
}
