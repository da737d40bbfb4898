package jobs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

// fullDisk is an etcd that refuses transactions at once while it is full, and still answers other reads.
type fullDisk struct {
	clientv3.KV

	before func(n int64) // each transaction; nil: nothing

	full    atomic.Bool
	unheard atomic.Bool  // transactions are made, and their answers lost
	asked   atomic.Int64 // transactions
}

func (f *fullDisk) Txn(ctx context.Context) clientv3.Txn {
	n := f.asked.Add(1)
	if f.before != nil {
		f.before(n)
	}
	if f.full.Load() {
		return refused{}
	}
	if f.unheard.Load() {
		return &unheard{f.KV.Txn(ctx)}
	}
	return f.KV.Txn(ctx)
}

type unheard struct{ of clientv3.Txn }

func (u *unheard) If(c ...clientv3.Cmp) clientv3.Txn  { u.of = u.of.If(c...); return u }
func (u *unheard) Then(o ...clientv3.Op) clientv3.Txn { u.of = u.of.Then(o...); return u }
func (u *unheard) Else(o ...clientv3.Op) clientv3.Txn { u.of = u.of.Else(o...); return u }
func (u *unheard) Commit() (*clientv3.TxnResponse, error) {
	_, err := u.of.Commit()
	return nil, errors.Join(err, errors.New("the connection broke"))
}

type refused struct{}

func (r refused) If(...clientv3.Cmp) clientv3.Txn  { return r }
func (r refused) Then(...clientv3.Op) clientv3.Txn { return r }
func (r refused) Else(...clientv3.Op) clientv3.Txn { return r }
func (refused) Commit() (*clientv3.TxnResponse, error) {
	return nil, errors.New("database space exceeded")
}

// under changes a manager's etcd, before it is used.
func (f *fullDisk) under(c *Config) { f.KV, c.Client.KV = c.Client.KV, f }

func someHaveIt(t *testing.T, w *world) {
	eventually(t, "some have it", func() bool { n, _ := w.arrived(); return n > 0 })
}

func diskFull(t *testing.T, etcd *etcdtest.Server) {
	w, disk := newWorld(t, etcd, "n1"), new(fullDisk)
	w.crowd(400)
	m := w.manager("m1", disk.under)
	m.create("j", everybody(200))
	someHaveIt(t, w)
	disk.full.Store(true)
	before := disk.asked.Load()
	time.Sleep(2 * time.Second)
	if n := disk.asked.Load() - before; n > 15 {
		t.Errorf("a write that is refused was tried %d times in two seconds", n)
	}
	disk.full.Store(false)
	p := m.ends("j", pubsub.JobState_SUCCEEDED).GetProgress()
	if n := w.onlyOnce(); n != 400 || p.GetDelivered() != 400 {
		t.Errorf("%d have it: %v", n, p)
	}
}

// A write may have been made though etcd has not answered: what it says is not said twice, and its users are sent to.
func answersLost(t *testing.T, etcd *etcdtest.Server) {
	w, disk := newWorld(t, etcd, "n1"), new(fullDisk)
	w.crowd(400)
	m := w.manager("m1", disk.under)
	m.create("j", everybody(200))
	someHaveIt(t, w)
	disk.unheard.Store(true)
	before, _ := w.arrived()
	eventually(t, "others have it, too", func() bool { n, _ := w.arrived(); return n > before+50 })
	disk.unheard.Store(false)
	p := m.ends("j", pubsub.JobState_SUCCEEDED).GetProgress()
	if n := w.onlyOnce(); n != 400 || p.GetDelivered() != 400 || p.GetTargets() != 400 {
		t.Errorf("%d have it: %v", n, p)
	}
}

func tooLate(t *testing.T, etcd *etcdtest.Server) {
	w, disk := newWorld(t, etcd, "n1"), new(fullDisk)
	w.crowd(1000)
	m := w.manager("m1", disk.under)
	spec := everybody(200)
	spec.Deadline = timestamppb.New(time.Now().Add(3 * time.Second))
	m.create("j", spec)
	someHaveIt(t, w)
	disk.full.Store(true)
	time.Sleep(time.Until(spec.GetDeadline().AsTime()))
	before, _ := w.arrived()
	disk.full.Store(false)
	p := m.ends("j", pubsub.JobState_FAILED).GetProgress()
	if n := w.onlyOnce(); n != before || p.GetFailed() == 0 {
		t.Errorf("%d got it when the deadline had passed: %v", n-before, p)
	}
}

