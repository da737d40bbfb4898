package faultbench

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
)

// kind is what a push is for.
type kind uint8

const (
	toUser kind = iota
	toUsers
	toRoom
	toAll
)

func (k kind) String() string { return [...]string{"user", "users", "room", "all"}[k] }

// push is what one caller asked for and what it was told.
type push struct {
	// Static once begun.
	id      string // of the message: tries to push one message share it
	kind    kind
	key     string   // the user or the room
	users   []string // of a push to several
	options *pubsub.PushOptions
	manager string // whom it was asked of
	stream  string // which PushStream it went into, "" for a unary call
	place   int    // and at which place
	limit   time.Duration
	start   time.Duration // all times count from the ledger's begin

	// Guarded by the ledger's mu until answered.
	end     time.Duration
	done    bool
	summary *pubsub.DeliverySummary // nil: an error
	success bool
	err     error
	message string // for people; set before the answer
}

// changed tells that the reply says that the push went by a route that has changed.
func (p *push) changed() bool { return strings.Contains(p.message, "which has changed since") }

func (p *push) took() time.Duration { return p.end - p.start }

// code is OK, or what the call failed with.
func (p *push) code() codes.Code { return status.Code(p.err) }

// safe tells an error that promises that nothing was sent.
func (p *push) safe() bool {
	if p.err == nil {
		return false
	}
	return reasonOf(p.err) != ""
}

// reasonOf is the reason of Push-Manager's ErrorInfo, "" if there is none.
func reasonOf(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == "push-manager" {
			return info.GetReason()
		}
	}
	return ""
}

func (p *push) String() string {
	s := fmt.Sprintf("%s to %s %q by %s", p.id, p.kind, p.key, p.manager)
	switch {
	case !p.done:
		return s + ": not answered"
	case p.err != nil:
		return fmt.Sprintf("%s: %v (nothing sent: %v) after %v", s, p.err, p.safe(), p.took())
	default:
		return fmt.Sprintf("%s: success=%v %v after %v", s, p.success, p.summary, p.took())
	}
}

// arrival is one push at one client.
type arrival struct {
	at       time.Duration
	push     string
	user     string
	client   string // the connection: the user's device, wherever it is connected
	node     string
	replayed bool // the gateway said so
	repeat   bool // it came before, to this connection, which has not acknowledged it
}

// ledger holds what arrived and what callers were told.
type ledger struct {
	begun time.Time

	// clientsLeave is set before the first push where clients come and go by themselves. A
	// node may hand a push to a connection whose client has just gone, so what is claimed to be
	// delivered cannot be counted in arrivals: people_test.go judges it.
	clientsLeave bool

	// What check grants to messages with options. Set before it.
	stays  func(user string) bool // who did stay, although clients leave; nil: nobody
	absent func(user string) bool // who did not come back in the end; nil: nobody
	late   time.Duration          // how much later than its time to live a message may be seen here

	unordered bool // a store that does not answer may be overtaken

	mu sync.Mutex
	// Guarded by mu.
	pushes   []*push
	arrivals []arrival // in the order of each client
	notes    []note    // what was done to the deployment
	frozen   []span    // when we ourselves could not run
	next     int
}

// span is a time from one moment to another.
type span struct{ from, to time.Duration }

// within is how much of the span lies between two moments.
func (s span) within(from, to time.Duration) time.Duration {
	return max(min(s.to, to)-max(s.from, from), 0)
}

type note struct {
	at   time.Duration
	text string
}

func newLedger() *ledger { return &ledger{begun: time.Now()} }

func (l *ledger) now() time.Duration { return time.Since(l.begun) }

// note tells what was done to the deployment, for histories.
func (l *ledger) note(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.notes = append(l.notes, note{l.now(), fmt.Sprintf(format, args...)})
}

// noteAt is note for what began earlier.
func (l *ledger) noteAt(at time.Duration, text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.notes = append(l.notes, note{at, text})
}

