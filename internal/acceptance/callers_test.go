package acceptance

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/metadata"
)

// run runs a program that is not ours to its end, with a standard input, and returns what it printed.
func run(t *testing.T, input, name string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	command := exec.CommandContext(within(t, patience), name, args...)
	command.Stdin = strings.NewReader(input)
	var out, errOut bytes.Buffer
	command.Stdout, command.Stderr = &out, &errOut
	err = command.Run()
	return out.String(), errOut.String(), err
}

func TestGrpcurlPushesWithACertificate(t *testing.T) {
	grpcurl := tool(t, "grpcurl", "make interop-tools builds it")
	s := startSecured(t)
	m := s.launch(t)
	const service = "pubsub.PushManagerService"
	trust := []string{"--cacert", s.file("ca.crt"), "--max-time", "60"}
	caller := append(slices.Clone(trust), "--cert", s.file("client-billing.crt"), "--key", s.file("client-billing.key"))

	out, errOut, err := run(t, "", grpcurl, append(caller, m.api, "list")...)
	if err != nil || !strings.Contains(out, service) {
		t.Errorf("list: %v\n%s%s", err, out, errOut)
	}
	const one = `{"user_id": "alice", "content": {"data": "SGVsbG8="}}`
	out, errOut, err = run(t, one, grpcurl, append(caller, "-d", "@", m.api, service+"/PushToUser")...)
	if err != nil || !strings.Contains(out, `"success": true`) {
		t.Errorf("PushToUser: %v\n%s%s", err, out, errOut)
	}
	two := `{"id": 1, "to_user": ` + one + `} {"id": 2, "to_user": ` + one + `}`
	out, errOut, err = run(t, two, grpcurl, append(caller, "-d", "@", m.api, service+"/PushStream")...)
	if err != nil || strings.Count(out, `"success": true`) != 2 {
		t.Errorf("PushStream: %v\n%s%s", err, out, errOut)
	}
	_, errOut, err = run(t, `{"content": {}}`, grpcurl, append(caller, "-d", "@", m.api, service+"/PushToUser")...)
	if err == nil || !strings.Contains(errOut, "InvalidArgument") || !strings.Contains(errOut, `"domain": "push-manager"`) || !strings.Contains(errOut, `"field": "user_id"`) {
		t.Errorf("a user_id that is missing: %v\n%s", err, errOut)
	}
	if out, _, err := run(t, one, grpcurl, append(trust, "-d", "@", m.api, service+"/PushToUser")...); err == nil {
		t.Errorf("without a certificate: %s", out)
	}
	if got := s.users.of("alice"); !slices.Equal(got, []string{"Hello", "Hello", "Hello"}) {
		t.Errorf("alice got %q", got)
	}
}

// sawNodeJS is what nodejs/client.mjs prints.
type sawNodeJS struct {
	Delivered bool
	Invalid   *errorNodeJS
	Streamed  int
	Large     bool
	Error     *errorNodeJS
}

type errorNodeJS struct{ Code, Reason, Field string }

// streamedNodeJS is how many pushes the Node.js caller sends on its PushStream.
const streamedNodeJS = 200

// nodeJS runs the Node.js caller with a certificate and a token, each of which may be empty.
func (s *secured) nodeJS(t *testing.T, m *manager, cert, token string) sawNodeJS {
	t.Helper()
	node := tool(t, "node", "Node.js 20 or later")
	if _, err := os.Stat("nodejs/node_modules"); err != nil {
		missing(t, "the packages of the Node.js caller are not installed (make interop-tools)")
	}
	work := map[string]any{"address": "localhost" + m.api[strings.LastIndex(m.api, ":"):], "ca": s.file("ca.crt"), "token": token,
		"user": "alice", "stream": streamedNodeJS, "bytes": 128 << 10}
	if cert != "" {
		work["cert"], work["key"] = s.file(cert+".crt"), s.file(cert+".key")
	}
	argument, err := json.Marshal(work)
	if err != nil {
		t.Fatal(err)
	}
	out, errOut, err := run(t, "", node, "nodejs/client.mjs", string(argument))
	var saw sawNodeJS
	if err == nil {
		err = json.Unmarshal([]byte(out), &saw)
	}
	if err != nil {
		t.Fatalf("%v\n%s%s", err, out, errOut)
	}
	return saw
}

func TestNodeJSCallerIsServedAsAnyOther(t *testing.T) {
	s := startSecured(t)
	m := s.launch(t)
	for _, test := range []struct {
		name, cert, token string
		refused           string // the code, empty if it is let in
	}{
		{name: "certificate", cert: "client-billing"},
		{name: "certificate and a token that nobody asks for", cert: "client-billing", token: "abc.def.ghi"},
		{name: "neither", refused: "UNAVAILABLE"},
		{name: "certificate of a stranger", cert: "stranger", refused: "UNAVAILABLE"},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := len(s.users.of("alice"))
			saw := s.nodeJS(t, m, test.cert, test.token)
			got := s.users.of("alice")[before:]
			if test.refused != "" {
				if saw.Error == nil || saw.Error.Code != test.refused || len(got) > 0 {
					t.Errorf("saw %+v, and alice got %d messages", saw, len(got))
				}
				return
			}
			if !saw.Delivered || !saw.Large || saw.Streamed != streamedNodeJS || saw.Error != nil {
				t.Errorf("saw %+v", saw)
			}
			if saw.Invalid == nil || *saw.Invalid != (errorNodeJS{"INVALID_ARGUMENT", "REQUIRED", "user_id"}) {
				t.Errorf("a user_id that is missing: %+v", saw.Invalid)
			}
			want := []string{"from Node.js"}
			for i := range streamedNodeJS {
				want = append(want, fmt.Sprint("stream ", i+1))
			}
			if len(got) != len(want)+1 || !slices.Equal(got[:len(want)], want) || len(got[len(want)]) != 128<<10 {
				t.Errorf("alice got %d messages, or not in order", len(got))
			}
		})
	}
}

// forwarded are headers in which proxies name a caller. Whoever calls can send them, too.
func forwarded(of int) metadata.MD {
	return metadata.Pairs(
		"x-forwarded-for", fmt.Sprint("192.0.2.", of),
		"forwarded", fmt.Sprint("for=192.0.2.", of),
		"x-real-ip", fmt.Sprint("192.0.2.", of),
		"x-forwarded-client-cert", fmt.Sprintf("URI=spiffe://test/client/caller-%d", of),
	)
}

func TestForwardedHeadersNameNobody(t *testing.T) {
	s := startSecured(t)
	m := s.launch(t, "RATE_LIMIT=1", "RATE_BURST=2")
	api := s.connect(t, m.api, "client-billing")
	for i := 1; ; i++ {
		_, err := api.PushToUser(metadata.NewOutgoingContext(within(t, patience), forwarded(i)), toAlice([]byte("x")))
		if nothingSent(err) == "RATE_LIMITED" {
			break
		}
		if err != nil || i == 50 { // a push costs 2, so the second one of a second is too much for one caller
			t.Fatalf("push %d: %v", i, err)
		}
	}
	stranger := s.connect(t, m.api, "")
	if _, err := stranger.PushToUser(metadata.NewOutgoingContext(within(t, patience), forwarded(1)), toAlice([]byte("x"))); err == nil {
		t.Error("a header was taken for a certificate")
	}
}
