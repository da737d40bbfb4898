package app_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/push-manager/push-manager/internal/app/connectnode"
	"github.com/push-manager/push-manager/internal/app/controller"
	"github.com/push-manager/push-manager/internal/app/pushmanager"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/etcdtest"
)

const (
	chart     = "../../deploy/helm/push-manager"
	kustomize = "../../deploy/kustomize"
	mounted   = "/etc/push-manager/" // where the chart puts files of Secrets and ConfigMaps
)

// chartSets are what the chart says itself, in place of the keys below config.
var chartSets = []string{
	"manager_id", "node_id", "advertise_address", "listen_address", "grpc_port", "http_port", "metrics_port", "allow_insecure", "trust_domain",
	"controller_store", "redis_url", "redis_url_file", "redis_ca_file",
}

// settingsSchema is the schema of a program's settings, as the chart takes them.
func settingsSchema(settings cli.Settings) map[string]any {
	object := func() map[string]any {
		return map[string]any{"type": "object", "additionalProperties": false, "properties": map[string]any{}}
	}
	root := object()
	for _, key := range keysOf(settings).Keys() {
		if slices.Contains(chartSets, key.Name()) || key.Flag() == "" { // a secret does not stand in a ConfigMap
			continue
		}
		at, path := root, strings.Split(key.Name(), ".")
		for i, name := range path {
			properties, _ := at["properties"].(map[string]any)
			switch below, ok := properties[name].(map[string]any); {
			case i == len(path)-1:
				properties[name] = map[string]any{"type": []any{"string", "number", "boolean", "array", "null"}}
			case ok:
				at = below
			default:
				at = object()
				properties[name] = at
			}
		}
	}
	return root
}

func readJSON(t *testing.T, path string) (tree map[string]any) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &tree); err != nil {
		t.Fatal(err)
	}
	return tree
}

func readYAML(t *testing.T, path string) (tree map[string]any) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, &tree); err != nil {
		t.Fatal(err)
	}
	return tree
}

