package pushctl

import (
	"encoding/json"
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/internal/programs"
	"github.com/push-manager/push-manager/transport/node"
)

// TestConformanceTriesANodeThroughClientsOfItsAuthor is the command as an author of a
// gateway calls it: clients are programs that print what they get.
func TestConformanceTriesANodeThroughClientsOfItsAuthor(t *testing.T) {
	// Without a store: a node asks one of the managers that have one, and that shall be the one that tries it.
	address, webSocket, _ := dev(t, "--store=off") // of the second node
	client := `exec '` + programs.Path(t, "pushctl") + `' --json listen --user "$USER_ID" --room "$ROOM_ID" --url ` + webSocket
	args := []string{"conformance", address["connect-node-2"], "--node-id=connect-node-2", "--client", client, "--within=20s", "--skip=keepalive"}
	code, out, errOut := pushctl(t, "", args...)
	if code != exitOK || errOut != "" {
		t.Errorf("exit %d, %q", code, errOut)
	}
	if strings.Contains(out, "\nFAIL") || strings.Count(out, "ok ") < 25 || strings.Count(out, "skip") != 1 {
		t.Errorf("printed\n%s", out)
	}

	code, out, errOut = pushctl(t, "", "conformance", address["connect-node-2"], "-o", "json", "--only=hello", "--user=nobody-1", "--within=5s")
	if code != exitError || !strings.Contains(errOut, "the node fails 1 check") {
		t.Errorf("exit %d, %q", code, errOut)
	}
	outcomes := map[string]string{}
	for line := range strings.Lines(out) {
		var r struct{ Check, Outcome, Expect, Got string }
		if err := json.Unmarshal([]byte(line), &r); err != nil || r.Expect == "" {
			t.Errorf("%v: %s", err, line)
		}
		outcomes[r.Check] = r.Outcome
	}
	if outcomes["connect"] != "ok" || outcomes["users"] != "FAIL" || outcomes["hello/reply"] != "ok" {
		t.Errorf("%v", outcomes)
	}
}

func TestConformanceOfNobodyAndOfNothing(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		code int
		want string
	}{
		"nobody there":  {[]string{"127.0.0.1:1"}, exitError, "the node fails"},
		"no such check": {[]string{"127.0.0.1:1", "--only=everything"}, exitUsage, `no check is called "everything"`},
		"no such port":  {[]string{"localhost:99999"}, exitUsage, `address "localhost:99999" is not HOST:PORT`},
		"no time":       {[]string{"127.0.0.1:1", "--within=0s"}, exitUsage, "--within"},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errOut := pushctl(t, "", append([]string{"conformance", "--skip=keepalive"}, tc.args...)...)
			if code != tc.code || !strings.Contains(errOut, tc.want) {
				t.Errorf("exit %d, %q, %s", code, errOut, out)
			}
		})
	}
	code, out, _ := pushctl(t, "", "conformance", serveNode(t), "--client=echo no such host >&2; exit 3", "--only=users")
	if code != exitError || !strings.Contains(out, "exit status 3: no such host") {
		t.Errorf("exit %d, %s", code, out)
	}
	code, out, _ = pushctl(t, "", "conformance", "--list", "127.0.0.1:1")
	if code != exitOK || !strings.Contains(out, "audience/disagreement") {
		t.Errorf("exit %d, %s", code, out)
	}
}

// serveNode serves a node on which nobody is connected.
func serveNode(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv, err := node.New(node.Config{NodeID: "n", Sessions: empty{}})
	if err != nil {
		t.Fatal(err)
	}
	gs := grpc.NewServer(node.ServerOptions()...)
	srv.Attach(gs)
	done := make(chan error, 1)
	go func() { done <- gs.Serve(l) }()
	t.Cleanup(func() {
		gs.Stop()
		<-done
		srv.Close()
	})
	return l.Addr().String()
}

type empty struct{}

func (empty) Deliver(string, *node.Message) node.Outcome { return node.NotHere }
func (empty) Broadcast(*node.Message) (int, int)         { return 0, 0 }
func (empty) Online() int                                { return 0 }
