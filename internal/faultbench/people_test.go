package faultbench

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lxzan/gws"
)

// visit is one WebSocket connection of a user to a gateway, as the client saw it. Times
// count from the ledger's begin; 0 means that it has not happened.
type visit struct {
	// Static.
	id   string
	user string
	gate *gate
	t    *town

	hushed atomic.Bool // it acknowledges nothing

	ws    *gws.Conn
	told  chan struct{} // closed when the gateway has said that pushes reach the user
	ended chan struct{} // closed when the reader has ended

	// Guarded by town.mu.
	ready  time.Duration // told so
	closed time.Duration // the client began to close it, or saw that it was over, or the gateway was asked to go
	stays  []*stay
	asked  map[uint64]bool // numbers that it was asked to acknowledge
}

// stay is one membership of a connection. A room that is left and entered again is two.
type stay struct {
	room                         string
	asked, joined, leaving, left time.Duration
}

// kept is how long a connection must have been told of something before a push for the
// push to be owed to it, and how long it must last after the answer.
const (
	keptBefore = 200 * time.Millisecond
	keptAfter  = time.Second
)

// throughout tells whether the user's connection was there all the while.
func (v *visit) throughout(p *push) bool {
	return v.ready > 0 && v.ready+keptBefore <= p.start && (v.closed == 0 || v.closed >= p.end+keptAfter)
}

// inThroughout tells whether the connection was in a room all the while.
func (v *visit) inThroughout(room string, p *push) bool {
	return (v.closed == 0 || v.closed >= p.end+keptAfter) && slices.ContainsFunc(v.stays, func(s *stay) bool {
		return s.room == room && s.joined > 0 && s.joined+keptBefore <= p.start && (s.leaving == 0 || s.leaving >= p.end)
	})
}

// mayGet tells whether a room's push may reach the connection at a moment.
func (v *visit) mayGet(room string, at time.Duration) bool {
	return slices.ContainsFunc(v.stays, func(s *stay) bool {
		return s.room == room && s.asked <= at && (s.left == 0 || at <= s.left)
	})
}

// open connects a user. nil means that the gateway did not take it.
func (t *town) open(user string, g *gate, room string) *visit {
	return t.openAt(user, g, g.http, room)
}

// openAt is open by another way to the gateway than its own address.
func (t *town) openAt(user string, g *gate, address, room string) *visit {
	v := &visit{id: fmt.Sprintf("%s/%d", user, t.visits.Add(1)), user: user, gate: g, t: t, told: make(chan struct{}), ended: make(chan struct{})}
	q := url.Values{"user_id": {user}}
	if room != "" {
		q.Set("room_id", room)
		v.stays = []*stay{{room: room, asked: t.ledger.now()}}
	}
	if t.plan.acks {
		q.Set("ack", "1")
	}
	if t.plan.resumes {
		q.Set("resume", t.positionOf(user))
	}
	ws, resp, err := gws.NewClient(clientEvents{v: v}, &gws.ClientOption{Addr: "ws://" + address + "/ws?" + q.Encode(), HandshakeTimeout: 2 * time.Second})
	if resp != nil && resp.Body != nil {
		_ = resp.Body.Close()
	}
	if err != nil {
		return nil
	}
	v.ws = ws
	t.mu.Lock()
	t.byUser[user] = append(t.byUser[user], v)
	if g.leaving { // it was asked to go meanwhile
		v.closed = t.ledger.now()
	}
	t.mu.Unlock()
	t.readers.Go(func() {
		defer close(v.ended)
		ws.ReadLoop()
	})
	return v
}

// close ends the connection and waits for its reader.
func (v *visit) close() {
	v.over()
	_ = v.ws.WriteClose(1000, nil)
	_ = v.ws.NetConn().Close()
	<-v.ended
}

// over notes the end of the connection, once.
func (v *visit) over() {
	v.t.mu.Lock()
	defer v.t.mu.Unlock()
	if v.closed == 0 {
		v.closed = v.t.ledger.now()
	}
}

// say sends a client message about a room.
func (v *visit) say(what, room string) {
	text, err := json.Marshal(map[string]string{"type": what, "room_id": room})
	if err != nil {
		panic(err)
	}
	_ = v.ws.WriteMessage(gws.OpcodeText, text) // whoever reads sees that it is over
}

// join asks for a room, leave for the way out.
func (v *visit) join(room string) {
	v.t.mu.Lock()
	v.stays = append(v.stays, &stay{room: room, asked: v.t.ledger.now()})
	v.t.mu.Unlock()
	v.say("join", room)
}

// leave leaves a room that the connection has joined; false means that it is in none.
func (v *visit) leave() bool {
	v.t.mu.Lock()
	i := slices.IndexFunc(v.stays, func(s *stay) bool { return s.joined > 0 && s.leaving == 0 })
	if i < 0 {
		v.t.mu.Unlock()
		return false
	}
	s := v.stays[i]
	s.leaving = v.t.ledger.now()
	v.t.mu.Unlock()
	v.say("leave", s.room)
	return true
}

