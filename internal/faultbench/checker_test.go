package faultbench

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// book is a ledger under the test's own clock.
type book struct{ *ledger }

// told adds a push with its answer; times are milliseconds.
func (b book) told(p *push, start, end int, s *pubsub.DeliverySummary, err error) *push {
	b.begin(p)
	p.limit = time.Second
	b.answer(p, err == nil && s.GetFailed() == 0 && s.GetUnknown() == 0, s, err)
	p.start, p.end = time.Duration(start)*time.Millisecond, time.Duration(end)*time.Millisecond
	return p
}

func summary(delivered, offline, failed, unknown int32) *pubsub.DeliverySummary {
	return &pubsub.DeliverySummary{
		Targets: delivered + offline + failed + unknown, Delivered: delivered, Offline: offline, Failed: failed, Unknown: unknown,
	}
}

func safeError(t *testing.T, code codes.Code) error {
	t.Helper()
	s, err := status.New(code, "no").WithDetails(&errdetails.ErrorInfo{Domain: "push-manager", Reason: "OVERLOADED"})
	if err != nil {
		t.Fatal(err)
	}
	return s.Err()
}

// TestCheckerFindsEachBrokenPromise breaks the promises one by one.
func TestCheckerFindsEachBrokenPromise(t *testing.T) {
	user := func(manager string) *push { return &push{kind: toUser, key: "u", manager: manager} }
	bare := status.Error(codes.Unavailable, "connection reset")
	for _, test := range []struct {
		name string
		want string // the rule, "" for none
		make func(b book)
	}{
		{"delivered and arrived", "", func(b book) {
			p := b.told(user("m"), 0, 5, summary(1, 0, 0, 0), nil)
			b.arrive(p.id, "u", "u", "n")
		}},
		{"delivered and did not arrive", "I1", func(b book) { b.told(user("m"), 0, 5, summary(1, 0, 0, 0), nil) }},
		{"unknown and arrived", "", func(b book) {
			p := b.told(user("m"), 0, 5, summary(0, 0, 0, 1), nil)
			b.arrive(p.id, "u", "u", "n")
		}},
		{"unknown and did not arrive", "", func(b book) { b.told(user("m"), 0, 5, summary(0, 0, 0, 1), nil) }},
		{"failed and arrived", "I1", func(b book) {
			p := b.told(user("m"), 0, 5, summary(0, 0, 1, 0), nil)
			b.arrive(p.id, "u", "u", "n")
		}},
		{"offline and arrived", "I1", func(b book) {
			p := b.told(user("m"), 0, 5, summary(0, 1, 0, 0), nil)
			b.arrive(p.id, "u", "u", "n")
		}},
		{"arrived at somebody else", "I1", func(b book) {
			p := b.told(user("m"), 0, 5, summary(1, 0, 0, 0), nil)
			b.arrive(p.id, "v", "v", "n")
		}},
		{"never pushed and arrived", "I1", func(b book) { b.arrive("p9", "u", "u", "n") }},
		{"a room claims more than arrived", "I1", func(b book) {
			p := b.told(&push{kind: toRoom, key: "r"}, 0, 5, summary(2, 0, 0, 0), nil)
			b.arrive(p.id, "u", "u/1", "n")
			b.arrive(p.id, "u", "u/2", "n") // two devices are one user
		}},
		{"a broadcast counts users of each node", "", func(b book) {
			p := b.told(&push{kind: toAll}, 0, 5, summary(2, 0, 0, 0), nil)
			b.arrive(p.id, "u", "u/1", "n1")
			b.arrive(p.id, "u", "u/2", "n2")
		}},
		{"a broadcast claims more than arrived", "I1", func(b book) {
			p := b.told(&push{kind: toAll}, 0, 5, summary(2, 0, 0, 0), nil)
			b.arrive(p.id, "u", "u", "n1")
		}},
		{"books do not balance", "I2", func(b book) {
			s := summary(0, 1, 0, 0)
			s.Targets = 2
			b.told(user("m"), 0, 5, s, nil)
		}},
		{"books balance with a negative count", "I2", func(b book) { b.told(user("m"), 0, 5, summary(0, 2, -1, 0), nil) }},
		{"no summary", "I2", func(b book) { b.told(user("m"), 0, 5, nil, nil) }},
		{"a success with something unknown", "I2", func(b book) {
			b.told(user("m"), 0, 5, summary(0, 0, 0, 1), nil).success = true
		}},
		{"arrived twice", "I3", func(b book) {
			p := b.told(user("m"), 0, 5, summary(0, 0, 0, 1), nil)
			b.arrive(p.id, "u", "u", "n")
			b.arrive(p.id, "u", "u", "n")
		}},
		{"an error that promises that nothing was sent", "", func(b book) {
			b.told(user("m"), 0, 5, nil, safeError(t, codes.ResourceExhausted))
		}},
		{"the same, and it arrived", "I4", func(b book) {
			p := b.told(user("m"), 0, 5, nil, safeError(t, codes.ResourceExhausted))
			b.arrive(p.id, "u", "u", "n")
		}},
		{"a bare error promises nothing", "", func(b book) {
			p := b.told(user("m"), 0, 5, nil, bare)
			b.arrive(p.id, "u", "u", "n")
		}},
		{"never answered", "I7", func(b book) { b.begin(user("m")) }},
		{"answered too late", "I7", func(b book) { b.told(user("m"), 0, 1200, summary(0, 1, 0, 0), nil) }},
		{"answered late, and the caller could not run for as long", "", func(b book) {
			b.told(user("m"), 0, 5000, summary(0, 1, 0, 0), nil)
			b.freeze(500*time.Millisecond, 4600*time.Millisecond)
		}},
		{"answered later than that", "I7", func(b book) {
			b.told(user("m"), 0, 5000, summary(0, 1, 0, 0), nil)
			b.freeze(1500*time.Millisecond, 9000*time.Millisecond)
		}},
		{"order kept", "", func(b book) { inOrder(b, "m", "m", summary(1, 0, 0, 0), 1, 2) }},
		{"order broken", "I10", func(b book) { inOrder(b, "m", "m", summary(1, 0, 0, 0), 2, 1) }},
		{"order broken over two managers", "I10", func(b book) { inOrder(b, "m1", "m2", summary(1, 0, 0, 0), 2, 1) }},
		{"order broken by one that was unknown", "I10", func(b book) { inOrder(b, "m", "m", summary(0, 0, 0, 1), 2, 1) }},
		{"unknown, and another manager", "", func(b book) { inOrder(b, "m1", "m2", summary(0, 0, 0, 1), 2, 1) }},
		{"a call that broke, and may still be on its way", "", func(b book) {
			first := b.told(user("m"), 0, 5, nil, bare)
			second := b.told(user("m"), 10, 15, summary(1, 0, 0, 0), nil)
			b.arrive(second.id, "u", "u", "n")
			b.arrive(first.id, "u", "u", "n")
		}},
		{"pushes that overlap have no order", "", func(b book) {
			first := b.told(user("m"), 0, 50, summary(1, 0, 0, 0), nil)
			second := b.told(user("m"), 10, 40, summary(1, 0, 0, 0), nil)
			b.arrive(second.id, "u", "u", "n")
			b.arrive(first.id, "u", "u", "n")
		}},
		{"but in a stream they have", "I10", func(b book) {
			one, two := user("m"), user("m")
			one.stream, one.place, two.stream, two.place = "s", 1, "s", 2
			first := b.told(one, 0, 50, summary(1, 0, 0, 0), nil)
			second := b.told(two, 10, 40, summary(1, 0, 0, 0), nil)
			b.arrive(second.id, "u", "u", "n")
			b.arrive(first.id, "u", "u", "n")
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

// inOrder makes two pushes to one user, one after the other, of which the first ends
// with s, and has them arrive in the given order.
func inOrder(b book, one, two string, s *pubsub.DeliverySummary, order ...int) {
	pushes := []*push{
		b.told(&push{kind: toUser, key: "u", manager: one}, 0, 5, s, nil),
		b.told(&push{kind: toUser, key: "u", manager: two}, 10, 15, summary(1, 0, 0, 0), nil),
	}
	for _, i := range order {
		b.arrive(pushes[i-1].id, "u", "u", "n")
	}
}

// TestHistoryTellsWhatHappenedToAPushAndAroundIt: it is all that a failed run leaves.
func TestHistoryTellsWhatHappenedToAPushAndAroundIt(t *testing.T) {
	l := newLedger()
	p := &push{kind: toRoom, key: "lobby", manager: "pm-1"}
	l.begin(p)
	l.note("node n1 killed")
	l.arrive(p.id, "u", "u/1", "n1")
	l.answer(p, false, nil, errors.New("gone"))
	text := l.history(p)
	for _, want := range []string{"lobby", "pm-1", "node n1 killed", "arrived at u/1 on n1", "gone"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if strings.Index(text, "killed") > strings.Index(text, "arrived") {
		t.Errorf("not in the order of time:\n%s", text)
	}
}
