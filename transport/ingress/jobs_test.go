package ingress

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/jobs"
)

// noNodes are those of jobs that nobody runs.
type noNodes struct{}

func (noNodes) NodeIDs() []string { return nil }
func (noNodes) ListUsers(context.Context, string, uint64, int, string) ([]string, uint64, error) {
	return nil, 0, errors.New("there are none")
}

// withJobs has jobs, which nobody runs unless they are started.
func withJobs(t *testing.T, change func(*Config, *engine.Config)) (*world, pubsub.BroadcastJobServiceClient, *jobs.Service) {
	t.Helper()
	w, client, service, _ := withJobsIn(t, change)
	return w, client, service
}

// withJobsIn tells their etcd, too.
func withJobsIn(t *testing.T, change func(*Config, *engine.Config)) (*world, pubsub.BroadcastJobServiceClient, *jobs.Service, *clientv3.Client) {
	t.Helper()
	etcd := etcdtest.Start(t)
	var service *jobs.Service
	w := newWorld(t, func(c *Config, ec *engine.Config) {
		if change != nil {
			change(c, ec)
		}
		e, err := engine.New(*ec)
		ok(t, err)
		service, err = jobs.New(jobs.Config{Client: etcd.Client(), Engine: e, Nodes: noNodes{}, ManagerID: "m", Most: 12})
		ok(t, err)
		c.Jobs = service
	})
	return w, pubsub.NewBroadcastJobServiceClient(w.conn), service, etcd.Client()
}

func job(id string) *pubsub.CreateJobRequest {
	return &pubsub.CreateJobRequest{JobId: id, Spec: &pubsub.BroadcastJobSpec{Everybody: true, Content: content("x"), RatePerSecond: 10}}
}