// freeze notes that this process could not run for a while: it was late to see the
// answers that came meanwhile.
func (l *ledger) freeze(from, to time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.frozen = append(l.frozen, span{from, to})
}

// starved is how late a timer may be before the machine counts as one that lets nobody
// run. A node that could not run is late with its acks through nobody's fault.
const starved = 250 * time.Millisecond

const starving = "the machine lets nobody run"

// watchMachine notes when a timer is late by more than that, until stop.
func (l *ledger) watchMachine(stop <-chan struct{}, tolerated time.Duration) {
	const pause = 20 * time.Millisecond
	for {
		select {
		case <-stop:
			return
		default:
		}
		begun := l.now()
		wait(pause)
		if l.now()-begun-pause > tolerated {
			l.noteAt(begun, starving+" begins")
			l.note(starving + " is over")
			l.freeze(begun, l.now())
		}
	}
}

// calm tells whether it did not happen between two moments.
func (l *ledger) calm(from, to time.Duration) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !slices.ContainsFunc(l.frozen, func(f span) bool { return f.within(from, to) > 0 })
}

// nearFreezeLocked tells whether we could not run while p was under way, or within that time
// of it. tally calls its pick under mu.
func (l *ledger) nearFreezeLocked(p *push, of time.Duration) bool {
	return slices.ContainsFunc(l.frozen, func(f span) bool { return f.within(p.start-of, p.end+of) > 0 })
}

// begin gives p an id, unless it is another try of a message, and notes that it is about to be
// asked for.
func (l *ledger) begin(p *push) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.id == "" {
		l.next++
		p.id = fmt.Sprintf("p%d", l.next)
	}
	if p.options != nil && p.options.GetMessageId() == "" {
		p.options = proto.CloneOf(p.options)
		p.options.MessageId = p.id
	}
	p.start = l.now()
	l.pushes = append(l.pushes, p)
}

// answer notes what the caller was told.
func (l *ledger) answer(p *push, success bool, summary *pubsub.DeliverySummary, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p.end, p.done, p.success, p.summary, p.err = l.now(), true, success, summary, err
}

// arrive notes that a client got a push.
func (l *ledger) arrive(id, user, client, node string) {
	l.add(arrival{push: id, user: user, client: client, node: node})
}

func (l *ledger) add(a arrival) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a.at = l.now()
	l.arrivals = append(l.arrivals, a)
}

// arrived is the number of arrivals since a moment of which pick says true.
func (l *ledger) arrived(since time.Duration, pick func(arrival) bool) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, a := range l.arrivals {
		if a.at > since && pick(a) {
			n++
		}
	}
	return n
}

func at(node string) func(arrival) bool { return func(a arrival) bool { return a.node == node } }

// violation is a broken promise.
type violation struct {
	rule string // I1 and so on
	text string
	push *push
}

// check compares what arrived with what was told. slack is what I7 grants beyond the
// deadline, and the time in which the callers could not run is not held against anybody.
func (l *ledger) check(slack time.Duration) []violation {
	l.mu.Lock()
	defer l.mu.Unlock()
	var found []violation
	byPush := make(map[string][]arrival, len(l.pushes))
	for _, a := range l.arrivals {
		byPush[a.push] = append(byPush[a.push], a)
	}
	known := make(map[string]*push, len(l.pushes))
	messages := make(map[string]*message)
	for _, p := range l.pushes {
		known[p.id] = p
		late := slack
		for _, f := range l.frozen {
			late += f.within(p.start, p.end)
		}
		list := p.checkAnswer(late)
		if p.options != nil {
			if messages[p.id] == nil {
				messages[p.id] = &message{arrived: byPush[p.id]}
			}
			messages[p.id].tries = append(messages[p.id].tries, p)
		} else {
			list = append(list, p.check(byPush[p.id], l.clientsLeave)...)
		}
		for _, f := range list {
			f.push = p
			found = append(found, f)
		}
	}
	for _, m := range messages {
		found = append(found, m.check(l)...)
	}
	found = append(found, l.checkMessageOrderLocked(messages)...)
	for id, list := range byPush {
		if known[id] == nil {
			found = append(found, violation{"I1", fmt.Sprintf("%q arrived at %q and was never pushed", id, list[0].client), &push{id: id}})
		}
	}
	return append(found, l.checkOrderLocked(known)...)
}

