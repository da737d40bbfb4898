package acceptance

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/metadata"

	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

// TestExplainOfARoomOverThreeNodesNamesWhatStandsInItsWay: one node is stalled, one member is nowhere, one is excluded.
func TestExplainOfARoomOverThreeNodesNamesWhatStandsInItsWay(t *testing.T) {
	etcd := startEtcd(t)
	p := freeport.Take(t, 2+3*3)
	controller := "127.0.0.1:" + p[0]
	start(t, binary(t, "controller"), []string{"GRPC_PORT=" + p[0], "METRICS_PORT=" + p[1], "ETCD_ENDPOINTS=" + etcd})
	ready(t, p[1])
	var nodes []*process
	var gateways []string
	for i := range 3 {
		p := p[2+3*i:]
		nodes = append(nodes, start(t, binary(t, "connect-node"), []string{
			fmt.Sprint("NODE_ID=node-", i+1), "GRPC_PORT=" + p[0], "HTTP_PORT=" + p[1], "METRICS_PORT=" + p[2],
			"CONTROLLER_ADDRESS=" + controller, "ETCD_ENDPOINTS=" + etcd,
		}))
		gateways = append(gateways, "127.0.0.1:"+p[1])
	}
	dir := t.TempDir()
	keys, policy := filepath.Join(dir, "keys.yaml"), filepath.Join(dir, "policy.yaml")
	out, err := exec.CommandContext(t.Context(), binary(t, "push-manager"), "keys", "new", "--name", "support", "--file", keys).Output()
	if err != nil {
		t.Fatal(err)
	}
	key := strings.TrimSpace(string(out))
	rules := fmt.Sprintf("version: 1\ncallers:\n- name: support\n  match: [{key: %s}]\n  rate: 1000\n  allow:\n  - methods: [Explain]\n  - {methods: [PushToRoom], rooms: [\"lob*\"]}\n", key[4:12])
	if err := os.WriteFile(policy, []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	m := startManager(t, etcd, controller, 3, "LINK_SILENCE=2s", "AUTH_MODE=required", "AUTH_POLICY_FILE="+policy, "AUTH_API_KEYS_FILE="+keys)
	ctx := metadata.AppendToOutgoingContext(within(t, patience), "authorization", "Bearer "+key)

	clients := []*client{connect(t, gateways[0], "alice", "lobby"), connect(t, gateways[1], "bob", "lobby"), connect(t, gateways[2], "carol", "lobby")}
	rooms := pubsub.NewControllerServiceClient(dial(t, controller))
	if _, err := rooms.JoinRoom(ctx, &pubsub.JoinRoomRequest{UserId: "dave", RoomId: "lobby", NodeId: "node-4"}); err != nil {
		t.Fatal(err)
	}
	explain := func(room string) (*pubsub.ExplainResponse, error) {
		return m.Explain(ctx, &pubsub.ExplainRequest{Push: &pubsub.ExplainRequest_ToRoom{ToRoom: &pubsub.PushToRoomRequest{
			RoomId: room, Content: text("hello"), ExcludeUserIds: []string{"carol"},
		}}})
	}
	nodes[1].signal(syscall.SIGSTOP)
	t.Cleanup(func() { nodes[1].signal(syscall.SIGCONT) })
	var got *pubsub.ExplainResponse
	eventually(t, "the stalled node is told", func() error {
		if got, err = explain("lobby"); err != nil {
			t.Fatal(err)
		}
		for _, d := range got.GetDeliveries() {
			if d.GetNodeId() == "node-2" && d.GetVerdict() != "queued" {
				return nil
			}
		}
		return fmt.Errorf("%v", got)
	})
	found := map[string]string{}
	for _, d := range got.GetDeliveries() {
		found[d.GetNodeId()] = strings.Join(d.GetUserIds(), " ") + ": " + d.GetVerdict()
	}
	if !strings.HasPrefix(found["node-1"], "alice: queued") || !strings.HasPrefix(found["node-2"], "bob: ") || !strings.Contains(found["node-4"], "dave: node not registered") {
		t.Errorf("where it would go: %q", found)
	}
	if _, ok := found["node-3"]; ok || !slices.Equal(got.GetExcludedUserIds(), []string{"carol"}) || got.GetExcluded() != 1 {
		t.Errorf("excluded: %v, %q", got.GetExcludedUserIds(), found)
	}
	c := got.GetCaller()
	if c.GetName() != "support" || !strings.Contains(c.GetRule(), "PushToRoom lob*") || c.RateLeft == nil {
		t.Errorf("the caller: %v", c)
	}
	if _, err := explain("office"); err == nil || !strings.Contains(err.Error(), "PushToRoom: room_id: not allowed") {
		t.Errorf("a room that is not allowed: %v", err)
	}
	nodes[1].signal(syscall.SIGCONT)
	values, err := m.readMetrics()
	if err != nil {
		t.Fatal(err)
	}
	if n := values["push_manager_push_total"]; n != 0 {
		t.Errorf("%v users were pushed to", n)
	}
	for _, c := range clients {
		c.expect()
	}
}
