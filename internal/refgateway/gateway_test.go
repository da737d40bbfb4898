package refgateway

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/gobwas/ws"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/push-manager/push-manager/internal/refcontroller"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
	"github.com/push-manager/push-manager/transport/node/membership"
)

func TestPushArrivesAsTheContractSays(t *testing.T) {
	g, n := start(t, newController(t), nil)
	d := connect(t, g, "u", "r")
	for _, test := range []struct {
		content *pubsub.MessageContent
		want    string
	}{
		{
			&pubsub.MessageContent{Data: []byte("Hello"), Timestamp: 1},
			`{"type":"text","room_id":"r","user_id":"u","timestamp":1,"data":{"content":"Hello"},"metadata":{}}`,
		},
		{
			&pubsub.MessageContent{Type: pubsub.MessageType_SYSTEM, Timestamp: 2, Metadata: map[string]string{"b": "2", "a": "\"1\n"}},
			`{"type":"system","room_id":"r","user_id":"u","timestamp":2,"data":{"content":""},"metadata":{"a":"\"1\n","b":"2"}}`,
		},
		{
			&pubsub.MessageContent{Type: 99, Data: []byte{0xff, 0x00}, Timestamp: 3},
			`{"type":"99","room_id":"r","user_id":"u","timestamp":3,"data":{"content_base64":"/wA="},"metadata":{}}`,
		},
		{
			&pubsub.MessageContent{Type: pubsub.MessageType_TRANSLATION, Data: []byte("Grüße <b> 世界 \u0001\u2028"), Timestamp: 4},
			`{"type":"translation","room_id":"r","user_id":"u","timestamp":4,"data":{"content":"Grüße <b> 世界 \u0001` + "\u2028" + `"},"metadata":{}}`,
		},
	} {
		if _, err := n.PushMessage(t.Context(), &pubsub.PushMessageRequest{UserId: "u", RoomId: "r", Content: test.content}); err != nil {
			t.Fatal(err)
		}
		d.want(test.want)
	}
}

func TestPushesOfAllSizesArrive(t *testing.T) {
	g, n := start(t, newController(t), nil)
	d := connect(t, g, "u", "")
	for _, size := range []int{0, 1, 20, 30, 40, 60, 1 << 10, 65 << 10, 256 << 10} {
		text := strings.Repeat("x", size)
		pushTo(t, n, "", text, "u")
		d.want(textFrame("", "u", text))
	}
	// Every byte takes six: more than the queue's bound, and alone in it.
	pushTo(t, n, "", strings.Repeat("\x01", 256<<10), "u")
	if got := d.next(); len(got) < 6*256<<10 {
		t.Errorf("%d bytes", len(got))
	}
}

