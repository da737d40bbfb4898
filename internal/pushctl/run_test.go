package pushctl

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/push-manager/push-manager/internal/programs"
	pubsub "github.com/push-manager/push-manager/proto"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		goleak.Cleanup(func(code int) {
			_ = programs.Remove() // what is left is temporary
			os.Exit(code)
		}),
		// The pool library keeps two goroutines of a pool of its own from the start on,
		goleak.IgnoreCurrent(),
		// and the metrics library one for each window of its summaries.
		goleak.IgnoreAnyFunction("github.com/VictoriaMetrics/metrics.summariesSwapCron"))
}

// server answers every push with one reply and keeps the request.
type server struct {
	pubsub.UnimplementedPushManagerServiceServer

	summary *pubsub.DeliverySummary
	success bool
	message string
	err     error
	wait    bool // answers when the caller has left

	presence presence // the other service

	mu            sync.Mutex
	got           proto.Message
	authorization []string // headers of the last PushToUser
}

func (s *server) keep(m proto.Message) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got = m
	return s.err
}

func (s *server) PushToRoom(_ context.Context, r *pubsub.PushToRoomRequest) (*pubsub.PushToRoomResponse, error) {
	return &pubsub.PushToRoomResponse{Success: s.success, Message: s.message, DeliveredCount: s.summary.GetDelivered(), Summary: s.summary}, s.keep(r)
}

func (s *server) PushToUser(ctx context.Context, r *pubsub.PushToUserRequest) (*pubsub.PushToUserResponse, error) {
	s.mu.Lock()
	s.authorization = metadata.ValueFromIncomingContext(ctx, "authorization")
	s.mu.Unlock()
	s.hang(ctx)
	return &pubsub.PushToUserResponse{Success: s.success, Message: s.message, Summary: s.summary}, s.keep(r)
}

func (s *server) PushToUsers(_ context.Context, r *pubsub.PushToUsersRequest) (*pubsub.PushToUsersResponse, error) {
	return &pubsub.PushToUsersResponse{Success: s.success, Message: s.message, Summary: s.summary}, s.keep(r)
}

func (s *server) PushToRooms(_ context.Context, r *pubsub.PushToRoomsRequest) (*pubsub.PushToRoomsResponse, error) {
	return &pubsub.PushToRoomsResponse{Success: s.success, Message: s.message, Summary: s.summary}, s.keep(r)
}

func (s *server) BroadcastMessage(_ context.Context, r *pubsub.BroadcastMessageRequest) (*pubsub.BroadcastMessageResponse, error) {
	return &pubsub.BroadcastMessageResponse{Success: s.success, Message: s.message, Summary: s.summary}, s.keep(r)
}

func serve(t *testing.T, s *server) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	pubsub.RegisterPushManagerServiceServer(g, s)
	pubsub.RegisterPresenceServiceServer(g, &s.presence)
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Stop()
		<-done
	})
	return l.Addr().String()
}

// pushctl runs one command line.
func pushctl(t *testing.T, in string, args ...string) (code int, out, errOut string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var o, e bytes.Buffer
	code = run(ctx, args, strings.NewReader(in), &o, &e)
	return code, o.String(), e.String()
}

