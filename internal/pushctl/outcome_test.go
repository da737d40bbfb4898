package pushctl

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	pubsub "github.com/push-manager/push-manager/proto"
)

// TestEachOutcomeHasItsWordsAndItsExitCode goes through what a reply can say of a push.
func TestEachOutcomeHasItsWordsAndItsExitCode(t *testing.T) {
	type summary = pubsub.DeliverySummary
	silent := []*pubsub.NodeFailure{{NodeId: "n1", Reason: "unknown: no acknowledgement in time"}}
	gone := []*pubsub.NodeFailure{{NodeId: "n1", Reason: "failed: node is not reachable"}}
	for name, tc := range map[string]struct {
		push    string
		success bool
		message string
		summary *summary
		code    int
		want    string // the first line
	}{
		"all":                        {"room", true, "", &summary{Targets: 2, Delivered: 2}, exitOK, `room "x": delivered to 2 of 2`},
		"by an old route":            {"room", true, "delivered to 2 users; by a route of 6 s ago", &summary{Targets: 2, Delivered: 2}, exitOK, `room "x": delivered to 2 of 2; by a route of 6 s ago`},
		"some, the others away":      {"room", true, "", &summary{Targets: 3, Delivered: 2, Offline: 1}, exitOK, `room "x": delivered to 2 of 3 (1 offline)`},
		"a room of people away":      {"room", true, "", &summary{Targets: 2, Offline: 2}, exitOffline, `room "x": delivered to nobody (2 offline)`},
		"an empty room":              {"room", true, "", &summary{}, exitOK, `room "x": nobody to deliver to`},
		"an unknown room":            {"room", false, `room "x" not found`, &summary{}, exitOffline, `room "x": not delivered: room "x" not found`},
		"failed":                     {"room", false, "not delivered", &summary{Targets: 1, Failed: 1, NodeFailures: gone}, exitFailed, `room "x": not delivered (1 failed)`},
		"failed, and why":            {"room", false, "not delivered: failed: queue full", &summary{Targets: 1, Failed: 1, NodeFailures: gone}, exitFailed, `room "x": not delivered (1 failed): failed: queue full`},
		"some failed":                {"room", false, "partly", &summary{Targets: 2, Delivered: 1, Failed: 1, NodeFailures: gone}, exitFailed, `room "x": delivered to 1 of 2 (1 failed): partly`},
		"unknown":                    {"room", false, "unknown whether delivered", &summary{Targets: 1, Unknown: 1, NodeFailures: silent}, exitUnknown, `room "x": unknown whether delivered (1 unknown: may have arrived)`},
		"failed and unknown":         {"room", false, "m", &summary{Targets: 2, Failed: 1, Unknown: 1}, exitUnknown, `room "x": unknown whether delivered (1 failed, 1 unknown: may have arrived): m`},
		"stored":                     {"room", true, `user "x" is offline; stored`, &summary{Targets: 1, Offline: 1, Stored: 1, MessageId: "m-1"}, exitOK, `room "x": stored (1 offline, 1 stored), id m-1`},
		"had it, and says so":        {"room", true, "", &summary{Targets: 2, Delivered: 2, Acked: 1, Duplicates: 1, MessageId: "m-1"}, exitOK, `room "x": delivered to 2 of 2 (1 acknowledged by clients, 1 had it before), id m-1`},
		"some stored":                {"room", true, "", &summary{Targets: 3, Delivered: 1, Offline: 2, Stored: 2, Unsure: 1}, exitOK, `room "x": delivered to 1 of 3 (2 offline, 2 stored, 1 may have it already)`},
		"stored for a room":          {"room", true, "", &summary{Targets: 3, Delivered: 1, Offline: 2, Stored: 2, MessageId: "m-1", Position: "AQ-7"}, exitOK, `room "x": delivered to 1 of 3 (2 offline, 2 stored), id m-1, position AQ-7`},
		"stored for whoever comes":   {"room", true, `room "x" not found; stored`, &summary{MessageId: "m-1", Position: "AQ-7"}, exitOK, `room "x": stored, id m-1, position AQ-7`},
		"broadcast":                  {"broadcast", true, "", &summary{Targets: 9, Delivered: 9}, exitOK, "broadcast: delivered to 9 of 9"},
		"broadcast to nobody":        {"broadcast", true, "", &summary{}, exitOK, "broadcast: nobody to deliver to"},
		"broadcast without nodes":    {"broadcast", false, "no connect-node is available", &summary{}, exitFailed, "broadcast: not delivered: no connect-node is available"},
		"broadcast, a node is gone":  {"broadcast", false, "m", &summary{NodeFailures: gone}, exitFailed, "broadcast: not delivered: m"},
		"broadcast, a silent node":   {"broadcast", false, "m", &summary{NodeFailures: silent}, exitUnknown, "broadcast: unknown whether delivered: m"},
		"broadcast, one node silent": {"broadcast", false, "m", &summary{Targets: 3, Delivered: 3, NodeFailures: silent}, exitUnknown, "broadcast: delivered to 3 of 3: m"},
	} {
		t.Run(name, func(t *testing.T) {
			args := []string{tc.push, "x", "--address", serve(t, &server{success: tc.success, message: tc.message, summary: tc.summary})}
			if tc.push == "room" {
				args = append(args, "hello")
			}
			code, out, errOut := pushctl(t, "", args...)
			first, _, _ := strings.Cut(out, "\n")
			if code != tc.code {
				t.Errorf("exit %d, want %d (%s)", code, tc.code, errOut)
			}
			if first != tc.want {
				t.Errorf("%q, want %q", first, tc.want)
			}
		})
	}
}

