package client_test

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/client"
	pubsub "github.com/push-manager/push-manager/proto"
)

// brokenJobs answers each first call with an error that does not say whether anything was done.
type brokenJobs struct {
	pubsub.UnimplementedBroadcastJobServiceServer

	calls atomic.Int64
	spec  atomic.Pointer[pubsub.BroadcastJobSpec] // the latest one
}

func (b *brokenJobs) try() error {
	if b.calls.Add(1) == 1 {
		return status.Error(codes.Unavailable, "the connection broke")
	}
	return nil
}

func (b *brokenJobs) CreateJob(_ context.Context, r *pubsub.CreateJobRequest) (*pubsub.CreateJobResponse, error) {
	b.spec.Store(r.GetSpec())
	return &pubsub.CreateJobResponse{Job: &pubsub.BroadcastJob{JobId: r.GetJobId(), State: pubsub.JobState_PENDING}}, b.try()
}

func (b *brokenJobs) DeleteJob(context.Context, *pubsub.DeleteJobRequest) (*pubsub.DeleteJobResponse, error) {
	return &pubsub.DeleteJobResponse{}, b.try()
}

// TestACallAboutAJobIsRepeatedIfItDoesNothingTwice, and only then.
func TestACallAboutAJobIsRepeatedIfItDoesNothingTwice(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server, service := grpc.NewServer(), &brokenJobs{}
	pubsub.RegisterBroadcastJobServiceServer(server, service)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() { server.Stop(); <-served })
	var retried []string
	c, err := client.New(l.Addr().String(), client.WithoutHealthChecks(), client.WithRetryHook(func(_ context.Context, r client.Retry) { retried = append(retried, r.Target.String()) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	j, err := c.CreateJob(within(t), "sale", client.JobSpec{
		Everybody: true, Message: client.Text("x"), Rate: 1,
		Filters: []client.Filter{{Attribute: "platform", Values: []string{"ios", "android"}}, {Attribute: "beta", Values: []string{"no"}, Not: true}},
	})
	if f := service.spec.Load().GetFilter(); len(f) != 2 || f[0].GetKey() != "platform" || len(f[0].GetValues()) != 2 || f[0].GetNot() || !f[1].GetNot() {
		t.Errorf("filter %v", f)
	}
	if err != nil || j.ID != "sale" || service.calls.Load() != 2 || len(retried) != 1 || retried[0] != "job:sale" {
		t.Errorf("%+v, %v after %d calls, repeated %q", j, err, service.calls.Load(), retried)
	}
	service.calls.Store(0)
	if err := c.DeleteJob(within(t), "sale"); !errors.Is(err, client.ErrUnknown) || service.calls.Load() != 1 {
		t.Errorf("%v after %d calls", err, service.calls.Load())
	}
	for _, rate := range []int{-1, 1 << 40} {
		if _, err := c.CreateJob(within(t), "sale", client.JobSpec{Rate: rate}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("rate %d: %v", rate, err)
		}
		if _, err := c.SetJobRate(within(t), "sale", rate); status.Code(err) != codes.InvalidArgument {
			t.Errorf("rate %d: %v", rate, err)
		}
	}
	short, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	for _, err := range c.WatchJob(short, "sale") {
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	}
}