func TestEachCommandSendsWhatItSays(t *testing.T) {
	s := &server{success: true, summary: &pubsub.DeliverySummary{Targets: 1, Delivered: 1}}
	addr := serve(t, s)
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, []byte{0, 1, 0xff}, 0o600); err != nil {
		t.Fatal(err)
	}
	content := func(data string) *pubsub.MessageContent { return &pubsub.MessageContent{Data: []byte(data)} }
	for name, tc := range map[string]struct {
		in   string
		args []string
		want proto.Message
	}{
		"room":           {"", []string{"room", "lobby", "Hello"}, &pubsub.PushToRoomRequest{RoomId: "lobby", Content: content("Hello")}},
		"exclude":        {"", []string{"room", "lobby", "x", "--exclude", "a,b", "--exclude=c"}, &pubsub.PushToRoomRequest{RoomId: "lobby", Content: content("x"), ExcludeUserIds: []string{"a,b", "c"}}},
		"user":           {"", []string{"user", "alice", "Hello"}, &pubsub.PushToUserRequest{UserId: "alice", Content: content("Hello")}},
		"users":          {"", []string{"users", "a, b,,c", "x"}, &pubsub.PushToUsersRequest{UserIds: []string{"a", "b", "c"}, Content: content("x")}},
		"rooms":          {"", []string{"rooms", "lobby, news", "x", "--exclude", "a,b"}, &pubsub.PushToRoomsRequest{RoomIds: []string{"lobby", "news"}, Content: content("x"), ExcludeUserIds: []string{"a,b"}}},
		"broadcast":      {"", []string{"broadcast", "x"}, &pubsub.BroadcastMessageRequest{Content: content("x")}},
		"standard input": {"from a pipe", []string{"broadcast", "--data-file=-"}, &pubsub.BroadcastMessageRequest{Content: content("from a pipe")}},
		"file":           {"", []string{"broadcast", "--data-file", file}, &pubsub.BroadcastMessageRequest{Content: content("\x00\x01\xff")}},
		"type":           {"", []string{"broadcast", "x", "--type=SYSTEM"}, &pubsub.BroadcastMessageRequest{Content: &pubsub.MessageContent{Type: pubsub.MessageType_SYSTEM, Data: []byte("x")}}},
		"type as number": {"", []string{"broadcast", "x", "--type=77"}, &pubsub.BroadcastMessageRequest{Content: &pubsub.MessageContent{Type: 77, Data: []byte("x")}}},
		"options": {"", []string{"user", "alice", "x", "--id=m-1", "--ttl=1m", "--ack=client", "--ack-timeout", "300ms", "--store", "--collapse=k", "--receipt=async", "--priority=high"},
			&pubsub.PushToUserRequest{UserId: "alice", Content: content("x"), Options: &pubsub.PushOptions{
				MessageId: "m-1", TtlMs: 60_000, Ack: pubsub.AckPolicy_ACK_CLIENT, AckTimeoutMs: 300, Offline: pubsub.OfflinePolicy_OFFLINE_STORE,
				CollapseKey: "k", Receipt: pubsub.ReceiptMode_RECEIPT_ASYNC, Priority: pubsub.Priority_PRIORITY_HIGH}}},
		"options of a room":      {"", []string{"room", "r", "x", "--id=m"}, &pubsub.PushToRoomRequest{RoomId: "r", Content: content("x"), Options: &pubsub.PushOptions{MessageId: "m"}}},
		"options of users":       {"", []string{"users", "u", "x", "--store"}, &pubsub.PushToUsersRequest{UserIds: []string{"u"}, Content: content("x"), Options: &pubsub.PushOptions{Offline: pubsub.OfflinePolicy_OFFLINE_STORE}}},
		"options of a broadcast": {"", []string{"broadcast", "x", "--ttl=5s"}, &pubsub.BroadcastMessageRequest{Content: content("x"), Options: &pubsub.PushOptions{TtlMs: 5000}}},
		"metadata only":          {"", []string{"broadcast", "--metadata=a=1;b=2", "--metadata", "k=v=w"}, &pubsub.BroadcastMessageRequest{Content: &pubsub.MessageContent{Metadata: map[string]string{"a": "1;b=2", "k": "v=w"}}}},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errOut := pushctl(t, tc.in, append(tc.args, "--address", addr)...)
			if code != 0 || !strings.Contains(out, "delivered to 1 of 1") || errOut != "" {
				t.Errorf("exit %d, %q, %q", code, out, errOut)
			}
			if diff := cmp.Diff(tc.want, s.got, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestOutcomeIsToldHonestly(t *testing.T) {
	info := func(code codes.Code, text, reason string) error {
		s, err := status.New(code, text).WithDetails(&errdetails.ErrorInfo{Domain: "push-manager", Reason: reason})
		if err != nil {
			t.Fatal(err)
		}
		return s.Err()
	}
	for name, tc := range map[string]struct {
		server       *server
		code         int
		out, errOut  []string
		neverContain string
	}{
		"partial": {
			&server{
				message: "delivered to 5 of 9 users",
				summary: &pubsub.DeliverySummary{Targets: 9, Delivered: 5, Offline: 1, Failed: 2, Unknown: 1, NodeFailures: []*pubsub.NodeFailure{
					{NodeId: "n2", Reason: "failed: queue full", Users: 2}, {NodeId: "n3\x1b[31m", Reason: "unknown: stream broke", Users: 1},
				}},
			},
			exitUnknown,
			[]string{"delivered to 5 of 9", "1 offline, 2 failed, 1 unknown: may have arrived", "n2: failed: queue full (2 users)", `n3\x1b[31m: unknown: stream broke (1 user)`},
			nil, "\x1b",
		},
		"offline": {
			&server{message: `user "bob" is offline`, summary: &pubsub.DeliverySummary{Targets: 1, Offline: 1}},
			exitOffline, []string{`not delivered (1 offline): user "bob" is offline`}, nil, "",
		},
		"refused": {&server{err: info(codes.InvalidArgument, "user_id: must not be empty", "REQUIRED")}, 1, nil, []string{"invalid, nothing was sent: user_id: must not be empty [REQUIRED]"}, ""},
		"reused":  {&server{err: info(codes.AlreadyExists, "options.message_id: was used for another content", "MESSAGE_ID_REUSED")}, 1, nil, []string{"already used, nothing was sent: options.message_id"}, ""},
		"tenant":  {&server{err: info(codes.FailedPrecondition, "no scope", "NO_SCOPE")}, 1, nil, []string{"not possible, nothing was sent: no scope"}, ""},
		"away":    {&server{err: info(codes.Unavailable, "controller not reachable", "CONTROLLER_UNAVAILABLE")}, 1, nil, []string{"unavailable, nothing was sent"}, "push-manager dev"},
		"broken":  {&server{err: status.Error(codes.Internal, "oops")}, exitUnknown, nil, []string{"may have been delivered: oops"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errOut := pushctl(t, "", "user", "bob", "x", "--address", serve(t, tc.server))
			if code != tc.code {
				t.Errorf("exit %d", code)
			}
			for _, want := range tc.out {
				if !strings.Contains(out, want) {
					t.Errorf("%q lacks %q", out, want)
				}
			}
			for _, want := range tc.errOut {
				if !strings.Contains(errOut, want) {
					t.Errorf("%q lacks %q", errOut, want)
				}
			}
			if tc.neverContain != "" && strings.Contains(out+errOut, tc.neverContain) {
				t.Errorf("%q contains %q", out+errOut, tc.neverContain)
			}
		})
	}
}

func TestJSONIsOneObjectALine(t *testing.T) {
	addr := serve(t, &server{success: true, summary: &pubsub.DeliverySummary{Targets: 2, Delivered: 2}})
	code, out, _ := pushctl(t, "", "--json", "room", "r", "x", "--address", addr)
	var reply struct {
		Success bool `json:"success"`
		Summary struct {
			Delivered int `json:"delivered"`
		} `json:"summary"`
	}
	if err := json.Unmarshal([]byte(out), &reply); err != nil || code != 0 || !reply.Success || reply.Summary.Delivered != 2 || strings.Count(out, "\n") != 1 {
		t.Errorf("exit %d, %q: %v", code, out, err)
	}
}

func TestMistakesExitWith2AndNobodyThereWith1(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		code int
		want string
	}{
		"nothing":         {nil, 2, "expected one of"},
		"unknown command": {[]string{"rooms"}, 2, "rooms"},
		"no room":         {[]string{"room"}, 2, "room"},
		"no text":         {[]string{"room", "r"}, 2, "nothing to push"},
		"two texts":       {[]string{"room", "r", "x", "--data-file=-"}, 2, "not both"},
		"type":            {[]string{"room", "r", "x", "--type=loud"}, 2, "--type"},
		"timeout":         {[]string{"room", "r", "x", "--timeout=-1s"}, 2, "--timeout"},
		"a URL":           {[]string{"room", "r", "x", "--address=http://localhost:50053"}, 2, `--address: "http://localhost:50053" is not HOST:PORT`},
		"no such port":    {[]string{"user", "u", "x", "--address=localhost:99999"}, 2, `--address: "localhost:99999" is not HOST:PORT`},
		"no address":      {[]string{"broadcast", "x", "--address="}, 2, `--address: "" is not HOST:PORT`},
		"dns target":      {[]string{"room", "r", "x", "--address=dns:///127.0.0.1:1"}, 1, "nobody answers at dns:///127.0.0.1:1"},
		"unix target":     {[]string{"room", "r", "x", "--address=unix:/nowhere/socket"}, 1, "nobody answers at unix:/nowhere/socket"},
		"no duration":     {[]string{"room", "r", "x", "--timeout=soon"}, 2, "--timeout"},
		"metadata":        {[]string{"room", "r", "x", "--metadata=a"}, 2, "--metadata"},
		"no file":         {[]string{"room", "r", "--data-file=/nowhere"}, 1, "/nowhere"},
		"url":             {[]string{"listen", "--url=http://x"}, 2, "--url"},
		"nobody there":    {[]string{"room", "r", "x", "--address=127.0.0.1:1"}, 1, "push-manager dev"},
		"no node there":   {[]string{"listen", "--url=ws://127.0.0.1:1/ws"}, 1, "push-manager dev"},
		"no etcd there":   {[]string{"nodes", "--etcd-endpoints=127.0.0.1:1", "--timeout=200ms"}, 1, "etcd does not answer at 127.0.0.1:1"},
		"no time for it":  {[]string{"nodes", "--etcd-endpoints=127.0.0.1:1", "--timeout=1ns"}, 1, ": out of time (--timeout)"},
		"nodes timeout":   {[]string{"nodes", "--timeout=0s"}, 2, "--timeout"},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, errOut := pushctl(t, "", tc.args...)
			if code != tc.code || !strings.Contains(errOut, tc.want) {
				t.Errorf("exit %d, %q", code, errOut)
			}
		})
	}
	if code, out, _ := pushctl(t, "", "--help"); code != 0 || !strings.Contains(out, "Usage: pushctl") {
		t.Errorf("--help: exit %d, %q", code, out)
	}
}

