package controller

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

func members(t *testing.T, c *Controller, room string) ([]string, bool, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	var got []string
	found, _, err := c.Room(ctx, room, func(user, node []byte) { got = append(got, string(user)+"@"+string(node)) })
	return got, found, err
}

func roomOf(n int) *pubsub.GetRoomInfoResponse {
	info := &pubsub.RoomInfo{}
	for i := range n {
		info.Users = append(info.Users, &pubsub.UserInfo{UserId: fmt.Sprintf("u%d", i), NodeId: "n1"})
	}
	return &pubsub.GetRoomInfoResponse{RoomInfo: info}
}

func TestRoom(t *testing.T) {
	v := serve(t, &script{room: func(_ context.Context, in *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
		switch in.GetRoomId() {
		case "r":
			return &pubsub.GetRoomInfoResponse{RoomInfo: &pubsub.RoomInfo{Users: []*pubsub.UserInfo{
				{UserId: "a", NodeId: "n1"}, {UserId: "a", NodeId: "n2"}, {UserId: "b"}, {UserId: ""},
				{UserId: strings.Repeat("x", 289), NodeId: "n1"}, {UserId: "c", NodeId: "n\x00"},
			}}}, nil
		case "empty":
			return &pubsub.GetRoomInfoResponse{RoomInfo: &pubsub.RoomInfo{RoomId: "empty"}}, nil
		case "big":
			return roomOf(11), nil
		case "bytes":
			return roomOf(300), nil
		case "not found":
			return nil, status.Error(codes.NotFound, "no such room")
		case "denied":
			return nil, status.Error(codes.PermissionDenied, "no")
		}
		return &pubsub.GetRoomInfoResponse{}, nil
	}})
	c := connect(t, v, Config{MaxMembers: 10, MaxReplyBytes: 2000})
	for room, tc := range map[string]struct {
		want  []string
		found bool
		err   string
	}{
		"r":         {[]string{"a@n1", "a@n2", "b@", "c@"}, true, ""},
		"empty":     {nil, true, ""},
		"unknown":   {nil, false, ""},
		"not found": {nil, false, ""},
		"big":       {err: "too many members"},
		"bytes":     {err: "larger than max"},
		"denied":    {err: "PermissionDenied"},
	} {
		t.Run(room, func(t *testing.T) {
			got, found, err := members(t, c, room)
			if tc.err != "" {
				if !errors.Is(err, route.ErrUnavailable) || !strings.Contains(err.Error(), tc.err) || !strings.Contains(err.Error(), room) {
					t.Fatalf("got %v", err)
				}
				return
			}
			if err != nil || found != tc.found || !slices.Equal(got, tc.want) {
				t.Fatalf("got %q, %v, %v", got, found, err)
			}
		})
	}
	if n := c.m.badIDs.Get(); n != 3 {
		t.Errorf("%d bad ids counted", n)
	}
	if n := c.m.lookups[kindRoom][resultError].Get(); n != 3 {
		t.Errorf("%d errors counted", n)
	}
}

func TestRoomOfAMillion(t *testing.T) {
	if testing.Short() {
		t.Skip("large")
	}
	reply := roomOf(1_000_000)
	v := serve(t, &script{room: func(context.Context, *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
		return reply, nil
	}})
	c := connect(t, v, Config{})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	n := 0
	found, _, err := c.Room(ctx, "r", func(_, _ []byte) { n++ })
	if err != nil || !found || n != 1_000_000 {
		t.Fatal(n, found, err)
	}
}

func user(id string) *pubsub.GetUserNodeResponse {
	switch id {
	case "two":
		return &pubsub.GetUserNodeResponse{Found: true, NodeId: "n1", NodeIds: []string{"n1", "n2", "n1", ""}}
	case "gone":
		return &pubsub.GetUserNodeResponse{NodeId: "n9"}
	case "nowhere":
		return &pubsub.GetUserNodeResponse{Found: true}
	}
	return &pubsub.GetUserNodeResponse{Found: true, NodeId: "node-of-" + id}
}