// TestDocumentsOfTheSettingsAreKnownToTheChart: a key below config that a program does not know is refused by helm, not by a pod. make generate writes
// that part of the schema anew.
func TestDocumentsOfTheSettingsAreKnownToTheChart(t *testing.T) {
	path := filepath.Join(chart, "values.schema.json")
	schema := readJSON(t, path)
	definitions, _ := schema["$defs"].(map[string]any)
	for name, settings := range map[string]cli.Settings{"managerConfig": &pushmanager.Config{}, "controllerConfig": &controller.Config{}, "nodeConfig": &connectnode.Config{}} {
		definitions[name] = settingsSchema(settings)
	}
	want, err := json.MarshalIndent(schema, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	want = append(want, '\n')
	if *update {
		if err := os.WriteFile(path, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s is not what the settings say: make generate (%v)", path, err)
	}
}

// unknown returns the keys of a tree that a schema has not, with their paths.
func unknown(root, schema map[string]any, tree any, path string) (found []string) {
	if ref, ok := schema["$ref"].(string); ok {
		definitions, _ := root["$defs"].(map[string]any)
		schema, _ = definitions[strings.TrimPrefix(ref, "#/$defs/")].(map[string]any)
	}
	switch tree := tree.(type) {
	case []any:
		items, _ := schema["items"].(map[string]any)
		for i, item := range tree {
			found = append(found, unknown(root, items, item, fmt.Sprintf("%s[%d]", path, i))...)
		}
	case map[string]any:
		properties, named := schema["properties"].(map[string]any)
		for key, value := range tree {
			below, ok := properties[key].(map[string]any)
			if !ok && named {
				found = append(found, path+"."+key)
			}
			found = append(found, unknown(root, below, value, path+"."+key)...)
		}
	}
	return found
}

// TestTheChartRefusesUnknownValues: its schema names each value and allows no other. It is held without helm here; make kube asks helm.
func TestTheChartRefusesUnknownValues(t *testing.T) {
	schema := readJSON(t, filepath.Join(chart, "values.schema.json"))
	var closed func(path string, tree any)
	closed = func(path string, tree any) {
		switch tree := tree.(type) {
		case []any:
			for _, item := range tree {
				closed(path, item)
			}
		case map[string]any:
			if _, ok := tree["properties"].(map[string]any); ok && tree["type"] == "object" && tree["additionalProperties"] != false {
				t.Errorf("%s takes what it does not name", path)
			}
			for key, below := range tree {
				closed(path+"."+key, below)
			}
		}
	}
	closed("", schema)

	files, err := filepath.Glob(filepath.Join(chart, "ci/*.yaml"))
	if err != nil || len(files) != 5 {
		t.Fatalf("%d sets of values, want 5 (%v)", len(files), err)
	}
	for _, file := range append(files, filepath.Join(chart, "values.yaml"), filepath.Join(kustomize, "values.yaml")) {
		if found := unknown(schema, schema, any(readYAML(t, file)), ""); len(found) > 0 {
			t.Errorf("%s: the schema has no %v", file, found)
		}
	}
	for key, values := range map[string]string{
		".replicsa":                          "replicsa: 2",
		".connectNode.replicaz":              "connectNode: {replicaz: 2}",
		".config.link.heartbeet":             "config: {link: {heartbeet: 1s}}",
		".config.grpc_port":                  "config: {grpc_port: 1}",
		".config.etcd.password":              "config: {etcd: {password: x}}",
		".connectNode.config.max_conections": "connectNode: {config: {max_conections: 1}}",
		".controller.redis.existingsecret":   "controller: {redis: {existingsecret: x}}",
		".extraEnv[0].nane":                  "extraEnv: [{nane: X}]",
	} {
		var tree map[string]any
		if err := yaml.Unmarshal([]byte(values), &tree); err != nil {
			t.Fatal(err)
		}
		if found := unknown(schema, schema, any(tree), ""); !slices.Equal(found, []string{key}) {
			t.Errorf("%s: found %v", values, found)
		}
	}
	// What is written in values.yaml is all that there is.
	values := readYAML(t, filepath.Join(chart, "values.yaml"))
	properties, _ := schema["properties"].(map[string]any)
	for name := range properties {
		if _, ok := values[name]; !ok && name != "global" {
			t.Errorf("values.yaml does not show %s", name)
		}
	}
}

// TestTheChartCarriesTheAlertRules: those of deploy/prometheus, all of them.
func TestTheChartCarriesTheAlertRules(t *testing.T) {
	read := func(pattern string) map[string]string {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		texts := map[string]string{}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.yml") {
				continue
			}
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			texts[filepath.Base(file)] = string(text)
		}
		return texts
	}
	want, got := read("../../deploy/prometheus/*.yml"), read(filepath.Join(chart, "rules/*.yml"))
	if len(want) == 0 || !maps.Equal(want, got) {
		t.Errorf("the chart carries %v, and deploy/prometheus has %v, or their texts differ: make kube-rules", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
	}
}

// TestTheKustomizeBaseIsCurrent: its second line has the digest of what it was made from. make kube-generate makes it anew.
func TestTheKustomizeBaseIsCurrent(t *testing.T) {
	inputs := []string{filepath.Join(chart, "Chart.yaml"), filepath.Join(chart, "values.yaml"), filepath.Join(kustomize, "values.yaml")}
	if err := filepath.WalkDir(filepath.Join(chart, "templates"), func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			inputs = append(inputs, path)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(inputs)
	hash := sha256.New()
	for _, file := range inputs {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = hash.Write(text)
	}
	base, err := os.ReadFile(filepath.Join(kustomize, "base/push-manager.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("# sha256 of what it is made from: %x\n", hash.Sum(nil)); !strings.Contains(string(base), want) {
		t.Error("deploy/kustomize/base is not what the chart gives: make kube-generate")
	}
}

// manifest is what is read here of an object of Kubernetes.
type manifest struct {
	Kind     string
	Metadata struct{ Name string }
	Data     map[string]string
	Spec     struct {
		Selector any
		Ports    []struct {
			Name       string
			TargetPort string `yaml:"targetPort"`
		}
		Template struct{ Spec podSpec }
	}
}

type podSpec struct {
	Token       *bool          `yaml:"automountServiceAccountToken"`
	Links       *bool          `yaml:"enableServiceLinks"`
	GracePeriod int            `yaml:"terminationGracePeriodSeconds"`
	Security    map[string]any `yaml:"securityContext"`
	Containers  []container
	Volumes     []struct {
		Name   string
		Secret struct {
			SecretName  string `yaml:"secretName"`
			DefaultMode int    `yaml:"defaultMode"`
		}
	}
}

type container struct {
	Name  string
	Args  []string
	Env   []struct{ Name, Value string }
	Ports []struct {
		Name   string
		Number int `yaml:"containerPort"`
	}
	Startup   probe          `yaml:"startupProbe"`
	Liveness  probe          `yaml:"livenessProbe"`
	Readiness probe          `yaml:"readinessProbe"`
	Security  map[string]any `yaml:"securityContext"`
}

type probe struct {
	HTTP struct{ Path, Port string } `yaml:"httpGet"`
}

func readBase(t *testing.T) (all []manifest) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(kustomize, "base/push-manager.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for decoder := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var m manifest
		if err := decoder.Decode(&m); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, m)
	}
}

// pod is a program as the base starts it, with files of a test in place of Secrets.
type pod struct {
	manifest

	container
	settings cli.Settings
	file     string // the configuration, if it has one
	env      map[string]string
}

// load fills the settings. change comes on top of the environment; an empty value takes a variable away.
func (p *pod) load(change map[string]string) (*config.Set, error) {
	env := maps.Clone(p.env)
	maps.Copy(env, change)
	set, lookup := config.New(), func(name string) (string, bool) { v, ok := env[name]; return v, ok }
	p.settings.Bind(set)
	if err := set.Load(config.Options{File: p.file, NoFile: p.file == "", LookupEnv: lookup}); err != nil {
		return nil, err
	}
	return set, p.settings.Validate(set, lookup)
}

// basePods are the three programs of the base. dir gets what their Secrets are to hold.
func basePods(t *testing.T, ca, etcdCA authority, dir string) map[string]*pod {
	t.Helper()
	programs := map[string]func() cli.Settings{
		"serve":        func() cli.Settings { return &pushmanager.Config{} },
		"connect-node": func() cli.Settings { return &connectnode.Config{} },
		"controller":   func() cli.Settings { return &controller.Config{} },
	}
	write := func(path string, text []byte) {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, text, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	identities := map[string]string{ // as docs/kubernetes.md says
		"push-manager": "push-manager/push-manager", "push-manager-controller": "controller/push-manager-controller",
		"push-manager-connect-node": "ns/push-manager/sa/push-manager-connect-node",
	}
	pods, configs := map[string]*pod{}, map[string]map[string]string{}
	for _, m := range readBase(t) {
		if m.Kind == "ConfigMap" {
			configs[m.Metadata.Name] = m.Data
		}
		if m.Kind != "Deployment" && m.Kind != "StatefulSet" {
			continue
		}
		if n := len(m.Spec.Template.Spec.Containers); n != 1 {
			t.Fatalf("%s has %d containers", m.Metadata.Name, n)
		}
		p := &pod{manifest: m, container: m.Spec.Template.Spec.Containers[0], env: map[string]string{}}
		p.settings = programs[p.Args[0]]()
		own := filepath.Join(dir, m.Metadata.Name) + "/"
		pair := ca.issue(t, "spiffe://cluster.local/"+identities[m.Metadata.Name], func(r *certs.Request) { r.Hosts = append(r.Hosts, m.Metadata.Name) })
		client := etcdCA.issue(t, "")
		for file, text := range map[string][]byte{
			"tls/tls.crt": pair.Cert, "tls/tls.key": pair.Key, "tls/ca.crt": ca.pair.Cert,
			"etcd-tls/tls.crt": client.Cert, "etcd-tls/tls.key": client.Key, "etcd-tls/ca.crt": etcdCA.pair.Cert,
			"secrets/policy.yaml":    []byte(`{version: 1, callers: [{name: shop, match: [{san: "spiffe://cluster.local/client/shop"}], allow: [{methods: [PushToUser], users: ["*"]}]}]}`),
			"secrets/clients.secret": []byte(strings.Repeat("secret", 8)),
		} {
			write(own+file, text)
		}
		for _, arg := range p.Args[1:] {
			path, ok := strings.CutPrefix(arg, "--config=")
			text, has := configs[m.Metadata.Name][filepath.Base(path)]
			if !ok || !has {
				t.Fatalf("%s: there is nothing for %s", m.Metadata.Name, arg)
			}
			p.file = own + filepath.Base(path)
			write(p.file, []byte(strings.ReplaceAll(text, mounted, own)))
		}
		for _, v := range p.Env {
			switch {
			case v.Value != "":
				p.env[v.Name] = strings.ReplaceAll(strings.ReplaceAll(v.Value, mounted, own), "$(POD_IP)", "127.0.0.1")
			case v.Name != "POD_IP": // the name of the pod
				p.env[v.Name] = m.Metadata.Name + "-0"
			}
		}
		pods[p.Container()] = p
	}
	if len(pods) != len(programs) {
		t.Fatalf("the base has %v", slices.Sorted(maps.Keys(pods)))
	}
	return pods
}

// Container is the name of the container, which is that of the program.
func (p *pod) Container() string { return p.container.Name }

// TestTheKustomizeBaseIsUnderstood: each program knows all that its pod sets, serves what the pod's ports and probes say, and stops
// before it is killed.
func TestTheKustomizeBaseIsUnderstood(t *testing.T) {
	pods := basePods(t, newAuthority(t), newAuthority(t), t.TempDir())
	for name, p := range pods {
		set, err := p.load(nil)
		if err != nil {
			t.Errorf("%s does not start: %v", name, err)
			continue
		}
		variables := map[string]bool{"POD_IP": true}
		for _, key := range set.Keys() {
			variables[key.Variable()] = true
		}
		for _, v := range p.Env {
			if !variables[v.Name] {
				t.Errorf("%s has no setting %s", name, v.Name)
			}
		}
		var text bytes.Buffer
		var inForce map[string]any
		if err := errors.Join(set.Write(&text, false), yaml.Unmarshal(text.Bytes(), &inForce)); err != nil {
			t.Fatal(err)
		}
		ports := map[string]bool{}
		for _, port := range p.Ports {
			ports[port.Name] = true
			if got, ok := inForce[port.Name+"_port"]; ok && fmt.Sprint(got) != strconv.Itoa(port.Number) {
				t.Errorf("%s: port %s is %d, and the program listens on %v", name, port.Name, port.Number, got)
			}
		}
		for key := range inForce {
			if port, ok := strings.CutSuffix(key, "_port"); ok && !ports[port] {
				t.Errorf("%s: the pod does not show %s", name, key)
			}
		}
		for _, probe := range []probe{p.Startup, p.Liveness} {
			if probe.HTTP.Path != "/healthz" || probe.HTTP.Port != "metrics" {
				t.Errorf("%s: startup and liveness ask %v, not whether the process lives", name, probe.HTTP)
			}
		}
		if p.Readiness.HTTP.Port != "metrics" || !strings.HasPrefix(p.Readiness.HTTP.Path, "/readyz") {
			t.Errorf("%s: readiness asks %v", name, p.Readiness.HTTP)
		}
		spec := p.Spec.Template.Spec
		if drain, grace := p.settings.Timeout(), time.Duration(spec.GracePeriod)*time.Second; grace < drain+5*time.Second {
			t.Errorf("%s is killed %v after it was asked to stop, and drains for up to %v", name, grace, drain)
		}
		if spec.Token == nil || *spec.Token || spec.Links == nil || *spec.Links {
			t.Errorf("%s is given a token or the variables of Services", name)
		}
		security := fmt.Sprint(spec.Security, p.container.Security)
		for _, want := range []string{"runAsNonRoot:true", "runAsUser:65532", "seccompProfile:map[type:RuntimeDefault]", "allowPrivilegeEscalation:false", "readOnlyRootFilesystem:true", "capabilities:map[drop:[ALL]]"} {
			if !strings.Contains(security, want) {
				t.Errorf("%s: the security context lacks %s: %s", name, want, security)
			}
		}
		for _, v := range spec.Volumes {
			if v.Secret.SecretName != "" && v.Secret.DefaultMode != 0o440 {
				t.Errorf("%s: files of the Secret %s have mode %o", name, v.Secret.SecretName, v.Secret.DefaultMode)
			}
		}
	}
	for _, m := range readBase(t) {
		for _, port := range m.Spec.Ports {
			selector, _ := m.Spec.Selector.(map[string]any)
			p := pods[fmt.Sprint(selector["app.kubernetes.io/component"])]
			if p == nil || !slices.ContainsFunc(p.Ports, func(its struct {
				Name   string
				Number int `yaml:"containerPort"`
			}) bool {
				return its.Name == port.TargetPort
			}) {
				t.Errorf("the Service %s leads to a port %s that no pod has", m.Metadata.Name, port.TargetPort)
			}
		}
	}
	// Nothing that a pod sets may be unknown to the program without a word.
	p := pods["push-manager"]
	text, err := os.ReadFile(p.file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.file, append(text, "link_typo: 1\n"...), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := p.load(nil); err == nil || !strings.Contains(err.Error(), "link_typo") {
		t.Errorf("an unknown key in the ConfigMap: %v", err)
	}
	overlay, _ := readYAML(t, filepath.Join(kustomize, "overlays/production/config.yaml"))["data"].(map[string]any)
	text = []byte(strings.ReplaceAll(fmt.Sprint(overlay["config.yaml"]), mounted, filepath.Dir(p.file)+"/"))
	if err := os.WriteFile(p.file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := p.load(nil); err != nil {
		t.Errorf("Push-Manager does not start with the file of the overlay: %v", err)
	}
}

// TestTheKustomizeBaseConnects: with certificates that carry the names of docs/kubernetes.md the three programs take each other for who
// they are. Only addresses and ports differ from those in a cluster.
func TestTheKustomizeBaseConnects(t *testing.T) {
	dir := t.TempDir()
	ca, etcdCA := newAuthority(t), newAuthority(t)
	pods := basePods(t, ca, etcdCA, dir)
	server := etcdCA.issue(t, "")
	for file, text := range map[string][]byte{"etcd.crt": server.Cert, "etcd.key": server.Key, "etcd-ca.crt": etcdCA.pair.Cert} {
		if err := os.WriteFile(filepath.Join(dir, file), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	etcd := etcdtest.Start(t, etcdtest.WithTLS(filepath.Join(dir, "etcd.crt"), filepath.Join(dir, "etcd.key"), filepath.Join(dir, "etcd-ca.crt")))
	start := func(name string, change map[string]string) cli.Program {
		t.Helper()
		here := map[string]string{
			"LISTEN_ADDRESS": "127.0.0.1", "GRPC_PORT": "0", "HTTP_PORT": "0", "METRICS_PORT": "0", "ADVERTISE_ADDRESS": "",
			"ETCD_ENDPOINTS": etcd.Endpoint(), "DRAIN_NOTICE": "1ms",
		}
		maps.Copy(here, change)
		if _, err := pods[name].load(here); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		p, err := pods[name].settings.Start(t.Context(), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
			defer cancel()
			_ = p.Drain(ctx) // the Controller is away
		})
		return p
	}
	c, _ := start("controller", nil).(*controller.Controller)
	toController := map[string]string{"CONTROLLER_ADDRESS": c.GRPCAddr(), "CONTROLLER_TLS_SERVER_NAME": "push-manager-controller"}
	node, _ := start("connect-node", toController).(*connectnode.ConnectNode)
	manager, _ := start("push-manager", toController).(*pushmanager.PushManager)
	eventually(t, "the Connect-Node is ready", func() bool { return len(node.NotReady()) == 0 })
	eventually(t, "Push-Manager reaches the node and the Controller", func() bool { return len(manager.NotReady()) == 0 && manager.Reachable() == 1 })

	for name, address := range map[string]string{"push-manager": manager.HTTPAddr(), "connect-node": node.MetricsAddr().String(), "controller": c.HTTPAddr()} {
		for _, probe := range []probe{pods[name].Startup, pods[name].Liveness, pods[name].Readiness} {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+probe.HTTP.Path, nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			text, _ := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Errorf("%s: %s says %d: %s", name, probe.HTTP.Path, resp.StatusCode, text)
			}
		}
	}
}
