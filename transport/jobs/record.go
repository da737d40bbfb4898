package jobs

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/plain"
	pubsub "github.com/push-manager/push-manager/proto"
)

// The states, as they stand in etcd.
const (
	pending   = "PENDING"
	running   = "RUNNING"
	paused    = "PAUSED"
	succeeded = "SUCCEEDED"
	cancelled = "CANCELLED"
	failed    = "FAILED"
)

var states = []string{pending, running, paused, succeeded, cancelled, failed}

const (
	// failuresMost is how many pairs of node and reason a record has.
	failuresMost = 20
	// passedMost is how many nodes a record names that were passed by.
	passedMost = 100
	// textMax is how long a reason may be.
	textMax = 160
	// heldPrefix begins the reason of a job that runs and is held up.
	heldPrefix = "waits: "
	// ratioFrom is how many outcomes must be known for max_failed_ratio to count.
	ratioFrom = 100
)

// record is what stands in etcd of a job beside its spec: all that changes. It is JSON, so that it can be read without us.
type record struct {
	// Set by callers, and by who runs it when the job ends or pauses by itself.
	State  string    `json:"state"`
	Reason string    `json:"reason,omitempty"`
	Rate   int       `json:"rate"`
	Ended  time.Time `json:"ended,omitzero"`

	// Static.
	CreatedBy      string          `json:"created_by,omitempty"`
	Target         string          `json:"target"`
	Priority       engine.Priority `json:"priority"`
	Created        time.Time       `json:"created"`
	Start          time.Time       `json:"start"` // not before that
	Deadline       time.Time       `json:"deadline"`
	MaxFailedRatio float64         `json:"max_failed_ratio,omitempty"`

	// Written by who runs it, and by nobody else.
	Run       uint64    `json:"run,omitempty"`   // rises with each instance that takes the job over
	Write     uint64    `json:"write,omitempty"` // rises with each of its writes
	Manager   string    `json:"manager,omitempty"`
	Began     time.Time `json:"began,omitzero"`
	Next      uint64    `json:"next"` // the turns before it are over
	Done      bool      `json:"done,omitempty"`
	Counts    counts    `json:"counts"`
	Open      int64     `json:"open"` // whose turn is over, and who are not in Counts
	Expected  int64     `json:"expected,omitempty"`
	Speed     float64   `json:"speed,omitempty"`
	Nodes     int       `json:"nodes,omitempty"`
	Failures  []failure `json:"failures,omitempty"`
	PassedBy  []string  `json:"passed_by,omitempty"` // nodes whose users had no turn, passedMost at most
	SeenSince int64     `json:"seen_since,omitempty"`
	BadSince  int64     `json:"bad_since,omitempty"` // of them; since the last resume
}

// counts are users by what became of them.
type counts struct {
	Delivered int64 `json:"delivered"`
	Offline   int64 `json:"offline"`
	Failed    int64 `json:"failed"`
	Unknown   int64 `json:"unknown"`
}

func (c *counts) total() int64 { return c.Delivered + c.Offline + c.Failed + c.Unknown }

func (c *counts) add(o counts) {
	c.Delivered += o.Delivered
	c.Offline += o.Offline
	c.Failed += o.Failed
	c.Unknown += o.Unknown
}

// failure is a node where users failed or are unknown, and why.
type failure struct {
	Node   string `json:"node"`
	Reason string `json:"reason"`
	Users  int64  `json:"users"`
}

// outcomes are what became of some users.
type outcomes struct {
	counts   counts
	failures []failure
}

func (o *outcomes) add(more outcomes) {
	o.counts.add(more.counts)
	o.failures = addFailures(o.failures, more.failures)
}

func (o *outcomes) empty() bool { return o.counts == counts{} && len(o.failures) == 0 }

// addFailures adds to a list what it has room for.
func addFailures(list, more []failure) []failure {
	for _, f := range more {
		f.Reason = plain.Line(f.Reason, textMax)
		i := slices.IndexFunc(list, func(has failure) bool { return has.Node == f.Node && has.Reason == f.Reason })
		switch {
		case i >= 0:
			list[i].Users += f.Users
		case len(list) < failuresMost:
			list = append(list, f)
		}
	}
	return list
}

func (r *record) ended() bool {
	return r.State == succeeded || r.State == cancelled || r.State == failed
}

// over tells that nothing of the job changes any more.
func (r *record) over() bool { return r.ended() && r.Open == 0 }

func (r *record) targets() int64 { return r.Counts.total() + r.Open }

// due tells whether somebody has to run the job now.
func (r *record) due(now time.Time) bool {
	switch {
	case r.Open > 0, r.State == running:
		return true
	case r.State == pending:
		return !now.Before(r.Start) || !now.Before(r.Deadline)
	case r.State == paused:
		return !now.Before(r.Deadline)
	default:
		return false
	}
}