func single(_ context.Context, in *pubsub.GetUserNodeRequest) (*pubsub.GetUserNodeResponse, error) {
	return user(in.GetUserId()), nil
}

var askedUsers = []string{"a", "two", "gone", "nowhere", "b"}

func wantUsers(t *testing.T, nodes [][]string) {
	t.Helper()
	want := [][]string{{"node-of-a"}, {"n1", "n2"}, nil, {}, {"node-of-b"}}
	for i := range want {
		if !slices.Equal(nodes[i], want[i]) {
			t.Errorf("%s: got %q, want %q", askedUsers[i], nodes[i], want[i])
		}
	}
}

func TestUsersInBatches(t *testing.T) {
	var sizes []int
	v := serve(t, &script{user: single, users: func(_ context.Context, in *pubsub.GetUserNodesRequest) (*pubsub.GetUserNodesResponse, error) {
		sizes = append(sizes, len(in.GetUserIds()))
		out := &pubsub.GetUserNodesResponse{}
		for _, id := range in.GetUserIds() {
			out.Users = append(out.Users, user(id))
		}
		return out, nil
	}})
	c := connect(t, v, Config{BatchUsers: 2})
	nodes := make([][]string, len(askedUsers))
	if err := c.Users(t.Context(), askedUsers, nodes); err != nil {
		t.Fatal(err)
	}
	wantUsers(t, nodes)
	if !slices.Equal(sizes, []int{2, 2, 1}) {
		t.Errorf("batches of %v", sizes)
	}
}

func TestShortBatchReplyIsAnError(t *testing.T) {
	v := serve(t, &script{users: func(context.Context, *pubsub.GetUserNodesRequest) (*pubsub.GetUserNodesResponse, error) {
		return &pubsub.GetUserNodesResponse{}, nil
	}})
	c := connect(t, v, Config{})
	if err := c.Users(t.Context(), askedUsers, make([][]string, 5)); !errors.Is(err, route.ErrUnavailable) {
		t.Fatal(err)
	}
}

func TestUsersWithoutBatches(t *testing.T) {
	var now, most, calls, probes atomic.Int64
	s := &script{}
	s.user = func(ctx context.Context, in *pubsub.GetUserNodeRequest) (*pubsub.GetUserNodeResponse, error) {
		calls.Add(1)
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		return single(ctx, in)
	}
	s.users = func(context.Context, *pubsub.GetUserNodesRequest) (*pubsub.GetUserNodesResponse, error) {
		probes.Add(1)
		return nil, errNone
	}
	v := serve(t, s)
	var book logbook
	c := connect(t, v, Config{Parallel: 3, Logger: book.logger()})
	many := slices.Repeat(askedUsers, 40)
	for range 3 {
		nodes := make([][]string, len(many))
		if err := c.Users(t.Context(), many, nodes); err != nil {
			t.Fatal(err)
		}
		wantUsers(t, nodes[len(nodes)-5:])
	}
	if calls.Load() != 600 || most.Load() > 3 || probes.Load() != 1 {
		t.Errorf("%d calls, %d at once, %d probes", calls.Load(), most.Load(), probes.Load())
	}
	if n := book.count("GetUserNodes"); n != 1 {
		t.Errorf("logged %d times", n)
	}
}

func TestOneFailedUserFailsTheLookup(t *testing.T) {
	v := serve(t, &script{user: func(ctx context.Context, in *pubsub.GetUserNodeRequest) (*pubsub.GetUserNodeResponse, error) {
		if in.GetUserId() == "gone" {
			return nil, status.Error(codes.PermissionDenied, "no")
		}
		return single(ctx, in)
	}})
	c := connect(t, v, Config{})
	err := c.Users(t.Context(), askedUsers, make([][]string, 5))
	if !errors.Is(err, route.ErrUnavailable) || !strings.Contains(err.Error(), `"gone"`) {
		t.Fatal(err)
	}
}