func TestEachRecipientFindsItsOwnId(t *testing.T) {
	g, n := start(t, newController(t), nil)
	a, b := connect(t, g, "a", "r"), connect(t, g, `b"\`, "r")
	pushTo(t, n, "r", "hi", "a", `b"\`)
	a.want(textFrame("r", "a", "hi"))
	b.want(textFrame("r", `b"\`, "hi"))
	if _, err := n.Broadcast(t.Context(), &pubsub.BroadcastRequest{Content: &pubsub.MessageContent{Data: []byte("all"), Timestamp: 1}}); err != nil {
		t.Fatal(err)
	}
	a.want(broadcastFrame("a", "all"))
	b.want(broadcastFrame(`b"\`, "all"))
}

func TestAllDevicesGetAPushAndTheUserCountsOnce(t *testing.T) {
	g, n := start(t, newController(t), nil)
	phone, laptop := connect(t, g, "u", "r"), connect(t, g, "u", "")
	r := pushTo(t, n, "r", "hi", "u", "nobody")
	if r.GetDeliveredCount() != 1 || !slices.Equal(r.GetFailedUserIds(), []string{"nobody"}) {
		t.Error(r)
	}
	phone.want(textFrame("r", "u", "hi"))
	laptop.wantNothing() // It is not in the room.
	if r := pushTo(t, n, "", "both", "u"); r.GetDeliveredCount() != 1 {
		t.Error(r)
	}
	phone.want(textFrame("", "u", "both"))
	laptop.want(textFrame("", "u", "both"))
	all, err := n.Broadcast(t.Context(), &pubsub.BroadcastRequest{Content: &pubsub.MessageContent{Data: []byte("all"), Timestamp: 1}})
	if err != nil || all.GetDeliveredCount() != 1 {
		t.Error(all, err)
	}
	phone.want(broadcastFrame("u", "all"))
	laptop.want(broadcastFrame("u", "all"))
	phone.ws.NetConn().Close()
	eventually(t, "one connection left", func() bool { return g.users.Connections() == 1 })
	if r := pushTo(t, n, "", "2", "u"); r.GetDeliveredCount() != 1 {
		t.Error(r)
	}
	laptop.want(textFrame("", "u", "2"))
}

func TestDeliverStreamReachesClientsInOrder(t *testing.T) {
	g, n := start(t, newController(t), nil)
	d := connect(t, g, "u", "r")
	stream, err := n.Deliver(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&pubsub.DeliverRequest{Hello: &pubsub.Hello{ProtocolVersion: 1}}); err != nil {
		t.Fatal(err)
	}
	if r, err := stream.Recv(); err != nil || r.GetHello().GetNodeId() != "node-1" || r.GetHello().GetOnlineUsers() != 1 {
		t.Fatal(r, err)
	}
	const pushes, perFrame = 2000, 50
	audience := &pubsub.Audience{Id: 1, Version: 1, RoomId: "r", Join: []string{"u", "gone"}}
	for seq := uint64(1); seq <= pushes; seq += perFrame {
		r := &pubsub.DeliverRequest{FirstSeq: seq}
		for i := range uint64(perFrame) {
			r.Deliveries = append(r.Deliveries, &pubsub.Delivery{Audience: audience, Content: &pubsub.MessageContent{Data: fmt.Append(nil, seq+i), Timestamp: 1}})
			audience = &pubsub.Audience{Id: 1, Version: 1}
		}
		if err := stream.Send(r); err != nil {
			t.Fatal(err)
		}
		for acked := 0; acked < perFrame; {
			r, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range r.GetAcks() {
				acked += len(a.GetDelivered())
				for i, n := range a.GetDelivered() {
					if n != 1 {
						t.Fatalf("seq %d: %d delivered", a.GetFirst()+uint64(i), n)
					}
				}
			}
		}
	}
	for i := 1; i <= pushes; i++ {
		d.want(textFrame("r", "u", fmt.Sprint(i)))
	}
}

func TestBurstToOneClientIsNotASlowClient(t *testing.T) {
	g, n := start(t, newController(t), nil)
	d := connect(t, g, "u", "")
	stream, err := n.Deliver(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	const pushes = 4000
	r := &pubsub.DeliverRequest{FirstSeq: 1}
	for i := range pushes {
		r.Deliveries = append(r.Deliveries, &pubsub.Delivery{UserIds: []string{"u"}, Content: &pubsub.MessageContent{Data: fmt.Append(nil, i), Timestamp: 1}})
	}
	for _, frame := range []*pubsub.DeliverRequest{{Hello: &pubsub.Hello{ProtocolVersion: 1}}, r} {
		if err := stream.Send(frame); err != nil {
			t.Fatal(err)
		}
	}
	for i := range pushes {
		d.want(textFrame("", "u", fmt.Sprint(i)))
	}
}

func TestJoinAndLeaveFurtherRooms(t *testing.T) {
	c := newController(t)
	g, _ := start(t, c, nil)
	d := connect(t, g, "u", "r")
	if !c.has("u", "r") {
		t.Fatal("joined was sent before the controller knew")
	}
	d.say(`{"type":"join","room_id":"r2"}`)
	d.want(`{"type":"joined","room_id":"r2"}`)
	if !c.has("u", "r2") {
		t.Fatal("joined was sent before the controller knew")
	}
	d.say(`{"type":"join","room_id":"r2"}`) // Again: confirmed, not reported.
	d.want(`{"type":"joined","room_id":"r2"}`)
	d.say(`{"type":"leave","room_id":"r"}`)
	d.want(`{"type":"left","room_id":"r"}`)
	if c.has("u", "r") {
		t.Fatal("left was sent before the controller knew")
	}
	if diff := cmp.Diff([]string{"join"}, c.calls("u", "r2")); diff != "" {
		t.Error(diff)
	}
	c.mu.Lock()
	name := c.members["u r2 node-1"]
	c.mu.Unlock()
	if name != "name of u" {
		t.Errorf("user_name %q", name)
	}
	d.ws.NetConn().Close()
	eventually(t, "the controller knows nothing of u", func() bool { return c.size() == 0 })
}

func TestRoomIsLeftWithTheLastConnection(t *testing.T) {
	c := newController(t)
	g, _ := start(t, c, nil)
	phone, laptop := connect(t, g, "u", "r"), connect(t, g, "u", "r")
	phone.say(`{"type":"leave","room_id":"r"}`)
	phone.want(`{"type":"left","room_id":"r"}`)
	if !c.has("u", "r") {
		t.Fatal("left while another connection is in the room")
	}
	laptop.say(`{"type":"leave","room_id":"r"}`)
	laptop.want(`{"type":"left","room_id":"r"}`)
	if diff := cmp.Diff([]string{"join", "leave"}, c.calls("u", "r")); diff != "" {
		t.Error(diff)
	}
	eventually(t, "a connected user without a room is known", func() bool { return c.has("u", "@node:node-1") })
}

func TestPushToARoomIsForTheConnectionsInIt(t *testing.T) {
	g, n := start(t, newController(t), nil)
	inA, inB, inNone := connect(t, g, "u", "A"), connect(t, g, "u", "B"), connect(t, g, "u", "")
	push := func(text string, delivered bool) {
		t.Helper()
		r := pushTo(t, n, "A", text, "u")
		if got := r.GetDeliveredCount() == 1; got != delivered || got == slices.Contains(r.GetFailedUserIds(), "u") {
			t.Errorf("%s: %v, want delivered: %v", text, r, delivered)
		}
	}
	push("1", true)
	inA.want(textFrame("A", "u", "1"))
	inB.wantNothing()
	inNone.wantNothing()

	inNone.say(`{"type":"join","room_id":"A"}`)
	inNone.want(`{"type":"joined","room_id":"A"}`)
	push("2", true)
	inA.want(textFrame("A", "u", "2"))
	inNone.want(textFrame("A", "u", "2"))

	inA.say(`{"type":"leave","room_id":"A"}`)
	inA.want(`{"type":"left","room_id":"A"}`)
	push("3", true)
	inNone.want(textFrame("A", "u", "3"))
	inA.wantNothing() // Told left, nothing more of the room comes.

	inNone.ws.NetConn().Close()
	eventually(t, "it is forgotten", func() bool { return g.users.Connections() == 2 })
	push("4", false) // A route that is out of date.
	inA.wantNothing()
	inB.wantNothing()
}

// TestTheControllerPutsNobodyIntoARoom: a user whom it has in a room that no connection has joined
// is not there, whatever rooms the connections are in.
func TestTheControllerPutsNobodyIntoARoom(t *testing.T) {
	g, n := start(t, newController(t), nil)
	inNone := connect(t, g, "u", "")
	for _, join := range []string{"", "other"} {
		if join != "" {
			inNone.say(`{"type":"join","room_id":"other"}`)
			inNone.want(`{"type":"joined","room_id":"other"}`)
		}
		if r := pushTo(t, n, "filled by the Controller", "1", "u"); !slices.Equal(r.GetFailedUserIds(), []string{"u"}) {
			t.Errorf("in %q: %v", join, r)
		}
	}
	inNone.wantNothing()
}

// TestNothingOfARoomComesAfterLeft: whatever races with the leave, left is the last word.
func TestNothingOfARoomComesAfterLeft(t *testing.T) {
	g, _ := start(t, newController(t), nil)
	stays, leaves := connect(t, g, "u", "r"), connect(t, g, "u", "")
	for range 20 {
		leaves.say(`{"type":"join","room_id":"r"}`)
		leaves.want(`{"type":"joined","room_id":"r"}`)
		var wg sync.WaitGroup
		stop := make(chan struct{})
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
					if i < 2000 { // not more than the clients' queues
						sessions{g.users}.Deliver("u", &node.Message{RoomID: "r"})
					}
				}
			}
		})
		leaves.say(`{"type":"leave","room_id":"r"}`)
		for leaves.next() != `{"type":"left","room_id":"r"}` {
		}
		close(stop)
		wg.Wait()
		leaves.wantNothing()
		for len(stays.frames) > 0 {
			<-stays.frames
		}
	}
}