// waits tells whether a job that should get on does not.
func (r *stored) waits(now time.Time) bool {
	switch r.State {
	case pending:
		return now.Sub(r.Start) > waitsAfter
	case running:
		return strings.HasPrefix(r.Reason, heldPrefix) || now.Sub(r.since) > waitsAfter
	default:
		return false
	}
}

// pause, resume, cancel and setRate are what callers ask for. They tell whether the record has changed.

func (r *record) pause() (bool, error) {
	switch {
	case r.ended():
		return false, ErrEnded
	case r.State == paused:
		return false, nil
	}
	r.State, r.Reason = paused, ""
	return true, nil
}

func (r *record) resume(now time.Time) (bool, error) {
	switch {
	case r.ended():
		return false, ErrEnded
	case r.State != paused:
		return false, nil
	}
	r.State, r.Reason, r.SeenSince, r.BadSince = running, "", 0, 0
	if r.Began.IsZero() {
		r.State = pending
	}
	r.judge(now)
	return true, nil
}

func (r *record) cancel(now time.Time) (bool, error) {
	switch {
	case r.State == cancelled:
		return false, nil
	case r.ended():
		return false, ErrEnded
	}
	r.State, r.Reason, r.Ended = cancelled, "", now
	return true, nil
}

func (r *record) setRate(rate int) (bool, error) {
	switch {
	case r.ended():
		return false, ErrEnded
	case r.Rate == rate:
		return false, nil
	}
	r.Rate = rate
	return true, nil
}

// takeOver makes the job that of an instance. Who is open may have got the message, and is not sent it again.
func (r *record) takeOver(manager string) {
	r.Run++
	r.Manager = manager
	r.Counts.Unknown += r.Open
	r.Failures = slices.Clone(r.Failures)
	if r.Open > 0 {
		r.Failures = addFailures(r.Failures, []failure{{Reason: "unknown: the push-manager that ran the job was lost", Users: r.Open}})
	}
	r.Open = 0
}

// book counts what became of users who were open.
func (r *record) book(o outcomes) {
	n := o.counts.total()
	r.Open -= n
	r.Counts.add(o.counts)
	r.Failures = addFailures(slices.Clone(r.Failures), o.failures)
	r.SeenSince += n
	r.BadSince += o.counts.Failed + o.counts.Unknown
}

// pass notes nodes whose users have no turn.
func (r *record) pass(nodes []string) {
	r.PassedBy = slices.Clone(r.PassedBy)
	for _, node := range nodes {
		if len(r.PassedBy) < passedMost && !slices.Contains(r.PassedBy, node) {
			r.PassedBy = append(r.PassedBy, node)
		}
	}
}

// announce ends the turns before next. n users have had theirs, and are open.
func (r *record) announce(n int, next uint64, done bool) {
	r.Open += int64(n)
	r.Next, r.Done = next, done
}

// judge makes the job begin, pause or end if that is due. It tells whether it has.
func (r *record) judge(now time.Time) bool {
	switch bad := float64(r.BadSince); {
	case r.ended():
		return false
	case (r.State == running || r.State == paused) && r.Done && r.Open == 0: // a pause that came too late stops nothing
		r.State, r.Reason, r.Ended = succeeded, "", now
		if n := len(r.PassedBy); n > 0 {
			r.Reason = "users of " + plural(n, "node") + " had no turn: node_failures says why"
		}
	case !r.Done && !now.Before(r.Deadline):
		r.State, r.Reason, r.Ended = failed, "the deadline passed before everybody had a turn", now
	case r.State == running && !r.Done && r.MaxFailedRatio > 0 && r.SeenSince >= ratioFrom && bad > r.MaxFailedRatio*float64(r.SeenSince):
		r.State, r.Reason = paused, fmt.Sprintf("%d of the last %d users failed or are unknown, which is more than max_failed_ratio", r.BadSince, r.SeenSince)
	case r.State == pending && !now.Before(r.Start):
		r.State, r.Began = running, now
	default:
		return false
	}
	return true
}

// expect says how many targets there will be, by users that have been found for the turns from first to last: so many of
// them are still to come.
func (r *record) expect(left, found int, first, last uint64) {
	beyond := float64(found) / (float64(last-first) + 1) * float64(ids.LastTurn-last)
	r.Expected = r.targets() + int64(left) + int64(math.Round(beyond))
}

