package pushctl

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pubsub "github.com/push-manager/push-manager/proto"
)

// jobServer has one job, and keeps what it was asked.
type jobServer struct {
	pubsub.UnimplementedBroadcastJobServiceServer

	job *pubsub.BroadcastJob
	got proto.Message
}

func (s *jobServer) CreateJob(_ context.Context, r *pubsub.CreateJobRequest) (*pubsub.CreateJobResponse, error) {
	s.got = r
	return &pubsub.CreateJobResponse{Job: s.job}, nil
}

func (s *jobServer) GetJob(_ context.Context, r *pubsub.GetJobRequest) (*pubsub.GetJobResponse, error) {
	if r.GetJobId() != s.job.GetJobId() {
		st, err := status.New(codes.NotFound, "there is no such job").WithDetails(&errdetails.ErrorInfo{Reason: "JOB_NOT_FOUND", Domain: "push-manager"})
		if err != nil {
			return nil, err
		}
		return nil, st.Err()
	}
	return &pubsub.GetJobResponse{Job: s.job}, nil
}

func (s *jobServer) ListJobs(_ context.Context, r *pubsub.ListJobsRequest) (*pubsub.ListJobsResponse, error) {
	if r.GetPageToken() == "" {
		return &pubsub.ListJobsResponse{Jobs: []*pubsub.BroadcastJob{{JobId: "first", State: pubsub.JobState_PAUSED}}, NextPageToken: "first"}, nil
	}
	return &pubsub.ListJobsResponse{Jobs: []*pubsub.BroadcastJob{s.job}}, nil
}

func (s *jobServer) WatchJob(_ *pubsub.WatchJobRequest, stream grpc.ServerStreamingServer[pubsub.WatchJobResponse]) error {
	running := proto.CloneOf(s.job)
	running.State = pubsub.JobState_RUNNING
	for _, j := range []*pubsub.BroadcastJob{running, s.job} {
		if err := stream.Send(&pubsub.WatchJobResponse{Job: j}); err != nil {
			return err
		}
	}
	return nil
}

func (s *jobServer) PauseJob(_ context.Context, r *pubsub.PauseJobRequest) (*pubsub.PauseJobResponse, error) {
	s.got = r
	return &pubsub.PauseJobResponse{Job: s.job}, nil
}

func (s *jobServer) ResumeJob(_ context.Context, r *pubsub.ResumeJobRequest) (*pubsub.ResumeJobResponse, error) {
	s.got = r
	return &pubsub.ResumeJobResponse{Job: s.job}, nil
}

func (s *jobServer) CancelJob(_ context.Context, r *pubsub.CancelJobRequest) (*pubsub.CancelJobResponse, error) {
	s.got = r
	return &pubsub.CancelJobResponse{Job: s.job}, nil
}

func (s *jobServer) SetJobRate(_ context.Context, r *pubsub.SetJobRateRequest) (*pubsub.SetJobRateResponse, error) {
	s.got = r
	return &pubsub.SetJobRateResponse{Job: s.job}, nil
}

func (s *jobServer) DeleteJob(_ context.Context, r *pubsub.DeleteJobRequest) (*pubsub.DeleteJobResponse, error) {
	s.got = r
	return &pubsub.DeleteJobResponse{Job: s.job}, nil
}

func serveJobs(t *testing.T, s *jobServer) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	pubsub.RegisterBroadcastJobServiceServer(g, s)
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Stop()
		<-done
	})
	return l.Addr().String()
}

func someJob() *pubsub.BroadcastJob {
	return &pubsub.BroadcastJob{
		JobId: "sale", State: pubsub.JobState_SUCCEEDED, RatePerSecond: 100, Target: "everybody", CreatedBy: "shop\x1b[31m", Reason: "users of 1 node had no turn",
		CreateTime: timestamppb.New(time.Unix(1_800_000_000, 0)), Spec: &pubsub.BroadcastJobSpec{Everybody: true},
		Progress: &pubsub.JobProgress{
			Targets: 7, Delivered: 4, Offline: 2, Failed: 1, TargetsEstimate: 9,
			NodeFailures: []*pubsub.NodeFailure{{NodeId: "n1", Reason: "failed: queue is full", Users: 1}},
		},
	}
}

