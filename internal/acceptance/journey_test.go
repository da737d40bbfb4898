package acceptance

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

// deployment is Push-Manager with three gateways, however it was started.
type deployment struct {
	manager  pubsub.PushManagerServiceClient
	gateways []string // host:port of their WebSockets
	kept     int      // pushes of transcripts to the logs of rooms
	position string   // of the first
}

// TestDevProgramServesRealClients runs what the README's first command runs.
func TestDevProgramServesRealClients(t *testing.T) {
	base := freeport.Row(t, 16)
	dev := start(t, binary(t, "push-manager"), nil, "dev", "--base-port", strconv.Itoa(base), "--data-dir", t.TempDir())
	var d deployment
	eventually(t, "dev says that it is ready", func() error {
		if !strings.Contains(dev.out.String(), "Ready.") {
			return fmt.Errorf("printed:\n%s", dev.out.String())
		}
		return nil
	})
	printed := dev.out.String()
	d.manager = pubsub.NewPushManagerServiceClient(dial(t, printedAddress(t, printed, `Push-Manager +`)))
	for i := range 3 {
		d.gateways = append(d.gateways, printedAddress(t, printed, fmt.Sprintf(`connect-node-%d .*WebSocket at http://`, i+1)))
	}
	journey(t, d)
	dev.signal(syscall.SIGTERM)
	if code := dev.exit(10 * time.Second); code != 0 {
		t.Errorf("dev exits with %d", code)
	}
}

// TestProgramsRunOneByOne runs etcd, a Controller, three Connect-Nodes and
// Push-Manager, each as a process of its own.
func TestProgramsRunOneByOne(t *testing.T) {
	etcd := startEtcd(t)
	p := freeport.Take(t, 2+3*3)
	controller := "127.0.0.1:" + p[0]
	all := []*process{start(t, binary(t, "controller"), []string{"GRPC_PORT=" + p[0], "METRICS_PORT=" + p[1], "ETCD_ENDPOINTS=" + etcd})}
	ready(t, p[1])
	var d deployment
	for i := range 3 {
		p := p[2+3*i:]
		all = append(all, start(t, binary(t, "connect-node"), []string{
			fmt.Sprint("NODE_ID=connect-node-", i+1), "GRPC_PORT=" + p[0], "HTTP_PORT=" + p[1], "METRICS_PORT=" + p[2],
			"CONTROLLER_ADDRESS=" + controller, "ETCD_ENDPOINTS=" + etcd,
		}))
		d.gateways = append(d.gateways, "127.0.0.1:"+p[1])
	}
	m := startManager(t, etcd, controller, 3)
	d.manager = m
	all = append(all, m.process)
	journey(t, d)
	for _, p := range slices.Backward(all) {
		p.signal(syscall.SIGTERM)
		if code := p.exit(10 * time.Second); code != 0 {
			t.Errorf("%s exits with %d", p.name, code)
		}
	}
}

