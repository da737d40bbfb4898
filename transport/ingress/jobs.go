package ingress

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/jobs"
)

const (
	jobServiceName   = "pubsub.BroadcastJobService"
	jobServiceMetric = "BroadcastJobService" // the label api of all its methods
)

// The fields of a CreateJobRequest and of its BroadcastJobSpec.
const (
	createSpec  = 2
	specRooms   = 2
	specUsers   = 3
	specContent = 4
)

var errJobsOff = errors.New("there are no broadcast jobs here")

// jobsDesc is the generated description of BroadcastJobService with handlers that take the bytes of a request.
func (s *Server) jobsDesc() *grpc.ServiceDesc {
	d := &grpc.ServiceDesc{
		ServiceName: jobServiceName,
		HandlerType: (*any)(nil),
		Streams:     []grpc.StreamDesc{{StreamName: watchJob.String(), Handler: s.watchJob, ServerStreams: true}},
		Metadata:    pubsub.BroadcastJobService_ServiceDesc.Metadata,
	}
	d.Methods = append(d.Methods, grpc.MethodDesc{MethodName: createJob.String(), Handler: s.callHandler(createJob, s.createJob)})
	for a := range methods {
		if a.ofJobs() && a != createJob && a != watchJob {
			d.Methods = append(d.Methods, grpc.MethodDesc{MethodName: a.String(), Handler: s.callHandler(a, s.aJob(a))})
		}
	}
	return d
}

// createJob serves CreateJob. It is paid for like one push, unless there is such a job already.
func (s *Server) createJob(ctx context.Context, info *callInfo, line *audit.Entry) ([]byte, error) {
	c := s.takeCall(toUsers) // may have the longest list
	info.allow(c)
	defer func() { s.space.release(info.conn, c.held) }()
	if err := s.read(ctx, info.wire, info.conn, c); err != nil {
		return nil, err
	}
	r, err := s.decoder.decodeJob(c.in.wire)
	if err != nil {
		return nil, err
	}
	if err := s.stillMay(ctx, info, createJob); err != nil {
		return nil, err
	}
	spec := r.GetSpec()
	if err := s.authorizeJob(info.principal, spec); err != nil {
		return nil, err
	}
	if s.cfg.Jobs == nil {
		return nil, errJobsOff
	}
	priority := engine.Low
	if p := spec.GetPriority(); p != pubsub.Priority_PRIORITY_UNSPECIFIED {
		priority = priorityOf(p)
	}
	if info.principal != nil { // it may be one of another policy by now
		info.priorityMax = min(info.priorityMax, info.principal.PriorityMax)
	}
	ctx, cancel := context.WithDeadline(ctx, info.call.Began.Add(s.cfg.Engine.Timeout()))
	defer cancel()
	job, created, err := s.cfg.Jobs.Create(ctx, info.tenant(), info.sender(), r.GetJobId(), min(priority, info.priorityMax), spec)
	if err != nil {
		return nil, err //nolint:wrapcheck // status.go knows them
	}
	info.unsent = !created
	if created {
		line.Event, line.Job, line.Rate = audit.JobCreated, r.GetJobId(), int(spec.GetRatePerSecond())
		switch {
		case spec.GetEverybody():
			line.TargetKind = "everybody"
		case len(spec.GetRoomIds()) > 0:
			line.TargetKind, line.Targets = "rooms", len(spec.GetRoomIds())
		default:
			line.TargetKind, line.Targets = "users", len(spec.GetUserIds())
		}
	}
	return marshalJob(&pubsub.CreateJobResponse{Job: job})
}