// rooms is how many the connection is in or has asked for.
func (v *visit) rooms() (n int, in func(room string) bool) {
	v.t.mu.Lock()
	defer v.t.mu.Unlock()
	var open []string
	for _, s := range v.stays {
		if s.left == 0 {
			open = append(open, s.room)
		}
	}
	return len(open), func(room string) bool { return slices.Contains(open, room) }
}

// clientEvents reads what a gateway says to one connection.
type clientEvents struct {
	gws.BuiltinEventHandler

	v *visit
}

// OnClose implements gws.Event.
func (e clientEvents) OnClose(*gws.Conn, error) { e.v.over() }

// OnPing implements gws.Event.
func (e clientEvents) OnPing(ws *gws.Conn, payload []byte) { _ = ws.WritePong(payload) }

// OnMessage implements gws.Event.
func (e clientEvents) OnMessage(_ *gws.Conn, message *gws.Message) {
	defer func() { _ = message.Close() }()
	var m struct {
		Type    string `json:"type"`
		RoomID  string `json:"room_id"`
		Message string `json:"message"`
		Data    struct {
			Content string `json:"content"`
		} `json:"data"`
		ID       string `json:"id"`
		Ack      uint64 `json:"ack"`
		Replayed bool   `json:"replayed"`
		Token    string `json:"token"`
	}
	v, t := e.v, e.v.t
	if err := json.Unmarshal(message.Bytes(), &m); err != nil {
		t.broken("%s: %v: %.200q", v.id, err, message.Bytes())
		return
	}
	switch m.Type {
	case "text":
		id := idOf([]byte(m.Data.Content))
		t.mu.Lock()
		stranger := m.RoomID != "" && !v.mayGet(m.RoomID, t.ledger.now())
		again := v.asked[m.Ack] // its acknowledgement has come too late: a repeat has the old number
		if m.Ack != 0 {
			if v.asked == nil {
				v.asked = make(map[uint64]bool)
			}
			v.asked[m.Ack] = true
		}
		t.mu.Unlock()
		if stranger {
			t.broken("%s got %s of room %s, in which it is not", v.id, id, m.RoomID)
		}
		if !t.plan.acks && !t.plan.resumes && (m.ID != "" || m.Ack != 0 || m.Replayed) {
			t.broken("%s did not ask for acknowledgements, and got %.200q", v.id, message.Bytes())
		}
		hushed := v.hushed.Load()
		t.ledger.add(arrival{push: id, user: v.user, client: v.id, node: v.gate.id, replayed: m.Replayed, repeat: m.Replayed && (hushed || again)})
		if m.Ack != 0 && !hushed {
			_ = v.ws.WriteMessage(gws.OpcodeText, fmt.Appendf(nil, `{"type":"ack","ack":%d}`, m.Ack))
		}
	case "resume", "gap":
		t.told(v, m.Type, m.RoomID, m.Token)
	case "ready", "joined", "left":
		t.mu.Lock()
		now := t.ledger.now()
		first := v.ready == 0
		if first && m.Type != "left" {
			v.ready = now
		}
		for _, s := range v.stays {
			switch {
			case s.room != m.RoomID:
			case m.Type == "joined" && s.joined == 0:
				s.joined = now
			case m.Type == "left" && s.leaving > 0 && s.left == 0:
				s.left = now
			}
		}
		t.mu.Unlock()
		if first && m.Type != "left" {
			close(v.told)
		}
	case "error":
		t.refused.Add(1)
		t.ledger.note("%s was told: %s", v.id, m.Message)
	}
}

// person is a user who comes, moves and goes.
type person struct {
	t    *town
	name string
	r    *rand.Rand
	now  *visit
}

// live acts every now and then, until the town ends.
func (p *person) live(pause time.Duration) {
	defer func() {
		if p.now != nil {
			p.now.close()
		}
	}()
	wait(time.Duration(p.r.Int64N(int64(pause))))
	for {
		timer := time.NewTimer(time.Duration(p.r.ExpFloat64() * float64(pause)))
		var ended chan struct{} // of the connection, if there is one
		if p.now != nil {
			ended = p.now.ended
		}
		select {
		case <-p.t.stop:
			timer.Stop()
			return
		case <-ended: // the gateway has gone: come again at once
			timer.Stop()
			p.now = nil
			p.come()
		case <-timer.C:
			p.act()
		}
	}
}

func (p *person) act() {
	p.t.acts.Add(1)
	switch n := p.r.IntN(100); {
	case p.now == nil:
		p.come()
	case n < 45:
		p.move()
	case n < 75:
		p.now.close()
		p.now = nil
	case n < 90:
		room := p.t.anyRoom(p.r)
		if count, in := p.now.rooms(); count < 3 && !in(room) {
			p.now.join(room)
		}
	default:
		p.now.leave()
	}
}