func TestBadClientMessagesNameTheField(t *testing.T) {
	g, _ := start(t, newController(t), func(c *Config) { c.Members.MaxRooms = 2 })
	d := connect(t, g, "u", "r")
	for _, test := range []struct{ say, field string }{
		{`{`, "message"},
		{`[]`, "message"},
		{`"join"`, "message"},
		{`{"type":1}`, "type"},
		{`{"type":"join","room_id":{"a":1}}`, "room_id"},
		{`{}`, "type"},
		{`{"type":"push"}`, "type"},
		{`{"type":"join"}`, "room_id"},
		{`{"type":"join","room_id":""}`, "room_id"},
		{`{"type":"join","room_id":"a\u0000b"}`, "room_id"},
		{`{"type":"join","room_id":"@node:node-1"}`, "room_id"},
		{`{"type":"leave","room_id":"@node:node-1"}`, "room_id"},
		{`{"type":"join","room_id":"` + strings.Repeat("x", 257) + `"}`, "room_id"},
		{`{"type":"leave","room_id":"never joined"}`, "room_id"},
	} {
		d.say(test.say)
		d.wantError(test.field)
	}
	if err := d.ws.WriteMessage(2, []byte{1}); err != nil {
		t.Fatal(err)
	}
	d.wantError("type")
	d.say(`{"type":"join","room_id":"r2"}`)
	d.want(`{"type":"joined","room_id":"r2"}`)
	d.say(`{"type":"join","room_id":"r3"}`)
	d.want(`{"type":"error","message":"room_id: too many rooms on this connection","room_id":"r3"}`)
	d.say(`{"type":"leave","room_id":"r3"}`)
	d.want(`{"type":"error","message":"room_id: not in this room","room_id":"r3"}`)
	d.say(`{"type":"join","room_id":"@node:x"}`)
	d.want(`{"type":"error","message":"room_id: names that begin with @node: are reserved","room_id":"@node:x"}`)
	d.say(`{"type":"leave","room_id":"r"}`)
	d.want(`{"type":"left","room_id":"r"}`)
	d.say(`{"type":"join","room_id":"r3"}`)
	d.want(`{"type":"joined","room_id":"r3"}`)
	d.wantNothing()
}

