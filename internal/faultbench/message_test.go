package faultbench

import (
	"fmt"
	"slices"
	"strings"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

// message is what was pushed with options, in one try or in several with one id.
type message struct {
	tries   []*push // in the order in which they were begun
	arrived []arrival
}

func (m *message) first() *push { return m.tries[0] }
func (m *message) last() *push  { return m.tries[len(m.tries)-1] }

// check holds a message against its arrivals:
//
//   - no connection gets it twice, but for a repeat of what it has not acknowledged, and, marked as
//     such, for what callers were told that it may have already, and for what stands in the log of a room
//   - who is said to have acknowledged it has got it, and so has who it is stored for, when
//     they have come back
//   - who is said to have it from nobody has not got it
//   - nothing is shown later than it is good for
func (m *message) check(l *ledger) (found []violation) {
	add := func(rule string, p *push, format string, args ...any) {
		found = append(found, violation{rule, fmt.Sprintf(format, args...), p})
	}
	p := m.first()
	clients := make(map[string]int, len(m.arrived))
	reached := make(map[string]bool, len(m.arrived))
	unsure := slices.ContainsFunc(m.tries, func(p *push) bool {
		return p.summary.GetUnsure() > 0 || p.summary.GetUnknown() > 0 && p.maybeKept()
	})
	logged := m.logged() || p.kind == toRoom && slices.ContainsFunc(m.tries, (*push).maybeKept)
	for _, a := range m.arrived {
		if client := a.client + " on " + a.node; !a.repeat && !(a.replayed && (unsure || logged) && clients[client] > 0) {
			clients[client]++
		}
		reached[a.user] = true
		if p.kind == toUser && a.user != p.key || p.kind == toUsers && !slices.Contains(p.users, a.user) {
			add("I1", p, "it arrived at %q", a.user)
		}
	}
	for client, n := range clients {
		if n > 1 {
			add("I3", p, "%q got it %d times", client, n)
		}
	}
	m.checkClaims(l, reached, add)
	m.checkAge(l, add)
	return found
}

// logged tells that the message stands in the log of its room: then members get it of whom its callers were told nothing, and
// town.checkLogs judges who has to.
func (m *message) logged() bool {
	return slices.ContainsFunc(m.tries, func(p *push) bool { return p.summary.GetPosition() != "" })
}

// maybeKept tells that the store may have kept more of the push than its caller was told: the store or the Push-Manager died over it.
func (p *push) maybeKept() bool {
	return !p.done || p.err != nil && !p.safe() || strings.Contains(failures(p.summary), "store: ")
}

func (m *message) checkClaims(l *ledger, reached map[string]bool, add func(string, *push, string, ...any)) {
	may, open := 0, m.logged() // how many it may have reached by what was said
	for _, p := range m.tries {
		open = open || p.maybeKept()
		s := p.summary
		may += int(s.GetDelivered() - s.GetDuplicates() + s.GetUnknown() + s.GetStored())
		claimed := int(s.GetAcked())
		if !l.clientsLeave || p.kind == toUser && l.stays != nil && l.stays(p.key) {
			claimed = int(s.GetDelivered())
		}
		if claimed > len(reached) {
			add("I1", p, "%d users are claimed, %d were reached", claimed, len(reached))
		}
		// A list is judged as a whole: nobody says who of it is stored.
		if stored := int(s.GetStored()); stored > 0 && p.options.GetTtlMs() == 0 && p.options.GetCollapseKey() == "" && p.kind != toRoom {
			away := 0
			for _, user := range append([]string{p.key}, p.users...) {
				if l.absent != nil && l.absent(user) {
					away++
				}
			}
			if claimed+stored > len(reached)+away {
				add("I1", p, "it is stored for %d users and was never shown to them: %d were reached, %d did not come back", stored, len(reached), away)
			}
		}
	}
	if len(reached) > may && !open {
		add("I1", m.last(), "%d users were reached, more than the %d who are claimed, unknown or stored", len(reached), may)
	}
}

func (m *message) checkAge(l *ledger, add func(string, *push, string, ...any)) {
	p := m.last()
	ttl := time.Duration(p.options.GetTtlMs()) * time.Millisecond
	if ttl == 0 || !p.done {
		return
	}
	for _, a := range m.arrived {
		limit := p.end + ttl + l.late
		for _, f := range l.frozen {
			limit += f.within(p.start, a.at)
		}
		if a.at > limit {
			add("I11", p, "%q got it at %v, and it was good until %v at the latest", a.client, a.at, p.end+ttl)
		}
	}
}

// settled tells that the message is where it was said to be: nothing of an earlier try, or of
// one that nobody knows of, is still on its way.
func (m *message) settled() bool {
	for i, p := range m.tries {
		switch {
		case !p.done:
			return false
		case p.err != nil && (!p.safe() || i == len(m.tries)-1):
			return false
		case i == len(m.tries)-1 && (p.summary.GetFailed() > 0 || p.summary.GetUnknown() > 0 || p.summary.GetOffline() > p.summary.GetStored()):
			return false
		}
	}
	return true
}

// checkMessageOrderLocked finds messages to one user that the user saw in another order than
// they were made in, whatever connections they came to: the second was begun after the first was
// answered. What came again does not count, and neither does what gives up its order.
func (l *ledger) checkMessageOrderLocked(messages map[string]*message) (found []violation) {
	if l.unordered {
		return nil
	}
	seen := make(map[[2]string]bool)
	latest := make(map[string]*message) // by user: the one that was begun last
	for _, a := range l.arrivals {
		m := messages[a.push]
		if m == nil || m.first().kind != toUser || seen[[2]string{a.push, a.user}] || m.first().options.GetCollapseKey() != "" {
			continue
		}
		seen[[2]string{a.push, a.user}] = true
		if b := latest[a.user]; b != nil && m.settled() && b.first().start > m.last().end {
			found = append(found, outOfOrder(a.user, b.first(), m.last()))
		}
		if b := latest[a.user]; b == nil || m.first().start > b.first().start {
			latest[a.user] = m
		}
	}
	return found
}

// lasting are options with everything: an id, which is the push's own, acknowledgement by the
// client, and the store.
func lasting() *pubsub.PushOptions {
	return &pubsub.PushOptions{Ack: pubsub.AckPolicy_ACK_CLIENT, Offline: pubsub.OfflinePolicy_OFFLINE_STORE}
}

// failures are the reasons that a summary gives.
func failures(s *pubsub.DeliverySummary) string {
	var all []string
	for _, f := range s.GetNodeFailures() {
		all = append(all, fmt.Sprint(f))
	}
	return strings.Join(all, "; ")
}
