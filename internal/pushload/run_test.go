package pushload

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/load"
	pubsub "github.com/push-manager/push-manager/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server delivers pushes to users and fails all others.
type server struct {
	pubsub.UnimplementedPushManagerServiceServer

	users  atomic.Int64 // pushes to users
	twenty func()       // called at the 20th of them; nil for nothing
}

func (s *server) PushToUser(context.Context, *pubsub.PushToUserRequest) (*pubsub.PushToUserResponse, error) {
	if s.users.Add(1) == 20 && s.twenty != nil {
		s.twenty()
	}
	return &pubsub.PushToUserResponse{Success: true, Summary: &pubsub.DeliverySummary{Targets: 1, Delivered: 1}}, nil
}

func (*server) PushToRoom(context.Context, *pubsub.PushToRoomRequest) (*pubsub.PushToRoomResponse, error) {
	return nil, status.Error(codes.Internal, "no")
}

func serve(t *testing.T) string {
	t.Helper()
	return (&server{}).serve(t)
}

func (s *server) serve(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	pubsub.RegisterPushManagerServiceServer(g, s)
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Stop()
		<-done
	})
	return l.Addr().String()
}

// pushload runs one command line.
func pushload(ctx context.Context, args ...string) (code int, out, errOut string) {
	var o, e bytes.Buffer
	code = run(ctx, args, &o, &e)
	return code, o.String(), e.String()
}

func TestResultsAreTextAndJSON(t *testing.T) {
	dir := t.TempDir()
	js := filepath.Join(dir, "r.json")
	// A busy machine may fall short of the rate: the exit code has a test of its own.
	code, out, errOut := pushload(t.Context(), "--address", serve(t), "--rate=200", "--duration=500ms", "--warmup=100ms",
		"--mix=user=3,room=1", "--max-errors=1", "--json", js)
	if code > exitFailed || errOut != "" {
		t.Fatalf("exit %d, %q", code, errOut)
	}
	for _, want := range []string{"200 pushes/s for 500ms", "75 % user, 25 % room", "p99.9", "Internal", "unknown", "sent late by"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %s", want, out)
		}
	}
	text, err := os.ReadFile(js)
	if err != nil {
		t.Fatal(err)
	}
	var rep report
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&rep); err != nil {
		t.Fatal(err)
	}
	user, room := rep.Kinds["user"], rep.Kinds["room"]
	if rep.Version != 1 || rep.Total.Pushes+rep.Unsent != 100 || user.Pushes+room.Pushes != rep.Total.Pushes ||
		user.Outcomes["delivered"] != user.Pushes || room.Outcomes["unknown"] != room.Pushes ||
		room.Codes["Internal"] != room.Pushes || user.Targets.Delivered != user.Pushes || len(rep.Timeline) == 0 {
		t.Errorf("%s", text)
	}
	if l := user.Latency; l == nil || l.P50 <= 0 || l.P50 > l.P99 || l.P99 > l.Max || l.Count != user.Pushes {
		t.Errorf("latency %+v", l)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// The names of the fields are an interface: scripts read them.
func TestJSONHasTheNamesThatAreDocumented(t *testing.T) {
	code, out, _ := pushload(t.Context(), "--address", serve(t), "--duration=200ms", "--warmup=0s", "--mix=user=1", "--json=-")
	if code > exitFailed {
		t.Fatalf("exit %d", code)
	}
	var all map[string]json.RawMessage
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	document, err := os.ReadFile("../../docs/load.md")
	if err != nil {
		t.Fatal(err)
	}
	for name := range all {
		if !strings.Contains(string(document), "`"+name+"`") {
			t.Errorf("docs/load.md does not name %s", name)
		}
	}
}

func TestExitCodes(t *testing.T) {
	address := serve(t)
	for name, tc := range map[string]struct {
		code int
		want string
		args []string
	}{
		"errors":          {exitFailed, "too many errors", []string{"--mix=room=1", "--rate=50"}},
		"nobody":          {exitFailed, "nobody answers", []string{"--address=127.0.0.1:1"}},
		"no folder":       {exitFailed, "--json", []string{"--json=/nowhere/at/all.json"}},
		"an odd flag":     {exitUsage, "unknown flag --odd", []string{"--odd"}},
		"mix":             {exitUsage, "--mix", []string{"--mix=user"}},
		"mix of whom":     {exitUsage, `"people" is none of`, []string{"--mix=people=1"}},
		"mix of nothing":  {exitUsage, "nothing to push", []string{"--mix=user=0"}},
		"rate":            {exitUsage, "--rate", []string{"--rate=-1"}},
		"several":         {exitUsage, "--rooms: 0 must be from 1 to 1073741824", []string{"--users=0", "--rooms=0"}},
		"pattern":         {exitUsage, "--user-pattern", []string{"--user-pattern=x"}},
		"payload":         {exitUsage, "--payload", []string{"--payload=1 lot"}},
		"payload of what": {exitUsage, "--payload-file", []string{"--payload-file=/nowhere"}},
		"way":             {exitUsage, "--way", []string{"--way=train"}},
		"duration":        {exitUsage, "--duration", []string{"--duration=1ns"}},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, errOut := pushload(t.Context(), append([]string{"--address", address, "--duration=200ms", "--warmup=0s", "--quiet"}, tc.args...)...)
			if code != tc.code || !strings.Contains(errOut, tc.want) {
				t.Errorf("exit %d, %q; want %d, %q", code, errOut, tc.code, tc.want)
			}
			if code == exitUsage && strings.Count(errOut, "\n") != 1 {
				t.Errorf("more than a line: %q", errOut)
			}
		})
	}
}