// checkAnswer holds what a caller was told against itself.
func (p *push) checkAnswer(slack time.Duration) (found []violation) {
	add := func(rule, format string, args ...any) {
		found = append(found, violation{rule: rule, text: fmt.Sprintf(format, args...)})
	}
	switch {
	case !p.done:
		add("I7", "it was never answered")
		return found
	case p.took() > p.limit+slack:
		add("I7", "answered after %v, the limit is %v", p.took(), p.limit)
	}
	if p.err != nil {
		return found
	}
	s := p.summary
	if s == nil {
		add("I2", "no summary")
		return found
	}
	if sum := s.GetDelivered() + s.GetOffline() + s.GetFailed() + s.GetUnknown(); s.GetTargets() != sum || min(s.GetDelivered(), s.GetOffline(), s.GetFailed(), s.GetUnknown()) < 0 {
		add("I2", "%d targets, but the outcomes are %d", s.GetTargets(), sum)
	}
	whole := s.GetFailed() == 0 && s.GetUnknown() == 0 && len(s.GetNodeFailures()) == 0
	if p.success && !whole {
		add("I2", "success although something failed or is unknown")
	}
	for _, part := range []struct {
		what     string
		is, most int32
	}{
		{"stored of offline", s.GetStored(), s.GetOffline()},
		{"unsure of stored", s.GetUnsure(), s.GetStored()},
		{"acked of delivered", s.GetAcked(), s.GetDelivered()},
		{"duplicates of delivered", s.GetDuplicates(), s.GetDelivered()},
	} {
		if part.is < 0 || part.is > part.most {
			add("I2", "%d %s, which are %d", part.is, part.what, part.most)
		}
	}
	store := p.options.GetOffline() == pubsub.OfflinePolicy_OFFLINE_STORE
	if s.GetStored() > 0 && !store || s.GetAcked() > 0 && p.options.GetAck() != pubsub.AckPolicy_ACK_CLIENT || s.GetDuplicates() > 0 && p.options.GetMessageId() == "" {
		add("I2", "it says what nobody asked for")
	}
	notKept := strings.Contains(failures(s), "store: ")
	switch position := s.GetPosition(); {
	case position != "" && (p.kind != toRoom || !store):
		add("I2", "it stands in a log, and nobody asked for it")
	case position == "" && p.kind == toRoom && (s.GetStored() > 0 || store && !notKept):
		add("I2", "it stands in no log, and nothing says why")
	}
	if id := p.options.GetMessageId(); id != s.GetMessageId() && (id != "" || !store) {
		add("I2", "the message is called %q, not %q", s.GetMessageId(), id)
	}
	if store && whole && s.GetTargets() > 0 && s.GetStored() == s.GetOffline() && !p.success && !p.changed() {
		add("I2", "all is delivered or stored, and it is no success")
	}
	return found
}