func TestMessageOverTheLimitClosesTheConnection(t *testing.T) {
	g, _ := start(t, newController(t), func(c *Config) { c.MaxMessageBytes = 100 })
	d := connect(t, g, "u", "")
	d.say(strings.Repeat(" ", 101))
	d.wantClose(1009)
}

func TestBadHandshakes(t *testing.T) {
	g, _ := start(t, newController(t), func(c *Config) { c.MaxConnections = 1; c.AllowedOrigins = []string{"https://app.example.com"} })
	long := strings.Repeat("x", 257)
	for query, field := range map[string]string{
		"":                                 "user_id",
		"user_id=":                         "user_id",
		"user_id=" + long:                  "user_id",
		"user_id=%ff":                      "user_id",
		"user_id=a%00":                     "user_id",
		"user_id=a&user_id=b":              "user_id",
		"user_id=a&room_id=":               "room_id",
		"user_id=a&room_id=%0a":            "room_id",
		"user_id=a&room_id=@node:x":        "room_id",
		"user_id=a&user_name=" + long:      "user_name",
		"user_id=a&user_name=%1b[31m":      "user_name",
		"user_id=a&room_id=r&room_id=also": "room_id",
		"user_id=%zz":                      "query",
	} {
		_, resp, err := dialQuery(g, query, nil)
		if err == nil || resp == nil || resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%.40q: %v %v", query, resp, err)
			continue
		}
		if body, _ := io.ReadAll(io.LimitReader(resp.Body, 20)); !strings.HasPrefix(string(body), field+":") {
			t.Errorf("%.40q: %q does not name %s", query, body, field)
		}
	}
	host := g.HTTPAddr().String()
	for origin, want := range map[string]bool{
		"https://evil.example": false, "http://127.0.0.1.evil.example": false, "null": false, "http://10.1.2.3:80": false,
		"https://app.example.com": true, "http://localhost:1": true, "http://[::1]:1": true, "http://" + host: true,
	} {
		r := &http.Request{Host: host, Header: http.Header{"Origin": {origin}}}
		if got := g.originAllowed(r); got != want {
			t.Errorf("origin %s: allowed %v", origin, got)
		}
	}
	if _, resp, _ := dialQuery(g, "user_id=a", http.Header{"Origin": {"https://evil.example"}}); resp == nil || resp.StatusCode != http.StatusForbidden {
		t.Errorf("bad origin: %v", resp)
	}
	d := connect(t, g, "a", "")
	if _, resp, _ := dialQuery(g, "user_id=b", nil); resp == nil || resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("over MaxConnections: %v", resp)
	}
	d.ws.NetConn().Close()
	eventually(t, "the place is free again", func() bool {
		d, _, err := dialQuery(g, "user_id=b", nil)
		if err == nil {
			_ = d.ws.NetConn().Close()
		}
		return err == nil
	})
}

func TestSlowClientIsCutOffAndSlowsNobody(t *testing.T) {
	g, n := start(t, newController(t), func(c *Config) { c.QueueFrames, c.SocketBuffer = 16, 4<<10 })
	well := connect(t, g, "well", "")
	_ = deaf(t, g, "slow")
	text := strings.Repeat("x", 8<<10)
	failed := 0
	for i := 0; g.users.Connections() > 1; i++ {
		if i == 10000 {
			t.Fatal("a client that reads nothing is not cut off")
		}
		r := pushTo(t, n, "", text, "slow", "well")
		if slices.Contains(r.GetUnreachedUserIds(), "well") {
			t.Fatal("the other client missed a push")
		}
		failed += len(r.GetUnreachedUserIds())
		well.want(textFrame("", "well", text))
	}
	if failed == 0 || g.count.slow.Get() != 1 {
		t.Errorf("%d pushes failed, %d clients counted", failed, g.count.slow.Get())
	}
	if r := pushTo(t, n, "", "x", "slow"); r.GetDeliveredCount() != 0 {
		t.Error(r)
	}
}

