package pushctl

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.yaml.in/yaml/v3"

	pubsub "github.com/push-manager/push-manager/proto"
)

// home gives a test contexts of its own, and takes what the environment would say.
func home(t *testing.T) (file string) {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", dir)
	for _, line := range os.Environ() {
		name, _, _ := strings.Cut(line, "=")
		if strings.HasPrefix(name, "PUSHCTL_") || strings.HasPrefix(name, "PUSH_MANAGER_") {
			t.Setenv(name, "")
			_ = os.Unsetenv(name) // Setenv puts it back at the end
		}
	}
	return filepath.Join(dir, "pushctl", "contexts.yaml")
}

func TestContextsAreKeptSelectedListedAndRemoved(t *testing.T) {
	file := home(t)
	t.Chdir(t.TempDir())
	if err := os.WriteFile("key", []byte("pmk_x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		line string
		code int
		want string // in what is printed
	}{
		{"context ls", exitOK, "there is no context in " + file},
		{"context select prod", exitUsage, `there is no context "prod"`},
		{"context add prod --address=push.example.com:50053 --tls --token-file=key --metrics=a:9093,b:9093", exitOK, "context prod is kept in " + file + ", and in use"},
		{"context add prod --address=x:1", exitUsage, `there is a context "prod" already (--replace)`},
		{"context add dev --address=localhost:50053", exitOK, "context dev is kept in " + file + "\n"},
		{"context add bad/name", exitUsage, `"bad/name" is no name of a context`},
		{"context add x --address=http://a", exitUsage, `--address: "http://a" is not HOST:PORT`},
		{"context add x --token-file=nowhere", exitUsage, "--token-file: "},
		{"context add x --metrics=a", exitUsage, `--metrics: "a" is not HOST:PORT`},
		{"context ls", exitOK, "* prod  push.example.com:50053  yes  " + filepath.Join(here, "key") + "\n"},
		{"context ls -o wide", exitOK, "a:9093,b:9093"},
		{"context select dev", exitOK, "context dev is in use"},
		{"context select", exitUsage, "give the name of a context, or --none"},
		{"context ls -o yaml", exitOK, "name: dev\ncurrent: true\naddress: localhost:50053\n---\nname: prod\ncurrent: false\n"},
		{"context rm dev", exitOK, "context dev is removed; no context is in use"},
		{"context rm dev", exitUsage, `there is no context "dev"; there are prod`},
		{"context add prod --replace --select --address=b:1", exitOK, "in use"},
		{"context ls -o json", exitOK, `{"name":"prod","current":true,"address":"b:1"}` + "\n"},
		{"context select --none", exitOK, "no context is in use"},
	} {
		code, out, errOut := pushctl(t, "", strings.Fields(step.line)...)
		if code != step.code || !strings.Contains(out+errOut, step.want) {
			t.Errorf("%s: exit %d, %q, %q, want %d, %q", step.line, code, out, errOut, step.code, step.want)
		}
	}
	for name, want := range map[string]os.FileMode{file: 0o600, filepath.Dir(file): 0o700} {
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(file), ".*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

// TestTheNearerWordCounts: command line, environment, context, default.
func TestTheNearerWordCounts(t *testing.T) {
	servers := map[string]*server{}
	address := map[string]string{}
	for _, name := range []string{"flag", "ours", "old", "context", "other"} {
		servers[name] = &server{success: true, summary: &pubsub.DeliverySummary{Targets: 1, Delivered: 1}}
		address[name] = serve(t, servers[name])
	}
	dir := t.TempDir()
	token := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("token-of-"+name+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, tc := range map[string]struct {
		env    map[string]string
		args   []string
		server string
		shown  string // the token
	}{
		"context":                        {nil, nil, "context", "token-of-context"},
		"another context, by flag":       {nil, []string{"--context=other"}, "other", ""},
		"another context, by variable":   {map[string]string{"PUSHCTL_CONTEXT": "other"}, nil, "other", ""},
		"flag before variable":           {map[string]string{"PUSHCTL_CONTEXT": "nowhere"}, []string{"--context=other"}, "other", ""},
		"our variable":                   {map[string]string{"PUSHCTL_ADDRESS": address["ours"], "PUSH_MANAGER_ADDRESS": address["old"]}, nil, "ours", "token-of-context"},
		"the older variable":             {map[string]string{"PUSH_MANAGER_ADDRESS": address["old"]}, nil, "old", "token-of-context"},
		"flag":                           {map[string]string{"PUSHCTL_ADDRESS": address["ours"]}, []string{"--address", address["flag"]}, "flag", "token-of-context"},
		"a token's file by variable":     {map[string]string{"PUSHCTL_TOKEN_FILE": token("variable")}, nil, "context", "token-of-variable"},
		"a token's file by flag":         {map[string]string{"PUSHCTL_TOKEN_FILE": token("variable")}, []string{"--token-file", token("flag")}, "context", "token-of-flag"},
		"a token in the environment":     {map[string]string{"PUSHCTL_TOKEN": "from-env"}, nil, "context", "from-env"},
		"an API key in the environment":  {map[string]string{"PUSHCTL_API_KEY": "key-from-env"}, nil, "context", "key-from-env"},
		"an empty variable is no choice": {map[string]string{"PUSHCTL_CONTEXT": ""}, nil, "context", "token-of-context"},
	} {
		t.Run(name, func(t *testing.T) {
			home(t)
			for _, line := range [][]string{
				{"context", "add", "first", "--address", address["context"], "--token-file", token("context")},
				{"context", "add", "other", "--address", address["other"]},
			} {
				if code, _, errOut := pushctl(t, "", line...); code != exitOK {
					t.Fatal(errOut)
				}
			}
			for name, value := range tc.env {
				t.Setenv(name, value)
			}
			for _, s := range servers {
				s.got, s.authorization = nil, nil
			}
			if code, _, errOut := pushctl(t, "", append([]string{"user", "bob", "x"}, tc.args...)...); code != exitOK {
				t.Fatalf("exit %d, %q", code, errOut)
			}
			for at, s := range servers {
				if (s.got != nil) != (at == tc.server) {
					t.Errorf("the push went to %s: %v", at, s.got != nil)
				}
			}
			want := []string{"Bearer " + tc.shown}
			if tc.shown == "" {
				want = nil
			}
			if got := servers[tc.server].authorization; !slices.Equal(got, want) {
				t.Errorf("shown %q, want %q", got, want)
			}
		})
	}
}

// TestTheTokenOfAContextGoesNowhereElse, unless it is to another instance, which its authority vouches for, or into a tunnel.
func TestTheTokenOfAContextGoesNowhereElse(t *testing.T) {
	file := home(t)
	dir := t.TempDir()
	for name, text := range map[string]string{"key": "pmk_x\n", "other": "pmk_y\n", "ca.crt": "no certificate\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(`contexts:
  system:
    address: push.example.com:50053
    tls: true
    token_file: DIR/key
    connect_node_url: wss://push.example.com/ws
    connect_node_token_file: DIR/key
  own:
    address: push.example.com:50053
    ca: DIR/ca.crt
    token_file: DIR/key
`, "DIR", dir)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	const refused = "--token-file: missing: the token of context system is for "
	for line, want := range map[string]string{
		"user bob x --context system --address push.example.org:50053":                                     refused + "push.example.com:50053, and would go to push.example.org:50053 (--address)",
		"explain user bob --context system --address push.example.com:1":                                   refused,
		"jobs ls --context system --address 127.0.0.1:1,push.example.org:50053":                            refused,
		"jobs ls --context system --address dns:///push.example.org:50053":                                 refused,
		"listen --context system --url wss://push.example.org/ws":                                          refused + "wss://push.example.com/ws, and would go to wss://push.example.org/ws (--url)",
		"user bob x --timeout 100ms --context system --address localhost:1":                                "",
		"user bob x --timeout 100ms --context system --address push.example.com:50053":                     "",
		"user bob x --timeout 100ms --context system --address a.invalid:1 --token-file " + dir + "/other": "",
		"user bob x --timeout 100ms --context own --address a.invalid:1":                                   "--ca: ",
	} {
		code, out, errOut := pushctl(t, "", strings.Fields(line)...)
		if want != "" && (code == exitOK || !strings.Contains(errOut, want)) || want == "" && strings.Contains(errOut, "--token-file") {
			t.Errorf("%s: exit %d, %q, %q", line, code, out, errOut)
		}
	}
	t.Setenv("PUSHCTL_ADDRESS", "push.example.org:50053")
	if code, _, errOut := pushctl(t, "", "user", "bob", "x", "--context", "system"); code != exitUsage || !strings.Contains(errOut, refused) {
		t.Errorf("an address by variable: exit %d, %q", code, errOut)
	}
}

func TestContextsOfAnotherUserAreRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a file away")
	}
	file := home(t)
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("contexts: {a: {address: 'b:1'}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errOut := pushctl(t, "", "context", "ls"); code != exitOK {
		t.Errorf("exit %d, %q", code, errOut)
	}
	if err := os.Chown(file, 12345, -1); err != nil {
		t.Fatal(err)
	}
	if code, _, errOut := pushctl(t, "", "context", "ls"); code != exitUsage || !strings.Contains(errOut, "belongs to another user (id 12345), who decides where tokens go") {
		t.Errorf("exit %d, %q", code, errOut)
	}
}

// TestContextsServeEveryCommandThatTakesAnAddress, each with keys of its own.
func TestContextsServeEveryCommandThatTakesAnAddress(t *testing.T) {
	file := home(t)
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	text := "current: c\ncontexts:\n  c:\n    etcd_endpoints: 127.0.0.1:1\n    connect_node_url: ws://127.0.0.1:2/ws\n    metrics: 127.0.0.1:3\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]string{
		"nodes --timeout=100ms":                              "etcd does not answer at 127.0.0.1:1",
		"nodes --timeout=100ms --etcd-endpoints 127.0.0.1:4": "etcd does not answer at 127.0.0.1:4",
		"listen": "ws://127.0.0.1:2/ws",
		"top":    "there are no metrics at 127.0.0.1:3",
		"watch":  "there are no metrics at 127.0.0.1:3",
	} {
		code, _, errOut := pushctl(t, "", strings.Fields(line)...)
		if code != exitError || !strings.Contains(errOut, want) {
			t.Errorf("%s: exit %d, %q", line, code, errOut)
		}
	}
}

// TestABadFileOfContextsIsRefusedByTheKeyAtFault, and commands that need none of it work.
func TestABadFileOfContextsIsRefusedByTheKeyAtFault(t *testing.T) {
	for name, tc := range map[string]struct {
		text string
		mode os.FileMode
		want string
	}{
		"unknown key of a context": {"contexts:\n  c:\n    addresss: x:1\n", 0o600, "line 3: the key addresss is not known"},
		"unknown key":              {"contxts: {}\n", 0o600, "the key contxts is not known"},
		"twice":                    {"contexts:\n  c: {address: a}\n  c: {address: b}\n", 0o600, `"c" already defined`},
		"a list":                   {"contexts:\n  c: {address: [a, b]}\n", 0o600, "line 2: cannot unmarshal"},
		"no YAML":                  {"contexts: {\n", 0o600, "yaml: "},
		"control characters":       {"contexts:\n  \"\\e[31m\": {address: a}\n", 0o600, "is no name of a context"},
		"current":                  {"current: nowhere\n", 0o600, `current: there is no context "nowhere"`},
		"relative":                 {"contexts:\n  c: {token_file: key}\n", 0o600, `context c: token_file: "key" is no absolute path`},
		"two documents":            {"contexts: {}\n---\ncontexts: {}\n", 0o600, "more than one document"},
		"too large":                {"#" + strings.Repeat("x", maxContexts), 0o600, "larger than 256"},
		"others may write it":      {"contexts: {}\n", 0o622, "has mode 0622"},
		"a bomb":                   {"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n", 0o600, "is not known"},
	} {
		t.Run(name, func(t *testing.T) {
			file := home(t)
			if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(tc.text), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(file, tc.mode); err != nil {
				t.Fatal(err)
			}
			for _, line := range []string{"user bob x --timeout=1s", "context ls", "context add y --address=a:1", "doctor"} {
				code, out, errOut := pushctl(t, "", strings.Fields(line)...)
				if code != exitUsage || !strings.Contains(errOut, tc.want) || strings.Contains(out+errOut, "\x1b") {
					t.Errorf("%s: exit %d, %.300q, want %q", line, code, errOut, tc.want)
				}
			}
			if code, _, errOut := pushctl(t, "", "version"); code != exitOK {
				t.Errorf("version: exit %d, %q", code, errOut)
			}
			if now, err := os.ReadFile(file); err != nil || string(now) != tc.text {
				t.Errorf("the file was changed: %v", err)
			}
		})
	}
}

// TestAPipeInPlaceOfTheContextsIsNotWaitedFor: nobody may ever write to it.
func TestAPipeInPlaceOfTheContextsIsNotWaitedFor(t *testing.T) {
	file := home(t)
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(file, 0o600); err != nil {
		t.Skip(err)
	}
	if code, _, errOut := pushctl(t, "", "context", "ls"); code != exitUsage || !strings.Contains(errOut, "is no regular file") {
		t.Errorf("exit %d, %q", code, errOut)
	}
}

// FuzzContexts: whatever the file holds, it is taken or refused, and what was taken comes back as it was.
func FuzzContexts(f *testing.F) {
	f.Add([]byte("current: c\ncontexts:\n  c: {address: 'a:1', tls: true, token_file: /k}\n"))
	f.Add([]byte("contexts: {c: }"))
	f.Add([]byte("a: &a [*a]"))
	f.Add([]byte("contexts: {}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if len(text) > maxContexts {
			return
		}
		b, err := parseContexts(text)
		if err != nil {
			return
		}
		again, err := yaml.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		c, err := parseContexts(again)
		if err != nil {
			t.Fatalf("%q became %q: %v", text, again, err)
		}
		for _, one := range []*book{b, c} {
			if len(one.Contexts) == 0 {
				one.Contexts = nil // as good as an empty one
			}
		}
		was, _ := json.Marshal(b)
		if is, _ := json.Marshal(c); string(was) != string(is) {
			t.Fatalf("%s became %s", was, is)
		}
	})
}