func TestRefusedFailsAtOnce(t *testing.T) {
	addr := freeport.Addr(t)
	c := open(t, Config{Address: addr + "," + addr})
	c.Start(nil)
	for range 3 {
		began := time.Now()
		_, _, err := members(t, c, "r")
		if !errors.Is(err, route.ErrUnavailable) {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 4*time.Second { // the context has 5 s
			t.Errorf("took %v", took)
		}
	}
	if _, contacted, trouble := c.Away(); c.Healthy() || contacted || !strings.Contains(trouble, "connection refused") {
		t.Errorf("healthy, or contacted (%v), or no word of what went wrong: %q", contacted, trouble)
	}
}

func TestSilentControllerFailsWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := serve(t, &script{room: func(ctx context.Context, _ *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}})
		c := connect(t, v, Config{})
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		began := time.Now()
		_, _, err := c.Room(ctx, "r", func([]byte, []byte) {})
		if !errors.Is(err, route.ErrUnavailable) || time.Since(began) != 300*time.Millisecond {
			t.Fatal(err, time.Since(began))
		}
	})
}

func TestOneRetry(t *testing.T) {
	var calls atomic.Int64
	v := serve(t, &script{room: func(context.Context, *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
		if calls.Add(1) == 1 {
			return nil, status.Error(codes.Unavailable, "not now")
		}
		return roomOf(1), nil
	}})
	c := connect(t, v, Config{})
	if got, _, err := members(t, c, "r"); err != nil || len(got) != 1 {
		t.Fatal(got, err)
	}
	if calls.Load() != 2 || c.m.retries.Get() != 1 {
		t.Fatal(calls.Load(), c.m.retries.Get())
	}
}

func TestRetriesStayWithinTheirBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := serve(t, &script{room: func(context.Context, *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
			return nil, status.Error(codes.Unavailable, "not now")
		}})
		c := connect(t, v, Config{})
		const lookups = 1000
		for range lookups {
			if _, _, err := members(t, c, "r"); !errors.Is(err, route.ErrUnavailable) {
				t.Fatal(err)
			}
		}
		if n := c.m.retries.Get(); n < 50 || n > lookups/10+budgetFull/retryCost {
			t.Fatalf("%d retries for %d look-ups", n, lookups)
		}
	})
}

func TestTraceGoesOnWhenSampled(t *testing.T) {
	var got atomic.Pointer[[]string]
	v := serve(t, &script{room: func(ctx context.Context, _ *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		values := md.Get("traceparent")
		got.Store(&values)
		return roomOf(0), nil
	}})
	c := connect(t, v, Config{})
	for _, flags := range []trace.TraceFlags{0, trace.FlagsSampled} {
		sc := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: flags})
		if _, _, err := c.Room(trace.ContextWithSpanContext(t.Context(), sc), "r", func([]byte, []byte) {}); err != nil {
			t.Fatal(err)
		}
		var want []string
		if flags.IsSampled() {
			want = []string{"00-01000000000000000000000000000000-0200000000000000-01"}
		}
		if !slices.Equal(*got.Load(), want) {
			t.Errorf("flags %v: got %q", flags, *got.Load())
		}
	}
}

// ledger is a Changes that writes down what it is told.
type ledger struct {
	mu      sync.Mutex
	lines   []string
	vouched bool
	until   time.Time
	stall   time.Duration // the next Vouch takes so long
	panics  bool          // the next InvalidateAll
}

func (l *ledger) write(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, line)
}
func (l *ledger) Invalidate(rooms, users []string) {
	l.write(fmt.Sprint("rooms", rooms, " users", users))
}
func (l *ledger) Moved(moves []route.Move) { l.write(fmt.Sprint("moves", moves)) }
func (l *ledger) InvalidateAll() {
	l.mu.Lock()
	panics := l.panics
	l.panics = false
	l.mu.Unlock()
	if panics {
		panic("ledger")
	}
	l.write("all")
}

func (l *ledger) Vouch(until time.Time) {
	l.mu.Lock()
	stall := l.stall
	l.stall = 0
	defer time.Sleep(stall)
	defer l.mu.Unlock()
	l.until = until
	if vouched := time.Now().Before(until); vouched != l.vouched {
		l.vouched = vouched
		l.lines = append(l.lines, fmt.Sprint("watched ", vouched))
	}
}

