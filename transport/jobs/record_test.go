package jobs

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/ids"
	pubsub "github.com/push-manager/push-manager/proto"
)

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func content(text string) *pubsub.MessageContent { return &pubsub.MessageContent{Data: []byte(text)} }

// Callers and whoever runs the job change its state. Each row is what one of them may do, or is told.
func TestStatesFollowEachOther(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	pause := func(r *record) (bool, error) { return r.pause() }
	resume := func(r *record) (bool, error) { return r.resume(now) }
	cancel := func(r *record) (bool, error) { return r.cancel(now) }
	rate := func(r *record) (bool, error) { return r.setRate(7) }
	judge := func(r *record) (bool, error) { return r.judge(now), nil }
	for name, tc := range map[string]struct {
		from    record
		do      func(*record) (bool, error)
		want    string
		changed bool
		err     error
	}{
		"pending is paused":                    {record{State: pending}, pause, paused, true, nil},
		"running is paused":                    {record{State: running}, pause, paused, true, nil},
		"paused stays paused":                  {record{State: paused}, pause, paused, false, nil},
		"what has ended is not paused":         {record{State: succeeded}, pause, succeeded, false, ErrEnded},
		"paused goes on":                       {record{State: paused, Began: now}, resume, running, true, nil},
		"paused before its start waits for it": {record{State: paused, Start: now.Add(1)}, resume, pending, true, nil},
		"paused before it began begins":        {record{State: paused, Start: now}, resume, running, true, nil},
		"running goes on as it does":           {record{State: running}, resume, running, false, nil},
		"what has ended does not go on":        {record{State: failed}, resume, failed, false, ErrEnded},
		"pending is cancelled":                 {record{State: pending}, cancel, cancelled, true, nil},
		"paused is cancelled":                  {record{State: paused}, cancel, cancelled, true, nil},
		"cancelled stays so":                   {record{State: cancelled}, cancel, cancelled, false, nil},
		"what has succeeded is not cancelled":  {record{State: succeeded}, cancel, succeeded, false, ErrEnded},
		"a paused job gets another rate":       {record{State: paused, Rate: 1}, rate, paused, true, nil},
		"the same rate changes nothing":        {record{State: running, Rate: 7}, rate, running, false, nil},
		"what has ended has its rate":          {record{State: cancelled, Rate: 1}, rate, cancelled, false, ErrEnded},
		"pending begins at its start":          {record{State: pending, Start: now}, judge, running, true, nil},
		"pending waits for its start":          {record{State: pending, Start: now.Add(1)}, judge, pending, false, nil},
		"done is a success":                    {record{State: running, Done: true, Counts: counts{Failed: 3}}, judge, succeeded, true, nil},
		"done waits for who is open":           {record{State: running, Done: true, Open: 1}, judge, running, false, nil},
		"the deadline ends a job":              {record{State: running, Deadline: now}, judge, failed, true, nil},
		"the deadline ends a paused job":       {record{State: paused, Deadline: now}, judge, failed, true, nil},
		"done beats the deadline":              {record{State: running, Done: true, Deadline: now, Open: 5}, judge, running, false, nil},
		"too many failed":                      {record{State: running, MaxFailedRatio: 0.1, SeenSince: 100, BadSince: 11}, judge, paused, true, nil},
		"not too many failed":                  {record{State: running, MaxFailedRatio: 0.1, SeenSince: 100, BadSince: 10}, judge, running, false, nil},
		"a pause that came too late ends":      {record{State: paused, Done: true, Deadline: now, Counts: counts{Delivered: 1}}, judge, succeeded, true, nil},
		"paused with users who are open waits": {record{State: paused, Done: true, Open: 1}, judge, paused, false, nil},
		"nobody is left to be saved":           {record{State: running, Done: true, Open: 1, MaxFailedRatio: 0.1, SeenSince: 100, BadSince: 11}, judge, running, false, nil},
		"too few are known":                    {record{State: running, MaxFailedRatio: 0.1, SeenSince: 99, BadSince: 99}, judge, running, false, nil},
		"no ratio, no pause":                   {record{State: running, SeenSince: 100, BadSince: 100}, judge, running, false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			r := tc.from
			if r.Deadline.IsZero() {
				r.Deadline = now.Add(time.Hour)
			}
			changed, err := tc.do(&r)
			if r.State != tc.want || changed != tc.changed || !errors.Is(err, tc.err) {
				t.Errorf("%s, changed %v, %v; want %s, %v, %v", r.State, changed, err, tc.want, tc.changed, tc.err)
			}
			if r.ended() && changed && r.Ended.IsZero() {
				t.Error("nobody knows when it ended")
			}
		})
	}
}

