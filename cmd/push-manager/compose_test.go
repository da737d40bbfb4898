package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/config"
)

// composeFolder is where the files of Compose stand.
const composeFolder = "../../deploy/compose"

// service is what this test reads of a service. `make compose` checks the whole file by Compose's own code.
type service struct {
	Image       string
	Build       any
	Command     []string
	Environment map[string]string
	Ports       []string
	Volumes     []string
	User        string
	ReadOnly    bool     `yaml:"read_only"`
	CapDrop     []string `yaml:"cap_drop"`
	SecurityOpt []string `yaml:"security_opt"`
	MemLimit    string   `yaml:"mem_limit"`
	Healthcheck struct{ Test []string }
	Networks    any
}

type composeFile struct {
	Services map[string]service
	Volumes  map[string]any
}

func parseYAML(t *testing.T, file string, into any) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(composeFolder, file))
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, into); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

// settingsOf reads the variables of a container as the program in it would with --print-config, and nothing else. Unlike the
// program, whose environment holds much that is not for it, it refuses a variable that the program does not know.
func settingsOf(command []string, environment map[string]string) (*config.Set, error) {
	name := "serve"
	if len(command) > 0 {
		name = command[0]
	}
	commands := commandLine().Commands
	i := slices.IndexFunc(commands, func(c cli.Command) bool { return c.Name == name })
	if i < 0 {
		return nil, fmt.Errorf("there is no command %q", name)
	}
	settings, set := commands[i].New(), config.New()
	settings.Bind(set)
	flags, err := set.Parse(command[min(1, len(command)):], commands[i].File)
	if err != nil {
		return nil, err
	}
	known, traces := []string{"CONFIG_FILE", "GOGC", "GOMEMLIMIT", "GOMAXPROCS"}, false
	for _, key := range set.Keys() {
		known = append(known, key.Variable())
		traces = traces || key.Name() == "tracing.endpoint"
	}
	for variable := range environment {
		if !slices.Contains(known, variable) && !(traces && strings.HasPrefix(variable, "OTEL_")) {
			return nil, fmt.Errorf("%s is no variable of %s", variable, name)
		}
	}
	flags.LookupEnv = func(name string) (string, bool) {
		text, ok := environment[name]
		return text, ok
	}
	if err := set.Load(flags.Options); err != nil {
		return nil, err
	}
	return set, settings.Validate(set, flags.LookupEnv)
}

func valueOf(set *config.Set, name string) string {
	var b strings.Builder
	_ = set.Write(&b, false) // a strings.Builder takes everything
	found := regexp.MustCompile(`(?m)^` + name + `: "?([^"\s]*)`).FindStringSubmatch(b.String())
	if found == nil {
		return ""
	}
	return found[1]
}

// TestComposeStartsThreeOfEachWithSettingsThatAreTheirs: what the file says to our programs is what they understand, and what
// the services say of each other is where they are.
func TestComposeStartsThreeOfEachWithSettingsThatAreTheirs(t *testing.T) {
	var file composeFile
	parseYAML(t, "compose.yml", &file)
	listening := map[string]bool{"jaeger:4317": true, "redis:6379": true, "controllers:50051": true}
	count, ids := map[string]int{}, map[string]string{}
	for name, s := range file.Services {
		if s.Build == nil {
			if strings.HasPrefix(name, "etcd-") {
				listening[name+":2379"], listening[name+":2380"] = true, true
			}
			continue
		}
		set, err := settingsOf(s.Command, s.Environment)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		kind := name[:strings.LastIndexByte(name, '-')]
		count[kind]++
		listening[name+":"+valueOf(set, "grpc_port")], listening[name+":"+valueOf(set, "metrics_port")] = true, true
		id := s.Environment["MANAGER_ID"] + s.Environment["NODE_ID"]
		if other, ok := ids[id]; ok && id != "" {
			t.Errorf("%s and %s are both %s", name, other, id)
		}
		ids[id] = name
		if want := name + ":" + valueOf(set, "grpc_port"); kind != "controller" && valueOf(set, "advertise_address") != want {
			t.Errorf("%s is registered as %s, want %s", name, valueOf(set, "advertise_address"), want)
		}
		if check, want := strings.Join(s.Healthcheck.Test, " "), "CMD /usr/bin/pushctl health http://127.0.0.1:"+valueOf(set, "metrics_port")+"/readyz"; check != want {
			t.Errorf("%s: the health check is %q, want %q", name, check, want)
		}
	}
	if want := map[string]int{"push-manager": 3, "connect-node": 3, "controller": 2}; fmt.Sprint(count) != fmt.Sprint(want) {
		t.Errorf("%v, want %v", count, want)
	}

	var prometheus struct {
		ScrapeConfigs []struct {
			JobName       string                       `yaml:"job_name"`
			StaticConfigs []struct{ Targets []string } `yaml:"static_configs"`
		} `yaml:"scrape_configs"`
		RuleFiles []string `yaml:"rule_files"`
	}
	parseYAML(t, "prometheus.yml", &prometheus)
	scraped := 0
	for _, job := range prometheus.ScrapeConfigs {
		for _, target := range job.StaticConfigs[0].Targets {
			scraped++
			if !listening[target] || !strings.HasPrefix(target, job.JobName+"-") {
				t.Errorf("Prometheus asks %s for metrics, where no %s is", target, job.JobName)
			}
		}
	}
	if want := 3 + 3 + 2 + 3; scraped != want {
		t.Errorf("Prometheus asks %d programs, want %d", scraped, want)
	}

	// Everything that looks like the address of a service is one.
	address := regexp.MustCompile(`\b((?:etcd|controller|controllers|connect-node|push-manager|redis|jaeger)(?:-\d)?):(\d+)\b`)
	for name, s := range file.Services {
		for variable, value := range s.Environment {
			for _, found := range address.FindAllString(value, -1) {
				if !listening[found] {
					t.Errorf("%s: %s: nothing listens at %s", name, variable, found)
				}
			}
		}
	}
	balanced := file.Services["haproxy"].Environment
	for i := range 3 {
		server, metrics := balanced[fmt.Sprintf("PM_%d", i+1)], balanced[fmt.Sprintf("PM_%d_METRICS_PORT", i+1)]
		host, _, err := net.SplitHostPort(server)
		if err != nil || host != fmt.Sprintf("push-manager-%d", i+1) || !listening[server] || !listening[host+":"+metrics] {
			t.Errorf("HAProxy balances to %q and asks its port %q", server, metrics)
		}
	}
}