// trusts tells whether a query at this moment would trust what is kept.
func (l *ledger) trusts() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return time.Now().Before(l.until)
}

func (l *ledger) is(want ...string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Equal(l.lines, want)
}

func TestChangeStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		send := make(chan *pubsub.WatchRoutesResponse)
		v := serve(t, &script{watch: func(stream grpc.ServerStreamingServer[pubsub.WatchRoutesResponse]) error {
			for {
				select {
				case <-stream.Context().Done():
					return nil
				case msg := <-send:
					if msg == nil {
						return status.Error(codes.Unavailable, "going")
					}
					if err := stream.Send(msg); err != nil {
						return err
					}
				}
			}
		}})
		var l ledger
		c := connect(t, v, Config{})
		c.Start(&l)
		synctest.Wait()
		if !l.is() || c.Watched() {
			t.Fatalf("told before synced: %q", l.lines)
		}
		send <- &pubsub.WatchRoutesResponse{Synced: true}
		synctest.Wait()
		send <- &pubsub.WatchRoutesResponse{RoomIds: []string{"r"}, UserIds: []string{"u", "v"}}
		send <- &pubsub.WatchRoutesResponse{All: true}
		send <- &pubsub.WatchRoutesResponse{}
		synctest.Wait()
		want := []string{"all", "watched true", "rooms[r] users[u v]", "all"}
		if !l.is(want...) || !c.Watched() {
			t.Fatalf("got %q", l.lines)
		}

		send <- nil
		synctest.Wait()
		want = append(want, "watched false")
		if !l.is(want...) || c.Watched() {
			t.Fatalf("got %q", l.lines)
		}
		// Opened again, and not trusted before it is in sync.
		send <- &pubsub.WatchRoutesResponse{Synced: true}
		synctest.Wait()
		want = append(want, "all", "watched true")
		if !l.is(want...) {
			t.Fatalf("got %q", l.lines)
		}

		v.down()
		synctest.Wait()
		want = append(want, "watched false")
		if !l.is(want...) {
			t.Fatalf("got %q", l.lines)
		}
		v.up()
		send <- &pubsub.WatchRoutesResponse{Synced: true}
		synctest.Wait()
		want = append(want, "all", "watched true")
		if !l.is(want...) || c.m.breaks.Get() != 2 || c.m.changes.Get() != 4 {
			t.Fatalf("got %q, %d breaks, %d changes", l.lines, c.m.breaks.Get(), c.m.changes.Get())
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		v.down()
	})
}

func TestChangeStreamThatIsNotInSyncIsNotTrusted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := serve(t, &script{watch: func(stream grpc.ServerStreamingServer[pubsub.WatchRoutesResponse]) error {
			if err := stream.Send(&pubsub.WatchRoutesResponse{RoomIds: []string{"r"}}); err != nil {
				return err
			}
			<-stream.Context().Done()
			return nil
		}})
		var l ledger
		c := connect(t, v, Config{})
		c.Start(&l)
		time.Sleep(time.Minute)
		if !l.is() {
			t.Fatalf("told %q", l.lines)
		}
		_ = c.Close()
		v.down()
	})
}

func TestMissingChangeStreamIsProbedAgainAfterReconnecting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var probes atomic.Int64
		v := serve(t, &script{watch: func(grpc.ServerStreamingServer[pubsub.WatchRoutesResponse]) error {
			probes.Add(1)
			return errNone
		}})
		var l ledger
		var book logbook
		c := connect(t, v, Config{Logger: book.logger()})
		c.Start(&l)
		time.Sleep(5 * time.Minute)
		before := probes.Load()
		if before == 0 || before > 2 {
			t.Fatalf("%d probes", before)
		}
		v.down()
		time.Sleep(time.Second)
		v.up()
		time.Sleep(5 * time.Second)
		if probes.Load() == before {
			t.Error("not probed again")
		}
		if !l.is() || book.count("WatchRoutes") != 1 {
			t.Errorf("told %q, logged %d times", l.lines, book.count("WatchRoutes"))
		}
		_ = c.Close()
		v.down()
	})
}