func TestResumeForgetsWhatHadFailed(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	r := record{State: running, MaxFailedRatio: 0.5, Deadline: now.Add(time.Hour), Began: now}
	r.announce(100, 1, false)
	r.book(outcomes{counts: counts{Failed: 60, Delivered: 40}})
	if r.judge(now); r.State != paused || !strings.Contains(r.Reason, "60 of the last 100") {
		t.Fatalf("%s %s", r.State, r.Reason)
	}
	_, err := r.resume(now)
	ok(t, err)
	if r.judge(now); r.State != running || r.Reason != "" || r.targets() != 100 {
		t.Errorf("%s %q, %d targets", r.State, r.Reason, r.targets())
	}
}

// Of a job that has just begun it is not known when it will be done, and "now" would be wrong.
func TestEtaIsThatOfAJobOfWhichSomethingIsKnown(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	for name, tc := range map[string]struct {
		r    record
		want time.Duration // below 0: unset
	}{
		"begun just now":          {record{State: running, Rate: 10}, -1},
		"half of it":              {record{State: running, Rate: 10, Expected: 200, Counts: counts{Delivered: 100}}, 10 * time.Second},
		"more than expected":      {record{State: running, Rate: 10, Expected: 50, Counts: counts{Delivered: 100}}, -1},
		"the last are on the way": {record{State: running, Rate: 10, Done: true, Expected: 50, Counts: counts{Delivered: 100}}, 0},
		"paused":                  {record{State: paused, Rate: 10, Expected: 200}, -1},
	} {
		eta := tc.r.show("j", nil, now).GetProgress().GetEta()
		if tc.want < 0 != (eta == nil) || eta != nil && !eta.AsTime().Equal(now.Add(tc.want)) {
			t.Errorf("%s: %v, want %v", name, eta.AsTime(), tc.want)
		}
	}
}

