package devstack_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lxzan/gws"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/push-manager/push-manager/internal/devstack"
	pubsub "github.com/push-manager/push-manager/proto"
)

// returning is a client that comes back at once whenever it is disconnected, whatever the code says.
type returning struct {
	gws.BuiltinEventHandler

	url  string
	stop chan struct{}

	mu    sync.Mutex
	here  bool
	conn  *gws.Conn
	codes []uint16 // of its ends
}

func (c *returning) OnMessage(_ *gws.Conn, m *gws.Message) {
	if strings.HasPrefix(m.Data.String(), `{"type":"ready"`) {
		c.mu.Lock()
		c.here = true
		c.mu.Unlock()
	}
	_ = m.Close()
}

func (c *returning) OnClose(_ *gws.Conn, err error) {
	if closed, ok := errors.AsType[*gws.CloseError](err); ok {
		c.mu.Lock()
		c.codes = append(c.codes, closed.Code)
		c.mu.Unlock()
	}
}

func (c *returning) loop() {
	for {
		select {
		case <-c.stop:
			return
		default:
		}
		conn, _, err := gws.NewClient(c, &gws.ClientOption{Addr: c.url})
		if err == nil {
			c.mu.Lock()
			c.conn = conn
			c.mu.Unlock()
			select {
			case <-c.stop: // who stops it has not seen this connection
				_ = conn.NetConn().Close()
			default:
			}
			conn.ReadLoop()
		}
		c.mu.Lock()
		c.here = false
		c.mu.Unlock()
		time.Sleep(2 * time.Millisecond)
	}
}

func (c *returning) isHere() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.here
}

// seen is how often it has ended with a code.
func (c *returning) seen(code uint16) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, seen := range c.codes {
		if seen == code {
			n++
		}
	}
	return n
}

// TestAUserWithFiveConnectionsOnThreeNodesThatComeBackAtOnceIsGoneOnEveryNode: with refuse_for nobody of them is let in again, on a node
// that starts later neither, and without it, or once it is lifted, all are.
func TestAUserWithFiveConnectionsOnThreeNodesThatComeBackAtOnceIsGoneOnEveryNode(t *testing.T) {
	s := startStack(t, devstack.Config{Nodes: 3})
	defer stopStack(t, s)
	conn, err := grpc.NewClient(s.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	api := pubsub.NewPresenceServiceClient(conn)
	ask := func(r *pubsub.DisconnectRequest) *pubsub.DisconnectResponse {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		reply, err := api.Disconnect(ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		if !reply.GetSuccess() || reply.GetNodes() != 3 || len(reply.GetNodeFailures()) > 0 {
			t.Fatalf("%v: %v", r, reply)
		}
		return reply
	}
	until := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not in time: %s", what)
			}
		}
	}

	var wg sync.WaitGroup
	var clients []*returning
	begin := func(user string, i int, device string) *returning {
		n := s.Nodes()[i%3]
		c := &returning{url: fmt.Sprintf("%s?user_id=%s&attr.device_id=%s", n.WebSocket(), user, device), stop: make(chan struct{})}
		clients = append(clients, c)
		wg.Go(c.loop)
		return c
	}
	defer func() {
		for _, c := range clients {
			close(c.stop)
			c.mu.Lock()
			if c.conn != nil {
				_ = c.conn.NetConn().Close()
			}
			c.mu.Unlock()
		}
		wg.Wait()
	}()
	var alice []*returning
	for i := range 5 {
		alice = append(alice, begin("alice", i, fmt.Sprint("d", i)))
	}
	bob := begin("bob", 0, "d0")
	all := func(here bool) func() bool {
		return func() bool {
			for _, c := range alice {
				if c.isHere() != here {
					return false
				}
			}
			return true
		}
	}
	until("all are connected", func() bool { return all(true)() && bob.isHere() })

	// Without refuse_for they come back.
	if n := ask(&pubsub.DisconnectRequest{UserId: "alice", Code: 4123, Reason: "again"}).GetDisconnected(); n != 5 {
		t.Errorf("%d connections were closed, want 5", n)
	}
	for _, c := range alice {
		until("the close code has come", func() bool { return c.seen(4123) == 1 })
	}
	until("all are back", all(true))

	// One device.
	if n := ask(&pubsub.DisconnectRequest{UserId: "alice", DeviceId: "d3", Code: 4124, RefuseFor: durationpb.New(time.Hour)}).GetDisconnected(); n != 1 {
		t.Errorf("%d connections of a device were closed, want 1", n)
	}
	until("the device is refused again and again", func() bool { return alice[3].seen(4124) > 3 })
	ask(&pubsub.DisconnectRequest{UserId: "alice", DeviceId: "d3", AllowAgain: true})
	until("the device is back", all(true))

	// With refuse_for none is let in. Each of them tries all the time.
	began := time.Now()
	if n := ask(&pubsub.DisconnectRequest{UserId: "alice", RefuseFor: durationpb.New(time.Hour), Reason: "spam"}).GetDisconnected(); n != 5 {
		t.Errorf("%d connections were closed, want 5", n)
	}
	replied := time.Since(began)
	for _, c := range alice {
		until("the close code has come", func() bool { return c.seen(4410) > 0 })
	}
	t.Logf("reply after %v, all gone after %v", replied, time.Since(began))
	for _, c := range alice {
		until("all are refused again and again", func() bool { return c.seen(4410) > 10 })
		if c.isHere() {
			t.Error("a user who is refused is connected")
		}
	}
	if !bob.isHere() || len(bob.codes) > 0 {
		t.Error("somebody else was disconnected, too")
	}
	// Nobody was let in for a moment: each end of a client that was told that it is connected would be one more than the ends that are refusals.
	if n := ask(&pubsub.DisconnectRequest{UserId: "alice", Code: 4125}).GetDisconnected(); n != 0 {
		t.Errorf("%d connections of a user who is refused were there", n)
	}
	ask(&pubsub.DisconnectRequest{UserId: "alice", AllowAgain: true})
	until("all are back", all(true))

	// Over HTTP.
	resp, err := http.Post("http://"+s.HTTPAddress()+"/v1/users/alice/disconnect", "application/json", strings.NewReader(`{"code": 4126, "reason": "by HTTP"}`))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("by HTTP: status %d", resp.StatusCode)
	}
	for _, c := range alice {
		until("the close code has come", func() bool { return c.seen(4126) == 1 })
	}
}