// What a run has not sent yet is not tried again once another instance has the job, or the run would never end.
func takenAway(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(100)
	w.down = true // so that nothing is sent
	m := w.manager("m1", nil)
	m.create("j", everybody(1000))
	eventually(t, "pushes that wait", func() bool { return m.job("j").GetProgress().GetInFlight() == 100 })
	eventually(t, "a take-over", func() bool {
		cur, err := m.store.getRecord(t.Context(), key{"", "j"})
		ok(t, err)
		next := cur.record
		next.takeOver("m2")
		_, err = next.cancel(time.Now())
		ok(t, err)
		_, err = m.store.write(t.Context(), key{"", "j"}, &next, cur.rev)
		return err == nil
	})
	eventually(t, "the end of the run", func() bool { return m.metrics.running.Load() == 0 })
	w.mu.Lock()
	w.down = false
	w.mu.Unlock()
	if p := m.ends("j", pubsub.JobState_CANCELLED).GetProgress(); p.GetUnknown() != 100 || p.GetTargets() != 100 || p.GetFailed() != 0 || w.onlyOnce() != 0 {
		t.Errorf("%v", p)
	}
}

func unreadable(t *testing.T, etcd *etcdtest.Server) {
	w, disk := newWorld(t, etcd, "n1"), new(fullDisk)
	r, err := newRecord(everybody(1), 1, time.Now())
	ok(t, err)
	b, err := json.Marshal(r)
	ok(t, err)
	for kind, value := range map[string]string{"spec": "\xff", "state": string(b)} {
		_, err := w.client.Put(t.Context(), w.prefix+"/"+kind+"/-/j", value)
		ok(t, err)
	}
	w.manager("m1", disk.under)
	time.Sleep(3 * time.Second)
	if n := disk.asked.Load(); n == 0 || n > 20 {
		t.Errorf("%d transactions in three seconds", n)
	}
}

// Everybody has had a turn, and whom nothing was sent to has failed by the deadline: the job does not stay for ever.
func pausedTooLate(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(100)
	w.down = true // so that nothing is sent
	m := w.manager("m1", nil)
	spec := everybody(1000)
	spec.Deadline = timestamppb.New(time.Now().Add(3 * time.Second))
	m.create("j", spec)
	eventually(t, "the last turn", func() bool { return m.job("j").GetProgress().GetInFlight() == 100 })
	_, err := m.Pause(t.Context(), "", "j")
	ok(t, err)
	if p := m.ends("j", pubsub.JobState_SUCCEEDED).GetProgress(); p.GetFailed() != 100 || w.onlyOnce() != 0 {
		t.Errorf("%v", p)
	}
}

// A pause holds for what is between two attempts, too: it comes before the next one.
func pausedBetween(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	users := w.crowd(10)
	w.down = true // so that nothing is sent
	m := w.manager("m1", nil)
	payload, err := content("x").MarshalVT()
	ok(t, err)
	r := &run{svc: m.Service, deadline: time.Now().Add(time.Hour), state: running, left: 10, payload: payload, content: engine.Content{Present: true, DataLen: 1}}
	ctx, stop := context.WithCancel(t.Context())
	defer r.pushes.Wait()
	defer stop()
	m.metrics.open.Add(10)
	r.pushes.Go(func() { r.push(ctx, "", users) })
	eventually(t, "the first attempt", func() bool { return r.heldUp(time.Now()) != "" })
	r.setState(paused)
	w.mu.Lock()
	w.down = false
	w.mu.Unlock()
	time.Sleep(500 * time.Millisecond)
	if n, _ := w.arrived(); n > 0 {
		t.Errorf("%d got it during the pause", n)
	}
	r.setState(running)
	r.pushes.Wait()
	if n := w.onlyOnce(); n != 10 || r.got.counts.Delivered != 10 {
		t.Errorf("%d have it: %v", n, r.got)
	}
}

func oddIDs(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	w.crowd(20)
	for _, id := range []string{"a\nb", "\xff", strings.Repeat("x", 257), "shop/" + strings.Repeat("x", 252), ""} {
		w.connect(id, "n1", "")
	}
	m := w.manager("m1", nil)
	m.create("j", everybody(1000))
	p := m.ends("j", pubsub.JobState_SUCCEEDED).GetProgress()
	if n := w.onlyOnce(); n != 20 || p.GetTargets() != 20 || p.GetDelivered() != 20 || len(p.GetNodeFailures()) != 1 {
		t.Errorf("%d have it: %v", n, p)
	}
}