func TestSlowDeviceDoesNotFailTheUser(t *testing.T) {
	g, n := start(t, newController(t), func(c *Config) { c.QueueFrames, c.SocketBuffer = 4, 4<<10 })
	well := connect(t, g, "u", "")
	_ = deaf(t, g, "u")
	eventually(t, "both are known", func() bool { return g.users.Connections() == 2 })
	text := strings.Repeat("x", 32<<10)
	for g.users.Connections() > 1 {
		if r := pushTo(t, n, "", text, "u"); r.GetDeliveredCount() != 1 {
			t.Fatal(r)
		}
		well.want(textFrame("", "u", text))
	}
}

func TestSilentClientsArePingedAndDeadOnesCutOff(t *testing.T) {
	g, _ := start(t, newController(t), func(c *Config) { c.PingInterval, c.IdleTimeout = 200*time.Millisecond, 4*time.Second })
	well := connect(t, g, "well", "") // Answers pings.
	_ = deaf(t, g, "dead")
	eventually(t, "the dead client is cut off", func() bool { return g.count.dead.Get() == 1 })
	eventually(t, "it is forgotten", func() bool { return len(g.users.Of("dead")) == 0 })
	well.wantNothing()
	if got := g.users.Connections(); got != 1 {
		t.Errorf("%d connections", got)
	}
	if err := well.ws.WritePing([]byte("abc")); err != nil {
		t.Fatal(err)
	}
	well.wantNothing()
}

func TestMembershipsAreReportedAgainAfterTheControllerRestarted(t *testing.T) {
	c := newController(t)
	g, n := start(t, c, nil)
	a, b := connect(t, g, "a", "r"), connect(t, g, "b", "r")
	gone := connect(t, g, "gone", "r")
	c.stop()
	eventually(t, "not ready without a controller", func() bool { return len(g.NotReady()) > 0 })
	for query, want := range map[string]string{
		"": "503", "?exclude=discovery": "503", "?exclude=controller": "200", "?exclude=discovery,controller": "200", "?exclude=controler": "400",
	} {
		if got := get(t, "http://"+g.HTTPAddr().String()+"/readyz"+query); !strings.HasPrefix(got, want) {
			t.Errorf("/readyz%s: %s, want %s", query, got, want)
		}
	}
	// While it is away: pushes work, a join waits, a leave is remembered.
	if r := pushTo(t, n, "r", "still", "a"); r.GetDeliveredCount() != 1 {
		t.Error(r)
	}
	a.want(textFrame("r", "a", "still"))
	a.say(`{"type":"join","room_id":"later"}`)
	a.wantNothing()
	b.say(`{"type":"leave","room_id":"r"}`)
	b.wantNothing()
	gone.ws.NetConn().Close()
	eventually(t, "gone is gone", func() bool { return g.users.Connections() == 2 })

	c.start(t, c.addr)
	a.want(`{"type":"joined","room_id":"later"}`)
	b.want(`{"type":"left","room_id":"r"}`)
	eventually(t, "all memberships are known again", func() bool {
		return c.has("a", "r") && c.has("a", "later") && c.has("a", "@node:node-1") && c.has("b", "@node:node-1") && c.size() == 4
	})
	eventually(t, "ready again", func() bool { return len(g.NotReady()) == 0 })
	a.wantNothing() // Nothing is confirmed twice.
	if got := counted(g, "connect_node_rejoins_total"); got != 1 {
		t.Errorf("%d rejoins", got)
	}
}