func TestHealthFollowsTheController(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := serve(t, &script{})
		c := connect(t, v, Config{})
		healthy := func(when string, want bool) {
			t.Helper()
			if c.Healthy() != want {
				t.Fatalf("%s: healthy is %v", when, !want)
			}
		}
		healthy("before the start", false)
		c.Start(nil)
		synctest.Wait()
		healthy("after the start", true)
		time.Sleep(time.Hour)
		healthy("an hour later", true)
		v.down()
		synctest.Wait()
		healthy("without a Controller", false)
		v.up()
		time.Sleep(2 * time.Second)
		healthy("when it is back", true)
		_ = c.Close()
		v.down()
	})
}

// TestAwayIsTheTimeSinceTheLastWord: before the first word there is nothing that a cache
// could have. What went wrong is known although nobody has looked anything up.
func TestAwayIsTheTimeSinceTheLastWord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := serve(t, &script{})
		v.down()
		c := connect(t, v, Config{})
		c.Start(nil)
		away := func(least, most time.Duration, contacted bool) {
			t.Helper()
			synctest.Wait()
			d, ok, trouble := c.Away()
			if d < least || d > most || ok != contacted {
				t.Errorf("away for %v, contacted before %v; want %v to %v, %v", d, ok, least, most, contacted)
			}
			if strings.Contains(trouble, "refused") != (least > 0) {
				t.Errorf("away for %v: %q", d, trouble)
			}
		}
		time.Sleep(time.Minute)
		away(time.Minute, time.Minute, false)
		v.up()
		time.Sleep(2 * time.Second)
		away(0, 0, true)
		time.Sleep(time.Hour)
		away(0, 0, true)
		v.down()
		time.Sleep(75 * time.Second)
		away(75*time.Second, 80*time.Second, true) // the last word was a ping of each 5 s
		v.up()
		time.Sleep(2 * time.Second)
		away(0, 0, true)
		_ = c.Close()
		v.down()
	})
}

// mute is a connection that brings nothing any more once it is told so.
type mute struct {
	net.Conn
	silent *atomic.Bool
	once   sync.Once
	closed chan struct{}
}

func (m *mute) Read(p []byte) (int, error) {
	n, err := m.Conn.Read(p)
	if m.silent.Load() {
		<-m.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (m *mute) Close() error {
	m.once.Do(func() { close(m.closed) })
	return m.Conn.Close()
}

// TestSilentControllerIsAsFarAwayAsOneThatRefuses: it takes connections and says nothing.
func TestSilentControllerIsAsFarAwayAsOneThatRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := serve(t, &script{})
		var silent atomic.Bool
		c := open(t, Config{Address: "passthrough:///memory", DialOptions: []grpc.DialOption{
			grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
				conn, err := v.dial(ctx, addr)
				if err != nil {
					return nil, err
				}
				return &mute{Conn: conn, silent: &silent, closed: make(chan struct{})}, nil
			}),
		}})
		c.Start(nil)
		time.Sleep(time.Minute)
		if d, contacted, trouble := c.Away(); d != 0 || !contacted || trouble != "" {
			t.Errorf("away for %v, contacted before %v, %q", d, contacted, trouble)
		}
		silent.Store(true)
		time.Sleep(75 * time.Second)
		if d, contacted, trouble := c.Away(); d < 75*time.Second || d > 80*time.Second || !contacted || trouble == "" {
			t.Errorf("away for %v, contacted before %v, %q", d, contacted, trouble)
		}
		silent.Store(false)
		time.Sleep(30 * time.Second) // what was muted is given up, and connected anew
		if d, contacted, trouble := c.Away(); d != 0 || !contacted || trouble != "" {
			t.Errorf("away for %v, contacted before %v, %q", d, contacted, trouble)
		}
		_ = c.Close()
		v.down()
	})
}

func TestConfigNamesWhatIsWrong(t *testing.T) {
	_, err := New(Config{Address: " , ", Parallel: -1, BatchUsers: 10_001})
	for _, want := range []string{"Address", "Parallel", "BatchUsers"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
}