// show is the job as callers see it.
func (r *record) show(id string, spec *pubsub.BroadcastJobSpec, now time.Time) *pubsub.BroadcastJob {
	p := &pubsub.JobProgress{
		Targets: r.targets(), Delivered: r.Counts.Delivered, Offline: r.Counts.Offline, Failed: r.Counts.Failed, Unknown: r.Counts.Unknown, InFlight: r.Open,
		TargetsEstimate: max(r.Expected, r.targets()), Nodes: int32(r.Nodes),
	}
	if r.ended() || r.Done {
		p.TargetsEstimate = r.targets()
	}
	if r.State == running {
		p.Rate = math.Round(r.Speed*10) / 10
	}
	if left := p.GetTargetsEstimate() - p.GetTargets(); r.State == running && (left > 0 || r.Done) { // of one that has just begun nothing is known
		p.Eta = timestamppb.New(now.Add(time.Duration(float64(left) / float64(max(r.Rate, 1)) * float64(time.Second))))
	}
	for _, f := range r.Failures {
		p.NodeFailures = append(p.NodeFailures, &pubsub.NodeFailure{NodeId: f.Node, Reason: f.Reason, Users: int32(min(f.Users, math.MaxInt32))})
	}
	j := &pubsub.BroadcastJob{
		JobId: id, Spec: spec, State: pubsub.JobState(pubsub.JobState_value[r.State]), Reason: r.Reason, RatePerSecond: uint32(r.Rate), Progress: p,
		CreatedBy: r.CreatedBy, Target: r.Target, CreateTime: timestamppb.New(r.Created),
	}
	if !r.over() && r.State != paused {
		j.ManagerId = r.Manager
	}
	if !r.Began.IsZero() {
		j.BeginTime = timestamppb.New(r.Began)
	}
	if !r.Ended.IsZero() {
		j.EndTime = timestamppb.New(r.Ended)
	}
	return j
}

func plural(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// targetOf is what a spec is for, in words.
func targetOf(s *pubsub.BroadcastJobSpec) string {
	switch {
	case s.GetEverybody():
		return "everybody"
	case len(s.GetRoomIds()) > 0:
		return plural(len(s.GetRoomIds()), "room")
	default:
		return plural(len(s.GetUserIds()), "user")
	}
}

// RoomsMost is how many rooms a job may be for.
const RoomsMost = 100

// The bounds of a spec that no setting changes.
const (
	aheadMost  = 30 * 24 * time.Hour // of the start, and of the deadline behind it
	deadlineIn = 7 * 24 * time.Hour
	specBytes  = 1 << 20 // etcd takes 1.5 MiB
)

// newRecord is the record of a new job. The error is an *engine.InvalidError.
func newRecord(s *pubsub.BroadcastJobSpec, maxRate int, now time.Time) (record, error) {
	invalid := func(field, code, text string) (record, error) {
		return record{}, &engine.InvalidError{Field: "spec." + field, Code: code, Description: text}
	}
	targets := 0
	for _, set := range []bool{s.GetEverybody(), len(s.GetRoomIds()) > 0, len(s.GetUserIds()) > 0} {
		if set {
			targets++
		}
	}
	r := record{
		State: pending, Rate: int(s.GetRatePerSecond()), Target: targetOf(s), Created: now, Start: now, MaxFailedRatio: s.GetMaxFailedRatio(), Priority: engine.Low,
	}
	for _, t := range []struct {
		name string
		from *timestamppb.Timestamp
		into *time.Time
	}{{"start_time", s.GetStartTime(), &r.Start}, {"deadline", s.GetDeadline(), &r.Deadline}} {
		if t.from == nil {
			continue
		}
		if err := t.from.CheckValid(); err != nil {
			return invalid(t.name, engine.CodeMalformed, "is no time")
		}
		*t.into = t.from.AsTime()
	}
	r.Deadline = cmp.Or(r.Deadline, r.Start.Add(deadlineIn))
	switch {
	case targets != 1:
		return invalid("everybody", engine.CodeRequired, "exactly one of everybody, room_ids and user_ids must be set")
	case len(s.GetRoomIds()) > RoomsMost:
		return invalid("room_ids", engine.CodeTooMany, fmt.Sprintf("more than %d entries", RoomsMost))
	case checkRate("spec.", r.Rate, maxRate) != nil:
		return record{}, checkRate("spec.", r.Rate, maxRate)
	case r.Start.After(now.Add(aheadMost)):
		return invalid("start_time", engine.CodeOutOfRange, "must be within 30 days")
	case !r.Deadline.After(now) || !r.Deadline.After(r.Start):
		return invalid("deadline", engine.CodeOutOfRange, "must be after now and after start_time")
	case r.Deadline.After(r.Start.Add(aheadMost)):
		return invalid("deadline", engine.CodeOutOfRange, "must be within 30 days of start_time")
	case !(r.MaxFailedRatio >= 0 && r.MaxFailedRatio <= 1): // or it is not a number
		return invalid("max_failed_ratio", engine.CodeOutOfRange, "must be between 0 and 1")
	case s.SizeVT() > specBytes:
		return record{}, &engine.InvalidError{Field: "spec", Code: engine.CodeTooLarge, Description: fmt.Sprintf("%d bytes, more than %d", s.SizeVT(), specBytes)}
	}
	return r, nil
}

// checkRate refuses a rate; prefix is what stands before the name of its field. The error is an *engine.InvalidError.
func checkRate(prefix string, rate, most int) error {
	if rate >= 1 && rate <= most {
		return nil
	}
	return &engine.InvalidError{Field: prefix + "rate_per_second", Code: engine.CodeOutOfRange, Description: fmt.Sprintf("must be between 1 and %d", most)}
}