func TestSpecsThatAreRefusedNameTheField(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	at := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(d)) }
	good := func() *pubsub.BroadcastJobSpec {
		return &pubsub.BroadcastJobSpec{Everybody: true, Content: content("x"), RatePerSecond: 10}
	}
	day := 24 * time.Hour
	for field, change := range map[string]func(*pubsub.BroadcastJobSpec){
		"":                                   func(*pubsub.BroadcastJobSpec) {},
		" ":                                  func(s *pubsub.BroadcastJobSpec) { s.StartTime, s.Deadline = at(29*day), at(58*day) },
		"  ":                                 func(s *pubsub.BroadcastJobSpec) { s.StartTime = at(-day) },
		"spec.everybody REQUIRED":            func(s *pubsub.BroadcastJobSpec) { s.Everybody = false },
		"spec.everybody REQUIRED ":           func(s *pubsub.BroadcastJobSpec) { s.RoomIds = []string{"r"} },
		"spec.room_ids TOO_MANY":             func(s *pubsub.BroadcastJobSpec) { s.Everybody, s.RoomIds = false, make([]string, RoomsMost+1) },
		"spec.rate_per_second OUT_OF_RANGE":  func(s *pubsub.BroadcastJobSpec) { s.RatePerSecond = 0 },
		"spec.rate_per_second OUT_OF_RANGE ": func(s *pubsub.BroadcastJobSpec) { s.RatePerSecond = 1001 },
		"spec.start_time OUT_OF_RANGE":       func(s *pubsub.BroadcastJobSpec) { s.StartTime = at(31 * day) },
		"spec.start_time MALFORMED":          func(s *pubsub.BroadcastJobSpec) { s.StartTime = &timestamppb.Timestamp{Nanos: -1} },
		"spec.deadline OUT_OF_RANGE":         func(s *pubsub.BroadcastJobSpec) { s.Deadline = at(0) },
		"spec.deadline OUT_OF_RANGE ":        func(s *pubsub.BroadcastJobSpec) { s.StartTime, s.Deadline = at(day), at(time.Hour) },
		"spec.deadline OUT_OF_RANGE  ":       func(s *pubsub.BroadcastJobSpec) { s.Deadline = at(31 * day) },
		"spec.deadline OUT_OF_RANGE   ":      func(s *pubsub.BroadcastJobSpec) { s.StartTime = at(-8 * day) },
		"spec.max_failed_ratio OUT_OF_RANGE": func(s *pubsub.BroadcastJobSpec) { s.MaxFailedRatio = 1.1 },
		"spec.max_failed_ratio OUT_OF_RANGE ": func(s *pubsub.BroadcastJobSpec) {
			s.MaxFailedRatio = math.NaN()
		},
		"spec PAYLOAD_TOO_LARGE": func(s *pubsub.BroadcastJobSpec) { s.Content = content(strings.Repeat("x", specBytes)) },
	} {
		s := good()
		change(s)
		_, err := newRecord(s, 1000, now)
		got := ""
		if invalid, is := errors.AsType[*engine.InvalidError](err); is {
			got = invalid.Field + " " + invalid.Code
		} else {
			ok(t, err)
		}
		if want := strings.TrimSpace(field); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestIDsOfJobs(t *testing.T) {
	for id, good := range map[string]bool{
		"a": true, "2026-12-01_winter.sale": true, strings.Repeat("x", 64): true,
		"": false, "-a": false, ".": false, "a/b": false, "a b": false, "ä": false, "a\x00": false, strings.Repeat("x", 65): false,
	} {
		if err := CheckID(id); (err == nil) != good {
			t.Errorf("%q: %v", id, err)
		}
	}
}

// Instances that are killed, that wake up late and that write at the same moment, and callers who pause and resume: nobody is
// sent the message twice, and the counts add up. They do what a run does, and etcd is one record that is written only by
// who has read the last one.
func TestNobodyIsSentTheMessageTwiceAndTheCountsAddUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Unix(1_000_000, 0)
		users := rapid.IntRange(1, 40).Draw(t, "users")
		etcd := stored{rev: 1, record: record{State: pending, Rate: 1, Start: now, Deadline: now.Add(time.Hour)}}
		write := func(r record, rev int64) bool {
			if rev != etcd.rev {
				return false
			}
			etcd = stored{record: r, rev: rev + 1}
			return true
		}
		sent := make([]int, users) // how often
		type instance struct {
			name  string
			base  stored
			owes  []int // whom its last write has announced, and whom it has not sent to yet
			known outcomes
			alive bool
		}
		var instances []*instance
		draw := func(what string) *instance {
			var alive []*instance
			for _, i := range instances {
				if i.alive {
					alive = append(alive, i)
				}
			}
			if len(alive) == 0 {
				t.Skip("nobody lives")
			}
			return rapid.SampledFrom(alive).Draw(t, what)
		}
		before := etcd.record
		t.Repeat(map[string]func(*rapid.T){
			"take over": func(t *rapid.T) {
				cur := etcd
				if !cur.due(now) {
					t.Skip("nothing is due")
				}
				next := cur.record
				next.takeOver("m")
				next.judge(now)
				if write(next, cur.rev) {
					instances = append(instances, &instance{name: fmt.Sprint(len(instances)), base: etcd, alive: true})
				}
			},
			"write": func(t *rapid.T) { // one step of a run: it books, announces, and notices what others have written
				i := draw("who writes")
				if etcd.Run != i.base.Run {
					i.alive = false // another instance runs the job
					return
				}
				if etcd.rev != i.base.rev { // a caller has changed it
					i.base = etcd
				}
				next := i.base.record
				next.book(i.known)
				next.judge(now)
				var chunk []int
				if next.State == running && !next.Done {
					n := rapid.IntRange(0, 5).Draw(t, "n")
					for user := int(next.Next); user < users && len(chunk) < n; user++ {
						chunk = append(chunk, user)
					}
					end := next.Next + uint64(len(chunk))
					next.announce(len(chunk), end, int(end) == users)
				}
				if !write(next, i.base.rev) {
					t.Fatal("the last one to write could not write")
				}
				i.base, i.known = etcd, outcomes{}
				i.owes = append(i.owes, chunk...)
			},
			"send": func(t *rapid.T) { // however late
				i := draw("who sends")
				for _, user := range i.owes {
					sent[user]++
				}
				o := rapid.SampledFrom([]counts{{Delivered: 1}, {Offline: 1}, {Failed: 1}, {Unknown: 1}})
				for range i.owes {
					i.known.add(outcomes{counts: o.Draw(t, "outcome")})
				}
				i.owes = nil
			},
			"kill":   func(t *rapid.T) { draw("who is killed").alive = false },
			"pause":  func(*rapid.T) { r, rev := etcd.record, etcd.rev; _, _ = r.pause(); write(r, rev) },
			"resume": func(*rapid.T) { r, rev := etcd.record, etcd.rev; _, _ = r.resume(now); write(r, rev) },
			"cancel": func(t *rapid.T) {
				if rapid.IntRange(0, 9).Draw(t, "seldom") == 0 {
					r, rev := etcd.record, etcd.rev
					_, _ = r.cancel(now)
					write(r, rev)
				}
			},
			"": func(t *rapid.T) {
				r := etcd.record
				for user, n := range sent {
					if n > 1 {
						t.Fatalf("user %d was sent it %d times", user, n)
					}
				}
				if r.Open < 0 || r.targets() != int64(r.Next) {
					t.Fatalf("%d turns are over, the record says %d targets, %d of them open", r.Next, r.targets(), r.Open)
				}
				if r.Next < before.Next || before.ended() && r.State != before.State {
					t.Fatalf("from %d %s to %d %s", before.Next, before.State, r.Next, r.State)
				}
				if r.State == succeeded && (int(r.Next) != users || r.Open != 0) {
					t.Fatalf("success with %d of %d, %d open", r.Next, users, r.Open)
				}
				before = r
			},
		})
	})
}