func TestJobsOverTheAPI(t *testing.T) {
	w, client, service := withJobs(t, nil)
	created, err := client.CreateJob(w.context(), job("j"))
	ok(t, err)
	if j := created.GetJob(); j.GetState() != pubsub.JobState_PENDING || j.GetRatePerSecond() != 10 || j.GetSpec().GetContent() == nil || j.GetTarget() != "everybody" {
		t.Errorf("%v", j)
	}
	again, err := client.CreateJob(w.context(), job("j"))
	ok(t, err)
	if again.GetJob().GetCreateTime().AsTime() != created.GetJob().GetCreateTime().AsTime() {
		t.Errorf("%v, and %v", created, again)
	}
	other := job("j")
	other.Spec.Content = content("y")
	_, err = client.CreateJob(w.context(), other)
	wantError(t, err, codes.AlreadyExists, "JOB_EXISTS", "")
	paused, err := client.PauseJob(w.context(), &pubsub.PauseJobRequest{JobId: "j"})
	ok(t, err)
	rated, err := client.SetJobRate(w.context(), &pubsub.SetJobRateRequest{JobId: "j", RatePerSecond: 20})
	ok(t, err)
	if paused.GetJob().GetState() != pubsub.JobState_PAUSED || rated.GetJob().GetRatePerSecond() != 20 {
		t.Errorf("%v %v", paused, rated)
	}
	_, err = client.SetJobRate(w.context(), &pubsub.SetJobRateRequest{JobId: "j"})
	wantError(t, err, codes.InvalidArgument, "OUT_OF_RANGE", "rate_per_second")
	list, err := client.ListJobs(w.context(), &pubsub.ListJobsRequest{})
	ok(t, err)
	if len(list.GetJobs()) != 1 || list.GetJobs()[0].GetSpec() != nil || list.GetNextPageToken() != "" {
		t.Errorf("%v", list)
	}
	_, err = client.ListJobs(w.context(), &pubsub.ListJobsRequest{PageSize: -1})
	wantError(t, err, codes.InvalidArgument, "OUT_OF_RANGE", "page_size")
	resumed, err := client.ResumeJob(w.context(), &pubsub.ResumeJobRequest{JobId: "j"})
	ok(t, err)
	if resumed.GetJob().GetState() != pubsub.JobState_RUNNING { // its start has come
		t.Errorf("%v", resumed)
	}
	service.Start() // its table is what watchers see
	t.Cleanup(func() { ok(t, service.Close(context.Background())) })
	watch, err := client.WatchJob(w.context(), &pubsub.WatchJobRequest{JobId: "j"})
	ok(t, err)
	first, err := watch.Recv()
	ok(t, err)
	if first.GetJob().GetState() != pubsub.JobState_RUNNING || first.GetJob().GetSpec() != nil {
		t.Errorf("%v", first)
	}
	if n := w.metric("push_manager_job_watchers"); n != "1" {
		t.Errorf("%s watchers", n)
	}
	_, err = client.CancelJob(w.context(), &pubsub.CancelJobRequest{JobId: "j"})
	ok(t, err)
	var last *pubsub.BroadcastJob
	for {
		r, err := watch.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		ok(t, err)
		last = r.GetJob()
	}
	if last.GetState() != pubsub.JobState_CANCELLED {
		t.Errorf("%v", last)
	}
	_, err = client.PauseJob(w.context(), &pubsub.PauseJobRequest{JobId: "j"})
	wantError(t, err, codes.FailedPrecondition, "JOB_ENDED", "")
	_, err = client.GetJob(w.context(), &pubsub.GetJobRequest{JobId: "k"})
	wantError(t, err, codes.NotFound, "JOB_NOT_FOUND", "")
	got, err := client.GetJob(w.context(), &pubsub.GetJobRequest{JobId: "j"})
	ok(t, err)
	if got.GetJob().GetEndTime() == nil {
		t.Errorf("%v", got)
	}
	if n := w.metric(`push_manager_api_requests_total{api="BroadcastJobService",status="success"}`); n != "8" {
		t.Errorf("%s calls", n)
	}
	_, err = client.CreateJob(w.context(), job("k"))
	ok(t, err)
	_, err = client.DeleteJob(w.context(), &pubsub.DeleteJobRequest{JobId: "k"})
	wantError(t, err, codes.FailedPrecondition, "JOB_NOT_ENDED", "")
	w.wait("a list of what has not ended", func() bool {
		open, err := client.ListJobs(w.context(), &pubsub.ListJobsRequest{NotEnded: true})
		return err == nil && len(open.GetJobs()) == 1 && open.GetJobs()[0].GetJobId() == "k"
	})
	deleted, err := client.DeleteJob(w.context(), &pubsub.DeleteJobRequest{JobId: "j"})
	ok(t, err)
	if deleted.GetJob().GetState() != pubsub.JobState_CANCELLED {
		t.Errorf("%v", deleted)
	}
	_, err = client.GetJob(w.context(), &pubsub.GetJobRequest{JobId: "j"})
	wantError(t, err, codes.NotFound, "JOB_NOT_FOUND", "")
	w.noDelivery(t)
}

