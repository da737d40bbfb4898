package acceptance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	push "github.com/push-manager/push-manager/client"
	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// audience is users who are connected to nodes, without sockets: what it counts is messages.
type audience struct {
	pubsub.UnimplementedControllerServiceServer

	nodes map[string]string // of each user
	got   map[string]*atomic.Int32
	last  atomic.Int64 // when the last message came, in Unix nanoseconds
	total atomic.Int64
}

// listener is a connection of a user.
type listener struct {
	a   *audience
	got *atomic.Int32
}

// Deliver implements node.Conn.
func (l *listener) Deliver(*node.Message) node.Outcome {
	l.got.Add(1)
	l.a.total.Add(1)
	l.a.last.Store(time.Now().UnixNano())
	return node.Delivered
}

// GetUserNode implements pubsub.ControllerServiceServer.
func (a *audience) GetUserNode(_ context.Context, r *pubsub.GetUserNodeRequest) (*pubsub.GetUserNodeResponse, error) {
	id, found := a.nodes[r.GetUserId()]
	return &pubsub.GetUserNodeResponse{NodeId: id, Found: found}, nil
}

// GetUserNodes implements pubsub.ControllerServiceServer.
func (a *audience) GetUserNodes(_ context.Context, r *pubsub.GetUserNodesRequest) (*pubsub.GetUserNodesResponse, error) {
	reply := &pubsub.GetUserNodesResponse{}
	for _, user := range r.GetUserIds() {
		id, found := a.nodes[user]
		reply.Users = append(reply.Users, &pubsub.GetUserNodeResponse{NodeId: id, Found: found})
	}
	return reply, nil
}

// newAudience connects users to nodes.
func newAudience(t *testing.T, etcd *clientv3.Client, users, nodes int) *audience {
	t.Helper()
	a := &audience{nodes: map[string]string{}, got: map[string]*atomic.Int32{}}
	all := make([]*node.Users[*listener], nodes)
	for i := range all {
		all[i] = node.NewUsers[*listener]()
	}
	for i := range users {
		user := fmt.Sprint("user-", i)
		a.nodes[user], a.got[user] = fmt.Sprint("n", i%nodes), new(atomic.Int32)
		all[i%nodes].Add(user, &listener{a, a.got[user]})
	}
	for i, sessions := range all {
		id := fmt.Sprint("n", i)
		n, err := node.New(node.Config{NodeID: id, Sessions: sessions})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(n.Close)
		s := grpc.NewServer(node.ServerOptions()...)
		n.Attach(s)
		register(t, etcd, id, serve(t, s))
	}
	return a
}

// once fails if anybody has got more than want messages, and returns how many have fewer.
func (a *audience) once(t *testing.T, want int32) (fewer int) {
	t.Helper()
	for user, got := range a.got {
		switch n := got.Load(); {
		case n > want:
			t.Errorf("%s got it %d times", user, n-want+1)
		case n < want:
			fewer++
		}
	}
	return fewer
}