func TestARecordIsReadAsItWasWritten(t *testing.T) {
	now := time.Now().UTC().Round(0)
	r := record{State: running, Reason: "x", Rate: 3, Created: now, Start: now, Deadline: now, Next: math.MaxUint64, Priority: engine.Low, Open: 7, Failures: []failure{{"n", "failed: x", 2}}}
	b, err := json.Marshal(r)
	ok(t, err)
	got, err := readRecord(b, 9)
	ok(t, err)
	if again, _ := json.Marshal(got.record); string(again) != string(b) || got.rev != 9 || got.Next != math.MaxUint64 {
		t.Errorf("%s\n%s", b, again)
	}
	if len(b) > 1024 {
		t.Errorf("%d bytes", len(b))
	}
}

// A node's users are a sample of all: what is expected is about right from the first page on.
func TestTheNumberOfTargetsIsEstimatedFromTheTurnsThatAreKnown(t *testing.T) {
	line := ids.Line{Last: ids.LastTurn, Limit: 1000}
	for i := range 50_000 {
		line.Add(fmt.Sprint("user-", i))
	}
	var r record
	r.expect(1000, len(line.Users()), 0, line.Last)
	if r.Expected < 45_000 || r.Expected > 55_000 {
		t.Errorf("%d of 50,000", r.Expected)
	}
	r.announce(400, 5, false)
	r.expect(0, 400, 0, ids.LastTurn)
	if r.Expected != 400 {
		t.Errorf("%d of 400", r.Expected)
	}
}
