package acceptance

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lxzan/gws"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

// TestANodeThatIsStoppedIsNamedAndRefusesWhenItGoesOn although nobody asks again.
func TestANodeThatIsStoppedIsNamedAndRefusesWhenItGoesOn(t *testing.T) {
	if os.Getenv("LONG") == "" {
		t.Skip("set LONG=1 to run it")
	}
	etcd := startEtcd(t)
	p := freeport.Take(t, 2+3*2)
	controller := "127.0.0.1:" + p[0]
	start(t, binary(t, "controller"), []string{"GRPC_PORT=" + p[0], "METRICS_PORT=" + p[1], "ETCD_ENDPOINTS=" + etcd})
	ready(t, p[1])
	var nodes []*process
	var gateways []string
	for i := range 2 {
		p := p[2+3*i:]
		nodes = append(nodes, start(t, binary(t, "connect-node"), []string{
			fmt.Sprint("NODE_ID=node-", i+1), "GRPC_PORT=" + p[0], "HTTP_PORT=" + p[1], "METRICS_PORT=" + p[2],
			"CONTROLLER_ADDRESS=" + controller, "ETCD_ENDPOINTS=" + etcd,
		}))
		ready(t, p[2])
		gateways = append(gateways, "127.0.0.1:"+p[1])
	}
	m := startManager(t, etcd, controller, 2)
	api := pubsub.NewPresenceServiceClient(dial(t, m.api))
	one, two, bob := connect(t, gateways[0], "alice", ""), connect(t, gateways[1], "alice", ""), connect(t, gateways[1], "bob", "")
	refused := func(c *client) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		var end *gws.CloseError
		if !errors.As(c.closed, &end) || end.Code != 4410 {
			return fmt.Errorf("%s: closed with %q", c.name, fmt.Sprint(c.closed))
		}
		return nil
	}

	nodes[1].signal(syscall.SIGSTOP)
	t.Cleanup(func() { nodes[1].signal(syscall.SIGCONT) })
	began := time.Now()
	r, err := api.Disconnect(within(t, patience), &pubsub.DisconnectRequest{UserId: "alice", RefuseFor: durationpb.New(time.Hour), Reason: "away"})
	t.Logf("%v after %v: %v", r, time.Since(began), err)
	if err != nil {
		t.Fatal(err)
	}
	failures := r.GetNodeFailures()
	if r.GetSuccess() || r.GetDisconnected() != 1 || r.GetNodes() != 1 || len(failures) != 1 || failures[0].GetNodeId() != "node-2" || !strings.HasPrefix(failures[0].GetReason(), "unknown: ") {
		t.Errorf("while a node is stopped: %v", r)
	}
	eventually(t, "the connection to the other node is closed", func() error { return refused(one) })

	nodes[1].signal(syscall.SIGCONT)
	eventually(t, "the connection to the node that was stopped is closed", func() error { return refused(two) })
	t.Logf("closed after %v", time.Since(began))
	for _, gateway := range gateways {
		again := &client{t: t, name: "alice again at " + gateway}
		conn, _, err := gws.NewClient(again, &gws.ClientOption{Addr: "ws://" + gateway + "/ws?user_id=alice"})
		if err != nil {
			t.Fatal(err)
		}
		conn.ReadLoop()
		if err := refused(again); err != nil {
			t.Error(err)
		}
	}
	if r, err := api.Disconnect(within(t, patience), &pubsub.DisconnectRequest{UserId: "alice", AllowAgain: true}); err != nil || !r.GetSuccess() {
		t.Errorf("lifted: %v, %v", r, err)
	}
	for _, gateway := range gateways {
		connect(t, gateway, "alice", "")
	}
	if err := refused(bob); err == nil {
		t.Error("somebody else was disconnected")
	}
}