// check holds one push without options against its arrivals.
func (p *push) check(arrived []arrival, clientsLeave bool) (found []violation) {
	add := func(rule, format string, args ...any) {
		found = append(found, violation{rule: rule, text: fmt.Sprintf(format, args...)})
	}
	clients := make(map[string]int, len(arrived))
	reached := make(map[string]bool, len(arrived)) // users; in a broadcast users of a node
	for _, a := range arrived {
		if p.kind == toAll { // each node counts for itself, and a client may move on meanwhile
			a.client, a.user = a.client+" on "+a.node, a.user+" on "+a.node
		}
		clients[a.client]++
		reached[a.user] = true
		if p.kind == toUser && a.user != p.key {
			add("I1", "it arrived at %q", a.user)
		}
	}
	for client, n := range clients {
		if n > 1 {
			add("I3", "%q got it %d times", client, n)
		}
	}
	if p.err != nil {
		if p.safe() && len(arrived) > 0 {
			add("I4", "the error says that nothing was sent, and it arrived %d times", len(arrived))
		}
		return found
	}
	s := p.summary
	if s == nil {
		return found
	}
	delivered, unknown := int(s.GetDelivered()), int(s.GetUnknown())
	if delivered > len(reached) && !clientsLeave {
		add("I1", "%d users are claimed, %d were reached", delivered, len(reached))
	}
	// In a broadcast a node that did not answer adds nothing to the counts.
	if len(reached) > delivered+unknown && (p.kind != toAll || len(s.GetNodeFailures()) == 0) {
		add("I1", "%d users were reached, more than the %d delivered and %d unknown: what is said to have failed has arrived", len(reached), delivered, unknown)
	}
	return found
}

// checkOrderLocked finds, client by client, pushes with one key that arrived in
// another order than they were made in.
//
// Two pushes are in order when the second was begun after the first was answered, or
// when both went into one PushStream. Only pushes through the same Push-Manager are
// compared where the first ended unknown: it may still be on its way from the one,
// and nobody could tell the other. An error that is not Push-Manager's own is no answer
// at all: the call may still be on its way to it.
func (l *ledger) checkOrderLocked(known map[string]*push) (found []violation) {
	last := make(map[lane]*latest)
	for _, a := range l.arrivals {
		p := known[a.push]
		if p == nil || p.kind == toUsers || !p.done || p.options != nil {
			continue // a list of users is no key, and messages are judged by themselves
		}
		conn, key := a.client+" on "+a.node, p.kind.String()+" "+p.key
		own := reach(last, lane{conn, key, p.manager})
		found = append(found, own.judge(conn, p)...)
		own.add(p)
		all := reach(last, lane{conn, key, ""})
		if b := all.begun; p.settled() && b != nil && b.manager != p.manager && b.start > p.end {
			found = append(found, outOfOrder(conn, b, p))
		}
		all.add(p)
	}
	return found
}

// settled tells that nothing of the push can still be on its way.
func (p *push) settled() bool {
	return p.err == nil && p.summary.GetUnknown() == 0 && len(p.summary.GetNodeFailures()) == 0
}

// lane is what has an order: the pushes with one key by one Push-Manager, "" for
// all, at one connection.
type lane struct{ conn, key, manager string }

// latest is what a lane has got so far.
type latest struct {
	begun *push            // the one that was begun last
	place map[string]*push // and the last of each stream
}

func reach(lanes map[lane]*latest, at lane) *latest {
	if lanes[at] == nil {
		lanes[at] = &latest{place: map[string]*push{}}
	}
	return lanes[at]
}

func (t *latest) judge(conn string, p *push) (found []violation) {
	if b := t.begun; b != nil && b.start > p.end && (p.err == nil || p.safe()) {
		return []violation{outOfOrder(conn, b, p)}
	}
	if b := t.place[p.stream]; p.stream != "" && b != nil && b.place > p.place {
		return []violation{{"I10", fmt.Sprintf("%s got %s before it, which is behind it in the stream", conn, b.id), p}}
	}
	return nil
}

func (t *latest) add(p *push) {
	if t.begun == nil || p.start > t.begun.start {
		t.begun = p
	}
	if b := t.place[p.stream]; p.stream != "" && (b == nil || p.place > b.place) {
		t.place[p.stream] = p
	}
}

func outOfOrder(conn string, first, second *push) violation {
	return violation{"I10", fmt.Sprintf("%s got %s before it, which was begun %v after it was answered", conn, first.id, first.start-second.end), second}
}

