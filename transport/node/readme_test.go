package node

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/testing/protocmp"

	pubsub "github.com/push-manager/push-manager/proto"
)

// TestReadmeExample plays the example of proto/README.md to a node.
func TestReadmeExample(t *testing.T) {
	text, err := os.ReadFile("../../proto/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, example, _ := strings.Cut(string(text), "### An example\n")
	_, example, _ = strings.Cut(example, "```\n")
	example, _, _ = strings.Cut(example, "```\n")
	var frames []string
	for line := range strings.Lines(example) {
		switch {
		case strings.HasPrefix(line, "> "), strings.HasPrefix(line, "< "):
			frames = append(frames, line)
		case strings.HasPrefix(line, "  ("):
		default:
			frames[len(frames)-1] += line
		}
	}
	if len(frames) < 7 {
		t.Fatalf("%d frames", len(frames))
	}
	g := newGateway()
	g.absent["bob"] = true
	b := serve(t, Config{Sessions: g, NodeID: "connect-node-1"})
	stream, err := b.client.Deliver(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{t: t, stream: stream}
	for _, frame := range frames {
		if request, ok := strings.CutPrefix(frame, "> "); ok {
			r := new(pubsub.DeliverRequest)
			if err := prototext.Unmarshal([]byte(request), r); err != nil {
				t.Fatalf("%v in %s", err, request)
			}
			m.send(r)
			continue
		}
		want := new(pubsub.DeliverResponse)
		if err := prototext.Unmarshal([]byte(frame[2:]), want); err != nil {
			t.Fatalf("%v in %s", err, frame)
		}
		got := m.recv()
		if want.GetHeartbeat() != 0 && got.GetHeartbeat() == 0 {
			more := m.recv() // The acks were faster.
			got.Heartbeat, got.OnlineUsers = more.GetHeartbeat(), more.GetOnlineUsers()
		}
		// What depends on the node.
		diff := cmp.Diff(want, got, protocmp.Transform(), protocmp.IgnoreFields(&pubsub.DeliverResponse{}, "online_users"),
			protocmp.IgnoreFields(&pubsub.HelloReply{}, "boot_id", "max_audience_members", "max_unacked", "online_users"))
		if diff != "" {
			t.Error(diff)
		}
	}
	_ = m.wantEnd(codes.OK)
}
