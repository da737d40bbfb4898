package refgateway

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lxzan/gws"

	pubsub "github.com/push-manager/push-manager/proto"
)

// disconnecter is a manager's stream that asks for disconnects.
type disconnecter struct {
	t      testing.TB
	stream pubsub.ConnectNodeService_DeliverClient
	token  uint64
}

func disconnecting(t testing.TB, node pubsub.ConnectNodeServiceClient) *disconnecter {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	stream, err := node.Deliver(ctx)
	if err == nil {
		err = stream.Send(&pubsub.DeliverRequest{Hello: &pubsub.Hello{ProtocolVersion: 1, ManagerId: "m", Shards: 1}})
	}
	if err == nil {
		_, err = stream.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	return &disconnecter{t: t, stream: stream}
}

// disconnect returns how many connections were closed.
func (m *disconnecter) disconnect(d *pubsub.Disconnect) uint32 {
	m.t.Helper()
	m.token++
	d.Token = m.token
	if err := m.stream.Send(&pubsub.DeliverRequest{Disconnects: []*pubsub.Disconnect{d}}); err != nil {
		m.t.Fatal(err)
	}
	for {
		r, err := m.stream.Recv()
		if err != nil {
			m.t.Fatal(err)
		}
		for _, c := range r.GetDisconnected() {
			if c.GetToken() == m.token {
				return c.GetConnections()
			}
		}
	}
}

// wantEnd demands the code and the words of a close frame.
func (d *device) wantEnd(code uint16, words string) {
	d.t.Helper()
	select {
	case err := <-d.closed:
		var closed *gws.CloseError
		if !errors.As(err, &closed) || closed.Code != code || string(closed.Reason) != words {
			d.t.Fatalf("closed with %v, want %d %q", err, code, words)
		}
	case <-time.NewTimer(patience).C:
		d.t.Fatal("not closed")
	}
}

// arrive opens a connection that may be refused.
func arrive(t testing.TB, g *Gateway, query string) *device {
	t.Helper()
	d, _ := dial(t, g, query, nil)
	return d
}

func TestDisconnectClosesTheConnectionsThatItIsAboutAndNoOthers(t *testing.T) {
	g, node := start(t, newController(t), nil)
	m := disconnecting(t, node)
	phone := arrive(t, g, "user_id=a&attr.device_id=phone")
	phone.want(`{"type":"ready","user_id":"a","node_id":"node-1"}`)
	other, inRoom, bob := connect(t, g, "a", ""), connect(t, g, "a", "r"), connect(t, g, "b", "r")
	if n := m.disconnect(&pubsub.Disconnect{UserId: "a", DeviceId: "phone", Code: 4001, Reason: "signed out"}); n != 1 {
		t.Errorf("%d connections of a device were closed", n)
	}
	phone.wantEnd(4001, "signed out")
	if n := m.disconnect(&pubsub.Disconnect{RoomId: "r", Code: 4002, Reason: "closed"}); n != 2 {
		t.Errorf("%d connections in a room were closed", n)
	}
	inRoom.wantEnd(4002, "closed")
	bob.wantEnd(4002, "closed")
	other.wantNothing()
	if n := m.disconnect(&pubsub.Disconnect{UserId: "a", Code: 4003}); n != 1 {
		t.Errorf("%d connections of a user were closed", n)
	}
	other.wantEnd(4003, "")
	connect(t, g, "a", "r") // nobody is refused
}

// TestWhoeverIsRefusedIsSoFromTheAnswerOn while others come all the time: none is let in after it, and none before it is forgotten.
func TestWhoeverIsRefusedIsSoFromTheAnswerOn(t *testing.T) {
	g, node := start(t, newController(t), nil)
	m := disconnecting(t, node)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				d, _, err := dialQuery(g, "user_id=a", nil)
				if err == nil {
					d.ws.ReadLoop()
				}
			}
		})
	}
	for revision := uint64(1); revision < 40; revision += 2 {
		eventually(t, "somebody is here", func() bool { return len(g.users.Of("a")) > 0 })
		m.disconnect(&pubsub.Disconnect{UserId: "a", Code: 4410, RefuseMs: 60_000, Revision: revision})
		eventually(t, "nobody is left", func() bool { return len(g.users.Of("a")) == 0 })
		if n := m.disconnect(&pubsub.Disconnect{UserId: "a", Code: 4410}); n != 0 {
			t.Fatalf("%d connections of a user who is refused", n)
		}
		m.disconnect(&pubsub.Disconnect{UserId: "a", Code: 4000, AllowAgain: true, Revision: revision + 1})
	}
	close(stop)
	m.disconnect(&pubsub.Disconnect{UserId: "a", Code: 4410, RefuseMs: 60_000, Revision: 100})
	wg.Wait()
}

func TestARefusedRoomIsClosedToConnectionsAndJoins(t *testing.T) {
	g, node := start(t, newController(t), nil)
	m := disconnecting(t, node)
	d := connect(t, g, "a", "")
	m.disconnect(&pubsub.Disconnect{RoomId: "r", Code: 4410, Reason: "closed", RefuseMs: 60_000, Revision: 1})
	d.say(`{"type":"join","room_id":"r"}`)
	d.want(`{"type":"error","message":"room_id: refused: closed","room_id":"r"}`)
	arrive(t, g, "user_id=b&room_id=r").wantEnd(4410, "closed")
	m.disconnect(&pubsub.Disconnect{RoomId: "r", Code: 4000, AllowAgain: true, Revision: 2})
	d.say(`{"type":"join","room_id":"r"}`)
	d.want(`{"type":"joined","room_id":"r"}`)
}

// TestPushesBeforeADisconnectComeInFrontOfTheCloseFrame: they wait for the client by then.
func TestPushesBeforeADisconnectComeInFrontOfTheCloseFrame(t *testing.T) {
	g, node := start(t, newController(t), nil)
	m := disconnecting(t, node)
	d := connect(t, g, "a", "")
	for i := range 100 {
		pushTo(t, node, "", fmt.Sprint(i), "a")
	}
	m.disconnect(&pubsub.Disconnect{UserId: "a", Code: 4000, Reason: "now"})
	for i := range 100 {
		d.want(textFrame("", "a", fmt.Sprint(i)))
	}
	d.wantEnd(4000, "now")
}

// TestAClientThatReadsNothingDoesNotOutliveADisconnect: what waits for it is left out in the end.
func TestAClientThatReadsNothingDoesNotOutliveADisconnect(t *testing.T) {
	g, node := start(t, newController(t), func(c *Config) { c.SocketBuffer, c.QueueBytes, c.QueueTotalBytes = 4<<10, 64<<20, 64<<20 })
	m := disconnecting(t, node)
	d, _, err := dialQuery(g, url.Values{"user_id": {"a"}}.Encode(), nil) // nobody reads it
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.ws.NetConn().Close() }()
	eventually(t, "it is here", func() bool { return len(g.users.Of("a")) == 1 })
	for range 64 {
		pushTo(t, node, "", strings.Repeat("x", 128<<10), "a")
	}
	if n := m.disconnect(&pubsub.Disconnect{UserId: "a", Code: 4000}); n != 1 {
		t.Errorf("%d connections were closed", n)
	}
	if r := pushTo(t, node, "", "later", "a"); r.GetDeliveredCount() != 0 {
		t.Error("something came later")
	}
	eventually(t, "it is gone", func() bool { return len(g.users.Of("a")) == 0 })
}