// SIGINT is a context that is done: main sees to that.
func TestAnInterruptedRunHasResults(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	code, out, errOut := pushload(ctx, "--address", (&server{twenty: cancel}).serve(t), "--duration=1h", "--warmup=0s", "--rate=100", "--mix=user=1")
	if code > exitFailed || !strings.Contains(out, "(stopped)") || !strings.Contains(out, "delivered") {
		t.Errorf("exit %d, %s, %s", code, out, errOut)
	}
	if code, _, errOut = pushload(ctx, "--address", serve(t)); code != exitFailed || errOut == "" {
		t.Errorf("stopped before it began: exit %d, %q", code, errOut)
	}
}

func TestARateThatFallsShortIsSaid(t *testing.T) {
	rep := &report{AskedRate: 1000, AchievedRate: 949, Total: kindReport{Pushes: 1}}
	if rep.judge(0); len(rep.Short) != 1 || !strings.Contains(rep.Short[0], "949 of 1,000") {
		t.Errorf("got %q", rep.Short)
	}
	rep = &report{AskedRate: 1000, AchievedRate: 951, ErrorShare: 0.01, Total: kindReport{Pushes: 1}}
	if rep.judge(0.01); len(rep.Short) != 0 {
		t.Errorf("got %q", rep.Short)
	}
}

func TestTheLiveLineFitsATerminal(t *testing.T) {
	l := &live{pen: &pen{}, total: time.Hour}
	for _, p := range []load.Progress{
		{Elapsed: time.Minute, Rate: 1e6, InFlight: 10000, P50: 234 * time.Microsecond, P99: 123 * time.Millisecond, Pushes: 1},
		{Elapsed: 2 * time.Hour, Draining: true},
		{Warmup: true, Elapsed: time.Second},
	} {
		if line := l.line(p); utf8.RuneCountInString(line) > 89 {
			t.Errorf("%d: %q", utf8.RuneCountInString(line), line)
		}
	}
	var b bytes.Buffer
	quiet := newLive(&b, false, load.Config{Duration: time.Second})
	quiet.show(load.Progress{})
	if quiet.clear(); b.Len() > 0 {
		t.Errorf("without a terminal: %q", b.String())
	}
}

func TestDurationsInThreeDigits(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0.00 µs", 1500: "1.50 µs", 99*time.Microsecond + 960: "100 µs", time.Millisecond - 1: "1.00 ms",
		12345 * time.Microsecond: "12.3 ms", 1500 * time.Millisecond: "1.5 s", 3 * time.Minute: "180 s",
	} {
		if got := brief(d); got != want {
			t.Errorf("%v is %q, want %q", d, got, want)
		}
	}
	if got := thousands(1234567) + " " + thousands(12) + " " + thousands(1000); got != "1,234,567 12 1,000" {
		t.Error(got)
	}
}