func TestJobsThatCannotBeAreRefused(t *testing.T) {
	w, client, _ := withJobs(t, func(c *Config, ec *engine.Config) { ec.Limits.Users = 3 })
	for want, change := range map[string]func(*pubsub.CreateJobRequest){
		"REQUIRED job_id":                    func(r *pubsub.CreateJobRequest) { r.JobId = "" },
		"ID_MALFORMED job_id":                func(r *pubsub.CreateJobRequest) { r.JobId = "a/b" },
		"REQUIRED spec":                      func(r *pubsub.CreateJobRequest) { r.Spec = nil },
		"REQUIRED spec.content":              func(r *pubsub.CreateJobRequest) { r.Spec.Content = nil },
		"REQUIRED spec.everybody":            func(r *pubsub.CreateJobRequest) { r.Spec.Everybody = false },
		"OUT_OF_RANGE spec.rate_per_second":  func(r *pubsub.CreateJobRequest) { r.Spec.RatePerSecond = 10_001 },
		"OUT_OF_RANGE spec.max_failed_ratio": func(r *pubsub.CreateJobRequest) { r.Spec.MaxFailedRatio = -1 },
		"OUT_OF_RANGE spec.priority":         func(r *pubsub.CreateJobRequest) { r.Spec.Priority = 9 },
		"PAYLOAD_TOO_LARGE spec.content.data": func(r *pubsub.CreateJobRequest) {
			r.Spec.Content = content(strings.Repeat("x", 256<<10+1))
		},
		"TOO_MANY spec.user_ids": func(r *pubsub.CreateJobRequest) {
			r.Spec.Everybody, r.Spec.UserIds = false, []string{"a", "b", "c", "d"}
		},
		"REQUIRED spec.filter[0].values": func(r *pubsub.CreateJobRequest) { r.Spec.Filter = []*pubsub.Match{{Key: "k"}} },
		"TOO_MANY spec.filter": func(r *pubsub.CreateJobRequest) {
			r.Spec.Filter = slices.Repeat([]*pubsub.Match{{Key: "k", Values: []string{"v"}}}, 9)
		},
		"TOO_MANY spec.room_ids": func(r *pubsub.CreateJobRequest) {
			r.Spec.Everybody, r.Spec.RoomIds = false, strings.Split(strings.Repeat("r ", 101), " ")
		},
		"ID_MALFORMED spec.user_ids[1]": func(r *pubsub.CreateJobRequest) {
			r.Spec.Everybody, r.Spec.UserIds = false, []string{"a", "b\x00"}
		},
		"REQUIRED spec.room_ids[1]": func(r *pubsub.CreateJobRequest) {
			r.Spec.Everybody, r.Spec.RoomIds = false, []string{"a", ""}
		},
	} {
		r := job("j")
		change(r)
		_, err := client.CreateJob(w.context(), r)
		code, field, _ := strings.Cut(want, " ")
		wantError(t, err, codes.InvalidArgument, code, field)
	}
	_, err := w.raw("/pubsub.BroadcastJobService/CreateJob", []byte{0x12, 9})
	wantError(t, err, codes.InvalidArgument, "MALFORMED", "request")
	_, err = w.raw("/pubsub.BroadcastJobService/PauseJob", []byte{0x0a, 9})
	wantError(t, err, codes.InvalidArgument, "MALFORMED", "request")
	list, err := client.ListJobs(w.context(), &pubsub.ListJobsRequest{})
	ok(t, err)
	if len(list.GetJobs()) > 0 {
		t.Errorf("%v", list)
	}
}

func TestWithoutJobsTheirMethodsSaySo(t *testing.T) {
	w := newWorld(t, nil)
	client := pubsub.NewBroadcastJobServiceClient(w.conn)
	_, err := client.CreateJob(w.context(), job("j"))
	wantError(t, err, codes.FailedPrecondition, "JOBS_OFF", "")
	_, err = client.ListJobs(w.context(), &pubsub.ListJobsRequest{})
	wantError(t, err, codes.FailedPrecondition, "JOBS_OFF", "")
	watch, err := client.WatchJob(w.context(), &pubsub.WatchJobRequest{JobId: "j"})
	ok(t, err)
	_, err = watch.Recv()
	wantError(t, err, codes.FailedPrecondition, "JOBS_OFF", "")
}

