package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/timestamppb"

	pubsub "github.com/push-manager/push-manager/proto"
)

// JobSpec is a broadcast job: one message to many users, at a speed, each of them once.
type JobSpec struct {
	// For whom. One of the three is set.

	// Everybody is everybody who is connected when their turn comes.
	Everybody bool
	// Rooms are at most 100. A user in several of them gets the message once.
	Rooms []string
	// Users are at most 10,000 by default.
	Users []string

	Message Message
	// Rate is in users a second, from 1 to 10,000 by default.
	Rate int
	// Start is at most 30 days ahead. Zero: at once.
	Start time.Time
	// Deadline is when nobody's turn comes any more. Zero: 7 days after the start.
	Deadline time.Time
	// MaxFailedRatio has the job pause itself when more than this part of the users failed or is unknown. 0: it does not.
	MaxFailedRatio float64
	// Priority is [Low] unless it is set.
	Priority Priority
	// Filters say which connections get it. All of them must hold. Who has no such connection is offline.
	Filters []Filter
}

// Filter is connections whose attribute, such as platform, has one of the values; with Not those where it has none of them, or is
// absent.
type Filter struct {
	Attribute string
	Values    []string
	Not       bool
}

// JobState is where a job is in its life.
type JobState int32

// The states.
const (
	JobPending   = JobState(pubsub.JobState_PENDING)
	JobRunning   = JobState(pubsub.JobState_RUNNING)
	JobPaused    = JobState(pubsub.JobState_PAUSED)
	JobSucceeded = JobState(pubsub.JobState_SUCCEEDED)
	JobCancelled = JobState(pubsub.JobState_CANCELLED)
	JobFailed    = JobState(pubsub.JobState_FAILED)
)

// String is the name in the protocol, such as RUNNING.
func (s JobState) String() string { return pubsub.JobState(s).String() }

// Ended tells whether nothing more is sent.
func (s JobState) Ended() bool {
	return s == JobSucceeded || s == JobCancelled || s == JobFailed
}

// Job is a broadcast job and how far it is.
//
// Targets = Delivered + Offline + Failed + Unknown + InFlight, always; InFlight is 0 when the job has ended and the last answers
// are there.
type Job struct {
	ID    string
	State JobState
	// Reason is why it is paused, has failed or does not get on. For people.
	Reason string
	// Target is whom it is for, in words: "everybody", "2 rooms", "300 users".
	Target string
	// Rate is what was set last, in users a second; Speed is how fast it has been lately.
	Rate  int
	Speed float64
	// Manager is the instance that runs it, "" while nobody does.
	Manager string
	// CreatedBy is a caller of the policy, "" where nobody is asked who calls.
	CreatedBy string

	// Targets are the users whose turn has come, each counted once.
	Targets int
	// Delivered, Offline, Failed and Unknown are what became of them, as in a [Result].
	Delivered, Offline, Failed, Unknown int
	// InFlight are those of whom that is not known yet.
	InFlight int
	// Estimate is about how many targets there will be.
	Estimate int
	// Failures tell where users failed or are unknown, 20 at most.
	Failures []Failure

	// Created, Began, Ended and ETA are zero where they have no meaning yet. ETA is about when it will be done.
	Created, Began, Ended, ETA time.Time
}

// CreateJob makes a job. id is chosen by the caller: 1 to 64 letters, digits, and . _ - behind the first of them. With the same id and
// the same spec again it answers the job that there is, so it is repeated when it is not known whether it was made. docs/jobs.md is
// the guide to jobs.
func (c *Client) CreateJob(ctx context.Context, id string, spec JobSpec) (Job, error) {
	if spec.Rate < 0 || spec.Rate > math.MaxUint32 {
		return Job{}, invalid("spec.rate_per_second", fmt.Sprintf("%d is no rate", spec.Rate))
	}
	m := &pubsub.MessageContent{Type: pubsub.MessageType(spec.Message.Type), Data: spec.Message.Data, Metadata: spec.Message.Metadata}
	if !spec.Message.Time.IsZero() {
		m.Timestamp = spec.Message.Time.Unix()
	}
	r := &pubsub.CreateJobRequest{JobId: id, Spec: &pubsub.BroadcastJobSpec{
		Everybody: spec.Everybody, RoomIds: spec.Rooms, UserIds: spec.Users, Content: m, RatePerSecond: uint32(spec.Rate),
		MaxFailedRatio: spec.MaxFailedRatio, Priority: pubsub.Priority(spec.Priority),
	}}
	for _, f := range spec.Filters {
		r.Spec.Filter = append(r.Spec.Filter, &pubsub.Match{Key: f.Attribute, Values: f.Values, Not: f.Not})
	}
	if !spec.Start.IsZero() {
		r.Spec.StartTime = timestamppb.New(spec.Start)
	}
	if !spec.Deadline.IsZero() {
		r.Spec.Deadline = timestamppb.New(spec.Deadline)
	}
	return c.job(ctx, id, pubsub.BroadcastJobService_CreateJob_FullMethodName, r, new(pubsub.CreateJobResponse))
}

// Job answers a job.
func (c *Client) Job(ctx context.Context, id string) (Job, error) {
	return c.job(ctx, id, pubsub.BroadcastJobService_GetJob_FullMethodName, &pubsub.GetJobRequest{JobId: id}, new(pubsub.GetJobResponse))
}