// The figures that broadcast jobs are held to: 100,000 users at 1,000 a second within 5 %; a pause that stops within a second;
// a kill -9 of who runs the job, after which another instance goes on, nobody gets it twice, and the counts add up.
func TestABroadcastJobKeepsItsRateAndOutlivesItsManager(t *testing.T) {
	if os.Getenv("LONG") == "" {
		t.Skip("takes three minutes: LONG=1")
	}
	const users = 100_000
	etcdAt := startEtcd(t)
	etcd := etcdtest.NewClient(t, etcdAt)
	a := newAudience(t, etcd, users, 3)
	s := grpc.NewServer()
	pubsub.RegisterControllerServiceServer(s, a)
	controller := serve(t, s)
	var managers []*manager
	for i := range 2 {
		managers = append(managers, startManager(t, etcdAt, controller, 3, fmt.Sprint("MANAGER_ID=pm-", i)))
	}
	api := pubsub.NewBroadcastJobServiceClient(dial(t, managers[0].api))
	create := func(id string, rate uint32) {
		t.Helper()
		_, err := api.CreateJob(within(t, patience), &pubsub.CreateJobRequest{JobId: id, Spec: &pubsub.BroadcastJobSpec{Everybody: true, Content: text(id), RatePerSecond: rate}})
		if err != nil {
			t.Fatal(err)
		}
	}
	ended := func(id string) *pubsub.BroadcastJob {
		t.Helper()
		for {
			r, err := api.GetJob(within(t, patience), &pubsub.GetJobRequest{JobId: id})
			if err != nil {
				t.Fatal(err)
			}
			j := r.GetJob()
			if p := j.GetProgress(); j.GetEndTime() != nil && p.GetInFlight() == 0 {
				if j.GetState() != pubsub.JobState_SUCCEEDED || p.GetTargets() != users || p.GetDelivered()+p.GetOffline()+p.GetFailed()+p.GetUnknown() != users {
					t.Errorf("%v", j)
				}
				return j
			}
			time.Sleep(100 * time.Millisecond)
		}
	}

	create("rate", 1000)
	j := ended("rate")
	took := time.Unix(0, a.last.Load()).Sub(j.GetBeginTime().AsTime())
	rate := users / took.Seconds()
	t.Logf("%d users at 1,000 a second took %v: %.1f a second", users, took.Round(time.Millisecond), rate)
	if rate < 950 || rate > 1050 || a.once(t, 1) > 0 {
		t.Errorf("%.1f users a second, %d left out", rate, a.once(t, 1))
	}

	a.total.Store(0)
	create("kill", 4000)
	eventually(t, "a fifth have it", func() error { return atLeast(&a.total, users/5) })
	if _, err := api.PauseJob(within(t, patience), &pubsub.PauseJobRequest{JobId: "kill"}); err != nil {
		t.Fatal(err)
	}
	paused := time.Now()
	time.Sleep(3 * time.Second)
	late := time.Unix(0, a.last.Load()).Sub(paused)
	t.Logf("the last message came %v after the reply to the pause", late)
	if late > time.Second {
		t.Error("a pause does not stop within a second")
	}
	if _, err := api.ResumeJob(within(t, patience), &pubsub.ResumeJobRequest{JobId: "kill"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "half have it", func() error { return atLeast(&a.total, users/2) })
	r, err := api.GetJob(within(t, patience), &pubsub.GetJobRequest{JobId: "kill"})
	if err != nil {
		t.Fatal(err)
	}
	runs := managers[0]
	if r.GetJob().GetManagerId() == "pm-1" {
		runs = managers[1]
	}
	runs.signal(syscall.SIGKILL)
	<-runs.done
	killed, before := time.Now(), a.total.Load()
	var again sync.Once
	for _, m := range managers {
		if m != runs {
			api = pubsub.NewBroadcastJobServiceClient(dial(t, m.api))
		}
	}
	eventually(t, "somebody goes on", func() error {
		err := atLeast(&a.total, before+1000)
		if err == nil {
			again.Do(func() {
				t.Logf("another instance went on %v after the kill", time.Since(killed).Round(time.Millisecond))
			})
		}
		return err
	})
	j = ended("kill")
	p := j.GetProgress()
	left := int64(a.once(t, 2))
	t.Logf("of %d targets %d delivered, %d offline, %d failed, %d unknown; %d have not got it", p.GetTargets(), p.GetDelivered(), p.GetOffline(), p.GetFailed(), p.GetUnknown(), left)
	if p.GetUnknown() == 0 || p.GetUnknown() > 8000 || users-left < p.GetDelivered() || users-left > p.GetDelivered()+p.GetUnknown() {
		t.Errorf("the account is not what arrived: %v", p)
	}
}

// TestJobsOfTheGoClient against the real service: what its methods say is what it answers.
func TestJobsOfTheGoClient(t *testing.T) {
	etcdAt := startEtcd(t)
	a := newAudience(t, etcdtest.NewClient(t, etcdAt), 30, 2)
	s := grpc.NewServer()
	pubsub.RegisterControllerServiceServer(s, a)
	m := startManager(t, etcdAt, serve(t, s), 2)
	c, err := push.New(m.api)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	ctx := within(t, patience)
	must := func(job push.Job, err error) push.Job {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return job
	}
	spec := push.JobSpec{Everybody: true, Message: push.Text("news"), Rate: 1, MaxFailedRatio: 0.5, Deadline: time.Now().Add(time.Hour).Truncate(time.Second)}
	j := must(c.CreateJob(ctx, "sale", spec))
	if j.ID != "sale" || j.State != push.JobPending || j.Target != "everybody" || j.Rate != 1 || j.Created.IsZero() || !j.Ended.IsZero() {
		t.Errorf("%+v", j)
	}
	if again := must(c.CreateJob(ctx, "sale", spec)); !again.Created.Equal(j.Created) {
		t.Errorf("%+v", again)
	}
	spec.Rate = 2
	var refused *push.Error
	if _, err := c.CreateJob(ctx, "sale", spec); !errors.As(err, &refused) || refused.Reason != "JOB_EXISTS" || !refused.NotSent {
		t.Errorf("another spec: %v", err)
	}
	if err := c.DeleteJob(ctx, "sale"); !errors.As(err, &refused) || refused.Reason != "JOB_NOT_ENDED" {
		t.Errorf("a job that runs is deleted: %v", err)
	}
	if j := must(c.PauseJob(ctx, "sale")); j.State != push.JobPaused || j.State.Ended() {
		t.Errorf("%+v", j)
	}
	if j := must(c.SetJobRate(ctx, "sale", 1000)); j.Rate != 1000 {
		t.Errorf("%+v", j)
	}
	must(c.ResumeJob(ctx, "sale"))
	var last push.Job
	for j, err := range c.WatchJob(ctx, "sale") {
		last = must(j, err)
	}
	if last.State != push.JobSucceeded || last.Delivered != 30 || last.Targets != 30 || last.Estimate != 30 || last.InFlight != 0 || last.Ended.IsZero() || last.Began.IsZero() {
		t.Errorf("%+v", last)
	}
	if n := a.once(t, 1); n > 0 {
		t.Errorf("%d have not got it", n)
	}
	must(c.CreateJob(ctx, "later", push.JobSpec{Users: []string{"user-1"}, Message: push.Text("news"), Rate: 1, Start: time.Now().Add(time.Hour)}))
	list := func(notEnded bool) (names []string) {
		for j, err := range c.Jobs(ctx, notEnded) {
			names = append(names, must(j, err).ID)
		}
		return names
	}
	if got := list(false); !slices.Equal(got, []string{"later", "sale"}) {
		t.Errorf("%q", got)
	}
	eventually(t, "the list of what has not ended", func() error {
		if got := list(true); !slices.Equal(got, []string{"later"}) {
			return fmt.Errorf("%q", got)
		}
		return nil
	})
	if j := must(c.CancelJob(ctx, "later")); j.State != push.JobCancelled {
		t.Errorf("%+v", j)
	}
	for _, id := range []string{"later", "sale"} {
		if err := c.DeleteJob(ctx, id); err != nil {
			t.Error(err)
		}
		if _, err := c.Job(ctx, id); !errors.As(err, &refused) || refused.Reason != "JOB_NOT_FOUND" {
			t.Errorf("%s is deleted: %v", id, err)
		}
	}
	for _, err := range c.WatchJob(ctx, "sale") {
		if !errors.As(err, &refused) || refused.Reason != "JOB_NOT_FOUND" {
			t.Errorf("a watch of what is deleted: %v", err)
		}
	}
}

func atLeast(n *atomic.Int64, want int64) error {
	if got := n.Load(); got < want {
		return fmt.Errorf("%d of %d", got, want)
	}
	return nil
}
