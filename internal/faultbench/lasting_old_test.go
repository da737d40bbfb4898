package faultbench

import (
	"context"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/lxzan/gws"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
)

// goldenFrame is what a client has got for a push since before there were options.
const goldenFrame = `{"type":"text","room_id":"","user_id":"%s","timestamp":1700000000,"data":{"content":"%s"},"metadata":{}}`

// listen connects a client that keeps its frames as they are.
func (t *town) listen(user string, ack bool) *rawFrames {
	t.t.Helper()
	q := url.Values{"user_id": {user}}
	if ack {
		q.Set("ack", "1")
	}
	f := &rawFrames{}
	ws, _, err := gws.NewClient(f, &gws.ClientOption{Addr: "ws://" + t.gates[0].http + "/ws?" + q.Encode()})
	if err != nil {
		t.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); ws.ReadLoop() }()
	t.t.Cleanup(func() { _ = ws.NetConn().Close(); <-ended })
	f.awaits(t.t, 1) // "ready"
	return f
}

func (f *rawFrames) awaits(t testing.TB, n int) []string {
	t.Helper()
	eventually(t, fmt.Sprint(n, " frames"), func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.got) < n {
			return fmt.Errorf("got %q", f.got)
		}
		return nil
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.got)
}

func content(data string) *pubsub.MessageContent {
	return &pubsub.MessageContent{Data: []byte(data), Timestamp: 1_700_000_000}
}

// TestLastingOldAndNewTogether: where nothing was asked for, replies and frames are what they were
// before there were options, whoever of client, gateway and Push-Manager knows them.
func TestLastingOldAndNewTogether(t *testing.T) {
	t.Parallel()
	c := newLastingTown(t, townPlan{managers: 1, gates: 1, managerEnv: storeAt(startStore(t))})
	m := c.managers[0]
	before := c.listen("old", false)
	after := c.listen("new", true)
	push := func(user, data string, o *pubsub.PushOptions) *pubsub.PushToUserResponse {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		r, err := m.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: user, Content: content(data), Options: o})
		if err != nil {
			t.Error(err)
		}
		return r
	}
	all := lasting()
	all.MessageId, all.TtlMs, all.CollapseKey = "id-1", 60_000, "key"
	plain := &pubsub.PushToUserResponse{Success: true, Summary: &pubsub.DeliverySummary{Targets: 1, Delivered: 1}}
	for _, user := range []string{"old", "new"} {
		r := push(user, "plain", nil)
		plain.Message = r.GetMessage() // for people
		if !proto.Equal(r, plain) {
			t.Errorf("%s: %v, want %v", user, r, plain)
		}
	}
	if s := push("old", "options", all).GetSummary(); s.GetDelivered() != 1 || s.GetAcked() != 0 || s.GetMessageId() != "id-1" {
		t.Errorf("a client that cannot acknowledge counts as it always did: %v", s)
	}
	for name, f := range map[string]*rawFrames{"old": before, "new": after} {
		if got := f.awaits(t, 2)[1]; got != fmt.Sprintf(goldenFrame, name, "plain") {
			t.Errorf("%s got\n%s, not\n"+goldenFrame, name, got, name, "plain")
		}
	}
	if got := before.awaits(t, 3)[2]; got != fmt.Sprintf(goldenFrame, "old", "options") {
		t.Errorf("a client that did not ask for acknowledgements got %s", got)
	}

	// A Push-Manager that offers no feature: its hello has none.
	conn, err := grpc.NewClient("passthrough:///"+c.gates[0].grpc, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stream, err := pubsub.NewConnectNodeServiceClient(conn).Deliver(ctx)
	if err != nil {
		t.Fatal(err)
	}
	send := func(f *pubsub.DeliverRequest) {
		if err := stream.Send(f); err != nil {
			t.Error(err)
		}
	}
	send(&pubsub.DeliverRequest{Hello: &pubsub.Hello{ProtocolVersion: 1, ManagerId: "old"}})
	send(&pubsub.DeliverRequest{FirstSeq: 1, Deliveries: []*pubsub.Delivery{{UserIds: []string{"old", "new"}, Content: content("from an old one")}}})
	acked := false
	for !acked {
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(r.GetReceipts())+len(r.GetCatchups())+len(r.GetReplayTaken())+len(r.GetNudgesTaken()) > 0 {
			t.Errorf("a feature that was not offered is used: %v", r)
		}
		for _, a := range r.GetAcks() {
			if acked = true; !proto.Equal(a, &pubsub.AckRange{First: 1, Delivered: []uint32{2}}) {
				t.Errorf("acknowledged by %v", a)
			}
		}
	}
	for name, f := range map[string]*rawFrames{"old": before, "new": after} {
		got := f.awaits(t, 3)
		if last := got[len(got)-1]; !strings.Contains(last, "from an old one") {
			got = f.awaits(t, len(got)+1)
		}
		if last := got[len(got)-1]; last != fmt.Sprintf(goldenFrame, name, "from an old one") {
			t.Errorf("%s got %s", name, last)
		}
	}
}

// TestLastingOptionsReachNoNodeThatDoesNotOfferThem: a scripted node without features is sent
// nothing of them (which it checks), and its users count as they always did.
func TestLastingOptionsReachNoNodeThatDoesNotOfferThem(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.wire("n", "u", "v")
	b.world.join("r", "u", "v")
	m := b.manage(1, lenient(storeAt(startStore(t))...)...)
	b.world.place("elsewhere", "gone") // at a node that nobody has registered
	b.ledger.absent = func(user string) bool { return user == "gone" }
	o := lasting()
	o.TtlMs, o.CollapseKey = 60_000, "key"
	want(t, m.push(user("u").with(o)), func(s *pubsub.DeliverySummary) bool { return s.GetDelivered() == 1 && s.GetAcked() == 0 }, "delivered")
	o = lasting()
	o.Offline = pubsub.OfflinePolicy_OFFLINE_DROP
	want(t, m.push(room("r").with(o)), func(s *pubsub.DeliverySummary) bool { return s.GetDelivered() == 2 && s.GetAcked() == 0 }, "delivered")
	want(t, m.push(user("gone").with(lasting())), isStored, "stored")
	want(t, m.push(user("nobody knows").with(o)), func(s *pubsub.DeliverySummary) bool { return s.GetOffline() == 1 && s.GetStored() == 0 }, "offline")
}