func TestWhatAKilledPredecessorLeftBehindIsEnded(t *testing.T) {
	store, err := refcontroller.New(refcontroller.Config{})
	if err != nil {
		t.Fatal(err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = store.Serve(lis) })
	t.Cleanup(func() {
		store.Close()
		wg.Wait()
	})
	conn, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	found := func(user string) bool {
		r, err := pubsub.NewControllerServiceClient(conn).GetUserNode(t.Context(), &pubsub.GetUserNodeRequest{UserId: user})
		return err == nil && r.GetFound()
	}
	first, _ := start(t, &controller{addr: lis.Addr().String()}, nil)
	connect(t, first, "u", "r")
	connect(t, first, "without a room", "")
	if !found("u") || !found("without a room") {
		t.Fatal("connected users are not found")
	}
	first.Close() // No goodbye.
	if !found("u") {
		t.Fatal("the test needs something that is left behind")
	}
	second, _ := start(t, &controller{addr: lis.Addr().String()}, nil)
	connect(t, second, "new", "r")
	if found("u") || found("without a room") || !found("new") {
		t.Errorf("u %v, without a room %v, new %v", found("u"), found("without a room"), found("new"))
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := second.Drain(ctx); err != nil {
		t.Error(err)
	}
	if found("new") {
		t.Error("found after the gateway has left")
	}
}

func TestReportsAreRetried(t *testing.T) {
	c := newController(t)
	g, _ := start(t, c, nil)
	d := connect(t, g, "u", "")
	c.mu.Lock()
	c.failing = codes.Internal
	c.mu.Unlock()
	d.say(`{"type":"join","room_id":"r"}`)
	eventually(t, "tried twice", func() bool { return len(c.calls("u", "r")) > 1 })
	c.mu.Lock()
	c.failing = codes.OK
	c.mu.Unlock()
	d.want(`{"type":"joined","room_id":"r"}`)
}

func TestControllerMayRefuseARoom(t *testing.T) {
	c := newController(t)
	g, _ := start(t, c, nil)
	d := connect(t, g, "u", "")
	c.mu.Lock()
	c.refuse = "full"
	c.mu.Unlock()
	d.say(`{"type":"join","room_id":"full"}`)
	d.wantError("room_id")
	d.say(`{"type":"leave","room_id":"full"}`)
	d.wantError("room_id")
	c.mu.Lock()
	c.refuse = ""
	c.mu.Unlock()
	d.say(`{"type":"join","room_id":"full"}`)
	d.want(`{"type":"joined","room_id":"full"}`)
}

func TestFlappingEndsInTheTruth(t *testing.T) {
	c := newController(t)
	g, _ := start(t, c, nil)
	var wg sync.WaitGroup
	for i := range 4 {
		d := connect(t, g, "u", "")
		wg.Go(func() {
			for range 50 {
				_ = d.ws.WriteString(`{"type":"join","room_id":"r"}`)
				_ = d.ws.WriteString(`{"type":"leave","room_id":"r"}`)
			}
			if i == 0 {
				_ = d.ws.WriteString(`{"type":"join","room_id":"r"}`)
			}
		})
	}
	wg.Wait()
	eventually(t, "only the one who stayed is in", func() bool {
		return g.count.messages.Get() == 401 && g.members.Stats().Pending == 0 && c.has("u", "r")
	})
	in := 0
	for _, conn := range g.users.Of("u") {
		if conn.member.In("r") {
			in++
		}
	}
	if in != 1 {
		t.Errorf("%d connections in the room", in)
	}
	last := ""
	for _, call := range c.calls("u", "r") {
		if call == last {
			t.Fatalf("%s twice in a row: %v", call, c.calls("u", "r"))
		}
		last = call
	}
}

func TestDrainSaysGoodbye(t *testing.T) {
	c := newController(t)
	g, n := start(t, c, nil)
	a, b := connect(t, g, "a", "r"), connect(t, g, "b", "")
	pushTo(t, n, "r", "last", "a")
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := g.Drain(ctx); err != nil {
		t.Error(err)
	}
	a.want(textFrame("r", "a", "last"))
	a.wantClose(1001)
	b.wantClose(1001)
	if c.size() != 0 {
		t.Errorf("the controller still has %v", c.members)
	}
	if _, resp, _ := dialQuery(g, "user_id=a", nil); resp == nil || resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("new client while draining: %v", resp)
	}
	if resp := get(t, "http://"+g.HTTPAddr().String()+"/readyz"); !strings.HasPrefix(resp, "503") {
		t.Error(resp)
	}
}

// TestPushesAreDeliveredUntilTheControllerHasHeardThatANodeDrains: a manager that were told earlier would fail them, as it does not
// know that nobody is there.
func TestPushesAreDeliveredUntilTheControllerHasHeardThatANodeDrains(t *testing.T) {
	c := newController(t)
	g, n := start(t, c, nil)
	d := connect(t, g, "u", "")
	m := manage(t, n, "pm")
	var once sync.Once
	c.mu.Lock()
	c.leaving = func() {
		once.Do(func() {
			time.Sleep(50 * time.Millisecond) // in which a manager would be told
			seq := m.deliver(&pubsub.Delivery{UserIds: []string{"u"}, Content: &pubsub.MessageContent{Data: []byte("last"), Timestamp: 1}})
			m.wantAck(seq, ack{delivered: 1})
			d.want(textFrame("", "u", "last"))
			_ = m.stream.CloseSend() // as a manager does when it is told
		})
	}
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := g.Drain(ctx); err != nil {
		t.Error(err)
	}
	d.wantClose(1001)
}