// lines hands out what a command prints, line by line.
type lines struct{ c chan string }

func (l lines) Write(p []byte) (int, error) {
	for line := range strings.Lines(string(p)) {
		l.c <- line
	}
	return len(p), nil
}

// dev is a push-manager dev with two nodes: where its parts listen, by their names, and
// the lines to copy.
func dev(t *testing.T, flags ...string) (address map[string]string, webSocket string, lines []string) {
	t.Helper()
	cmd := exec.Command(programs.Path(t, "push-manager"), append([]string{"dev", "--base-port=0", "--nodes=2"}, flags...)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("stop push-manager dev: %v", err)
		}
	})
	address = map[string]string{}
	ready := false
	for printed := bufio.NewScanner(out); printed.Scan(); {
		line := printed.Text()
		switch {
		case strings.HasPrefix(line, "Ready"):
			ready = true
			continue
		case strings.HasPrefix(line, "Ctrl-C"):
			return address, webSocket, lines
		case ready && strings.HasPrefix(line, "  ") && !strings.HasPrefix(line, "  http"): // a command
			lines = append(lines, strings.TrimSpace(line))
			continue
		}
		if fields := strings.Fields(line); len(fields) > 1 {
			address[fields[0]] = fields[1]
		}
		if _, at, ok := strings.Cut(line, "health at http://"); ok {
			address["metrics"] = at
		}
		if _, page, ok := strings.Cut(line, "WebSocket at http://"); ok {
			webSocket = "ws://" + page + "/ws"
		}
	}
	t.Fatal("push-manager dev did not get ready")
	return nil, "", nil
}

