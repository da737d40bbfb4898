package faultbench

import (
	"cmp"
	"slices"
	"time"

	"github.com/push-manager/push-manager/internal/position"
)

// kept is what a user's clients keep of the logs of rooms, over all connections.
type kept struct {
	token string        // the last one told
	since time.Duration // when the first one came
	gaps  map[string]bool
}

// positionOf is with what a user comes again.
func (t *town) positionOf(user string) string {
	if t.plan.highest {
		return t.highestOf(user)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if k := t.positions[user]; k != nil {
		return k.token
	}
	return ""
}

// told notes what a gateway says of a client's position.
func (t *town) told(v *visit, what, room, token string) {
	if !t.plan.resumes {
		t.broken("%s keeps no position, and is told %s", v.id, what)
		return
	}
	if _, err := position.Parse(token); what == "resume" && err != nil {
		t.broken("%s is told a position that is none: %q", v.id, token)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.positions == nil {
		t.positions = map[string]*kept{}
	}
	k := t.positions[v.user]
	if k == nil {
		k = &kept{gaps: map[string]bool{}}
		t.positions[v.user] = k
	}
	switch what {
	case "gap":
		k.gaps[room] = true
	default:
		if k.token == "" {
			k.since = t.ledger.now()
		}
		k.token = token
	}
}

// highestOf is the mistaken position of a client that takes the furthest message it has seen for one that has seen all.
func (t *town) highestOf(user string) string {
	t.mu.Lock()
	var told position.Position
	if k := t.positions[user]; k != nil && k.token != "" {
		told, _ = position.Parse(k.token)
	}
	t.mu.Unlock()
	l := t.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	at := map[string]string{}
	for _, p := range l.pushes {
		at[p.id] = p.summary.GetPosition()
	}
	all := position.Position{Epoch: told.Epoch}
	for _, at := range told.Places { // of which it has seen nothing, it reads all: that is no mistake
		all.Places = append(all.Places, position.Place{Partition: at.Partition})
	}
	for _, a := range l.arrivals {
		if a.user != user || at[a.push] == "" {
			continue
		}
		p, err := position.Parse(at[a.push])
		if err != nil || len(p.Places) != 1 {
			continue
		}
		all.Epoch = p.Epoch
		i, ok := slices.BinarySearchFunc(all.Places, p.Places[0].Partition, func(e position.Place, p uint32) int { return cmp.Compare(e.Partition, p) })
		if !ok {
			all.Places = slices.Insert(all.Places, i, p.Places[0])
		}
		all.Places[i].Seq = max(all.Places[i].Seq, p.Places[0].Seq)
	}
	if len(all.Places) == 0 {
		return ""
	}
	return all.String()
}

// missed are the messages that stand in the logs of rooms and have not come to members who keep positions: from when a
// member was in the room and had one. members are the rooms of users, which they never leave. A gap excuses nothing: the
// tests that call this keep enough.
func (t *town) missed(members map[string][]string) map[string][]string {
	joined := map[string]time.Duration{} // by user and room
	t.mu.Lock()
	for user, visits := range t.byUser {
		for _, v := range visits {
			for _, s := range v.stays {
				if at, ok := joined[user+" "+s.room]; s.joined > 0 && (!ok || s.joined < at) {
					joined[user+" "+s.room] = s.joined
				}
			}
		}
	}
	since := map[string]time.Duration{}
	for user, k := range t.positions {
		if k.token != "" {
			since[user] = k.since
		}
	}
	t.mu.Unlock()
	l := t.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	got := make(map[[2]string]bool, len(l.arrivals))
	for _, a := range l.arrivals {
		got[[2]string{a.user, a.push}] = true
	}
	byRoom := map[string][]*push{}
	for _, p := range l.pushes {
		if p.kind == toRoom && p.done && p.summary.GetPosition() != "" {
			byRoom[p.key] = append(byRoom[p.key], p)
		}
	}
	missed := map[string][]string{}
	for user, rooms := range members {
		from, ok := since[user]
		if !ok {
			continue
		}
		for _, room := range rooms {
			at, ok := joined[user+" "+room]
			if !ok {
				continue
			}
			for _, p := range byRoom[room] {
				if p.start > max(at, from) && !got[[2]string{user, p.id}] {
					missed[user] = append(missed[user], p.id)
				}
			}
		}
	}
	return missed
}

// gaps is how many users were told of a gap.
func (t *town) gaps() (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, k := range t.positions {
		n += min(len(k.gaps), 1)
	}
	return n
}
