package conformance

import (
	"slices"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

// plainLasting is what plain keeps for lasting delivery. Guarded by plain.mu.
type plainLasting struct {
	had    map[string]uint32 // hash of what was shown, by user, sender and id
	keys   map[string]bool   // collapse keys that were shown
	gates  uint64
	asked  map[uint64]*plainGate
	closed map[string]*plainGate // by user
}

// plainGate is a Catchup. Clients of plain acknowledge nothing, so what they took is taken.
type plainGate struct {
	user   string
	on     *plainStream
	number uint64
	last   uint64
	held   []*pubsub.MessageContent
}

func (p *plain) features() []pubsub.Feature {
	if p.bare || p.fault == "duplicates unnamed" || p.fault == "disconnects without the feature" {
		return []pubsub.Feature{pubsub.Feature_FEATURE_SCOPE}
	}
	return slices.Concat([]pubsub.Feature{pubsub.Feature_FEATURE_SCOPE, pubsub.Feature_FEATURE_ROOMS, pubsub.Feature_FEATURE_FILTER, pubsub.Feature_FEATURE_DISCONNECT}, every)
}

// handLasting gives a message to a user. What the node has not named it does not look at.
func (st *plainStream) handLasting(user string, d *pubsub.Delivery) (here bool, reason string) {
	p := st.p
	if len(p.features()) == 1 {
		if p.fault == "duplicates unnamed" && d.MessageId != "" {
			st.dups++
		}
		return p.hand(user, d.Content), ""
	}
	if d.TtlMs > 0 && p.fault == "everything expires" {
		return false, "expired"
	}
	key := user + "\x00" + d.Sender + "\x00" + d.MessageId
	p.mu.Lock()
	hash, had := p.lasting.had[key]
	gate := p.lasting.asked[d.GetReplay().GetGate()]
	_, connected := p.users[user]
	shut := p.lasting.closed[user]
	collapsed := d.CollapseKey != "" && p.fault == "the first of a key stays" && p.lasting.keys[user+d.CollapseKey]
	p.lasting.keys[user+d.CollapseKey] = true
	p.mu.Unlock()
	switch {
	case !connected, d.Replay != nil && gate == nil:
		return false, ""
	case d.Replay != nil && d.Replay.After != gate.last:
		return false, "behind"
	case had && d.MessageId != "" && hash != d.PayloadHash && p.fault != "ids are not remembered":
		return false, "reused"
	}
	if d.Replay != nil {
		gate.last = d.Replay.Seq
		st.taken = append(st.taken, &pubsub.ReplayTaken{Gate: gate.number, Seq: gate.last})
	}
	if had && d.MessageId != "" && p.fault != "ids are not remembered" {
		st.dups++
		return true, ""
	}
	if d.WantAck {
		st.waits++
	}
	if d.MessageId != "" {
		p.mu.Lock()
		p.lasting.had[key] = d.PayloadHash
		p.mu.Unlock()
	}
	if collapsed {
		return true, ""
	}
	if d.Replay == nil && shut != nil && p.fault != "live ones overtake" {
		p.mu.Lock()
		shut.held = append(shut.held, d.Content)
		p.mu.Unlock()
		return true, ""
	}
	return p.hand(user, d.Content), ""
}

// ask sends a Catchup. closed: what is new waits for its end.
func (st *plainStream) ask(user string, closed bool) {
	p := st.p
	p.mu.Lock()
	p.lasting.gates++
	g := &plainGate{user: user, on: st, number: p.lasting.gates}
	p.lasting.asked[g.number] = g
	if before := p.lasting.closed[user]; before != nil {
		g.held, closed = before.held, true
	}
	if closed {
		p.lasting.closed[user] = g
	}
	p.mu.Unlock()
	st.send(&pubsub.DeliverResponse{Catchups: []*pubsub.Catchup{{UserId: user, Gate: g.number}}})
}

// askAll asks for the users who are here.
func (st *plainStream) askAll(h *pubsub.Hello) {
	if !slices.Contains(h.GetFeatures(), pubsub.Feature_FEATURE_REPLAY) || len(st.p.features()) == 1 {
		return
	}
	st.p.mu.Lock()
	var users []string
	for user := range st.p.users {
		users = append(users, user)
	}
	st.p.mu.Unlock()
	for _, user := range users {
		st.ask(user, false)
	}
}

// end opens a gate.
func (st *plainStream) end(number uint64, failure string) {
	p := st.p
	p.mu.Lock()
	g := p.lasting.asked[number]
	if g == nil || g.on != st {
		p.mu.Unlock()
		return
	}
	delete(p.lasting.asked, number)
	if p.lasting.closed[g.user] == g {
		delete(p.lasting.closed, g.user)
		if got := p.users[g.user]; got != nil {
			for _, c := range g.held {
				got(string(c.GetData()))
			}
		}
	}
	p.mu.Unlock()
	if failure != "" && p.fault != "asks once" {
		time.AfterFunc(10*time.Millisecond, func() { st.ask(g.user, false) })
	}
}

// endAll opens the gates whose stream has ended.
func (st *plainStream) endAll() {
	st.p.mu.Lock()
	var numbers []uint64
	for number, g := range st.p.lasting.asked {
		if g.on == st {
			numbers = append(numbers, number)
		}
	}
	st.p.mu.Unlock()
	for _, number := range numbers {
		st.end(number, "")
	}
}

// rest takes what a frame says of replay, and says what its deliveries have left to say.
func (st *plainStream) rest(f *pubsub.DeliverRequest) {
	if len(st.p.features()) == 1 {
		return
	}
	if r := st.receipts; len(r)+len(st.taken) > 0 {
		st.send(&pubsub.DeliverResponse{Receipts: r, ReplayTaken: st.taken})
		st.receipts, st.taken = nil, nil
	}
	for _, e := range f.GetReplayEnds() {
		st.end(e.Gate, e.Error)
	}
	for _, n := range f.GetNudges() {
		st.p.mu.Lock()
		_, here := st.p.users[n.UserId]
		st.p.mu.Unlock()
		if here {
			st.ask(n.UserId, true)
		}
		if st.p.fault != "nudges are not answered" {
			st.send(&pubsub.DeliverResponse{NudgesTaken: []uint64{n.Token}})
		}
	}
}