// TestTheLinesThatDevPrintsRunInAnyFolder runs them as they are printed to somebody who
// has a clone and has installed nothing.
func TestTheLinesThatDevPrintsRunInAnyFolder(t *testing.T) {
	_, _, commands := dev(t)
	if len(commands) != 4 {
		t.Fatalf("printed %q", commands)
	}
	elsewhere := t.TempDir()
	line := func(command string) *exec.Cmd {
		cmd := exec.Command("sh", "-c", command)
		cmd.Dir = elsewhere
		return cmd
	}
	texts := []string{"Hello", "Hello, Alice", "Hello from curl"}
	if _, err := exec.LookPath("curl"); err != nil && os.Getenv("CI") != "true" {
		texts = texts[:2]
	}
	listen := line(fmt.Sprintf("%s --count %d", commands[0], len(texts)))
	out, err := listen.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := listen.Start(); err != nil {
		t.Fatal(err)
	}
	arrived := bufio.NewScanner(out)
	if !arrived.Scan() || arrived.Text() != "joined lobby" {
		t.Errorf("%s\nprinted %q", commands[0], arrived.Text())
	}
	for i, want := range texts {
		if got, err := line(commands[i+1]).CombinedOutput(); err != nil {
			t.Errorf("%s\n%v: %s", commands[i+1], err, got)
			_ = listen.Process.Kill()
			break
		}
		if !arrived.Scan() || !strings.HasSuffix(arrived.Text(), want) {
			t.Errorf("arrived %q, want %q", arrived.Text(), want)
		}
	}
	if err := listen.Wait(); err != nil {
		t.Error(err)
	}
}