// history tells all that happened to a push, and around it.
func (l *ledger) history(p *push) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var events []note
	until := p.end
	if p.id != "" && p.kind.String() != "" {
		events = append(events, note{p.start, fmt.Sprintf("%s pushed to %s %q by %s, stream %q place %d", p.id, p.kind, p.key, p.manager, p.stream, p.place)})
	}
	if p.done {
		events = append(events, note{p.end, p.String()})
	}
	for _, a := range l.arrivals {
		if a.push == p.id {
			events = append(events, note{a.at, fmt.Sprintf("%s arrived at %s on %s", a.push, a.client, a.node)})
			until = max(until, a.at)
		}
	}
	for _, n := range l.notes {
		if n.at >= p.start-5*time.Second && n.at <= until+time.Second {
			events = append(events, n)
		}
	}
	slices.SortStableFunc(events, func(a, b note) int { return int(a.at - b.at) })
	var b strings.Builder
	for _, e := range events {
		fmt.Fprintf(&b, "  %12v  %s\n", e.at.Round(time.Microsecond), e.text)
	}
	return b.String()
}

// tally sums up pushes.
type tally struct {
	pushes, success                               int
	targets, delivered, offline, failed, unknown  int
	stored, unsure, acked, duplicates             int
	errors                                        map[codes.Code]int
	bare                                          int           // errors that do not say that nothing was sent
	late                                          int           // calls that expired near a time in which we could not run
	median, slowest, overrun                      time.Duration // median: of those that ledger.tally sums up
	firstUnknown, lastUnknown, lastFailed, lastOK time.Duration
}

// tally sums up the answered pushes that were begun in a span of time and of which
// pick, which is called under mu, says true.
func (l *ledger) tally(from, to time.Duration, pick func(*push) bool) tally {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := tally{errors: map[codes.Code]int{}}
	var took []time.Duration
	for _, p := range l.pushes {
		if !p.done || p.start < from || p.start > to || pick != nil && !pick(p) {
			continue
		}
		t.add(p)
		if p.code() == codes.DeadlineExceeded && l.nearFreezeLocked(p, besideFreeze) {
			t.late++
		}
		took = append(took, p.took())
	}
	if len(took) > 0 {
		slices.Sort(took)
		t.median = took[len(took)/2]
	}
	return t
}

func (t *tally) add(p *push) {
	t.pushes++
	t.slowest = max(t.slowest, p.took())
	t.overrun = max(t.overrun, p.took()-p.limit)
	if p.err != nil {
		t.errors[p.code()]++
		if !p.safe() {
			t.bare++
		}
		return
	}
	if p.success {
		t.success++
		t.lastOK = max(t.lastOK, p.end)
	}
	s := p.summary
	t.targets += int(s.GetTargets())
	t.delivered += int(s.GetDelivered())
	t.offline += int(s.GetOffline())
	t.failed += int(s.GetFailed())
	t.unknown += int(s.GetUnknown())
	t.stored += int(s.GetStored())
	t.unsure += int(s.GetUnsure())
	t.acked += int(s.GetAcked())
	t.duplicates += int(s.GetDuplicates())
	if s.GetUnknown() > 0 {
		if t.firstUnknown == 0 || p.end < t.firstUnknown {
			t.firstUnknown = p.end
		}
		t.lastUnknown = max(t.lastUnknown, p.end)
	}
	if s.GetFailed() > 0 {
		t.lastFailed = max(t.lastFailed, p.end)
	}
}

func (t tally) String() string {
	return fmt.Sprintf("%d pushes, %d a success; of %d targets %d delivered (%d acked, %d duplicates), %d offline (%d stored, %d unsure), %d failed, %d unknown; errors %v, %d bare, %d late through the machine; median %v, slowest %v",
		t.pushes, t.success, t.targets, t.delivered, t.acked, t.duplicates, t.offline, t.stored, t.unsure, t.failed, t.unknown, t.errors, t.bare, t.late, t.median.Round(time.Millisecond), t.slowest.Round(time.Millisecond))
}