func TestDrainIsBoundedWithStuckPeers(t *testing.T) {
	c := newController(t)
	g, n := start(t, c, func(c *Config) { c.QueueFrames, c.SocketBuffer, c.QueueBytes = 10000, 4<<10, 64<<20 })
	_ = deaf(t, g, "stuck")
	text := strings.Repeat("x", 64<<10)
	for range 100 { // 6 MB: more than the kernels take.
		pushTo(t, n, "", text, "stuck")
	}
	stream, err := n.Deliver(t.Context()) // A manager that never closes.
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&pubsub.DeliverRequest{Hello: &pubsub.Hello{ProtocolVersion: 1}}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	c.stop() // Nor does the Controller answer.
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	began := time.Now()
	if g.Drain(ctx) == nil {
		t.Error("drained with stuck peers")
	}
	g.Close()
	if took := time.Since(began); took > 8*time.Second { // WriteTimeout is 10 s
		t.Errorf("took %v", took)
	}
}

func TestCloseIsSafeAtAnyTime(t *testing.T) {
	c := newController(t)
	g, err := New(Config{NodeID: "node-1", GRPCAddress: "127.0.0.1:0", HTTPAddress: "127.0.0.1:0", Members: membership.Config{Controller: c.addr}})
	if err != nil {
		t.Fatal(err)
	}
	if len(g.NotReady()) == 0 {
		t.Error("ready before Start")
	}
	g.Close()
	g.Close()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	g, err = New(Config{NodeID: "node-1", GRPCAddress: "127.0.0.1:0", HTTPAddress: taken.Addr().String(), Members: membership.Config{Controller: c.addr}})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(); err == nil || !strings.Contains(err.Error(), "HTTPAddress") {
		t.Error(err)
	}
}

func TestConfigReportsAllThatIsWrong(t *testing.T) {
	_, err := New(Config{GRPCAddress: "x", Members: membership.Config{MaxRooms: -1}, WriteTimeout: -1, PingInterval: time.Hour})
	for _, field := range []string{"NodeID", "GRPCAddress", "HTTPAddress", "Controller", "MaxRooms", "WriteTimeout", "IdleTimeout"} {
		if err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%v does not name %s", err, field)
		}
	}
}

func get(t *testing.T, address string) string {
	t.Helper()
	resp, err := http.Get(address)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	http.DefaultClient.CloseIdleConnections()
	return resp.Status + " " + string(body)
}

func TestHTTPSides(t *testing.T) {
	g, n := start(t, newController(t), func(c *Config) { c.Pushctl = "go run ./cmd/pushctl" })
	eventually(t, "ready", func() bool { return len(g.NotReady()) == 0 })
	connect(t, g, "u", "r")
	pushTo(t, n, "r", "x", "u")
	base, ops := "http://"+g.HTTPAddr().String(), "http://"+g.MetricsAddr().String()
	for address, want := range map[string]string{
		base + "/":        "<!doctype html>",
		base + "/info":    `{"api_tls":false,"node_id":"node-1","push_manager":"localhost:50053","pushctl":"go run ./cmd/pushctl","tokens":false}`,
		base + "/healthz": "200 OK ok",
		base + "/readyz":  "200 OK ok",
		base + "/ws":      "400 ",
		base + "/ws?user_id=" + strings.Repeat("%E4%B8%AD", 100): "400 Bad Request user_id: ", // The page shows it.
		base + "/other":        "404 ",
		base + "/metrics":      "404 ",
		base + "/ws?user_id=u": "426 ",
		ops + "/healthz":       "200 OK ok",
		ops + "/readyz":        "200 OK ok",
	} {
		if got := get(t, address); !strings.Contains(got, want) {
			t.Errorf("%s: %.200s", address, got)
		}
	}
	text := get(t, ops+"/metrics")
	for _, line := range []string{
		"connect_node_connections 1", "connect_node_users 1", "connect_node_rooms 1", "connect_node_memberships 2", "connect_node_push_frames_total 1",
		`connect_node_reports_total{kind="join",outcome="ok"} 2`, "connect_node_controller_up 1", "go_goroutines",
	} {
		if !strings.Contains(text, line) {
			t.Errorf("no %q in\n%s", line, text)
		}
	}
	if strings.Contains(string(page), "http://") && !strings.Contains(string(page), "http://www.w3.org/2000/svg") {
		t.Error("the page loads from elsewhere")
	}
}

