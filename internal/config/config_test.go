package config_test

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/push-manager/push-manager/internal/config"
)

type settings struct {
	ID        string
	Port      int
	Shards    int
	Limit     int
	Rate      float64
	Insecure  bool
	Level     string
	Timeout   time.Duration
	Endpoints []string
	Advertise string
	CertFile  string
	Password  string
	Issuers   []issuer
}

type issuer struct {
	Name       string
	Algorithms []string
	Retries    int
}

func bind() (*settings, *config.Set) {
	c, s := &settings{}, config.New()
	s.ID(&c.ID, "manager_id", "push-manager-1", "Name.")
	s.Port(&c.Port, "grpc_port", 50053, "Port.")
	s.Int(&c.Shards, "shards", 4, 1, math.MaxInt, "Shards.")
	s.Bytes(&c.Limit, "max_data", 256<<10, 0, 1<<20, "Limit.")
	s.Float(&c.Rate, "tracing.sample_rate", 1, 0, 1, "Rate.")
	s.Bool(&c.Insecure, "allow_insecure", false, "Insecure.")
	s.Choice(&c.Level, "log_level", "info", "Level.", "debug", "info")
	s.Duration(&c.Timeout, "etcd.dial_timeout", 2*time.Second, config.Positive, "Timeout.")
	s.List(&c.Endpoints, "etcd.endpoints", "localhost:2379", "Endpoints.").Env("ETCD_ADDRS")
	s.Text(&c.CertFile, "etcd.tls.cert_file", "", "Certificate.")
	s.Secret(&c.Password, "etcd.password", "Password.")
	s.Address(&c.Advertise, "advertise_address", "", "Address.")
	config.Sections(s, &c.Issuers, "auth.jwt", 3, "Issuers.", func(i *issuer, s *config.Set) {
		s.Text(&i.Name, "issuer", "", "Name of it.")
		s.List(&i.Algorithms, "algorithms", "EdDSA", "Algorithms.")
		s.Int(&i.Retries, "fetch.retries", 3, 0, 9, "Retries.")
	})
	return c, s
}

type sources struct {
	args []string
	env  map[string]string
	yaml string
}