func TestAJobNeedsItsOwnRightAndThatToItsTarget(t *testing.T) {
	a := newAccess(t, authtest.New(t, "version: 1\ntenants: {shop: {daily_pushes: 100}, news: {}}\ncallers:\n"+
		caller("all", `{methods: [CreateJob, GetJob, ListJobs, WatchJob, PauseJob, BroadcastMessage]}`, ", tenant: shop, priority_max: normal")+
		caller("rooms", `{methods: [CreateJob, PushToRoom], rooms: ["r-*"]}`, ", tenant: shop")+
		caller("pusher", `{methods: [BroadcastMessage, PushToRoom, PushToUsers], rooms: ["*"], users: ["*"]}`, ", tenant: shop")+
		caller("elsewhere", `{methods: ["*"], rooms: ["*"], users: ["*"]}`, ", tenant: news")))
	file := filepath.Join(t.TempDir(), "audit")
	log, err := audit.Open(audit.Config{File: file})
	ok(t, err)
	w, client, _, etcd := withJobsIn(t, func(c *Config, _ *engine.Config) { c.Auth, c.Audit = a.auth, log })
	as := func(name string) context.Context { return w.as(a.Token(name, time.Hour)) }
	j := job("j")
	j.Spec.Priority = pubsub.Priority_PRIORITY_CRITICAL
	created, err := client.CreateJob(as("all"), j)
	ok(t, err)
	if created.GetJob().GetCreatedBy() != "all" {
		t.Errorf("%v", created)
	}
	room := &pubsub.CreateJobRequest{JobId: "room", Spec: &pubsub.BroadcastJobSpec{RoomIds: []string{"r-1"}, Content: content("x"), RatePerSecond: 1}}
	_, err = client.CreateJob(as("rooms"), room)
	ok(t, err)
	// The priority is low unless another one is asked for, and never above that of the caller.
	for id, want := range map[string]engine.Priority{"j": engine.Normal, "room": engine.Low} {
		got, err := etcd.Get(t.Context(), jobs.Prefix+"/state/shop/"+id)
		ok(t, err)
		var record struct{ Priority engine.Priority }
		ok(t, json.Unmarshal(got.Kvs[0].Value, &record))
		if record.Priority != want {
			t.Errorf("%s has priority %v, want %v", id, record.Priority, want)
		}
	}
	for name, do := range map[string]func() error{
		"no right to jobs":      func() error { _, err := client.CreateJob(as("pusher"), job("k")); return err },
		"no right to everybody": func() error { _, err := client.CreateJob(as("rooms"), job("k")); return err },
		"no right to look":      func() error { _, err := client.GetJob(as("rooms"), &pubsub.GetJobRequest{JobId: "j"}); return err },
		"no right to cancel":    func() error { _, err := client.CancelJob(as("all"), &pubsub.CancelJobRequest{JobId: "j"}); return err },
		"no right to one room": func() error {
			r := proto.CloneOf(room)
			r.JobId, r.Spec.RoomIds = "k", []string{"r-1", "s"}
			_, err := client.CreateJob(as("rooms"), r)
			return err
		},
		"no right to rooms": func() error {
			r := proto.CloneOf(room)
			r.JobId = "k"
			_, err := client.CreateJob(as("all"), r)
			return err
		},
		"no right to these users": func() error {
			r := proto.CloneOf(room)
			r.JobId, r.Spec.RoomIds, r.Spec.UserIds = "k", nil, []string{"u"}
			_, err := client.CreateJob(as("rooms"), r)
			return err
		},
		"no right to watch": func() error {
			watch, err := client.WatchJob(as("rooms"), &pubsub.WatchJobRequest{JobId: "j"})
			ok(t, err)
			_, err = watch.Recv()
			return err
		},
	} {
		t.Run(name, func(t *testing.T) { wantError(t, do(), codes.PermissionDenied, "PERMISSION_DENIED", "") })
	}
	_, err = client.GetJob(w.context(), &pubsub.GetJobRequest{JobId: "j"})
	wantError(t, err, codes.Unauthenticated, "UNAUTHENTICATED", "")
	// Another tenant sees nothing of it, and may use the same name.
	_, err = client.GetJob(as("elsewhere"), &pubsub.GetJobRequest{JobId: "j"})
	wantError(t, err, codes.NotFound, "JOB_NOT_FOUND", "")
	_, err = client.CancelJob(as("elsewhere"), &pubsub.CancelJobRequest{JobId: "j"})
	wantError(t, err, codes.NotFound, "JOB_NOT_FOUND", "")
	_, err = client.CreateJob(as("elsewhere"), job("j"))
	ok(t, err)
	_, err = client.PauseJob(as("all"), &pubsub.PauseJobRequest{JobId: "j"})
	ok(t, err)
	list, err := client.ListJobs(as("all"), &pubsub.ListJobsRequest{})
	ok(t, err)
	if len(list.GetJobs()) != 2 || list.GetJobs()[0].GetState() != pubsub.JobState_PAUSED {
		t.Errorf("%v", list)
	}
	// So many are kept of a tenant.
	_, err = client.CreateJob(as("all"), job("k"))
	ok(t, err)
	_, err = client.CreateJob(as("all"), job("l"))
	wantError(t, err, codes.ResourceExhausted, "TOO_MANY_JOBS", "")
	ok(t, log.Close(context.Background()))
	b, err := os.ReadFile(file)
	ok(t, err)
	var lines []string
	for line := range bytes.Lines(b) {
		var e struct {
			Event, Caller, Tenant, Job, Method string
			Target                             string `json:"target_kind"`
		}
		ok(t, json.Unmarshal(line, &e))
		if strings.HasPrefix(e.Event, "job.") {
			lines = append(lines, strings.Join([]string{e.Event, e.Caller, e.Tenant, e.Job, e.Method, e.Target}, " "))
		}
	}
	want := "job.created all shop j CreateJob everybody\njob.created rooms shop room CreateJob rooms\njob.created elsewhere news j CreateJob everybody\n" +
		"job.paused all shop j PauseJob \njob.created all shop k CreateJob everybody"
	if got := strings.Join(lines, "\n"); got != want {
		t.Errorf("the audit log has\n%s\nwant\n%s", got, want)
	}
}

