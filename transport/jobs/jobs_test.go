package jobs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

func everybody(rate uint32) *pubsub.BroadcastJobSpec {
	return &pubsub.BroadcastJobSpec{Everybody: true, Content: content("news"), RatePerSecond: rate}
}

// TestJobs has one etcd for all tests, each of which mostly waits.
func TestJobs(t *testing.T) {
	etcd := etcdtest.Start(t)
	for name, test := range map[string]func(*testing.T, *etcdtest.Server){
		"everybody gets it once":                                       everybodyOnce,
		"a job for rooms goes to who is in them, once each":            roomsOnce,
		"a job for users tells who is offline":                         usersOffline,
		"a filter leaves out connections":                              filters,
		"turns do not come faster than the rate":                       notFaster,
		"a pause stops within a second, and nobody is left out":        pauseStops,
		"an instance that is killed is replaced":                       killed,
		"an instance that leaves loses nothing":                        leaves,
		"the same id is the same job, or refused":                      sameID,
		"nobody is left out of a node with more users than others":     unevenNodes,
		"an instance that is not ready runs no job":                    notReady,
		"a job is its tenant's":                                        tenants,
		"a start that is to come is waited for":                        startsLater,
		"the deadline ends a job":                                      deadline,
		"too many failures pause a job":                                failures,
		"a job is cancelled":                                           cancels,
		"a rate is changed while the job runs":                         changesRate,
		"so many jobs are kept, and not more":                          full,
		"a job that has ended is forgotten":                            forgets,
		"a node that names no users is passed by, and the job says so": passedBy,
		"a Controller that is away holds a job up":                     controllerAway,
		"a watcher sees a job to its end":                              watches,
		"lists have pages":                                             lists,
		"an etcd that refuses writes is not asked all the time":        diskFull,
		"a write whose answer is lost counts once":                     answersLost,
		"nobody gets it behind the deadline, however late etcd is":     tooLate,
		"a run ends when its job is taken away":                        takenAway,
		"a job that cannot be read is tried once a second":             unreadable,
		"a pause when all turns are over does not keep a job for ever": pausedTooLate,
		"a pause comes before the next attempt of a push":              pausedBetween,
		"ids that cannot be pushed to cost nobody else the message":    oddIDs,
		"calls at the same moment do not make too many jobs":           crowdOfMakers,
		"a caller who leaves when it is written is answered":           leavesEarly,
		"pages are no larger than clients take":                        largePages,
		"a job that has ended can be deleted, and no other one":        deletes,
		"what has not ended is listed on its own":                      listsOpen,
		"a few tenants leave room for others":                          shares,
		"slow jobs of one tenant keep no other one waiting":            slowTenant,
		"a job that does not get on counts as one that waits":          waiting,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, etcd)
		})
	}
}

func everybodyOnce(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1", "n2", "n3")
	users := w.crowd(600)
	w.connect("u0", "n2", "") // on two nodes, and twice on one
	w.connect("u1", "n2", "")
	w.connect("shop/u2", "n1", "")
	m := w.manager("m1", nil)
	m.create("j", everybody(4000))
	j := m.ends("j", pubsub.JobState_SUCCEEDED)
	p := j.GetProgress()
	if want := int64(len(users) + 1); p.GetTargets() != want || p.GetDelivered() != want || p.GetTargetsEstimate() != want || p.GetNodes() != 3 || j.GetReason() != "" {
		t.Errorf("%v", j)
	}
	w.mu.Lock()
	for _, user := range users {
		if want := len(w.at[user]); w.got[user] != want { // each connection has it once
			t.Errorf("%s got it %d times over %d connections", user, w.got[user], want)
		}
	}
	w.mu.Unlock()
	if j.GetBeginTime() == nil || j.GetTarget() != "everybody" || j.GetManagerId() != "" || len(p.GetNodeFailures()) > 0 {
		t.Errorf("%v", j)
	}
}

