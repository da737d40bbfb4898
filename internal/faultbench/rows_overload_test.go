package faultbench

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/programs"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Overload, by the ids in docs/faults.md.

// N6: of what a node does not take, low priority fails first, and the highest is queued up
// to the cap.
func TestQueueOfASlowNodeIsSharedByPriority(t *testing.T) {
	s := newStreet(t)
	bad := s.wire("bad", s.bad...)
	s.wire("good", s.good...)
	m := s.manage(2, "LINK_WINDOW=1", "LINK_QUEUE_LENGTH=16", "LINK_ACK_TIMEOUT=10m", "LINK_QUEUE_AGE=10m", "LINK_SILENCE=11m", "PUSH_TIMEOUT=10m")
	m.good(room("mixed"))
	m.rest()
	s.ledger.note("node bad acknowledges nothing")
	bad.play(func(a *answer) { a.silent = true })
	to := func(priority string) request {
		q := user("bad1")
		q.deadline, q.patient, q.priority = 5*time.Minute, true, priority
		return q
	}
	ctx, leave := context.WithCancel(t.Context())
	var callers sync.WaitGroup
	wait := func(metric string, n int, priority string) {
		callers.Go(func() { m.ask(ctx, m, to(priority)) })
		m.until(metric, func(v float64) bool { return v == float64(n) })
	}
	wait("link_window_deliveries", 1, "low") // so that all others are queued
	queued := 0
	for _, share := range []struct {
		priority string
		most     int
	}{{"low", 8}, {"normal", 14}, {"high", 15}, {"critical", 16}} {
		for ; queued < share.most; queued++ {
			wait("link_queue_deliveries", queued+1, share.priority)
		}
		p := m.push(to(share.priority))
		if p.summary.GetFailed() != 1 || p.summary.GetNodeFailures()[0].GetReason() != "failed: queue full" {
			t.Errorf("one more of %s: %v", share.priority, p)
		}
	}
	if n := m.metric("link_queue_deliveries"); n != 16 {
		t.Errorf("%v are queued", n)
	}
	m.good(user("good1"))
	leave() // nothing that was queued is written any more
	callers.Wait()
	m.until("pushes_in_flight", func(v float64) bool { return v == 0 })
	bad.play(nil)
}

// P10: with most of the memory in use, low priority is refused and then all but critical,
// and everything is taken again when it is free. Where root may confine it, and without the
// race detector, which takes memory of its own, the kernel would kill it at 256 MiB.
func TestMemoryIsKeptForTheHighestPriority(t *testing.T) {
	s := newStreet(t)
	bad := s.wire("bad", s.bad...)
	s.wire("good", s.good...)
	const limit = 96 << 20
	m := s.manage(2, fmt.Sprintf("GOMEMLIMIT=%d", limit), "LINK_WINDOW_BYTES=1GiB", "LINK_QUEUE_BYTES=1GiB",
		"LINK_ACK_TIMEOUT=10m", "LINK_QUEUE_AGE=10m", "LINK_SILENCE=11m", "PUSH_TIMEOUT=10m", "LOOKUP_TIMEOUT=1m",
		"API_BODY_BYTES=1GiB") // or there is never so much that memory runs out
	if !programs.Race() {
		confine(t, m.process, "memory", map[string]int{"memory.limit_in_bytes": 256 << 20})
	}
	m.good(room("mixed"))
	m.rest()
	s.ledger.note("node bad acknowledges nothing")
	bad.play(func(a *answer) { a.silent = true })
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	var callers sync.WaitGroup
	refused := func(priority string) float64 {
		return m.metric(fmt.Sprintf("refused_total{priority=%q,reason=\"memory\"}", priority))
	}
	probe := func(priority string) *push {
		q := user("good1") // a process near its limit is slow, and that is not in question
		q.deadline, q.patient, q.priority = time.Minute, true, priority
		return m.push(q)
	}
	const size = 200 << 10
	var api pubsub.PushManagerServiceClient
	started := 0
	// Bounded by what is held and not by time: the nearer a process is to its limit the more it
	// collects, and the slower it takes the next.
	for isRefused := false; !isRefused; {
		if started*size > 2*limit {
			t.Fatalf("%d MiB are held, of %d, and normal priority is still taken", started*size>>20, limit>>20)
		}
		for range 20 { // in steps, so that what is on its way is never much more than there is room for
			if started%100 == 0 {
				api = m.dial()
			}
			q := user(s.bad[started%len(s.bad)])
			q.size, q.deadline, q.patient = size, 5*time.Minute, true
			to := api
			callers.Go(func() { m.ask(ctx, to, q) })
			started++
		}
		probe("low")
		probe("normal")
		eventually(t, "metrics can be read", func() error { // slow to tell, too
			values, err := m.read()
			isRefused = values[`push_manager_refused_total{priority="normal",reason="memory"}`] > 0
			return err
		})
	}
	// Memory that rises through both marks between two probes had no low push to refuse
	// before; where normal is refused low is, without any more in use.
	eventually(t, "low is refused, too", func() error {
		if refused("low") == 0 {
			return fmt.Errorf("%v", probe("low"))
		}
		return nil
	})
	if n := refused("critical"); n > 0 {
		t.Errorf("critical is never refused, and was %v times", n)
	}
	for priority, want := range map[string]codes.Code{"low": codes.ResourceExhausted, "critical": codes.OK} {
		if p := probe(priority); p.code() != want || want == codes.OK && !p.success {
			t.Errorf("%s: %v", priority, p)
		}
	}
	leave()
	callers.Wait()
	bad.stop() // what it has not acknowledged is held for its answer until then
	eventually(t, "low is taken again", func() error {
		if p := probe("low"); !p.success {
			return fmt.Errorf("%v", p)
		}
		return nil
	})
}