// What changes of a job is not told to who may not watch it any more, or is of another tenant by now.
func TestAWatchOfAJobEndsWithTheRightToIt(t *testing.T) {
	policy := func(watcher string) string {
		return "version: 1\ntenants: {shop: {}, news: {}}\ncallers:\n" + watcher +
			caller("maker", `{methods: ["*"], rooms: ["*"], users: ["*"]}`, ", tenant: shop")
	}
	for name, then := range map[string]string{
		"no right":       caller("watcher", `{methods: [GetJob]}`, ", tenant: shop"),
		"another tenant": caller("watcher", `{methods: [WatchJob, GetJob]}`, ", tenant: news"),
	} {
		t.Run(name, func(t *testing.T) {
			a := newAccess(t, authtest.New(t, policy(caller("watcher", `{methods: [WatchJob]}`, ", tenant: shop"))))
			w, client, service := withJobs(t, func(c *Config, _ *engine.Config) { c.Auth = a.auth })
			as := func(name string) context.Context { return w.as(a.Token(name, time.Hour)) }
			_, err := client.CreateJob(as("maker"), job("j"))
			ok(t, err)
			service.Start()
			t.Cleanup(func() { ok(t, service.Close(context.Background())) })
			watch, err := client.WatchJob(as("watcher"), &pubsub.WatchJobRequest{JobId: "j"})
			ok(t, err)
			_, err = watch.Recv()
			ok(t, err)
			a.WritePolicy(policy(then))
			a.policies.Reload()
			for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) { // until the other policy holds
				_, err := client.GetJob(as("watcher"), &pubsub.GetJobRequest{JobId: "j"})
				if status.Code(err) != codes.PermissionDenied {
					break
				}
				if time.Now().After(end) {
					t.Fatal(err)
				}
			}
			_, err = client.CancelJob(as("maker"), &pubsub.CancelJobRequest{JobId: "j"})
			ok(t, err)
			for err == nil {
				var r *pubsub.WatchJobResponse
				if r, err = watch.Recv(); r.GetJob().GetState() == pubsub.JobState_CANCELLED {
					t.Error("it is told what became of the job")
				}
			}
			wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")
		})
	}
}

// FuzzCreateJob sends bytes as the request: it is refused with a status of ours, or is a job.
func FuzzCreateJob(f *testing.F) {
	for _, r := range []*pubsub.CreateJobRequest{job("j"), {JobId: "k", Spec: &pubsub.BroadcastJobSpec{UserIds: []string{"a", "b"}, RoomIds: []string{"r"}}}, {}} {
		b, err := r.MarshalVT()
		ok(f, err)
		f.Add(b)
		f.Add(protowire.AppendBytes(protowire.AppendTag(b, createSpec, protowire.BytesType), b)) // a spec in two parts
	}
	d := newDecoder(engine.Limits{IDBytes: 256, DataBytes: 256 << 10, MetadataEntries: 32, MetadataBytes: 8 << 10, Exclude: 10_000, Users: 3})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := d.decodeJob(b)
		if err != nil {
			if _, is := errors.AsType[*engine.InvalidError](err); !is {
				t.Fatalf("%v", err)
			}
			return
		}
		if jobs.CheckID(r.GetJobId()) != nil || len(r.GetSpec().GetUserIds()) > 3 || len(r.GetSpec().GetRoomIds()) > jobs.RoomsMost || len(r.GetSpec().GetContent().GetData()) > 256<<10 {
			t.Fatalf("%v", r)
		}
	})
}