func filters(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1", "n2")
	w.crowd(20)
	m := w.manager("m1", nil)
	for id, spec := range map[string]*pubsub.BroadcastJobSpec{"all": everybody(1000), "list": {UserIds: []string{"u0", "u5", "u6"}, RatePerSecond: 1000, Content: content("x")}} {
		spec.Filter = []*pubsub.Match{{Key: "user", Values: []string{"u0", "u5"}}}
		m.create(id, spec)
		p := m.ends(id, pubsub.JobState_SUCCEEDED).GetProgress()
		if p.GetDelivered() != 2 || p.GetOffline() != p.GetTargets()-2 || len(p.GetNodeFailures()) > 0 {
			t.Errorf("%s: %v", id, p)
		}
	}
	w.mu.Lock()
	if len(w.got) != 2 || w.got["u0"] != 2 || w.got["u5"] != 2 {
		t.Errorf("arrived: %v", w.got)
	}
	// The connection that the filter is for is in another room than the first of the user's rooms.
	w.rooms["r1"], w.rooms["r2"] = []string{"both", "one"}, []string{"both"}
	w.mu.Unlock()
	w.connect("both", "n1", "r1")
	w.connect("both", "n1", "r2")
	w.connect("one", "n2", "r1")
	m.create("rooms", &pubsub.BroadcastJobSpec{
		RoomIds: []string{"r1", "r2"}, RatePerSecond: 1000, Content: content("x"), Filter: []*pubsub.Match{{Key: "in", Values: []string{"r2"}}},
	})
	if p := m.ends("rooms", pubsub.JobState_SUCCEEDED).GetProgress(); p.GetDelivered() != 1 || p.GetOffline() != 1 || len(p.GetNodeFailures()) > 0 {
		t.Errorf("rooms: %v", p)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.got["both"] != 1 || w.where["both"] != "r2" || w.got["one"] != 0 {
		t.Errorf("arrived: %v, in %v", w.got, w.where)
	}
}

func roomsOnce(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1", "n2")
	for _, user := range []string{"a", "b", "c", "both"} {
		w.connect(user, "n1", "")
	}
	w.connect("d", "n2", "elsewhere")
	w.rooms["r1"] = []string{"a", "b", "both", "away"}
	w.rooms["r2"] = []string{"c", "both", "d"}
	m := w.manager("m1", nil)
	m.create("j", &pubsub.BroadcastJobSpec{RoomIds: []string{"r1", "r2", "nowhere"}, Content: content("news"), RatePerSecond: 1000})
	j := m.ends("j", pubsub.JobState_SUCCEEDED)
	p := j.GetProgress()
	if p.GetTargets() != 6 || p.GetDelivered() != 4 || p.GetOffline() != 2 { // d has no connection in the room
		t.Errorf("%v", p)
	}
	if len(p.GetNodeFailures()) != 1 || !strings.Contains(p.GetNodeFailures()[0].GetReason(), `room "nowhere" not found`) {
		t.Errorf("%v", p.GetNodeFailures())
	}
	w.onlyOnce()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.where["both"] != "r1" || w.where["c"] != "r2" || w.got["d"] != 0 {
		t.Errorf("%v", w.where)
	}
}

func usersOffline(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(50)
	m := w.manager("m1", nil)
	spec := &pubsub.BroadcastJobSpec{Content: content("news"), RatePerSecond: 1000}
	for i := range 100 { // half of them are not there
		spec.UserIds = append(spec.UserIds, fmt.Sprint("u", i))
	}
	spec.UserIds = append(spec.UserIds, "u1", "u1")
	m.create("j", spec)
	if p := m.ends("j", pubsub.JobState_SUCCEEDED).GetProgress(); p.GetTargets() != 100 || p.GetDelivered() != 50 || p.GetOffline() != 50 {
		t.Errorf("%v", p)
	}
	if n := w.onlyOnce(); n != 50 {
		t.Errorf("%d arrived", n)
	}
}

func notFaster(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(1200)
	m := w.manager("m1", nil)
	m.create("j", everybody(400))
	began := m.ends("j", pubsub.JobState_SUCCEEDED).GetBeginTime().AsTime()
	w.mu.Lock()
	defer w.mu.Unlock()
	// The first turns come a tick after the beginning. Nothing is caught up on that was not held up.
	if took := w.last.Sub(began); took < 2900*time.Millisecond {
		t.Errorf("1,200 users at 400 a second took %v", took)
	}
}

func pauseStops(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1", "n2")
	users := w.crowd(1500)
	m := w.manager("m1", nil)
	other := w.manager("m2", nil)
	m.create("j", everybody(500))
	eventually(t, "some of them have it", func() bool { n, _ := w.arrived(); return n > 200 })
	j, err := other.Pause(t.Context(), "", "j")
	ok(t, err)
	if j.GetState() != pubsub.JobState_PAUSED {
		t.Errorf("%v", j)
	}
	time.Sleep(time.Second)
	before, _ := w.arrived()
	time.Sleep(time.Second)
	if n, _ := w.arrived(); n != before {
		t.Errorf("%d got it later than a second after the pause", n-before)
	}
	if j := m.job("j"); j.GetState() != pubsub.JobState_PAUSED || j.GetProgress().GetInFlight() != 0 || j.GetProgress().GetDelivered() != int64(before) || j.GetManagerId() != "" {
		t.Errorf("%d have it: %v", before, j)
	}
	_, err = m.SetRate(t.Context(), "", "j", 5000)
	ok(t, err)
	_, err = m.Resume(t.Context(), "", "j")
	ok(t, err)
	if p := m.ends("j", pubsub.JobState_SUCCEEDED).GetProgress(); p.GetDelivered() != int64(len(users)) {
		t.Errorf("%v", p)
	}
	if n := w.onlyOnce(); n != len(users) {
		t.Errorf("%d of %d", n, len(users))
	}
}

// Users reconnect elsewhere all the time meanwhile.
func killed(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1", "n2", "n3")
	users := w.crowd(2000)
	settle := w.move(users)
	defer settle()
	managers := []*manager{w.manager("m0", nil), w.manager("m1", nil), w.manager("m2", nil)}
	managers[0].create("j", everybody(500))
	for i := range 2 {
		var runs *manager
		eventually(t, "some more have it", func() bool {
			n, _ := w.arrived()
			runs = nil
			for _, m := range managers {
				if m.alive && m.name == w.runner("j") {
					runs = m
				}
			}
			return n > 300*(i+1) && runs != nil
		})
		runs.kill()
	}
	last := managers[slices.IndexFunc(managers, func(m *manager) bool { return m.alive })]
	j := last.ends("j", pubsub.JobState_SUCCEEDED)
	p := j.GetProgress()
	n := int64(w.onlyOnce())
	if n < p.GetDelivered() || n > p.GetDelivered()+p.GetUnknown() {
		t.Errorf("%d have it: %v", n, p)
	}
	if p.GetUnknown() == 0 || p.GetUnknown() > 1500 || p.GetTargets() < 1900 {
		t.Errorf("%v", p)
	}
}

func leaves(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1", "n2")
	users := w.crowd(1000)
	a := w.manager("a", nil)
	a.create("j", everybody(250))
	eventually(t, "some of them have it", func() bool { n, _ := w.arrived(); return n > 100 })
	b := w.manager("b", nil)
	a.close()
	if n, _ := w.arrived(); n > len(users)-200 {
		t.Errorf("an instance that leaves has run a job nearly to its end: %d", n)
	}
	p := b.ends("j", pubsub.JobState_SUCCEEDED).GetProgress()
	if n := w.onlyOnce(); n != len(users) || p.GetDelivered() != int64(n) || p.GetUnknown() != 0 {
		t.Errorf("%d have it: %v", n, p)
	}
}

// A node that has more than its share of the users names a part of them at a time.
func unevenNodes(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1", "n2", "n3")
	for i := range 200 {
		w.connect(fmt.Sprint("u", i), "n1", "")
	}
	m := w.manager("m1", nil)
	m.create("j", everybody(20)) // each node is asked for 66
	someHaveIt(t, w)
	_, err := m.SetRate(t.Context(), "", "j", 5000)
	ok(t, err)
	p := m.ends("j", pubsub.JobState_SUCCEEDED).GetProgress()
	if n := w.onlyOnce(); n != 200 || p.GetDelivered() != 200 {
		t.Errorf("%d have it: %v", n, p)
	}
}

func notReady(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(10)
	var ready atomic.Bool
	m := w.manager("m1", func(c *Config) { c.Ready = ready.Load })
	m.create("j", everybody(1000))
	time.Sleep(1500 * time.Millisecond)
	if j := m.job("j"); j.GetState() != pubsub.JobState_PENDING || j.GetManagerId() != "" {
		t.Errorf("%v", j)
	}
	ready.Store(true)
	m.ends("j", pubsub.JobState_SUCCEEDED)
}

func sameID(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(10)
	m := w.manager("m1", nil)
	spec := everybody(1000)
	_, created, err := m.Create(t.Context(), "", "alice", "j", engine.Low, spec)
	ok(t, err)
	if !created {
		t.Error("the first one was not made")
	}
	m.ends("j", pubsub.JobState_SUCCEEDED)
	j, created, err := m.Create(t.Context(), "", "bob", "j", engine.Low, proto.CloneOf(spec))
	ok(t, err)
	if created || j.GetState() != pubsub.JobState_SUCCEEDED || j.GetCreatedBy() != "alice" || !proto.Equal(j.GetSpec(), spec) {
		t.Errorf("%v %v", created, j)
	}
	other := proto.CloneOf(spec)
	other.RatePerSecond++
	if _, _, err := m.Create(t.Context(), "", "", "j", engine.Low, other); !errors.Is(err, ErrExists) {
		t.Errorf("another spec: %v", err)
	}
	if n := w.onlyOnce(); n != 10 {
		t.Errorf("%d arrived", n)
	}
	for name, do := range map[string]func(context.Context, string, string) (*pubsub.BroadcastJob, error){"pause": m.Pause, "resume": m.Resume, "cancel": m.Cancel} {
		if _, err := do(t.Context(), "", "j"); !errors.Is(err, ErrEnded) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func tenants(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	longest := "shop/" + strings.Repeat("x", 256) // what stands behind the tenant may be so long
	for _, user := range []string{"shop/a", "shop/b", longest, "news/a", "a"} {
		w.connect(user, "n1", "")
	}
	w.rooms["shop/r"], w.rooms["r"] = []string{"shop/b"}, []string{"a"}
	m := w.manager("m1", nil)
	for id, spec := range map[string]*pubsub.BroadcastJobSpec{
		"all": everybody(100), "room": {RoomIds: []string{"r"}, Content: content("x"), RatePerSecond: 10}, "list": {UserIds: []string{"b", "c"}, Content: content("x"), RatePerSecond: 10},
	} {
		_, _, err := m.Create(t.Context(), "shop", "", id, engine.Low, spec)
		ok(t, err)
	}
	for id, want := range map[string]int64{"all": 3, "room": 1, "list": 1} {
		eventually(t, "the end of "+id, func() bool {
			j, err := m.Get(t.Context(), "shop", id)
			return err == nil && j.GetState() == pubsub.JobState_SUCCEEDED && j.GetProgress().GetDelivered() == want
		})
	}
	w.mu.Lock()
	if w.got["shop/a"] != 1 || w.got["shop/b"] != 3 || w.got[longest] != 1 || w.got["news/a"]+w.got["a"] != 0 {
		t.Errorf("%v", w.got)
	}
	w.mu.Unlock()
	for _, tenant := range []string{"", "news", "shop-1"} {
		if _, err := m.Get(t.Context(), tenant, "all"); !errors.Is(err, ErrUnknown) {
			t.Errorf("tenant %q: %v", tenant, err)
		}
		if _, err := m.Cancel(t.Context(), tenant, "all"); !errors.Is(err, ErrUnknown) {
			t.Errorf("tenant %q: %v", tenant, err)
		}
		if list, _, err := m.List(t.Context(), tenant, "", 0, false); err != nil || len(list) > 0 {
			t.Errorf("tenant %q: %v %v", tenant, list, err)
		}
		if err := m.Watch(t.Context(), tenant, "all", func(*pubsub.BroadcastJob) error { return nil }); !errors.Is(err, ErrUnknown) {
			t.Errorf("tenant %q: %v", tenant, err)
		}
	}
}

func startsLater(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(10)
	m := w.manager("m1", nil)
	spec := everybody(100)
	start := time.Now().Add(2 * time.Second)
	spec.StartTime = timestamppb.New(start)
	if j := m.create("j", spec); j.GetState() != pubsub.JobState_PENDING {
		t.Errorf("%v", j)
	}
	began := m.ends("j", pubsub.JobState_SUCCEEDED).GetBeginTime().AsTime()
	if began.Before(start.Add(-time.Millisecond)) {
		t.Errorf("began %v before its start", start.Sub(began))
	}
}

func deadline(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(1000)
	m := w.manager("m1", nil)
	spec := everybody(100)
	spec.Deadline = timestamppb.New(time.Now().Add(2 * time.Second))
	m.create("j", spec)
	waits := everybody(100)
	waits.Deadline = spec.GetDeadline()
	m.create("paused", waits)
	_, err := m.Pause(t.Context(), "", "paused")
	ok(t, err)
	p := m.ends("j", pubsub.JobState_FAILED).GetProgress()
	m.ends("paused", pubsub.JobState_FAILED)
	if p.GetDelivered() == 0 || p.GetTargets() > 500 {
		t.Errorf("%v", p)
	}
}

func failures(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.hang = true
	w.crowd(600)
	m := w.manager("m1", nil)
	spec := everybody(200)
	spec.MaxFailedRatio = 0.5
	m.create("j", spec)
	eventually(t, "the pause", func() bool {
		j := m.job("j")
		return j.GetState() == pubsub.JobState_PAUSED && j.GetProgress().GetInFlight() == 0
	})
	j := m.job("j")
	if p := j.GetProgress(); p.GetFailed() < 100 || p.GetFailed() != p.GetTargets() || p.GetTargets() == 600 || !strings.Contains(j.GetReason(), "max_failed_ratio") ||
		len(p.GetNodeFailures()) != 1 || p.GetNodeFailures()[0].GetNodeId() != "n1" || int64(p.GetNodeFailures()[0].GetUsers()) != p.GetFailed() {
		t.Errorf("%v", j)
	}
	w.mu.Lock()
	w.hang = false
	w.mu.Unlock()
	_, err := m.Resume(t.Context(), "", "j")
	ok(t, err)
	if p := m.ends("j", pubsub.JobState_SUCCEEDED).GetProgress(); p.GetDelivered()+p.GetFailed() != 600 || p.GetDelivered() == 0 {
		t.Errorf("%v", p)
	}
}

func cancels(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(1000)
	m := w.manager("m1", nil)
	m.create("j", everybody(200))
	eventually(t, "some of them have it", func() bool { n, _ := w.arrived(); return n > 0 })
	_, err := m.Cancel(t.Context(), "", "j")
	ok(t, err)
	p := m.ends("j", pubsub.JobState_CANCELLED).GetProgress()
	if n := w.onlyOnce(); int64(n) != p.GetDelivered() || n >= 1000 {
		t.Errorf("%d have it: %v", n, p)
	}
	if j, err := m.Cancel(t.Context(), "", "j"); err != nil || j.GetState() != pubsub.JobState_CANCELLED {
		t.Errorf("once more: %v %v", j, err)
	}
	later := everybody(1)
	later.StartTime = timestamppb.New(time.Now().Add(time.Hour))
	m.create("later", later)
	_, err = m.Cancel(t.Context(), "", "later")
	ok(t, err)
	m.ends("later", pubsub.JobState_CANCELLED)
}

func changesRate(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(2000)
	m := w.manager("m1", nil)
	m.create("j", everybody(20)) // would take 100 s
	eventually(t, "some of them have it", func() bool { n, _ := w.arrived(); return n > 0 })
	if p := m.job("j").GetProgress(); p.GetEta() == nil || p.GetTargetsEstimate() < 1000 || p.GetTargetsEstimate() > 4000 {
		t.Errorf("%v", p)
	}
	j, err := m.SetRate(t.Context(), "", "j", 10_000)
	ok(t, err)
	if j.GetRatePerSecond() != 10_000 || j.GetSpec().GetRatePerSecond() != 20 {
		t.Errorf("%v", j)
	}
	for _, rate := range []int{0, 100_001} {
		if _, err := m.SetRate(t.Context(), "", "j", rate); err == nil || !strings.Contains(err.Error(), "rate_per_second: must be between 1 and 100000") {
			t.Errorf("%d: %v", rate, err)
		}
	}
	if p := m.ends("j", pubsub.JobState_SUCCEEDED).GetProgress(); p.GetDelivered() != 2000 {
		t.Errorf("%v", p)
	}
	w.onlyOnce()
}

func full(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	m := w.manager("m1", func(c *Config) { c.Most = 8 })
	later := everybody(1)
	later.StartTime = timestamppb.New(time.Now().Add(time.Hour))
	create := func(tenant, id string) error {
		_, _, err := m.Create(t.Context(), tenant, "", id, engine.Low, later)
		return err
	}
	ok(t, create("shop", "a"))
	ok(t, create("shop", "b"))
	if err := create("shop", "c"); !errors.Is(err, ErrFullTenant) {
		t.Errorf("a tenant has a quarter: %v", err)
	}
	for i := range 6 {
		ok(t, create("", fmt.Sprint("j", i)))
	}
	if err := create("", "more"); !errors.Is(err, ErrFull) {
		t.Errorf("%v", err)
	}
	ok(t, create("", "j0")) // it is there
}

func shares(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	m := w.manager("m1", func(c *Config) { c.Most = 80 })
	later := everybody(1)
	later.StartTime = timestamppb.New(time.Now().Add(time.Hour))
	create := func(tenant string, n int) (made int, err error) {
		for i := range n {
			eventually(t, "an answer of etcd", func() bool {
				_, _, err = m.Create(t.Context(), tenant, "", fmt.Sprint("j", i), engine.Low, later)
				return !errors.Is(err, ErrUnavailable)
			})
			if err != nil {
				return made, err
			}
			made++
		}
		return made, nil
	}
	for i, want := range []int{20, 20, 20} { // a quarter each, and then there are three quarters
		if n, err := create(fmt.Sprint("large-", i), 21); n != want || !errors.Is(err, ErrFullTenant) {
			t.Errorf("tenant %d has %d: %v", i, n, err)
		}
	}
	for i := range 10 { // the last one is the last that there is room for
		if n, err := create(fmt.Sprint("small-", i), 3); n != 2 || !errors.Is(err, ErrFullTenant) && i < 9 {
			t.Errorf("small tenant %d has %d: %v", i, n, err)
		}
	}
	if n, err := create("late", 1); n != 0 || !errors.Is(err, ErrFull) {
		t.Errorf("%d when there is no room at all: %v", n, err)
	}
	_, err := m.Cancel(t.Context(), "large-0", "j0")
	ok(t, err)
	_, err = m.Delete(t.Context(), "large-0", "j0")
	ok(t, err)
	if n, err := create("late", 1); n != 1 {
		t.Errorf("when one was deleted: %v", err)
	}
}

func deletes(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(50)
	m := w.manager("m1", nil)
	m.create("j", everybody(10))
	if _, err := m.Delete(t.Context(), "", "j"); !errors.Is(err, ErrNotEnded) {
		t.Errorf("while it runs: %v", err)
	}
	if _, err := m.Delete(t.Context(), "shop", "j"); !errors.Is(err, ErrUnknown) {
		t.Errorf("of another tenant: %v", err)
	}
	_, err := m.SetRate(t.Context(), "", "j", 1000)
	ok(t, err)
	m.ends("j", pubsub.JobState_SUCCEEDED)
	j, err := m.Delete(t.Context(), "", "j")
	ok(t, err)
	if j.GetState() != pubsub.JobState_SUCCEEDED || j.GetProgress().GetDelivered() != 50 {
		t.Errorf("%v", j)
	}
	for name, do := range map[string]func(context.Context, string, string) (*pubsub.BroadcastJob, error){"get": m.Get, "delete": m.Delete, "pause": m.Pause} {
		if _, err := do(t.Context(), "", "j"); !errors.Is(err, ErrUnknown) {
			t.Errorf("%s when it is deleted: %v", name, err)
		}
	}
	m.create("j", everybody(1000)) // another one
	if p := m.ends("j", pubsub.JobState_SUCCEEDED).GetProgress(); p.GetDelivered() != 50 {
		t.Errorf("%v", p)
	}
	if n, twice := w.arrived(); n != 100 || len(twice) != 50 {
		t.Errorf("%d messages", n)
	}
}

func listsOpen(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	m := w.manager("m1", nil)
	later := everybody(1)
	later.StartTime = timestamppb.New(time.Now().Add(time.Hour))
	for i := range 9 {
		m.create(fmt.Sprint("j", i), later)
		if i%2 == 0 {
			_, err := m.Cancel(t.Context(), "", fmt.Sprint("j", i))
			ok(t, err)
		}
	}
	_, _, err := m.Create(t.Context(), "shop", "", "other", engine.Low, later)
	ok(t, err)
	read := func() (got []string, pages int) {
		for token := ""; ; {
			list, next, err := m.List(t.Context(), "", token, 3, true)
			ok(t, err)
			for _, j := range list {
				got = append(got, j.GetJobId())
			}
			pages++
			if token = next; token == "" {
				return got, pages
			}
		}
	}
	eventually(t, "those that have not ended", func() bool {
		got, pages := read()
		return slices.Equal(got, []string{"j1", "j3", "j5", "j7"}) && pages == 2
	})
	_, err = m.Cancel(t.Context(), "", "j3")
	ok(t, err)
	eventually(t, "one less", func() bool { got, _ := read(); return slices.Equal(got, []string{"j1", "j5", "j7"}) })
	m.close()
	m.Service.mu.Lock()
	m.Service.looked = time.Now().Add(-staleAfter - time.Second)
	m.Service.mu.Unlock()
	if _, _, err := m.List(t.Context(), "", "", 3, true); !errors.Is(err, ErrUnavailable) {
		t.Errorf("what is old is listed: %v", err)
	}
}

// TestManyJobsAreWrittenNoMoreOftenThanAFew: 24 jobs would be written 96 times a second. It has an etcd of its own, which has enough to do.
func TestManyJobsAreWrittenNoMoreOftenThanAFew(t *testing.T) {
	w, disk := newWorld(t, etcdtest.Start(t), "n1"), new(fullDisk)
	users := w.crowd(2400)
	m := w.manager("m1", disk.under)
	const many = 24
	for i := range many {
		m.create(fmt.Sprint("j", i), &pubsub.BroadcastJobSpec{UserIds: users[100*i : 100*(i+1)], Content: content("news"), RatePerSecond: 10})
	}
	eventually(t, "all of them run", func() bool { return m.metrics.running.Load() == many })
	before := disk.asked.Load()
	time.Sleep(2 * time.Second)
	if n := disk.asked.Load() - before; n > 2*writesMost*3/2 {
		t.Errorf("%d transactions in two seconds", n)
	}
	for i := range many {
		eventually(t, "another rate", func() bool {
			_, err := m.SetRate(t.Context(), "", fmt.Sprint("j", i), 1000)
			return err == nil
		})
	}
	for i := range many {
		if p := m.ends(fmt.Sprint("j", i), pubsub.JobState_SUCCEEDED).GetProgress(); p.GetDelivered() != 100 {
			t.Errorf("%v", p)
		}
	}
	if n := w.onlyOnce(); n != len(users) {
		t.Errorf("%d of %d", n, len(users))
	}
}

func slowTenant(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	m := w.manager("m1", func(c *Config) { c.Running = 8 })
	slow := &pubsub.BroadcastJobSpec{UserIds: []string{"a", "b", "c", "d", "e", "f"}, RatePerSecond: 1, Content: content("x")}
	run := func(tenant string) (n int64) {
		r, err := w.client.Get(t.Context(), w.prefix+"/owner/"+tenant+"/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return -1
		}
		return r.Count
	}
	for i := range 12 {
		_, _, err := m.Create(t.Context(), "shop", "", fmt.Sprint("j", i), engine.Low, slow)
		ok(t, err)
	}
	eventually(t, "some jobs", func() bool { return run("shop") == 2 })
	_, _, err := m.Create(t.Context(), "bank", "", "j", engine.Low, slow)
	ok(t, err)
	m.create("j", slow)
	eventually(t, "jobs of others", func() bool { return run("bank") == 1 && run("-") == 1 })
	if n := run("shop"); n > 2 {
		t.Errorf("%d of 8 are of one tenant", n)
	}
}

func waiting(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(10)
	w.down = true
	m := w.manager("m1", nil)
	m.create("j", everybody(1000))
	eventually(t, "a job that waits", func() bool { return m.metrics.waiting.Load() == 1 })
	w.mu.Lock()
	w.down = false
	w.mu.Unlock()
	m.ends("j", pubsub.JobState_SUCCEEDED)
	eventually(t, "none", func() bool { return m.metrics.waiting.Load() == 0 })
	now := time.Now()
	for _, c := range []struct {
		what  string
		r     stored
		waits bool
	}{
		{"its start is to come", stored{record: record{State: pending, Start: now.Add(time.Hour)}}, false},
		{"nobody has begun it", stored{record: record{State: pending, Start: now.Add(-2 * waitsAfter)}}, true},
		{"it gets on", stored{record: record{State: running}, since: now.Add(-waitsAfter / 2)}, false},
		{"nobody runs it", stored{record: record{State: running}, since: now.Add(-2 * waitsAfter)}, true},
		{"a caller has paused it", stored{record: record{State: paused}, since: now.Add(-2 * waitsAfter)}, false},
	} {
		if c.r.waits(now) != c.waits {
			t.Errorf("%s: %v", c.what, !c.waits)
		}
	}
}

func forgets(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	m := w.manager("m1", func(c *Config) { c.Keep = time.Second })
	later := everybody(1)
	later.StartTime = timestamppb.New(time.Now().Add(time.Hour))
	m.create("stays", later)
	m.create("goes", later)
	_, err := m.Cancel(t.Context(), "", "goes")
	ok(t, err)
	eventually(t, "the end of its time", func() bool { _, err := m.Get(t.Context(), "", "goes"); return errors.Is(err, ErrUnknown) })
	got, err := w.client.Get(t.Context(), w.prefix+"/spec/-/goes")
	ok(t, err)
	if len(got.Kvs) > 0 {
		t.Error("its content is still there")
	}
	if err := m.store.remove(t.Context(), key{"", "stays"}, 1); !errors.Is(err, errConflict) { // by an instance that has not heard of another job with its id
		t.Error(err)
	}
	m.job("stays")
}

// quiet are Sessions that name no users.
type quiet struct{ users *node.Users[*conn] }

func (q quiet) Deliver(user string, m *node.Message) node.Outcome    { return q.users.Deliver(user, m) }
func (q quiet) Broadcast(m *node.Message) (delivered, unreached int) { return q.users.Broadcast(m) }
func (q quiet) Online() int                                          { return q.users.Online() }

func passedBy(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	users := node.NewUsers[*conn]()
	w.addNode("old", users, quiet{users})
	w.crowd(100) // half of them on the old one
	m := w.manager("m1", nil)
	m.create("j", everybody(1000))
	j := m.ends("j", pubsub.JobState_SUCCEEDED)
	p := j.GetProgress()
	if p.GetTargets() != 50 || p.GetDelivered() != 50 || len(p.GetNodeFailures()) != 1 || p.GetNodeFailures()[0].GetNodeId() != "old" || !strings.Contains(j.GetReason(), "users of 1 node had no turn") {
		t.Errorf("%v", j)
	}
	m.create("list", &pubsub.BroadcastJobSpec{UserIds: []string{"u0", "u1"}, Content: content("x"), RatePerSecond: 10}) // who is named gets it there, too
	if p := m.ends("list", pubsub.JobState_SUCCEEDED).GetProgress(); p.GetDelivered() != 2 {
		t.Errorf("%v", p)
	}
}

func controllerAway(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(100)
	w.down = true
	m := w.manager("m1", nil)
	m.create("j", everybody(1000))
	eventually(t, "what holds it up", func() bool { return strings.Contains(m.job("j").GetReason(), "waits: ") })
	_, err := m.Pause(t.Context(), "", "j") // turns are over, and nothing was sent: that waits, too
	ok(t, err)
	time.Sleep(time.Second)
	w.mu.Lock()
	w.down = false
	w.mu.Unlock()
	time.Sleep(1500 * time.Millisecond)
	if n, _ := w.arrived(); n > 0 || m.job("j").GetProgress().GetInFlight() != 100 {
		t.Errorf("%d got it during the pause: %v", n, m.job("j"))
	}
	_, err = m.Resume(t.Context(), "", "j")
	ok(t, err)
	if p := m.ends("j", pubsub.JobState_SUCCEEDED).GetProgress(); p.GetDelivered() != 100 {
		t.Errorf("%v", p)
	}
	if n := w.onlyOnce(); n != 100 {
		t.Errorf("%d arrived", n)
	}
}

func watches(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(600)
	m, other := w.manager("m1", nil), w.manager("m2", nil)
	m.create("j", everybody(200))
	var seen []*pubsub.BroadcastJob
	ok(t, other.Watch(t.Context(), "", "j", func(j *pubsub.BroadcastJob) error { seen = append(seen, j); return nil }))
	last := seen[len(seen)-1]
	if len(seen) < 3 || last.GetState() != pubsub.JobState_SUCCEEDED || last.GetProgress().GetDelivered() != 600 || last.GetSpec() != nil {
		t.Errorf("%d: %v", len(seen), last)
	}
	for i := range seen[1:] {
		if a, b := seen[i].GetProgress().GetTargets(), seen[i+1].GetProgress().GetTargets(); b < a {
			t.Errorf("from %d targets to %d", a, b)
		}
	}
	gone := errors.New("gone")
	if err := m.Watch(t.Context(), "", "j", func(*pubsub.BroadcastJob) error { return gone }); !errors.Is(err, gone) {
		t.Errorf("%v", err)
	}
}

func lists(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	m := w.manager("m1", nil)
	later := everybody(1)
	later.StartTime = timestamppb.New(time.Now().Add(time.Hour))
	var want, got []string
	for i := range 7 {
		want = append(want, fmt.Sprint("j", i))
		m.create(want[i], later)
	}
	for token, pages := "", 0; ; pages++ {
		list, next, err := m.List(t.Context(), "", token, 3, false)
		ok(t, err)
		for _, j := range list {
			got = append(got, j.GetJobId())
			if j.GetSpec() != nil || j.GetTarget() != "everybody" {
				t.Errorf("%v", j)
			}
		}
		if token = next; token == "" {
			if pages != 2 {
				t.Errorf("%d pages", pages+1)
			}
			break
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	for field, ask := range map[string]func() error{
		"page_size":  func() error { _, _, err := m.List(t.Context(), "", "", PageMost+1, false); return err },
		"page_token": func() error { _, _, err := m.List(t.Context(), "", "/", 1, false); return err },
	} {
		if invalid, is := errors.AsType[*engine.InvalidError](ask()); !is || invalid.Field != field {
			t.Errorf("%s: %v", field, ask())
		}
	}
}

// etcd is away for a while in the middle of a job.
func TestAJobWaitsForEtcdAndGoesOn(t *testing.T) {
	etcd := etcdtest.Start(t)
	w := newWorld(t, etcd, "n1", "n2")
	users := w.crowd(1000)
	a, b := w.manager("a", nil), w.manager("b", nil)
	a.create("j", everybody(400))
	eventually(t, "some of them have it", func() bool { n, _ := w.arrived(); return n > 100 })
	etcd.Stop()
	time.Sleep(time.Second)
	before, _ := w.arrived()
	time.Sleep(2 * time.Second) // longer than the lease
	if n, _ := w.arrived(); n != before {
		t.Errorf("%d got it while etcd was away", n-before)
	}
	etcd.Restart()
	p := b.ends("j", pubsub.JobState_SUCCEEDED).GetProgress()
	n := int64(w.onlyOnce())
	if n < p.GetDelivered() || n > p.GetDelivered()+p.GetUnknown() || p.GetTargets() != int64(len(users)) {
		t.Errorf("%d have it: %v", n, p)
	}
	a.close()
}