// FuzzClientMessage: no message of a client does more than it may.
func FuzzClientMessage(f *testing.F) {
	for _, s := range []string{`{"type":"join","room_id":"r"}`, `{"type":"leave","room_id":"r"}`, `{"type":"ping"}`, `{}`, `null`, `[`, `{"type":null}`, `{"type":"join","room_id":"@node:x"}`, "{\"type\":\"join\",\"room_id\":\"\xff\"}"} {
		f.Add([]byte(s))
	}
	g, err := New(Config{NodeID: "n", GRPCAddress: "127.0.0.1:0", HTTPAddress: "127.0.0.1:0", Members: membership.Config{Controller: "127.0.0.1:1", MaxRooms: 3}})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(g.Close)
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &conn{g: g, user: "u", closed: true}
		c.member = g.members.Member("u", "", c)
		room, err := c.obey(b)
		var m struct {
			Type   string
			RoomID string `json:"room_id"`
		}
		known := json.Unmarshal(b, &m) == nil && (m.Type == "join" || m.Type == "leave" || m.Type == "ping")
		if err == nil && !known {
			t.Errorf("%q was obeyed", b)
		}
		if err != nil && !strings.Contains(err.Error(), ":") {
			t.Errorf("%v names no field", err)
		}
		if room != "" && checkID("room_id", room) != nil {
			t.Errorf("room %q cannot be", room)
		}
		if n := g.members.Stats().Memberships; n > 1 || n == 1 && (checkRoom(room) != nil || !c.member.In(room)) {
			t.Errorf("in %d rooms after %q", n, room)
		}
		c.member.Close()
		if n := g.members.Stats().Memberships; n != 0 {
			t.Errorf("%d memberships left", n)
		}
	})
}

// FuzzFrame: a push is valid JSON that says what was pushed.
func FuzzFrame(f *testing.F) {
	f.Add("r", "u", []byte("Hello"), "k", "v", int32(0), int64(1))
	f.Add("\"\\", "\u2028\x00", []byte{0xff}, "\x7f", "\xff", int32(-3), int64(-1))
	f.Fuzz(func(t *testing.T, room, user string, data []byte, key, value string, kind int32, timestamp int64) {
		p := queued{frame: newPush(&node.Message{Type: pubsub.MessageType(kind), Data: data, Timestamp: timestamp, RoomID: room, Metadata: map[string]string{key: value}}, room, false)}
		to := &recipient{user: appendString(nil, user)}
		frame, tail, _ := p.appendTo(nil, to)
		text := append(frame, tail...)[len(appendHeader(nil, ws.OpText, p.size(to))):]
		if len(text) != p.size(to) {
			t.Errorf("%d bytes, the header says %d", len(text), p.size(to))
		}
		var got struct {
			Type      string `json:"type"`
			RoomID    string `json:"room_id"`
			UserID    string `json:"user_id"`
			Timestamp int64  `json:"timestamp"`
			RawData   struct {
				Content *string `json:"content"`
				Base64  []byte  `json:"content_base64"`
			} `json:"data"`
			Metadata map[string]string `json:"metadata"`
		}
		if err := json.Unmarshal(text, &got); err != nil {
			t.Fatalf("%v in %s", err, text)
		}
		valid := func(s string) string { return strings.ToValidUTF8(s, "\x00") }
		same := func(a, b string) bool { // Each bad byte becomes one U+FFFD.
			return a == b || valid(b) != b && len([]rune(a)) == len([]rune(b))
		}
		if !same(got.RoomID, room) || !same(got.UserID, user) || got.Timestamp != timestamp || len(got.Metadata) != 1 {
			t.Errorf("%s from room %q user %q", text, room, user)
		}
		if got.RawData.Content != nil && *got.RawData.Content != string(data) || got.RawData.Content == nil && string(got.RawData.Base64) != string(data) {
			t.Errorf("%s from %q", text, data)
		}
	})
}

// BenchmarkPushToRoom measures one push to users that are here, without sockets.
func BenchmarkPushToRoom(b *testing.B) {
	for _, users := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("users=%d", users), func(b *testing.B) {
			g := &Gateway{users: node.NewUsers[*conn]()}
			g.cfg = Config{NodeID: "n", QueueFrames: 1 << 30, QueueBytes: 1 << 40, QueueTotalBytes: 1 << 40}
			g.cfg.Metrics = metrics.NewSet()
			newCounters(g)
			var ids []string
			for i := range users {
				c := &conn{g: g, user: fmt.Sprint("user-", i), writing: true}
				c.to.user = appendString(nil, c.user)
				g.users.Add(c.user, c)
				ids = append(ids, c.user)
			}
			s, data := sessions{g.users}, make([]byte, 128)
			for i := range data {
				data[i] = 'x'
			}
			b.ReportAllocs()
			for b.Loop() {
				m := &node.Message{Data: data} // connections without a Controller are in no room
				for _, id := range ids {
					s.Deliver(id, m)
				}
				b.StopTimer()
				g.users.Each(func(conns []*conn) { conns[0].queue, conns[0].bytes = conns[0].queue[:0], 0 })
				b.StartTimer()
			}
		})
	}
}
