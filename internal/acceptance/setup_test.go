package acceptance

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
)

// TestSetUpOfTheDocumentsPushes runs the commands of docs/securing.md, in order. Only names of machines and ports are
// replaced.
func TestSetUpOfTheDocumentsPushes(t *testing.T) {
	text, err := os.ReadFile("../../docs/securing.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Set-up in ten commands\n")
	section, _, _ = strings.Cut(section, "\n## ")
	p := freeport.Take(t, 8)
	section = strings.NewReplacer("controller.example.com:50051", "localhost:"+p[0], "push.example.com:50053", "localhost:"+p[2],
		"ws.example.com:8080", "localhost:"+p[5]).Replace(section)
	var blocks []string
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(section, -1) {
		blocks = append(blocks, block[1])
	}
	if len(blocks) != 6 {
		t.Fatalf("%d blocks of commands, 6 are right", len(blocks))
	}
	if n := len(regexp.MustCompile(`(?m)# \d+\.`).FindAllString(blocks[0], -1)); n != 10 {
		t.Errorf("%d commands", n)
	}

	dir := t.TempDir()
	bin := filepath.Dir(binary(t, "pushctl"))
	env := []string{"PATH=" + bin + ":" + os.Getenv("PATH")}
	shell := func(script string, more ...string) (string, error) {
		cmd := exec.CommandContext(within(t, patience), "bash", "-e", "-c", script)
		cmd.Dir, cmd.Env = dir, append(env, more...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	must := func(script string) string {
		t.Helper()
		out, err := shell(script)
		if err != nil {
			t.Fatalf("%v: %s\n%s", err, script, out)
		}
		return out
	}
	here := func(script string) string {
		return regexp.MustCompile(`[a-z]+\.example\.com`).ReplaceAllString(script, "localhost")
	}
	must(here(blocks[0]))
	must(blocks[1])
	etcdDir := filepath.Join(dir, "certs", "etcd")
	etcd := etcdtest.Start(t, etcdtest.WithTLS(filepath.Join(etcdDir, "etcd-etcd-1.crt"), filepath.Join(etcdDir, "etcd-etcd-1.key"), filepath.Join(etcdDir, "ca.crt")))
	_, etcdPort, err := net.SplitHostPort(strings.TrimPrefix(etcd.Endpoint(), "https://"))
	if err != nil {
		t.Fatal(err)
	}

	for i, ports := range [][]string{
		{"GRPC_PORT=" + p[0], "METRICS_PORT=" + p[1]},
		{"GRPC_PORT=" + p[4], "HTTP_PORT=" + p[5], "METRICS_PORT=" + p[6]},
		{"GRPC_PORT=" + p[2], "HTTP_PORT=0", "METRICS_PORT=" + p[3]},
	} {
		script := strings.ReplaceAll(here(strings.ReplaceAll(blocks[2+i], "etcd.example.com:2379", "localhost:"+etcdPort)), "\npush-manager ", "\nexec push-manager ")
		// The address that others reach is one that the program starts on; the test listens on this machine alone.
		if out, err := shell(strings.TrimSpace(script)+" --print-config", ports...); err != nil || !strings.Contains(out, "listen_address: 0.0.0.0") {
			t.Fatalf("%v: %s\n%s", err, script, out)
		}
		script = "cd " + dir + "\n" + strings.ReplaceAll(script, "LISTEN_ADDRESS=0.0.0.0", "LISTEN_ADDRESS=127.0.0.1")
		start(t, "bash", append(env, ports...), "-e", "-c", script)
	}
	ready(t, p[6])
	ready(t, p[3])

	lines := strings.Split(strings.TrimSpace(here(blocks[5])), "\n")
	must(lines[0])
	alice := start(t, "bash", env, "-c", "cd "+dir+"; exec "+lines[1])
	alice.shows(`listening as "alice"`, "joined order-7")
	for _, line := range lines[2:] {
		eventually(t, line, func() error { // the node has no stream of Push-Manager yet, or its user is not known
			out, err := shell(line)
			if err == nil && !strings.Contains(out, "delivered to 1 of 1") {
				err = errors.New("nobody is there")
			}
			if err != nil {
				return errors.Join(err, errors.New(out))
			}
			return nil
		})
	}
	for line, says := range map[string]string{
		strings.Replace(lines[3], "order-7", "other", 1):                                   "not allowed to you",
		strings.Replace(lines[2], "user alice", "room order-7", 1):                         "not allowed to you",
		strings.Replace(lines[3], " --token-file=orders.key", "", 1):                       "unauthenticated, nothing was sent",
		strings.ReplaceAll(lines[2], "client-billing", "node-connect-node-1"):              "unauthenticated, nothing was sent",
		strings.ReplaceAll(lines[2], "certs/client-billing", "certs/etcd/client-programs"): "nothing was sent",
	} {
		if out, err := shell(line); err == nil || !strings.Contains(out, says) {
			t.Errorf("%v, want %q: %s\n%s", err, says, line, out)
		}
	}
}
