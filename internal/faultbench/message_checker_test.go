package faultbench

import (
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// try adds a try of a message to u, with its answer; times are milliseconds. again is the try
// before, nil for the first.
func (b book) try(again *push, start, end int, s *pubsub.DeliverySummary, err error, change ...func(*pubsub.PushOptions)) *push {
	p := &push{kind: toUser, key: "u", manager: "m", options: lasting()}
	if again != nil {
		p.id = again.id
	}
	for _, c := range change {
		c(p.options)
	}
	b.told(p, start, end, s, err)
	if s != nil {
		s.MessageId = p.options.GetMessageId()
	}
	return p
}

// acked and stored are the summaries of one user.
func acked() *pubsub.DeliverySummary {
	s := summary(1, 0, 0, 0)
	s.Acked = 1
	return s
}

func stored() *pubsub.DeliverySummary {
	s := summary(0, 1, 0, 0)
	s.Stored = 1
	return s
}

func duplicate() *pubsub.DeliverySummary {
	s := acked()
	s.Duplicates = 1
	return s
}

// TestCheckerFindsEachBrokenPromiseOfMessages breaks the promises on messages with options.
func TestCheckerFindsEachBrokenPromiseOfMessages(t *testing.T) {
	bare := status.Error(codes.Unavailable, "connection reset")
	ttl := func(o *pubsub.PushOptions) { o.TtlMs = 1000 }
	for _, test := range []struct {
		name string
		want string // the rule, "" for none
		make func(b book)
	}{
		{"acked and arrived", "", func(b book) { b.arrive(b.try(nil, 0, 5, acked(), nil).id, "u", "c", "n") }},
		{"acked and did not arrive", "I1", func(b book) { b.try(nil, 0, 5, acked(), nil) }},
		{"acked and did not arrive where clients leave", "I1", func(b book) { b.clientsLeave = true; b.try(nil, 0, 5, acked(), nil) }},
		{"delivered to a client that may have left", "", func(b book) { b.clientsLeave = true; b.try(nil, 0, 5, summary(1, 0, 0, 0), nil) }},
		{"delivered to a client that stays", "I1", func(b book) {
			b.clientsLeave, b.stays = true, func(string) bool { return true }
			b.try(nil, 0, 5, summary(1, 0, 0, 0), nil)
		}},
		{"stored and came", "", func(b book) { b.arrive(b.try(nil, 0, 5, stored(), nil).id, "u", "c", "n") }},
		{"stored and never came", "I1", func(b book) { b.try(nil, 0, 5, stored(), nil) }},
		{"stored for one who did not come back", "", func(b book) {
			b.absent = func(string) bool { return true }
			b.try(nil, 0, 5, stored(), nil)
		}},
		{"stored and expired", "", func(b book) { b.try(nil, 0, 5, stored(), nil, ttl) }},
		{"stored for one of two", "I1", func(b book) {
			s := stored()
			s.Targets, s.Delivered, s.Acked = 2, 1, 1
			p := b.try(nil, 0, 5, s, nil)
			p.kind, p.users = toUsers, []string{"u", "v"}
			b.arrive(p.id, "u", "c", "n")
		}},
		{"twice at one connection", "I3", func(b book) {
			p := b.try(nil, 0, 5, acked(), nil)
			b.arrive(p.id, "u", "c", "n")
			b.arrive(b.try(p, 10, 15, duplicate(), nil).id, "u", "c", "n")
		}},
		{"twice, at two connections", "", func(b book) {
			p := b.try(nil, 0, 5, acked(), nil)
			b.arrive(p.id, "u", "c", "n")
			b.arrive(b.try(p, 10, 15, duplicate(), nil).id, "u", "d", "n")
		}},
		{"a repeat of what was not acknowledged", "", func(b book) {
			p := b.try(nil, 0, 5, acked(), nil)
			b.arrive(p.id, "u", "c", "n")
			b.add(arrival{push: p.id, user: "u", client: "c", node: "n", repeat: true})
		}},
		{"marked, and stored because it may have arrived", "", func(b book) {
			s := stored()
			s.Unsure = 1
			p := b.try(nil, 0, 5, s, nil)
			b.arrive(p.id, "u", "c", "n")
			b.add(arrival{push: p.id, user: "u", client: "c", node: "n", replayed: true})
		}},
		{"marked, and acknowledged before", "I3", func(b book) {
			p := b.try(nil, 0, 5, acked(), nil)
			b.arrive(p.id, "u", "c", "n")
			b.add(arrival{push: p.id, user: "u", client: "c", node: "n", replayed: true})
		}},
		{"not marked, and stored because it may have arrived", "I3", func(b book) {
			s := stored()
			s.Unsure = 1
			p := b.try(nil, 0, 5, s, nil)
			b.arrive(p.id, "u", "c", "n")
			b.arrive(p.id, "u", "c", "n")
		}},
		{"unknown, and the retry a duplicate", "", func(b book) {
			p := b.try(nil, 0, 5, summary(0, 0, 0, 1), nil)
			b.arrive(p.id, "u", "c", "n")
			b.try(p, 10, 15, duplicate(), nil)
		}},
		{"a duplicate that never came", "I1", func(b book) { b.try(b.try(nil, 0, 5, summary(0, 0, 0, 1), nil), 10, 15, duplicate(), nil) }},
		{"failed, and the retry acked", "", func(b book) {
			p := b.try(nil, 0, 5, summary(0, 0, 1, 0), nil)
			b.arrive(b.try(p, 10, 15, acked(), nil).id, "u", "c", "n")
		}},
		{"failed twice and arrived", "I1", func(b book) {
			p := b.try(nil, 0, 5, summary(0, 0, 1, 0), nil)
			b.arrive(b.try(p, 10, 15, summary(0, 0, 1, 0), nil).id, "u", "c", "n")
		}},
		{"not stored, as the store died, and it came", "", func(b book) {
			s := summary(0, 1, 0, 0)
			s.NodeFailures = []*pubsub.NodeFailure{{Reason: "failed: store: not reachable", Users: 1}}
			p := b.try(nil, 0, 5, s, nil)
			p.success = false
			b.arrive(p.id, "u", "c", "n")
		}},
		{"not stored by anybody's word, and it came", "I1", func(b book) {
			b.arrive(b.try(nil, 0, 5, summary(0, 1, 0, 0), nil, func(o *pubsub.PushOptions) { o.Offline = pubsub.OfflinePolicy_OFFLINE_DROP }).id, "u", "c", "n")
		}},
		{"errors that promise that nothing was sent, and it arrived", "I1", func(b book) {
			b.arrive(b.try(nil, 0, 5, nil, safeError(t, codes.ResourceExhausted)).id, "u", "c", "n")
		}},
		{"a bare error, and it arrived", "", func(b book) { b.arrive(b.try(nil, 0, 5, nil, bare).id, "u", "c", "n") }},
		{"arrived at somebody else", "I1", func(b book) { b.arrive(b.try(nil, 0, 5, acked(), nil).id, "v", "c", "n") }},
		{"more stored than offline", "I2", func(b book) {
			s := acked()
			s.Stored = 1
			p := b.try(nil, 0, 5, s, nil, ttl) // so that nobody is owed it
			b.arrive(p.id, "u", "c", "n")
		}},
		{"more unsure than stored", "I2", func(b book) {
			s := stored()
			s.Unsure = 2
			b.arrive(b.try(nil, 0, 5, s, nil).id, "u", "c", "n")
		}},
		{"stored, and nobody asked for it", "I2", func(b book) {
			p := b.try(nil, 0, 5, stored(), nil, func(o *pubsub.PushOptions) { o.Offline = pubsub.OfflinePolicy_OFFLINE_DROP })
			b.arrive(p.id, "u", "c", "n")
		}},
		{"acked, and nobody asked for it", "I2", func(b book) {
			p := b.try(nil, 0, 5, acked(), nil, func(o *pubsub.PushOptions) { o.Ack = pubsub.AckPolicy_ACK_NODE })
			b.arrive(p.id, "u", "c", "n")
		}},
		{"by another name", "I2", func(b book) {
			p := b.try(nil, 0, 5, acked(), nil)
			p.summary.MessageId = "x"
			b.arrive(p.id, "u", "c", "n")
		}},
		{"stored and no success", "I2", func(b book) {
			p := b.try(nil, 0, 5, stored(), nil)
			p.success = false
			b.arrive(p.id, "u", "c", "n")
		}},
		{"shown in time", "", func(b book) {
			b.late = time.Hour // the test's own clock
			b.arrive(b.try(nil, 0, 5, stored(), nil, ttl).id, "u", "c", "n")
		}},
		{"shown too late", "I11", func(b book) {
			p := b.try(nil, 0, 5, stored(), nil, ttl)
			p.start, p.end = -5*time.Second, -4*time.Second
			p.limit = time.Minute
			b.arrive(p.id, "u", "c", "n")
		}},
		{"stored in a room's log and read by one who was no target", "", func(b book) { b.toRoom(stored(), "AQ-1", "u", "v") }},
		{"twice at one connection, marked, out of a log", "", func(b book) {
			p := b.toRoom(acked(), "AQ-1", "u")
			b.add(arrival{push: p.id, user: "u", client: "u", node: "n", replayed: true})
		}},
		{"twice at one connection, not marked, out of a log", "I3", func(b book) { b.toRoom(acked(), "AQ-1", "u", "u") }},
		{"stored for a room, and in no log", "I2", func(b book) { b.toRoom(stored(), "") }},
		{"in a log of users", "I2", func(b book) {
			s := acked()
			s.Position = "AQ-1"
			b.arrive(b.try(nil, 0, 5, s, nil).id, "u", "c", "n")
		}},
		{"in no log, and nobody says why", "I2", func(b book) { b.toRoom(acked(), "", "u") }},
		{"in a log, and nobody asked for it", "I2", func(b book) {
			b.toRoom(acked(), "AQ-1", "u").options.Offline = pubsub.OfflinePolicy_OFFLINE_DROP
		}},
		{"in order over two connections", "", func(b book) { storedInOrder(b, 1, 2) }},
		{"in another order over two connections", "I10", func(b book) { storedInOrder(b, 2, 1) }},
		{"what came again is in no order", "", func(b book) { storedInOrder(b, 1, 2, 1) }},
		{"unknown, and another order", "", func(b book) {
			p, q := b.try(nil, 0, 5, summary(0, 0, 0, 1), nil), b.try(nil, 10, 15, acked(), nil)
			b.arrive(q.id, "u", "c", "n")
			b.arrive(p.id, "u", "c", "n")
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := book{newLedger()}
			test.make(b)
			found := b.check(100 * time.Millisecond)
			var rules []string
			for _, v := range found {
				rules = append(rules, v.rule)
			}
			switch {
			case test.want == "" && len(found) > 0:
				t.Errorf("found %v", found)
			case test.want != "" && !slices.Contains(rules, test.want):
				t.Errorf("found %v, want %s", found, test.want)
			case test.want != "" && len(found) != 1:
				t.Errorf("found more than the one: %v", found)
			}
		})
	}
}

// toRoom is a message to a room, with where it stands, and whose clients got it.
func (b book) toRoom(s *pubsub.DeliverySummary, position string, users ...string) *push {
	s.Position = position
	p := b.try(nil, 0, 5, s, nil)
	p.kind, p.key = toRoom, "r"
	for _, user := range users {
		b.arrive(p.id, user, user, "n")
	}
	return p
}

// storedInOrder stores one message, has the next one acknowledged, and has them arrive in the
// given order, each at a connection of its own.
func storedInOrder(b book, order ...int) {
	pushes := []*push{b.try(nil, 0, 5, stored(), nil), b.try(nil, 10, 15, acked(), nil)}
	for i, n := range order {
		b.arrive(pushes[n-1].id, "u", names("c", len(order))[i], "n")
	}
}