func (p *person) come() {
	room := ""
	if p.r.IntN(4) > 0 {
		room = p.t.anyRoom(p.r)
	}
	if g := p.t.anyGate(p.r); g != nil {
		p.now = p.t.open(p.name, g, room)
	}
}

// move connects somewhere else and goes when pushes come there.
func (p *person) move() {
	old := p.now
	p.now = nil
	if p.come(); p.now != nil {
		timer := time.NewTimer(3 * time.Second)
		select {
		case <-p.now.told:
		case <-p.now.ended:
		case <-timer.C: // no gateway has to be quick
		case <-p.t.stop:
		}
		timer.Stop()
	}
	old.close()
}

// town is real gateways, Controllers and Push-Managers, and the people.
type town struct {
	*bench
	plan        townPlan
	managers    []*manager
	gates       []*gate
	controllers []*controllerLives
	stop        chan struct{}
	rooms       []string
	users       []string

	readers, people, callers sync.WaitGroup
	visits, acts, refused    atomic.Int64

	mu sync.Mutex
	// Guarded by mu.
	byUser map[string][]*visit
	wrong  []string // promises that were broken

	positions map[string]*kept // of users, where townPlan.resumes; nil in the beginning
}

// broken notes a broken promise.
func (t *town) broken(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.wrong = append(t.wrong, fmt.Sprintf("%v: ", t.ledger.now().Round(time.Millisecond))+fmt.Sprintf(format, args...))
}

func (t *town) anyRoom(r *rand.Rand) string { return pick(r, t.rooms) }

// anyGate is a gateway that takes clients, nil if there is none.
func (t *town) anyGate(r *rand.Rand) *gate {
	t.mu.Lock()
	defer t.mu.Unlock()
	var open []*gate
	for _, g := range t.gates {
		if !g.leaving {
			open = append(open, g)
		}
	}
	if len(open) == 0 {
		return nil
	}
	return open[r.IntN(len(open))]
}

// owed judges pushes that were answered and whose arrivals are all in: whoever stayed
// connected misses nothing that says delivered, and is not said to be offline.
func (t *town) owed(pushes []*push, arrivals []arrival) {
	got := make(map[string][]string, len(pushes))
	for _, a := range arrivals {
		got[a.push] = append(got[a.push], a.user)
	}
	// A copy: who reads for clients must not wait for the judge.
	byUser, byRoom := map[string][]*visit{}, map[string][]*visit{}
	t.mu.Lock()
	for user, visits := range t.byUser {
		for _, v := range visits {
			c := &visit{id: v.id, user: user, gate: v.gate, ready: v.ready, closed: v.closed}
			for _, s := range v.stays {
				stay := *s
				c.stays = append(c.stays, &stay)
				byRoom[s.room] = append(byRoom[s.room], c)
			}
			byUser[user] = append(byUser[user], c)
		}
	}
	t.mu.Unlock()
	for _, p := range pushes {
		if p.err != nil || p.summary == nil {
			continue
		}
		there := map[string]bool{}
		switch p.kind {
		case toUser:
			for _, v := range byUser[p.key] {
				there[v.user] = there[v.user] || v.throughout(p)
			}
		case toRoom:
			for _, v := range byRoom[p.key] {
				there[v.user] = there[v.user] || v.inThroughout(p.key, p)
			}
		case toUsers, toAll: // the town has none
		}
		var missing []string
		for user, was := range there {
			if was && !slices.Contains(got[p.id], user) {
				missing = append(missing, user)
			}
		}
		excuse := int(p.summary.GetFailed() + p.summary.GetUnknown())
		if p.changed() {
			continue // it says that there may be others
		}
		if len(missing) > excuse {
			slices.Sort(missing)
			var about strings.Builder
			for _, v := range byUser[missing[0]] {
				fmt.Fprintf(&about, "\n    %s on %s ready %v closed %v", v.id, v.gate.id, v.ready, v.closed)
				for _, s := range v.stays {
					fmt.Fprintf(&about, "; %s asked %v joined %v leaving %v left %v", s.room, s.asked, s.joined, s.leaving, s.left)
				}
			}
			t.broken("pushed at %v: %v: %d of those who were there all the while did not get it, %d may: %v%s",
				p.start.Round(time.Millisecond), p, len(missing), excuse, missing[:min(len(missing), 5)], about.String())
		}
	}
}

// forget drops connections that ended before a moment.
func (t *town) forget(before time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for user, visits := range t.byUser {
		t.byUser[user] = slices.DeleteFunc(visits, func(v *visit) bool {
			return v.closed > 0 && v.closed < before
		})
	}
}