// journey is a day in the life of a deployment: what callers are told and what
// reaches real clients.
func journey(t *testing.T, d deployment) {
	t.Helper()
	alice := connect(t, d.gateways[0], "alice", "r1")
	alicePhone := connect(t, d.gateways[1], "alice", "r1")
	bob := connect(t, d.gateways[1], "bob", "r1")
	carol := connect(t, d.gateways[2], "carol", "r1")
	carol.join("r2")
	dave := connect(t, d.gateways[2], "dave", "r2")
	erin := connect(t, d.gateways[0], "erin", "") // in no room
	content := func(s string) *pubsub.MessageContent {
		return &pubsub.MessageContent{Data: []byte(s), Timestamp: 1}
	}
	ctx := within(t, 2*patience)
	check := func(what string, got *pubsub.DeliverySummary, success, want bool, err error, sum *pubsub.DeliverySummary) {
		t.Helper()
		if err != nil || success != want || !proto.Equal(got, sum) {
			t.Errorf("%s: success %v, %v, %v; want %v, %v", what, success, got, err, want, sum)
		}
	}
	// A client is in a room once it has been told so, whoever asks.
	room, err := d.manager.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "r1", Content: content("hello")})
	check("room", room.GetSummary(), room.GetSuccess(), true, err, &pubsub.DeliverySummary{Targets: 3, Delivered: 3})
	room, err = d.manager.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "r1", Content: content("not for bob"), ExcludeUserIds: []string{"bob", "nobody"}})
	check("exclude", room.GetSummary(), room.GetSuccess(), true, err, &pubsub.DeliverySummary{Targets: 2, Delivered: 2})
	user, err := d.manager.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "alice", Content: content("two devices")})
	check("user with two devices", user.GetSummary(), user.GetSuccess(), true, err, &pubsub.DeliverySummary{Targets: 1, Delivered: 1})
	user, err = d.manager.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "erin", Content: content("no room")})
	check("user in no room", user.GetSummary(), user.GetSuccess(), true, err, &pubsub.DeliverySummary{Targets: 1, Delivered: 1})
	users, err := d.manager.PushToUsers(ctx, &pubsub.PushToUsersRequest{UserIds: []string{"alice", "dave", "zoe", "dave"}, Content: content("three of you")})
	check("users", users.GetSummary(), users.GetSuccess(), true, err, &pubsub.DeliverySummary{Targets: 3, Delivered: 2, Offline: 1})
	all, err := d.manager.BroadcastMessage(ctx, &pubsub.BroadcastMessageRequest{Content: content("everybody")})
	check("broadcast", all.GetSummary(), all.GetSuccess(), true, err, &pubsub.DeliverySummary{Targets: 6, Delivered: 6})

	carol.leave("r1")
	room, err = d.manager.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "r1", Content: content("carol has left")})
	// The gateway knows at once; that the Controller's word is still on its way is
	// then healed.
	after := &pubsub.DeliverySummary{Targets: 2, Delivered: 2}
	if room.GetSummary().GetTargets() == 3 {
		after.Targets, after.Offline = 3, 1
	}
	check("room after a leave", room.GetSummary(), room.GetSuccess(), true, err, after)
	room, err = d.manager.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "r2", Content: content("r2")})
	check("second room", room.GetSummary(), room.GetSuccess(), true, err, &pubsub.DeliverySummary{Targets: 2, Delivered: 2})
	room, err = d.manager.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "nowhere", Content: content("x")})
	check("unknown room", room.GetSummary(), room.GetSuccess(), false, err, &pubsub.DeliverySummary{})
	if want := `room "nowhere" not found`; room.GetMessage() != want {
		t.Errorf("unknown room: %q, want %q", room.GetMessage(), want)
	}
	user, err = d.manager.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "zoe", Content: content("x")})
	check("offline user", user.GetSummary(), user.GetSuccess(), false, err, &pubsub.DeliverySummary{Targets: 1, Offline: 1})
	if want := `user "zoe" is offline`; user.GetMessage() != want {
		t.Errorf("offline user: %q, want %q", user.GetMessage(), want)
	}
	binaryData := &pubsub.MessageContent{Type: pubsub.MessageType_AUDIO, Data: []byte{0xff, 0}, Timestamp: 1, Metadata: map[string]string{"k": "v"}}
	user, err = d.manager.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "dave", Content: binaryData})
	check("bytes that are not UTF-8", user.GetSummary(), user.GetSuccess(), true, err, &pubsub.DeliverySummary{Targets: 1, Delivered: 1})

	alicePhone.expect(frame("alice", "r1", "hello"), frame("alice", "r1", "not for bob"), frame("alice", "", "two devices"),
		frame("alice", "", "three of you"), broadcast("alice", "everybody"), frame("alice", "r1", "carol has left"))
	alice.expect(alicePhone.frames...)
	bob.expect(frame("bob", "r1", "hello"), broadcast("bob", "everybody"), frame("bob", "r1", "carol has left"))
	carol.expect(frame("carol", "r1", "hello"), frame("carol", "r1", "not for bob"), broadcast("carol", "everybody"), frame("carol", "r2", "r2"))
	erin.expect(frame("erin", "", "no room"), broadcast("erin", "everybody"))
	audio := frame("dave", "", "")
	audio["type"], audio["data"], audio["metadata"] = "audio", map[string]any{"content_base64": "/wA="}, map[string]any{"k": "v"}
	dave.expect(frame("dave", "", "three of you"), broadcast("dave", "everybody"), frame("dave", "r2", "r2"), audio)
}

// printedAddress finds host:port in what dev has printed.
func printedAddress(t *testing.T, printed, before string) string {
	t.Helper()
	m := regexp.MustCompile(before + `(\S+:\d+)`).FindStringSubmatch(printed)
	if m == nil {
		t.Fatalf("no address behind %q in:\n%s", before, printed)
	}
	return m[1]
}