// PauseJob has nobody's turn come any more, from a second later at the latest.
func (c *Client) PauseJob(ctx context.Context, id string) (Job, error) {
	return c.job(ctx, id, pubsub.BroadcastJobService_PauseJob_FullMethodName, &pubsub.PauseJobRequest{JobId: id}, new(pubsub.PauseJobResponse))
}

// ResumeJob goes on where the job was paused.
func (c *Client) ResumeJob(ctx context.Context, id string) (Job, error) {
	return c.job(ctx, id, pubsub.BroadcastJobService_ResumeJob_FullMethodName, &pubsub.ResumeJobRequest{JobId: id}, new(pubsub.ResumeJobResponse))
}

// CancelJob ends a job. Who has got the message has it.
func (c *Client) CancelJob(ctx context.Context, id string) (Job, error) {
	return c.job(ctx, id, pubsub.BroadcastJobService_CancelJob_FullMethodName, &pubsub.CancelJobRequest{JobId: id}, new(pubsub.CancelJobResponse))
}

// SetJobRate changes the speed of a job that has not ended, in users a second.
func (c *Client) SetJobRate(ctx context.Context, id string, rate int) (Job, error) {
	if rate < 0 || rate > math.MaxUint32 {
		return Job{}, invalid("rate_per_second", fmt.Sprintf("%d is no rate", rate))
	}
	r := &pubsub.SetJobRateRequest{JobId: id, RatePerSecond: uint32(rate)}
	return c.job(ctx, id, pubsub.BroadcastJobService_SetJobRate_FullMethodName, r, new(pubsub.SetJobRateResponse))
}

// DeleteJob forgets a job that has ended. Its id is free again. It is repeated only if it was refused: when it had been done before,
// the job would not be found.
func (c *Client) DeleteJob(ctx context.Context, id string) error {
	return c.do(ctx, pubsub.BroadcastJobService_DeleteJob_FullMethodName, &pubsub.DeleteJobRequest{JobId: id}, new(pubsub.DeleteJobResponse))
}

// Jobs are the jobs of the caller's tenant, ordered by their ids. notEnded leaves out those that have ended; then it may be a second
// behind. An error is the last thing it gives.
func (c *Client) Jobs(ctx context.Context, notEnded bool) iter.Seq2[Job, error] {
	return func(yield func(Job, error) bool) {
		for token := ""; ; {
			var page pubsub.ListJobsResponse
			r := &pubsub.ListJobsRequest{PageToken: token, NotEnded: notEnded}
			if err := c.do(ctx, pubsub.BroadcastJobService_ListJobs_FullMethodName, r, &page); err != nil {
				yield(Job{}, err)
				return
			}
			for _, j := range page.GetJobs() {
				if !yield(jobOf(j), nil) {
					return
				}
			}
			if token = page.GetNextPageToken(); token == "" {
				return
			}
		}
	}
}

// WatchJob gives a job at once, and then each second in which it has changed. It ends when the job has, when ctx ends, or with an
// error, which is the last thing it gives. Begin again after one that is not about the job.
func (c *Client) WatchJob(ctx context.Context, id string) iter.Seq2[Job, error] {
	return func(yield func(Job, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		var given peer.Peer
		stream, err := pubsub.NewBroadcastJobServiceClient(c.conn).WatchJob(ctx, &pubsub.WatchJobRequest{JobId: id}, grpc.Peer(&given))
		for err == nil {
			var r *pubsub.WatchJobResponse
			if r, err = stream.Recv(); err == nil && !yield(jobOf(r.GetJob()), nil) {
				return
			}
		}
		switch {
		case errors.Is(err, io.EOF):
		case ctx.Err() != nil:
			yield(Job{}, ctx.Err())
		default:
			yield(Job{}, errorOf(err, given.Addr != nil))
		}
	}
}

// job does a call about one job, which does nothing twice: it is repeated when it is not known whether it was done.
func (c *Client) job(ctx context.Context, id, path string, request any, reply interface{ GetJob() *pubsub.BroadcastJob }) (Job, error) {
	ctx, cancel := c.withDeadline(ctx)
	defer cancel()
	if err := c.try(ctx, Target{kind: ofJob, id: id}, "", func() *Error { return c.call(ctx, path, request, reply) }); err != nil {
		return Job{}, err
	}
	return jobOf(reply.GetJob()), nil
}

func jobOf(j *pubsub.BroadcastJob) Job {
	p := j.GetProgress()
	job := Job{
		ID: j.GetJobId(), State: JobState(j.GetState()), Reason: j.GetReason(), Target: j.GetTarget(), Rate: int(j.GetRatePerSecond()), Speed: p.GetRate(),
		Manager: j.GetManagerId(), CreatedBy: j.GetCreatedBy(), Targets: int(p.GetTargets()), Delivered: int(p.GetDelivered()), Offline: int(p.GetOffline()),
		Failed: int(p.GetFailed()), Unknown: int(p.GetUnknown()), InFlight: int(p.GetInFlight()), Estimate: int(p.GetTargetsEstimate()),
		Failures: failuresOf(p.GetNodeFailures()),
	}
	for _, t := range []struct {
		from *timestamppb.Timestamp
		into *time.Time
	}{{j.GetCreateTime(), &job.Created}, {j.GetBeginTime(), &job.Began}, {j.GetEndTime(), &job.Ended}, {p.GetEta(), &job.ETA}} {
		if t.from != nil {
			*t.into = t.from.AsTime()
		}
	}
	return job
}