func TestListenPrintsPushesAsTheyArrive(t *testing.T) {
	address, webSocket, _ := dev(t)
	start, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()

	code, out, errOut := pushctl(t, "", "nodes", "--etcd-endpoints", address["etcd"])
	if code != 0 || !strings.Contains(out, "connect-node-2") || !strings.Contains(out, strings.TrimPrefix(address["Push-Manager"], "localhost")) {
		t.Errorf("nodes: exit %d, %q, %q", code, out, errOut)
	}

	printed := lines{make(chan string, 16)}
	ended := make(chan int, 1)
	go func() {
		args := []string{"listen", "--user=alice", "--room=lobby", "--room=second", "--count=4", "--url", webSocket}
		ended <- run(start, args, strings.NewReader(""), printed, io.Discard)
	}()
	joined := []string{<-printed.c, <-printed.c} // in either order
	slices.Sort(joined)
	if !slices.Equal(joined, []string{"joined lobby\n", "joined second\n"}) {
		t.Fatalf("printed %q", joined)
	}
	for _, push := range []struct {
		args []string
		want string
	}{
		{[]string{"room", "lobby", "Hello\x1b[31m"}, `  lobby  Hello\x1b[31m` + "\n"},
		{[]string{"room", "second", "two", "--type=system", "--metadata=k=v"}, "  second  [system] two  k=v\n"},
		{[]string{"user", "alice", "--data-file=-"}, "  (2 bytes of data) ff00\n"},
		{[]string{"broadcast", "all of you"}, "  to everybody  all of you\n"},
	} {
		code, out, errOut := pushctl(t, "\xff\x00", append(push.args, "--address", address["Push-Manager"])...)
		if code != 0 {
			t.Errorf("%v: exit %d, %q, %q", push.args, code, out, errOut)
			continue
		}
		if got := <-printed.c; !strings.HasSuffix(got, push.want) {
			t.Errorf("printed %q, want the end %q", got, push.want)
		}
	}
	if code := <-ended; code != 0 {
		t.Errorf("listen: exit %d", code)
	}
}
