package certcmd

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/cli"
)

func command(args ...string) (code int, out, errOut string) {
	var o, e bytes.Buffer
	code = run(args, &o, &e)
	return code, o.String(), e.String()
}

func TestCertificatesFitTogetherAndAreForTheirOwnerAlone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "certs")
	for _, args := range [][]string{
		{"ca"}, {"node", "n1"}, {"node", "n2", "n2.example", "10.0.0.2"}, {"manager", "pm"}, {"client", "billing"}, {"client", "balancer", "push.example"}, {"controller", "c1"}, {"etcd", "e1"},
	} {
		code, out, errOut := command(append(args, "--dir="+dir, "--trust-domain=test")...)
		if code != 0 || errOut != "" {
			t.Fatalf("%v: exit %d, %s", args, code, errOut)
		}
		for line := range strings.Lines(out) {
			if variable, file, ok := strings.Cut(strings.TrimSpace(line), "_FILE="); ok {
				if _, err := os.Stat(file); err != nil || variable == "" {
					t.Errorf("%v prints %q: %v", args, line, err)
				}
			}
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 16 {
		t.Fatalf("%d files, %v", len(entries), err)
	}
	for _, entry := range entries {
		if info, err := entry.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", entry.Name(), info.Mode(), err)
		}
	}
	for _, name := range []string{"node-n1", "node-n2", "manager-pm", "client-billing", "client-balancer", "controller-c1", "etcd-e1"} {
		files := certs.Files{Cert: filepath.Join(dir, name+".crt"), Key: filepath.Join(dir, name+".key"), CA: filepath.Join(dir, "ca.crt")}
		if err := files.Check(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if code, _, text := command("node", "n1", "--dir="+dir); code != cli.ExitFailed || !strings.Contains(text, "--overwrite") {
		t.Errorf("once more: exit %d, %s", code, text)
	}
	before, err := os.ReadFile(filepath.Join(dir, "node-n1.crt"))
	if err != nil {
		t.Fatal(err)
	}
	if code, _, text := command("node", "n1", "--dir="+dir, "--overwrite"); code != 0 {
		t.Errorf("renewed: exit %d, %s", code, text)
	}
	if after, err := os.ReadFile(filepath.Join(dir, "node-n1.crt")); err != nil || bytes.Equal(before, after) {
		t.Errorf("not renewed: %v", err)
	}
}

// TestPrintedVariablesLeaveNothingOpen: etcd with a certificate speaks plain text unless its URLs say https, and nodes have
// certificates of the authority that callers have theirs from.
func TestPrintedVariablesLeaveNothingOpen(t *testing.T) {
	dir := "--dir=" + t.TempDir()
	for _, tc := range []struct {
		args []string
		want []string
	}{
		{[]string{"ca"}, nil},
		{[]string{"etcd", "e1"}, []string{"ETCD_LISTEN_CLIENT_URLS=https://0.0.0.0:2379", "ETCD_ADVERTISE_CLIENT_URLS=https://localhost:2379"}},
		{[]string{"etcd", "e2", "etcd.example", "10.0.0.2"}, []string{"ETCD_ADVERTISE_CLIENT_URLS=https://etcd.example:2379"}},
		{[]string{"etcd", "e3", "fd00::1"}, []string{"ETCD_ADVERTISE_CLIENT_URLS=https://[fd00::1]:2379"}},
		{[]string{"manager", "pm"}, []string{"AUTH_MODE=required"}},
	} {
		code, out, errOut := command(append(tc.args, dir)...)
		if code != 0 {
			t.Fatalf("%v: exit %d, %s", tc.args, code, errOut)
		}
		for _, want := range tc.want {
			if !strings.Contains(out, "  "+want+"\n") {
				t.Errorf("%v does not print %s:\n%s", tc.args, want, out)
			}
		}
	}
}

func TestWhatCertsCannotDoIsOneLine(t *testing.T) {
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		args []string
		code int
		text string
	}{
		"nothing":       {nil, cli.ExitUsage, "expected one of"},
		"unknown":       {[]string{"server"}, cli.ExitUsage, "server"},
		"no id":         {[]string{"node"}, cli.ExitUsage, "<id>"},
		"no authority":  {[]string{"node", "n1"}, cli.ExitFailed, "push-manager certs ca"},
		"a way out":     {[]string{"node", "../n1"}, cli.ExitUsage, "letters, digits"},
		"days":          {[]string{"ca", "--days=0"}, cli.ExitUsage, "--days"},
		"trust domain":  {[]string{"ca", "--trust-domain=a/b"}, cli.ExitUsage, "--trust-domain"},
		"empty domain":  {[]string{"ca", "--trust-domain="}, cli.ExitUsage, "--trust-domain"},
		"unknown flags": {[]string{"ca", "--nope"}, cli.ExitUsage, "--nope"},
	} {
		code, _, text := command(append(tc.args, "--dir="+dir)...)
		if code != tc.code || !strings.Contains(text, tc.text) || strings.Count(text, "\n") != 1 {
			t.Errorf("%s: exit %d, %q", name, code, text)
		}
	}
	if code, out, _ := command("--help"); code != 0 || !strings.Contains(out, "manager") {
		t.Errorf("--help: exit %d, %q", code, out)
	}
}

// TestOnlyACallerWithHostsCanServe: a balancer has a certificate for both of its sides, and a caller cannot pass for a server.
func TestOnlyACallerWithHostsCanServe(t *testing.T) {
	dir := t.TempDir()
	for _, args := range [][]string{{"ca"}, {"client", "billing"}, {"client", "balancer", "push.example"}} {
		code, out, errOut := command(append(args, "--dir="+dir)...)
		if code != 0 {
			t.Fatalf("%v: exit %d, %s", args, code, errOut)
		}
		if got := strings.Contains(out, "  PUSH_API_CERT="+filepath.Join(dir, "client-balancer.crt")+"\n"); got != (len(args) == 3) {
			t.Errorf("%v prints for HAProxy: %t\n%s", args, got, out)
		}
	}
	for name, serves := range map[string]bool{"client-billing": false, "client-balancer": true} {
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key"))
		if err != nil {
			t.Fatal(err)
		}
		if got := slices.Contains(pair.Leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth); got != serves {
			t.Errorf("%s may serve: %t", name, got)
		}
		if !slices.Contains(pair.Leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
			t.Errorf("%s may not call", name)
		}
	}
}