func TestJobsCommandsSendWhatTheySay(t *testing.T) {
	for line, want := range map[string]proto.Message{
		"pause sale":    &pubsub.PauseJobRequest{JobId: "sale"},
		"resume sale":   &pubsub.ResumeJobRequest{JobId: "sale"},
		"cancel sale":   &pubsub.CancelJobRequest{JobId: "sale"},
		"delete sale":   &pubsub.DeleteJobRequest{JobId: "sale"},
		"rate sale 250": &pubsub.SetJobRateRequest{JobId: "sale", RatePerSecond: 250},
		"create sale hello --everybody --rate 5 --max-failed-ratio 0.25 --priority normal": &pubsub.CreateJobRequest{JobId: "sale", Spec: &pubsub.BroadcastJobSpec{
			Everybody: true, Content: &pubsub.MessageContent{Data: []byte("hello")}, RatePerSecond: 5, MaxFailedRatio: 0.25, Priority: pubsub.Priority_PRIORITY_NORMAL,
		}},
		"create sale hello --room a,b --room c --rate 5 --start 2026-12-24T18:00:00Z": &pubsub.CreateJobRequest{JobId: "sale", Spec: &pubsub.BroadcastJobSpec{
			RoomIds: []string{"a,b", "c"}, Content: &pubsub.MessageContent{Data: []byte("hello")}, RatePerSecond: 5, StartTime: timestamppb.New(time.Date(2026, 12, 24, 18, 0, 0, 0, time.UTC)),
		}},
		"create sale --metadata k=v --users a,b --rate 5": &pubsub.CreateJobRequest{JobId: "sale", Spec: &pubsub.BroadcastJobSpec{
			UserIds: []string{"a", "b"}, Content: &pubsub.MessageContent{Metadata: map[string]string{"k": "v"}}, RatePerSecond: 5,
		}},
		"create sale hello --users-file - --rate 5": &pubsub.CreateJobRequest{JobId: "sale", Spec: &pubsub.BroadcastJobSpec{
			UserIds: []string{"carol", "dave"}, Content: &pubsub.MessageContent{Data: []byte("hello")}, RatePerSecond: 5,
		}},
	} {
		t.Run(line, func(t *testing.T) {
			s := &jobServer{job: someJob()}
			code, out, errOut := pushctl(t, "carol\n\n dave \n", append([]string{"jobs"}, append(strings.Fields(line), "--address", serveJobs(t, s))...)...)
			if code != exitOK || errOut != "" || !proto.Equal(s.got, want) {
				t.Errorf("exit %d, %q, sent %v", code, errOut, s.got)
			}
			said := "job sale: SUCCEEDED (users of 1 node had no turn), for everybody\n"
			if strings.HasPrefix(line, "delete") {
				said = "job sale is deleted, it was SUCCEEDED (users of 1 node had no turn)\n"
			}
			if !strings.HasPrefix(out, said) {
				t.Errorf("printed %s", out)
			}
		})
	}
}

func TestJobsShowWhatTheyKnow(t *testing.T) {
	for line, want := range map[string][]string{
		"get sale":         {"rate      100 users a second", "targets   7 of ~9: delivered 4, offline 2, failed 1, unknown 0", `by        shop\x1b[31m`, "n1: failed: queue is full (1 user)"},
		"ls":               {"JOB    STATE", "first  PAUSED", "sale   SUCCEEDED  everybody"},
		"ls -o json":       {`"job_id":"first"`, `"job_id":"sale"`},
		"get sale -o json": {`"state":"SUCCEEDED"`, `"delivered":"4"`},
	} {
		s := &jobServer{job: someJob()}
		code, out, errOut := pushctl(t, "", append([]string{"jobs"}, append(strings.Fields(line), "--address", serveJobs(t, s))...)...)
		if code != exitOK || errOut != "" {
			t.Errorf("%s: exit %d, %q", line, code, errOut)
		}
		for _, text := range want {
			if !strings.Contains(strings.ReplaceAll(out, `": `, `":`), text) {
				t.Errorf("%s: %q is not in\n%s", line, text, out)
			}
		}
	}
}

func TestWatchingAJobEndsWithItsOutcome(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*pubsub.BroadcastJob)
		want   int
	}{
		"all have it":    {func(j *pubsub.BroadcastJob) { j.Progress = &pubsub.JobProgress{Targets: 1, Delivered: 1} }, exitOK},
		"nobody is here": {func(j *pubsub.BroadcastJob) { j.Progress = &pubsub.JobProgress{Targets: 1, Offline: 1} }, exitOffline},
		"some failed":    {func(*pubsub.BroadcastJob) {}, exitFailed},
		"some may have":  {func(j *pubsub.BroadcastJob) { j.Progress.Unknown = 1 }, exitUnknown},
		"it was cancelled": {func(j *pubsub.BroadcastJob) {
			j.State, j.Progress = pubsub.JobState_CANCELLED, &pubsub.JobProgress{Targets: 1, Delivered: 1}
		}, exitFailed},
	} {
		s := &jobServer{job: someJob()}
		tc.change(s.job)
		code, out, errOut := pushctl(t, "", "jobs", "watch", "sale", "--address", serveJobs(t, s))
		if code != tc.want || errOut != "" || strings.Count(out, "\n") != 2 || !strings.Contains(out, "RUNNING") {
			t.Errorf("%s: exit %d, %q, printed\n%s", name, code, errOut, out)
		}
	}
}

func TestJobsSayWhatIsWrong(t *testing.T) {
	addr := serveJobs(t, &jobServer{job: someJob()})
	for line, want := range map[string]struct {
		code int
		text string
	}{
		"get other":                                    {exitError, "not found: there is no such job [JOB_NOT_FOUND]"},
		"create j --everybody --rate 1":                {exitUsage, "nothing to push"},
		"create j x --everybody":                       {exitUsage, "--rate"},
		"create j x --rate 1 --start yesterday":        {exitUsage, `--start: "yesterday" is neither`},
		"create j x --rate 1 --users a --users-file f": {exitUsage, "not both"},
		"pause j --timeout 0s":                         {exitUsage, "--timeout"},
	} {
		code, _, errOut := pushctl(t, "", append([]string{"jobs"}, append(strings.Fields(line), "--address", addr)...)...)
		if code != want.code || !strings.Contains(errOut, want.text) {
			t.Errorf("%s: exit %d, %q", line, code, errOut)
		}
	}
}