// TestNothingWasSentIsSaidWhereItIsTrue: an error of a call that never left, or that no
// server has taken, is not said to be a push that may have been delivered.
func TestNothingWasSentIsSaidWhereItIsTrue(t *testing.T) {
	web := httptest.NewServer(http.NotFoundHandler())
	defer web.Close()
	secure := httptest.NewTLSServer(http.NotFoundHandler())
	defer secure.Close()
	mute, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = mute.Close() }()
	other := grpc.NewServer()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- other.Serve(l) }()
	defer func() { other.Stop(); <-done }()
	for name, tc := range map[string]struct{ address, want string }{
		"no such host":        {"nobody.invalid:50053", "no address is known"},
		"connection refused":  {"127.0.0.1:1", "nobody answers at 127.0.0.1:1"},
		"HTTP/1 port":         {strings.TrimPrefix(web.URL, "http://"), "does not speak gRPC without TLS"},
		"TLS port":            {strings.TrimPrefix(secure.URL, "https://"), "does not speak gRPC without TLS"},
		"says nothing":        {mute.Addr().String(), "out of time, nothing was sent: there was no connection to " + mute.Addr().String() + " within 1s"},
		"another gRPC server": {l.Addr().String(), "is no Push-Manager"},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, errOut := pushctl(t, "", "user", "bob", "x", "--timeout=1s", "--address", tc.address)
			if code != exitError {
				t.Errorf("exit %d", code)
			}
			if !strings.Contains(errOut, tc.want) || !strings.Contains(errOut, "nothing was sent") {
				t.Errorf("%q lacks %q and that nothing was sent", errOut, tc.want)
			}
			if strings.Contains(errOut, "may have") {
				t.Errorf("%q", errOut)
			}
		})
	}
}

// TestADeadlineThatPassedFirstIsNoPeerThatIsAway: the server is there.
func TestADeadlineThatPassedFirstIsNoPeerThatIsAway(t *testing.T) {
	address := serve(t, &server{success: true})
	code, _, errOut := pushctl(t, "", "user", "bob", "x", "--timeout=1ns", "--address", address)
	if code != exitError || !strings.Contains(errOut, "out of time, nothing was sent") || strings.Contains(errOut, "nobody answers") {
		t.Errorf("exit %d, %q", code, errOut)
	}
}

// TestACallThatWasTakenMayHaveBeenDelivered is the other side: where the server had the
// call, nothing is promised.
func TestACallThatWasTakenMayHaveBeenDelivered(t *testing.T) {
	address := serve(t, &server{wait: true})
	code, _, errOut := pushctl(t, "", "user", "bob", "x", "--timeout=300ms", "--address", address)
	if code != exitUnknown || !strings.Contains(errOut, "out of time, the push may have been delivered") {
		t.Errorf("exit %d, %q", code, errOut)
	}
}

func (s *server) hang(ctx context.Context) {
	if s.wait {
		<-ctx.Done()
		time.Sleep(200 * time.Millisecond) // the caller's clock is to be the one that ends the call
	}
}