func crowdOfMakers(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	m := w.manager("m1", func(c *Config) { c.Most = 8 })
	later := everybody(1)
	later.StartTime = timestamppb.New(time.Now().Add(time.Hour))
	var made atomic.Int64
	var makers sync.WaitGroup
	for i := range 40 {
		makers.Go(func() {
			_, _, err := m.Create(t.Context(), "", "", fmt.Sprint("j", i), engine.Low, later)
			switch {
			case err == nil:
				made.Add(1)
			case !errors.Is(err, ErrFull):
				t.Error(err)
			}
		})
	}
	makers.Wait()
	if n := made.Load(); n != 8 {
		t.Errorf("%d jobs were made, 8 may be", n)
	}
}

// Who leaves at the last moment is answered all the same, so that the audit log has what was done.
func leavesEarly(t *testing.T, etcd *etcdtest.Server) {
	w, disk := newWorld(t, etcd, "n1"), new(fullDisk)
	ctx, leave := context.WithCancel(t.Context())
	last := int64(3) // of Create: there is none, there is room, it is made
	disk.before = func(n int64) {
		if n == last {
			leave()
		}
	}
	m := w.manager("m1", disk.under)
	later := everybody(1)
	later.StartTime = timestamppb.New(time.Now().Add(time.Hour))
	if _, created, err := m.Create(ctx, "", "", "j", engine.Low, later); err != nil || !created {
		t.Errorf("created %v: %v", created, err)
	}
	last = 5 // of Pause: it is read, it is written
	ctx, leave = context.WithCancel(t.Context())
	defer leave()
	if _, err := m.Pause(ctx, "", "j"); err != nil || ctx.Err() == nil {
		t.Error(err, ctx.Err())
	}
}

// Pages are cut before they are more than a client takes.
func largePages(t *testing.T, etcd *etcdtest.Server) {
	w := newWorld(t, etcd, "n1")
	m := w.manager("m1", nil)
	r, err := newRecord(everybody(1), 1, time.Now())
	ok(t, err)
	r.State, r.Ended = cancelled, time.Now()
	for i := range failuresMost {
		r.Failures = append(r.Failures, failure{Node: fmt.Sprintf("%064d", i), Reason: strings.Repeat("x", textMax), Users: 1})
	}
	const n = 500
	for i := range n {
		_, err := m.store.create(t.Context(), key{"", fmt.Sprintf("j%03d", i)}, nil, &r)
		ok(t, err)
	}
	seen, pages := 0, 0
	for token := ""; ; {
		jobs, next, err := m.List(t.Context(), "", token, PageMost, false)
		ok(t, err)
		if size := (&pubsub.ListJobsResponse{Jobs: jobs}).SizeVT(); size > 2<<20 || len(jobs) == 0 {
			t.Fatalf("%d jobs, %d bytes", len(jobs), size)
		}
		for _, j := range jobs {
			if want := fmt.Sprintf("j%03d", seen); j.GetJobId() != want {
				t.Fatalf("%s, want %s", j.GetJobId(), want)
			}
			seen++
		}
		pages++
		if token = next; token == "" {
			break
		}
	}
	if seen != n || pages < 2 {
		t.Errorf("%d jobs in %d pages", seen, pages)
	}
}

// A node's own words stand in the record, which must not grow by them.
func TestWhatHoldsAJobUpIsALine(t *testing.T) {
	r := new(run)
	r.stalls(strings.Repeat("x\n\xff", 1<<20))
	if text := r.heldUp(time.Now()); len(text) > 2*textMax || !utf8.ValidString(text) || strings.Contains(text, "\n") {
		t.Errorf("%d bytes: %.50q", len(text), text)
	}
}

// A tenant reads its ids as it has given them.
func TestReasonsOfATenantsJobNameItsOwnIDs(t *testing.T) {
	r := &run{scope: "shop/"}
	o := r.outcomesOf(&engine.Result{Failed: 1, NodeFailures: []engine.NodeFailure{{Node: "n1", Reason: "failed: user shop/a", Users: 1}}}, 1)
	if len(o.failures) != 1 || o.failures[0] != (failure{"n1", "failed: user a", 1}) {
		t.Errorf("%v", o.failures)
	}
}
