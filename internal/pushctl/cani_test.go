package pushctl

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/internal/auth/authtest"

	pubsub "github.com/push-manager/push-manager/proto"
)

func TestCanIAnswersFromThePolicy(t *testing.T) {
	file := authtest.New(t, `version: 1
callers:
- name: billing
  match: [{key: 4fZ1q9aB}]
  allow:
  - {methods: [PushToUser], users: ["*"]}
  - {methods: [PushToRoom], rooms: ["order-*", lobby]}
- {name: ops, match: [{san: a.b}], allow: [{methods: ["*"]}]}
`).Policy
	for line, want := range map[string]struct {
		code int
		text string
	}{
		"--as billing PushToRoom order-7":           {0, "yes (" + file + ":7, \"order-*\")\n"},
		"--as billing PushToRoom lobby":             {0, "yes (" + file + ":7, \"lobby\")\n"},
		"--as billing PushToUser alice":             {0, "yes (" + file + ":6, \"*\")\n"},
		"--as billing PushToRoom Order-7":           {1, "no\n"},
		"--as billing PushToUsers alice":            {1, "no\n"},
		"--as billing BroadcastMessage":             {1, "no\n"},
		"--as ops BroadcastMessage":                 {0, "yes (" + file + ":8)\n"},
		"--as ops PushToUser alice":                 {1, "no\n"},
		"-o json --as billing PushToRoom order-7":   {0, `{"caller":"billing","method":"PushToRoom","id":"order-7","allowed":true,"line":7,"pattern":"order-*"}` + "\n"},
		"-o json --as billing BroadcastMessage":     {1, `{"caller":"billing","method":"BroadcastMessage","allowed":false}` + "\n"},
		"--as nobody PushToUser alice":              {1, "there is no caller \"nobody\""},
		"--as billing Push alice":                   {exitUsage, "is no method"},
		"--as billing PushToUser":                   {exitUsage, "needs the id of a user"},
		"--as billing BroadcastMessage alice":       {exitUsage, "takes no id"},
		"PushToUser alice":                          {exitUsage, "--as"},
		"--as a --policy /nowhere PushToUser alice": {1, "/nowhere"},
	} {
		args := append([]string{"can-i", "--policy", file}, strings.Fields(line)...)
		code, out, errOut := pushctl(t, "", args...)
		if code != want.code || code == 0 && out != want.text || !strings.Contains(out+errOut, want.text) {
			t.Errorf("%s: exit %d, %q, %q", line, code, out, errOut)
		}
	}
	if code, _, errOut := pushctl(t, "", "can-i", "--as", "a", "BroadcastMessage"); code != exitUsage || !strings.Contains(errOut, "--policy: missing") {
		t.Errorf("exit %d, %q", code, errOut)
	}
}

// TestACredentialIsShown, from a file or a variable, and never in plain text to another machine.
func TestACredentialIsShown(t *testing.T) {
	s := &server{success: true, summary: &pubsub.DeliverySummary{Targets: 1, Delivered: 1}}
	addr := serve(t, s)
	file, empty, two := filepath.Join(t.TempDir(), "token"), filepath.Join(t.TempDir(), "empty"), filepath.Join(t.TempDir(), "two")
	for path, text := range map[string]string{file: "from-file\n", empty: " \n", two: "a b\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, tc := range map[string]struct {
		env  map[string]string
		args []string
		want string // the header
		code int
		text string
	}{
		"none":              {nil, nil, "", 0, ""},
		"a file":            {map[string]string{"PUSHCTL_API_KEY": "k"}, []string{"--token-file", file}, "Bearer from-file", 0, ""},
		"a key":             {map[string]string{"PUSHCTL_API_KEY": "k", "PUSHCTL_TOKEN": "t"}, nil, "Bearer k", 0, ""},
		"a token":           {map[string]string{"PUSHCTL_TOKEN": "t"}, nil, "Bearer t", 0, ""},
		"an empty file":     {nil, []string{"--token-file", empty}, "", exitUsage, "holds nothing"},
		"two words":         {nil, []string{"--token-file", two}, "", exitUsage, "without spaces"},
		"no file":           {nil, []string{"--token-file", "/nowhere"}, "", exitUsage, "--token-file: open /nowhere"},
		"plain to others":   {map[string]string{"PUSHCTL_TOKEN": "t0psecret"}, []string{"--address", "192.0.2.1:1"}, "", exitUsage, "in plain text"},
		"plain to a target": {map[string]string{"PUSHCTL_TOKEN": "t0psecret"}, []string{"--address", "dns:///push.example:1"}, "", exitUsage, "in plain text"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("PUSHCTL_API_KEY", tc.env["PUSHCTL_API_KEY"])
			t.Setenv("PUSHCTL_TOKEN", tc.env["PUSHCTL_TOKEN"])
			s.mu.Lock()
			s.authorization = nil
			s.mu.Unlock()
			code, out, errOut := pushctl(t, "", append([]string{"user", "bob", "x", "--address", addr}, tc.args...)...)
			if code != tc.code || !strings.Contains(errOut, tc.text) || strings.Contains(out+errOut, "t0psecret") {
				t.Errorf("exit %d, %q, %q", code, out, errOut)
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			if got := strings.Join(s.authorization, "|"); got != tc.want {
				t.Errorf("shown: %q, want %q", got, tc.want)
			}
		})
	}
}