// P14: requests of nearly 1 MiB, 256 at a time, and more idle PushStreams than there is memory
// for: each within every limit, and all of them together more than a process of 256 MiB holds.
// Whoever does not fit waits or is told to come back; small pushes go on. Where root may confine it,
// and without the race detector, the kernel would kill it.
func TestRequestsWithinAllLimitsFitTheMemory(t *testing.T) {
	slow(t)
	s := newStreet(t)
	s.wire("bad", s.bad...)
	s.wire("good", s.good...)
	const limit = 256 << 20
	m := s.manage(2, fmt.Sprintf("GOMEMLIMIT=%d", limit*9/10), "PUSH_TIMEOUT=30s", "LOOKUP_TIMEOUT=30s", "LINK_ACK_TIMEOUT=30s", "LINK_SILENCE=31s") // the test's own node shares the machine
	if !programs.Race() {
		confine(t, m.process, "memory", map[string]int{"memory.limit_in_bytes": limit})
	}
	m.good(room("mixed"))
	m.rest()
	beside := func(what string) {
		t.Helper()
		for range 20 {
			if p := m.push(patiently(user("good1"))); !p.success {
				t.Errorf("a small push beside %s: %v", what, p)
			}
		}
	}
	// Told to come back, or that the machine was too slow to take it in: nothing was sent.
	honest := func(err error) bool {
		if err == nil {
			return true
		}
		st := status.Convert(err)
		return reasonOf(err) == "REQUEST_TOO_SLOW" || st.Code() == codes.ResourceExhausted && slices.ContainsFunc(st.Details(), func(d any) bool {
			_, is := d.(*errdetails.RetryInfo)
			return is
		})
	}

	s.ledger.note("256 requests of 1 MiB at a time")
	exclude := slices.Concat(s.bad, s.good) // nobody gets it
	for i := range 9_800 {
		exclude = append(exclude, fmt.Sprintf("%0100d", i))
	}
	big := &pubsub.PushToRoomRequest{RoomId: "mixed", Content: &pubsub.MessageContent{Data: []byte("x")}, ExcludeUserIds: exclude}
	var served, refused atomic.Int64
	var callers sync.WaitGroup
	api := m.dial()
	for range 256 {
		callers.Go(func() {
			for range 100 { // whoever comes again gets through
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				_, err := api.PushToRoom(ctx, big)
				cancel()
				if err == nil {
					served.Add(1)
					return
				}
				if refused.Add(1); !honest(err) {
					t.Errorf("a large push: %v", err)
				}
				time.Sleep(500 * time.Millisecond)
			}
		})
	}
	beside("large ones")
	callers.Wait()
	t.Logf("%d large pushes were served, %d were told to come back", served.Load(), refused.Load())
	if served.Load() != 256 {
		t.Errorf("%d of 256 large pushes were served", served.Load())
	}

	s.ledger.note("idle PushStreams")
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	opened, turnedAway := 0, 0
	for range 30 {
		api := m.dial()
		for range 128 {
			st, err := api.PushStream(ctx)
			if err == nil {
				_ = st.Send(&pubsub.PushStreamRequest{Id: 1, Push: &pubsub.PushStreamRequest_ToUser{ToUser: &pubsub.PushToUserRequest{
					UserId: "nobody", Content: &pubsub.MessageContent{Data: []byte("x")},
				}}})
				_, err = st.Recv()
			}
			if !honest(err) {
				t.Fatalf("stream %d: %v", opened, err)
			}
			if err != nil {
				turnedAway++
				break
			}
			opened++
		}
	}
	beside("idle streams")
	t.Logf("%d PushStreams were opened, %d told to come back", opened, turnedAway)
	if limit := m.metric("api_streams_limit"); opened == 0 || float64(opened) > limit || turnedAway == 0 {
		t.Errorf("%d PushStreams were opened, where %v may be", opened, limit)
	}
	leave()
	m.until("api_streams", func(n float64) bool { return n == 0 })
	m.until("api_space_bytes", func(n float64) bool { return n == 0 })
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "VmHWM:") {
			t.Log(strings.Join(strings.Fields(line), " "))
		}
	}
}