// decodeJob reads a CreateJobRequest and checks what it has in common with a push. Counts are checked before a list is made.
func (d *decoder) decodeJob(b []byte) (*pubsub.CreateJobRequest, error) {
	var rooms, users int
	var facts engine.Content
	for m := (wire.Reader{Rest: b}); m.Next(); {
		if !m.IsBytes(createSpec) {
			continue
		}
		spec := wire.Reader{Rest: m.Bytes}
		for spec.Next() {
			switch {
			case spec.IsBytes(specRooms):
				if rooms++; rooms > jobs.RoomsMost {
					return nil, &engine.InvalidError{Field: "spec.room_ids", Code: engine.CodeTooMany, Description: fmt.Sprintf("more than %d entries", jobs.RoomsMost)}
				}
			case spec.IsBytes(specUsers):
				if users++; users > d.limits.Users {
					return nil, inSpec(d.tooMany("user_ids", users), -1)
				}
			case spec.IsBytes(specContent):
				facts.Present = true
				if err := d.walkContent(&facts, spec.Bytes); err != nil {
					return nil, inSpec(err, -1)
				}
			}
		}
	}
	r := new(pubsub.CreateJobRequest)
	if err := r.UnmarshalVT(b); err != nil {
		return nil, malformed("request")
	}
	if err := jobs.CheckID(r.GetJobId()); err != nil {
		return nil, err //nolint:wrapcheck // it names its field
	}
	spec := r.GetSpec()
	if spec == nil {
		return nil, &engine.InvalidError{Field: "spec", Code: engine.CodeRequired, Description: "must be present"}
	}
	if _, known := pubsub.Priority_name[int32(spec.GetPriority())]; !known {
		return nil, &engine.InvalidError{Field: "spec.priority", Code: engine.CodeOutOfRange, Description: "is none of the values that are known"}
	}
	request := engine.Request{Kind: engine.ToAll, Content: facts}
	if len(spec.GetUserIds()) > 0 {
		request.Kind, request.Users = engine.ToUsers, spec.GetUserIds()
	}
	if err := d.limits.Check(&request); err != nil {
		return nil, inSpec(err, -1)
	}
	for i, room := range spec.GetRoomIds() {
		if err := d.limits.Check(&engine.Request{Kind: engine.ToRoom, Room: room, Content: facts}); err != nil {
			return nil, inSpec(err, i)
		}
	}
	return r, nil
}

// inSpec is an error about a push as one about a spec. room is the place of the room that it is about, or -1.
func inSpec(err error, room int) error {
	invalid, ok := errors.AsType[*engine.InvalidError](err)
	if !ok {
		return err
	}
	e := *invalid
	if e.Field = "spec." + e.Field; room >= 0 && e.Field == "spec.room_id" {
		e.Field = fmt.Sprintf("spec.room_ids[%d]", room)
	}
	return &e
}

// authorizeJob asks for the right to what a job pushes: as many pushes would need it.
func (s *Server) authorizeJob(who *auth.Principal, spec *pubsub.BroadcastJobSpec) error {
	if s.cfg.Auth == nil {
		return nil
	}
	allowed := !spec.GetEverybody() || who.May(auth.BroadcastMessage)
	for m, ids := range map[auth.Method][]string{auth.PushToRoom: spec.GetRoomIds(), auth.PushToUsers: spec.GetUserIds()} {
		allowed = allowed && !slices.ContainsFunc(ids, func(id string) bool { return !who.Allows(m, id) })
	}
	if !allowed {
		return deniedError{api: createJob}
	}
	return nil
}

// aJob serves the other unary methods. They are no pushes: quotas get theirs back.
func (s *Server) aJob(a api) func(context.Context, *callInfo, *audit.Entry) ([]byte, error) {
	return func(ctx context.Context, info *callInfo, line *audit.Entry) ([]byte, error) {
		info.unsent = true
		b, err := s.readSmall(info)
		if err != nil {
			return nil, err
		}
		if err := s.stillMay(ctx, info, a); err != nil {
			return nil, err
		}
		if s.cfg.Jobs == nil {
			return nil, errJobsOff
		}
		ctx, cancel := context.WithDeadline(ctx, info.call.Began.Add(s.cfg.Engine.Timeout()))
		defer cancel()
		if a == listJobs {
			return s.listJobs(ctx, info.tenant(), b)
		}
		var r pubsub.SetJobRateRequest // all requests begin with the job_id
		if err := r.UnmarshalVT(b); err != nil {
			return nil, malformed("request")
		}
		tenant, id, of := info.tenant(), r.GetJobId(), s.cfg.Jobs
		var job *pubsub.BroadcastJob
		switch a {
		case pauseJob:
			line.Event = audit.JobPaused
			job, err = of.Pause(ctx, tenant, id)
		case resumeJob:
			line.Event = audit.JobResumed
			job, err = of.Resume(ctx, tenant, id)
		case cancelJob:
			line.Event = audit.JobCancelled
			job, err = of.Cancel(ctx, tenant, id)
		case setJobRate:
			line.Event, line.Rate = audit.JobRateSet, int(r.GetRatePerSecond())
			job, err = of.SetRate(ctx, tenant, id, int(r.GetRatePerSecond()))
		case deleteJob:
			line.Event = audit.JobDeleted
			job, err = of.Delete(ctx, tenant, id)
		default:
			job, err = of.Get(ctx, tenant, id)
		}
		if err != nil {
			return nil, err //nolint:wrapcheck // status.go knows them
		}
		line.Job = id
		return marshalJob(&pubsub.GetJobResponse{Job: job}) // all replies are alike
	}
}