// TestComposeConfinesItsContainers: what somebody starts without a look is open to this machine alone, and can write where it
// must only.
func TestComposeConfinesItsContainers(t *testing.T) {
	var file composeFile
	parseYAML(t, "compose.yml", &file)
	pinned := regexp.MustCompile(`^[a-z.]+/[a-z/-]+:v?\d+\.\d+\.\d+(-alpine)?$`)
	for name, s := range file.Services {
		if !s.ReadOnly || !slices.Equal(s.CapDrop, []string{"ALL"}) || !slices.Equal(s.SecurityOpt, []string{"no-new-privileges:true"}) || s.MemLimit == "" {
			t.Errorf("%s may do what it need not: %+v", name, s)
		}
		if s.Build != nil && (s.User != "65532:65532" || len(s.Volumes) > 0) {
			t.Errorf("%s is user %q and has %v", name, s.User, s.Volumes)
		}
		if s.Build == nil && !pinned.MatchString(s.Image) {
			t.Errorf("%s: %s may be another program tomorrow", name, s.Image)
		}
		if len(s.Healthcheck.Test) == 0 && name != "jaeger" {
			t.Errorf("%s has no health check", name)
		}
		for _, port := range s.Ports {
			if !strings.HasPrefix(port, "127.0.0.1:") {
				t.Errorf("%s: port %s is open to a network", name, port)
			}
		}
		for _, volume := range s.Volumes {
			source, rest, _ := strings.Cut(volume, ":")
			if !strings.HasPrefix(source, ".") {
				if _, ok := file.Volumes[source]; !ok {
					t.Errorf("%s: there is no volume %s", name, source)
				}
				continue
			}
			if _, err := os.Stat(filepath.Join(composeFolder, source)); err != nil || !strings.HasSuffix(rest, ":ro") {
				t.Errorf("%s: %s: %v", name, volume, err)
			}
		}
	}
}

// TestComposeTestKnowsAWrongSetting: what the tests above rely on.
func TestComposeTestKnowsAWrongSetting(t *testing.T) {
	insecure := func(more ...string) map[string]string {
		env := map[string]string{"LISTEN_ADDRESS": "0.0.0.0", "ALLOW_INSECURE": "true"}
		for i := 0; i < len(more); i += 2 {
			env[more[i]] = more[i+1]
		}
		return env
	}
	for _, tc := range []struct {
		command     []string
		environment map[string]string
		want        string
	}{
		{nil, insecure(), ""},
		{nil, insecure("OTEL_EXPORTER_OTLP_ENDPOINT", "http://jaeger:4317"), ""},
		{nil, insecure("OTEL_EXPORTER_OTLP_ENDPOINT", "::::"), "OTEL_EXPORTER_OTLP_ENDPOINT"},
		{nil, insecure("MANAGERID", "x"), "MANAGERID"},
		{nil, map[string]string{"LISTEN_ADDRESS": "0.0.0.0"}, "listen_address"},
		{[]string{"controller"}, insecure("MANAGER_ID", "x"), "MANAGER_ID"},
		{[]string{"controller"}, insecure("CONTROLLER_STORE", "etcd"), "CONTROLLER_STORE"},
		{[]string{"connect-node"}, insecure("CONTROLLER_ADDRESS", "a:1,b:1"), "controller_address"},
		{[]string{"connect-nod"}, insecure(), "connect-nod"},
	} {
		_, err := settingsOf(tc.command, tc.environment)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(tc.want)) {
			t.Errorf("%v %v: %v, want %q", tc.command, tc.environment, err, tc.want)
		}
	}
}