func load(t *testing.T, src sources) (*settings, *config.Set, error) {
	t.Helper()
	c, s := bind()
	opts, err := s.Parse(src.args, true)
	if err != nil {
		return c, s, err
	}
	opts.LookupEnv = func(name string) (string, bool) {
		v, ok := src.env[name]
		return v, ok
	}
	t.Chdir(t.TempDir())
	if src.yaml != "" {
		if err := os.WriteFile("config.yaml", []byte(src.yaml), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c, s, s.Load(opts.Options)
}

func TestFlagBeatsEnvironmentBeatsFileBeatsDefault(t *testing.T) {
	yaml := "grpc_port: 3\nallow_insecure: true\n"
	for name, tc := range map[string]struct {
		src  sources
		want int
	}{
		"default": {sources{}, 50053},
		"file":    {sources{yaml: yaml}, 3},
		"env":     {sources{yaml: yaml, env: map[string]string{"GRPC_PORT": "2"}}, 2},
		"flag":    {sources{yaml: yaml, env: map[string]string{"GRPC_PORT": "2"}, args: []string{"--grpc-port=1"}}, 1},
		"apart":   {sources{args: []string{"--grpc-port", "1"}}, 1},
		"empty environment variable counts as not set": {sources{yaml: yaml, env: map[string]string{"GRPC_PORT": ""}}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			c, _, err := load(t, tc.src)
			if err != nil {
				t.Fatal(err)
			}
			if c.Port != tc.want {
				t.Errorf("port %d, want %d", c.Port, tc.want)
			}
		})
	}
}

func TestFlagCanTurnASwitchOff(t *testing.T) {
	for _, arg := range []string{"--no-allow-insecure", "--allow-insecure=false"} {
		c, _, err := load(t, sources{yaml: "allow_insecure: true", args: []string{arg}})
		if err != nil || c.Insecure {
			t.Errorf("%s: insecure %v, %v", arg, c.Insecure, err)
		}
	}
	if c, _, err := load(t, sources{args: []string{"--allow-insecure"}}); err != nil || !c.Insecure {
		t.Errorf("insecure %v, %v", c.Insecure, err)
	}
}

func TestFileHoldsAllKindsOfValues(t *testing.T) {
	c, _, err := load(t, sources{
		env: map[string]string{"HOST": "db: #1", "N": "", "EP": "a:1,b:2"},
		yaml: `
manager_id: "${ID:pm-7}"   # ${NOT_LOOKED_AT}
grpc_port: ${N:50054}
max_data: 64 KiB
allow_insecure: yes
log_level: DEBUG
advertise_address: 10.0.0.1:50053
tracing: {sample_rate: ${RATE:0.25}}
etcd:
  dial_timeout: 1m30s
  endpoints: [${EP}, "c:3"]
  tls:
    cert_file: /x/${HOST}/$${y}
`,
	})
	if err != nil {
		t.Fatal(err)
	}
	want := &settings{
		ID: "pm-7", Port: 50054, Shards: 4, Limit: 64 << 10, Rate: 0.25, Insecure: true, Level: "debug",
		Timeout: 90 * time.Second, Endpoints: []string{"a:1", "b:2", "c:3"}, Advertise: "10.0.0.1:50053",
		CertFile: "/x/db: #1/${y}",
	}
	if diff := cmp.Diff(want, c); diff != "" {
		t.Error(diff)
	}
}

func TestVariableCannotAddKeys(t *testing.T) {
	c, _, err := load(t, sources{
		env:  map[string]string{"ID": `x"  # y`},
		yaml: "manager_id: ${ID}\n",
	})
	if err != nil || c.ID != `x"  # y` {
		t.Errorf("id %q, %v", c.ID, err)
	}
	_, _, err = load(t, sources{env: map[string]string{"ID": "x\nshards: 9"}, yaml: "manager_id: ${ID}\n"})
	if err == nil || !strings.Contains(err.Error(), "manager_id") {
		t.Errorf("a line break went through: %v", err)
	}
}

func TestBadSettingIsNamedInOneLine(t *testing.T) {
	yaml := func(text string) sources { return sources{yaml: text} }
	env := func(name, v string) sources { return sources{env: map[string]string{name: v}} }
	for name, tc := range map[string]struct {
		src  sources
		want []string
	}{
		"unknown key":            {yaml("grpc_prot: 1\n"), []string{"config.yaml:1", `unknown key "grpc_prot"`, `"grpc_port"`}},
		"unknown key in section": {yaml("etcd:\n  endpoint: a:1\n"), []string{"config.yaml:2", "etcd.endpoint"}},
		"unknown section":        {yaml("redis:\n  a: 1\n"), []string{"redis.a"}},
		"unknown empty section":  {yaml("redis:\n"), []string{`unknown key "redis"`}},
		"value for a section":    {yaml("etcd: localhost:2379\n"), []string{"etcd must be a section"}},
		"section for a value":    {yaml("shards:\n  a: 1\n"), []string{"shards.a"}},
		"no value":               {yaml("shards:\n"), []string{"config.yaml:1", "shards has no value"}},
		"null":                   {yaml("shards: null\n"), []string{"shards has no value"}},
		"twice":                  {yaml("shards: 1\nshards: 2\n"), []string{"shards"}},
		"two documents":          {yaml("shards: 1\n---\nshards: 2\n"), []string{"more than one"}},
		"a list at the top":      {yaml("- a\n"), []string{"config.yaml:1", "keys and values"}},
		"bad YAML":               {yaml("a: [1\n"), []string{"config.yaml"}},
		"nested list":            {yaml("etcd:\n  endpoints: [[a]]\n"), []string{"etcd.endpoints"}},
		"missing variable":       {yaml("shards: ${N}\n"), []string{"shards", "${N}"}},
		"alias":                  {yaml("shards: &a 1\n"), []string{"shards"}},
		"flag out of range":      {sources{args: []string{"--grpc-port=70000"}}, []string{"--grpc-port: 70000", "65535"}},
		"unknown flag":           {sources{args: []string{"--nope"}}, []string{"--nope"}},
		"port negative":          {env("GRPC_PORT", "-1"), []string{"GRPC_PORT: -1"}},
		"port no number":         {env("GRPC_PORT", "http"), []string{`GRPC_PORT: "http"`}},
		"no shards":              {env("SHARDS", "0"), []string{"SHARDS: 0 must be at least 1"}},
		"negative limit":         {yaml("max_data: -1\n"), []string{"max_data: -1"}},
		"size out of range":      {yaml("max_data: 2MiB\n"), []string{"max_data: 2MiB", "1MiB"}},
		"size overflow":          {yaml("max_data: 99999999999999GiB\n"), []string{"max_data"}},
		"no size":                {yaml("max_data: much\n"), []string{"max_data"}},
		"rate":                   {yaml("tracing:\n  sample_rate: 1.5\n"), []string{"tracing.sample_rate: 1.5"}},
		"rate NaN":               {yaml("tracing:\n  sample_rate: .nan\n"), []string{"tracing.sample_rate"}},
		"switch":                 {env("ALLOW_INSECURE", "maybe"), []string{"ALLOW_INSECURE"}},
		"choice":                 {env("LOG_LEVEL", "loud"), []string{"LOG_LEVEL", "debug, info"}},
		"duration without unit":  {yaml("etcd:\n  dial_timeout: 5\n"), []string{"etcd.dial_timeout", `"5"`}},
		"duration zero":          {env("ETCD_DIAL_TIMEOUT", "0s"), []string{"ETCD_DIAL_TIMEOUT", "above zero"}},
		"duration negative":      {env("ETCD_DIAL_TIMEOUT", "-1s"), []string{"ETCD_DIAL_TIMEOUT"}},
		"duration endless":       {env("ETCD_DIAL_TIMEOUT", "9999h"), []string{"ETCD_DIAL_TIMEOUT"}},
		"no endpoints":           {env("ETCD_ADDRS", " , "), []string{"ETCD_ADDRS"}},
		"address":                {env("ADVERTISE_ADDRESS", "host"), []string{"ADVERTISE_ADDRESS", "HOST:PORT"}},
		"id with slash":          {env("MANAGER_ID", "a/b"), []string{"MANAGER_ID"}},
		"id with line break":     {env("MANAGER_ID", "a\nb"), []string{"MANAGER_ID"}},
		"file that is not there": {env("CONFIG_FILE", "nowhere.yaml"), []string{"CONFIG_FILE", "nowhere.yaml"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := load(t, tc.src)
			if err == nil {
				t.Fatal("no error")
			}
			for _, part := range tc.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q lacks %q", err, part)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %q", err)
			}
			if len(tc.src.args) == 0 && !errors.Is(err, config.ErrUsage) {
				t.Errorf("%v is no usage error", err)
			}
		})
	}
}