func (s *Server) listJobs(ctx context.Context, tenant string, b []byte) ([]byte, error) {
	var r pubsub.ListJobsRequest
	if err := r.UnmarshalVT(b); err != nil {
		return nil, malformed("request")
	}
	list, next, err := s.cfg.Jobs.List(ctx, tenant, r.GetPageToken(), int(r.GetPageSize()), r.GetNotEnded())
	if err != nil {
		return nil, err //nolint:wrapcheck // status.go knows them
	}
	return marshalJob(&pubsub.ListJobsResponse{Jobs: list, NextPageToken: next})
}

func marshalJob(m interface{ MarshalVT() ([]byte, error) }) ([]byte, error) {
	b, err := m.MarshalVT()
	if err != nil {
		return nil, fmt.Errorf("encode a job: %w", err)
	}
	return b, nil
}

// watchJob serves WatchJob.
func (s *Server) watchJob(_ any, ss grpc.ServerStream) (err error) {
	name := watchJob.String()
	info, err := s.admit(ss.Context(), watchJob)
	if err != nil {
		if s.cfg.Audit != nil {
			s.auditRefusal(info.auditEntry(ss.Context(), name), nil, err)
		}
		return s.rejectStream(ss, name, info.priority, err)
	}
	defer s.leave(&info)
	defer func() {
		if v := recover(); v != nil {
			s.panicked(name, v)
			err = s.statuses.internal.status.Err()
		}
	}()
	s.metrics.watched.Add(1)
	defer s.metrics.watched.Add(-1)
	s.watching.begin(info.conn)
	defer s.watching.end(info.conn, s.drained)
	ctx, cancel := context.WithCancelCause(ss.Context())
	over := make(chan struct{})
	defer close(over)
	s.readers.Go(func() {
		select {
		case <-over:
		case <-s.drained:
		case <-info.conn.ToldToGo():
		}
		cancel(engine.ErrDraining)
	})
	s.readers.Go(func() { s.endWatch(&info, over) })
	err = s.followJob(ctx, ss, &info)
	switch {
	case err == nil:
		return nil
	case ss.Context().Err() != nil:
		return status.FromContextError(ss.Context().Err()).Err()
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	}
	if _, ended := status.FromError(err); ended { // by a write
		return err
	}
	if s.cfg.Audit != nil {
		s.auditRefusal(info.auditEntry(ss.Context(), name), nil, err)
	}
	return s.rejectStream(ss, name, info.priority, err)
}

// followJob sends a job until it is over. The error says why it has not come so far.
func (s *Server) followJob(ctx context.Context, ss grpc.ServerStream, info *callInfo) error {
	b, err := s.readSmall(info)
	if err != nil {
		return err
	}
	var r pubsub.WatchJobRequest
	if err := r.UnmarshalVT(b); err != nil {
		return malformed("request")
	}
	if s.cfg.Jobs == nil {
		return errJobsOff
	}
	tenant := info.tenant()
	return s.cfg.Jobs.Watch(ctx, tenant, r.GetJobId(), func(job *pubsub.BroadcastJob) error { //nolint:wrapcheck // status.go knows them
		if s.cfg.Auth != nil && !s.cfg.Auth.Valid(info.principal, time.Now()) {
			if err := s.stillMay(ctx, info, watchJob); err != nil {
				return err
			}
			if info.tenant() != tenant {
				return deniedError{api: watchJob, method: true}
			}
		}
		b, err := marshalJob(&pubsub.WatchJobResponse{Job: job})
		if err != nil {
			return err
		}
		out := new(reply)
		out.set(b)
		return ss.SendMsg(out)
	})
}