func TestEmptySectionIsAllowed(t *testing.T) {
	if _, _, err := load(t, sources{yaml: "etcd:\ntracing: {}\n"}); err != nil {
		t.Error(err)
	}
}

func TestErrorIsNamedByItsSource(t *testing.T) {
	_, s, err := load(t, sources{yaml: "shards: 3\n", env: map[string]string{"GRPC_PORT": "5"}, args: []string{"--max-data=1"}})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"shards":     "config.yaml:1: shards: odd",
		"grpc_port":  "environment variable GRPC_PORT: odd",
		"max_data":   "flag --max-data: odd",
		"manager_id": "MANAGER_ID: odd",
	} {
		if got := s.Errorf(name, "odd"); got.Error() != want || !errors.Is(got, config.ErrUsage) {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestCommandLineThatIsWrongSaysWhatWasMeant(t *testing.T) {
	for arg, want := range map[string]string{
		"--nope":                 "unknown flag --nope",
		"--grpc-prt=1":           `unknown flag --grpc-prt, did you mean "--grpc-port"?`,
		"--grpc-port":            "--grpc-port: needs a value",
		"serve":                  "unexpected argument serve",
		"--etcd-password=secret": "unknown flag --etcd-password: a secret is no flag, use ETCD_PASSWORD or ETCD_PASSWORD_FILE",
	} {
		if _, _, err := load(t, sources{args: []string{arg}}); err == nil || err.Error() != want || !errors.Is(err, config.ErrUsage) {
			t.Errorf("%s: %v, want %s", arg, err, want)
		}
	}
	_, s := bind()
	for arg, ok := range map[string]func(config.CommandLine) bool{
		"--help": func(c config.CommandLine) bool { return c.Help }, "-h": func(c config.CommandLine) bool { return c.Help },
		"--version": func(c config.CommandLine) bool { return c.Version }, "--print-config": func(c config.CommandLine) bool { return c.PrintConfig },
		"--config=y":      func(c config.CommandLine) bool { return c.File == "y" },
		"--config-file=x": func(c config.CommandLine) bool { return c.File == "x" && !c.NoFile },
	} {
		if c, err := s.Parse([]string{arg}, true); err != nil || !ok(c) {
			t.Errorf("%s: %+v, %v", arg, c, err)
		}
	}
}

func TestHelpNamesEachKeyInItsSection(t *testing.T) {
	_, s := bind()
	var out strings.Builder
	if err := s.WriteHelp(&out, true); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"  --config-file=config.yaml\n", "  --grpc-port=50053\n        Port. ($GRPC_PORT)\n", "  --[no-]allow-insecure\n", "  --advertise-address=TEXT\n",
		"\netcd:\n  --etcd-dial-timeout=2s\n", "  $ETCD_PASSWORD\n        Password.\n  --etcd-password-file=TEXT\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("lacks %q:\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "--etcd-password=") {
		t.Errorf("a secret is a flag:\n%s", out.String())
	}
}

func TestSecretComesFromVariableFileOrKeyAndIsNotShown(t *testing.T) {
	file := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(file, []byte("hidden\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, src := range map[string]sources{
		"variable":         {env: map[string]string{"ETCD_PASSWORD": "hidden"}},
		"key":              {yaml: "etcd:\n  password: hidden\n"},
		"file by variable": {env: map[string]string{"ETCD_PASSWORD_FILE": file}},
		"file by key":      {yaml: "etcd:\n  password_file: " + file + "\n"},
		"file by flag":     {args: []string{"--etcd-password-file=" + file}},
	} {
		c, s, err := load(t, src)
		if err != nil || c.Password != "hidden" {
			t.Errorf("%s: %q, %v", name, c.Password, err)
			continue
		}
		var out strings.Builder
		if err := s.Write(&out, false); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(out.String(), "hidden") || !strings.Contains(out.String(), `password: "********"`) {
			t.Errorf("%s: printed:\n%s", name, out.String())
		}
	}
	for name, tc := range map[string]struct {
		src  sources
		want string
	}{
		"both":      {sources{env: map[string]string{"ETCD_PASSWORD": "x", "ETCD_PASSWORD_FILE": file}}, "etcd.password is set, too"},
		"not there": {sources{env: map[string]string{"ETCD_PASSWORD_FILE": "/nowhere"}}, "ETCD_PASSWORD_FILE"},
		"empty":     {sources{args: []string{"--etcd-password-file=" + empty}}, "holds nothing"},
	} {
		if _, _, err := load(t, tc.src); err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want %s", name, err, tc.want)
		}
	}
}

// A password, and the query of a URL, which may be a key: of a setting, in a list, and in a section.
func TestSecretsInURLsAreNotShown(t *testing.T) {
	_, s, err := load(t, sources{
		yaml: "auth:\n  jwt:\n    - issuer: 'https://me:hidden@keys.example/a?key=hidden#x'\n",
		args: []string{"--etcd-tls-cert-file=http://a:1/p?hidden=hidden,http://:hidden@b:2"},
	})
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := s.Write(&out, false); err != nil {
		t.Fatal(err)
	}
	for _, v := range s.Values() {
		out.WriteString(v.Value + "\n")
	}
	for _, want := range []string{"https://********@keys.example/a?********#x", "http://a:1/p?********,http://********@b:2"} {
		if n := strings.Count(out.String(), want); n != 2 {
			t.Errorf("%q is shown %d times", want, n)
		}
	}
	if strings.Contains(out.String(), "hidden") {
		t.Errorf("shown:\n%s", out.String())
	}
}

func TestWrittenConfigurationReadsBack(t *testing.T) {
	for _, help := range []bool{false, true} {
		c, s, err := load(t, sources{
			args: []string{"--etcd-tls-cert-file=a # b ${c} \"d\"", "--advertise-address=[::1]:5"},
			env:  map[string]string{"MANAGER_ID": "-x: y"},
		})
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := s.Write(&out, help); err != nil {
			t.Fatal(err)
		}
		again, s2 := bind()
		path := filepath.Join(t.TempDir(), "c.yaml")
		if err := os.WriteFile(path, out.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		none := func(string) (string, bool) { return "", false }
		if err := s2.Load(config.Options{File: path, LookupEnv: none}); err != nil {
			t.Fatalf("%v\n%s", err, out.String())
		}
		if diff := cmp.Diff(c, again); diff != "" {
			t.Errorf("%s\n%s", diff, out.String())
		}
	}
}

func TestLoopback(t *testing.T) {
	for host, want := range map[string]bool{
		"127.0.0.1": true, "127.9.9.9": true, "::1": true, "[::1]": true, "localhost": true,
		"": false, "0.0.0.0": false, "::": false, "10.0.0.1": false, "example.org": false,
	} {
		if config.Loopback(host) != want {
			t.Errorf("Loopback(%q) = %v", host, !want)
		}
	}
}

// FuzzLoad reads any file and any value of one environment variable. What is refused is
// refused in one line, and what is taken is within the bounds and reads back as it was.
func FuzzLoad(f *testing.F) {
	vars := []string{"MANAGER_ID", "GRPC_PORT", "SHARDS", "MAX_DATA", "TRACING_SAMPLE_RATE", "ALLOW_INSECURE", "LOG_LEVEL", "ETCD_DIAL_TIMEOUT", "ETCD_ADDRS", "ADVERTISE_ADDRESS", "AUTH_JWT"}
	for _, text := range []string{
		"", "etcd:\n  endpoints: [${A:b}, c]\nshards: 3\n", "a: &x\n<<: *x\n? [1]\n: |\n  $${\n",
		"manager_id: a\ngrpc_port: 0\nmax_data: 64KiB\ntracing: {sample_rate: 0.5}\nallow_insecure: true\nlog_level: debug\n",
		"etcd:\n  dial_timeout: 1m30s\n  tls:\n    cert_file: \"x # y\"\nadvertise_address: \"[::1]:5\"\n",
		"grpc_port: 65536\n", "grpc_port: -1\n", "shards: 0\n", "max_data: 1TiB\n", "tracing: {sample_rate: .nan}\n", "etcd: {dial_timeout: -1s}\n", "etcd: {dial_timeout: 0}\n",
		"unknown_key: 1\n", "etcd: 5\n", "shards: {}\n", "shards: 1\nshards: 2\n", "- a\n", "{", "\x00", "\xff\xfe", "manager_id: ${A:${B:c}}\n", "manager_id: ${", "manager_id: !!binary aGk=\n",
		"a: &a [*a]\n", "shards: 1e3\n", "--- \nshards: 1\n---\nshards: 2\n", "etcd:\n\tendpoints: a\n",
	} {
		f.Add(text, uint8(0), "")
	}
	for _, text := range hostile() {
		f.Add(text[:min(len(text), 4<<10)], uint8(0), "")
	}
	for i := range vars {
		for _, value := range []string{"x", "1", "0", "-1", "65536", "99999999999999999999", "NaN", "+Inf", "1s", "true", "info", "a,b", "a,,b", "h:1", "[::1]:1", "\n", "\xff", "${X:y}", "1KiB", " 1 ", "[{issuer: a}]", "[{issuer: ${A:b}}, {}]", "[{x: 1}]", "[]", "[", "{}", "[7]", "[{}]\n---\n[]"} {
			f.Add("", uint8(i), value)
		}
	}
	path := filepath.Join(f.TempDir(), "c.yaml") // one for all: inputs come one after the other
	f.Fuzz(func(t *testing.T, text string, which uint8, value string) {
		c, s := bind()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		env := func(name string) (string, bool) { return value, value != "" && name == vars[int(which)%len(vars)] }
		var err error
		n, _ := allocated(func() { err = s.Load(config.Options{File: path, LookupEnv: env}) })
		if n > mostAllocated/8+uint64(len(text))<<10 {
			t.Errorf("%d MiB were allocated for %d bytes", n>>20, len(text))
		}
		if err != nil {
			if strings.Contains(err.Error(), "\n") || !errors.Is(err, config.ErrUsage) {
				t.Errorf("no line on wrong usage: %q", err)
			}
			return
		}
		if c.ID == "" || c.Port < 0 || c.Port > 65535 || c.Shards < 1 || c.Limit < 0 || c.Limit > 1<<20 || !(c.Rate >= 0 && c.Rate <= 1) ||
			c.Level != "debug" && c.Level != "info" || c.Timeout <= 0 {
			t.Errorf("taken: %+v", c)
		}
		var out bytes.Buffer
		if err := s.Write(&out, false); err != nil {
			t.Fatal(err)
		}
		again, s2 := bind()
		if err := os.WriteFile(path, out.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := s2.Load(config.Options{File: path, LookupEnv: func(string) (string, bool) { return "", false }}); err != nil {
			t.Fatalf("%v\n%s", err, out.String())
		}
		if diff := cmp.Diff(c, again); diff != "" {
			t.Errorf("%s\n%s", diff, out.String())
		}
	})
}

// hostile are texts that cost some YAML readers gigabytes or minutes: each repeats a few bytes as often as a file may hold.
func hostile() map[string]string {
	const size = 256<<10 - 64
	fill := func(text string) string { return strings.Repeat(text, size/len(text)) }
	return map[string]string{
		"lists":          fill("["),
		"lists of a key": "a: " + fill("["),
		"closed lists":   "a: " + strings.Repeat("[", size/2-8) + strings.Repeat("]", size/2-8),
		"maps":           fill("{"),
		"maps with keys": fill("{a: "),
		"dashes":         fill("- "),
		"question marks": fill("? "),
		"colons":         fill(": "),
		"anchors":        fill("&a "),
		"aliases":        "a: &a 1\nb: [" + fill("*a,") + "]",
		"tags":           fill("!!a "),
		"quotes":         fill(`"`),
		"comments":       fill("#\n"),
		"empty lines":    fill("\n"),
		"documents":      fill("---\n"),
		"deep sections":  stairs(700),
		"keys":           names(30_000, "k%d:\n"),
		"one long key":   fill("k") + ": 1",
		"one long value": "manager_id: " + fill("v"),
		"variables":      "manager_id: " + fill("${A:b}"),
		"open variables": fill("${"),
		"folded text":    "a: >\n" + fill(" x\n"),
		"sections":       "auth: {jwt: [" + fill("{},") + "]}",
		"sections below": "auth: {jwt: [" + fill("{a: [{") + "]}",
		"wrong fields":   "auth: {jwt: [{" + strings.TrimSuffix(names(20_000, "k%d: 1, "), ", ") + "}]}",
		"tabs":           fill("\t"),
		"not UTF-8":      fill("\xff"),
	}
}

func stairs(depth int) string {
	var b strings.Builder
	for i := range depth {
		b.WriteString(strings.Repeat(" ", i) + "a:\n")
	}
	return b.String()
}

func names(n int, format string) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}

// allocated runs f and returns the bytes that were allocated meanwhile, and how long it took.
func allocated(f func()) (bytes uint64, took time.Duration) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	began := time.Now()
	f()
	took = time.Since(began)
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc, took
}

// mostAllocated is a few hundred times the largest file, and far below any machine's memory.
const mostAllocated = 256 << 20

func TestHostileFilesCostLittle(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	for name, text := range hostile() {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var err error
		n, took := allocated(func() {
			_, s := bind()
			err = s.Load(config.Options{File: path, LookupEnv: func(string) (string, bool) { return "", false }})
		})
		t.Logf("%s: %d KiB in %v: %.80v", name, n>>10, took, err)
		if n > mostAllocated {
			t.Errorf("%s: %d MiB were allocated for a file of %d KiB", name, n>>20, len(text)>>10)
		}
		if err != nil && (strings.Contains(err.Error(), "\n") || len(err.Error()) > 16<<10 || !errors.Is(err, config.ErrUsage)) {
			t.Errorf("%s: refused with %d bytes: %.200q", name, len(err.Error()), err)
		}
	}
}

// TestOnlyRegularFilesOfASizeAreRead: /dev/zero has no end, a pipe without a writer waits for ever, and a large file is
// not read to be refused.
func TestOnlyRegularFilesOfASizeAreRead(t *testing.T) {
	dir := t.TempDir()
	pipe, large, link := filepath.Join(dir, "pipe"), filepath.Join(dir, "large"), filepath.Join(dir, "link")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Skip("no named pipes here: ", err)
	}
	if err := os.WriteFile(large, make([]byte, 300<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(large, 8<<30); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"/dev/zero": "is no regular file",
		pipe:        "is no regular file",
		dir:         "is no regular file",
		large:       "larger than 256KiB",
	} {
		n, _ := allocated(func() {
			_, s := bind()
			err := s.Load(config.Options{File: path})
			if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) || !errors.Is(err, config.ErrUsage) {
				t.Errorf("%s: %v, want %s", path, err, want)
			}
		})
		if n > 8<<20 {
			t.Errorf("%s: %d MiB were allocated", path, n>>20)
		}
	}
	good := filepath.Join(dir, "good")
	if err := os.WriteFile(good, []byte("shards: 3\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(good, link); err != nil { // as a mounted ConfigMap is
		t.Fatal(err)
	}
	c, s := bind()
	if err := s.Load(config.Options{File: link}); err != nil || c.Shards != 3 {
		t.Errorf("a link to a file: %v, shards %d", err, c.Shards)
	}
}
