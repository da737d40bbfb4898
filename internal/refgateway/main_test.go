package refgateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lxzan/gws"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node/membership"
)

func TestMain(m *testing.M) {
	if what := os.Getenv(clientsEnv); what != "" {
		if err := beClients(what); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// patience bounds what must happen. It is long: only a failure takes it.
const patience = time.Minute

// controller is a small Controller that can be stopped, and comes back knowing
// nothing.
type controller struct {
	pubsub.UnimplementedControllerServiceServer

	addr string

	mu      sync.Mutex
	members map[string]string // "user room node" -> name
	log     []string
	refuse  string     // room nobody gets into
	failing codes.Code // of every call
	leaving func()     // called before a leave is taken, if it is not nil
	server  *grpc.Server
	wg      sync.WaitGroup
}

func newController(t testing.TB) *controller {
	t.Helper()
	c := &controller{}
	c.start(t, freeport.Addr(t))
	t.Cleanup(c.stop)
	return c
}

func (c *controller) start(t testing.TB, addr string) {
	t.Helper()
	var lis net.Listener
	eventually(t, "controller listens", func() bool {
		var err error
		lis, err = net.Listen("tcp", addr)
		return err == nil
	})
	gs := grpc.NewServer()
	pubsub.RegisterControllerServiceServer(gs, c)
	c.mu.Lock()
	c.addr, c.members, c.log, c.server = lis.Addr().String(), map[string]string{}, nil, gs
	c.mu.Unlock()
	c.wg.Go(func() { _ = gs.Serve(lis) })
}

func (c *controller) stop() {
	c.mu.Lock()
	gs := c.server
	c.mu.Unlock()
	gs.Stop()
	c.wg.Wait()
}

func (c *controller) JoinRoom(_ context.Context, r *pubsub.JoinRoomRequest) (*pubsub.JoinRoomResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := r.GetUserId() + " " + r.GetRoomId() + " " + r.GetNodeId()
	c.log = append(c.log, "join "+key)
	switch {
	case c.failing != codes.OK:
		return nil, status.Error(c.failing, "as the test wants")
	case r.GetRoomId() == c.refuse:
		return &pubsub.JoinRoomResponse{Message: "room is full"}, nil
	}
	c.members[key] = r.GetUserName()
	return &pubsub.JoinRoomResponse{Success: true}, nil
}

func (c *controller) LeaveRoom(_ context.Context, r *pubsub.LeaveRoomRequest) (*pubsub.LeaveRoomResponse, error) {
	c.mu.Lock()
	if leaving := c.leaving; leaving != nil {
		c.mu.Unlock()
		leaving()
		c.mu.Lock()
	}
	defer c.mu.Unlock()
	if r.GetUserId() == "" {
		return nil, status.Error(codes.InvalidArgument, "user_id: required") // As old Controllers do.
	}
	key := r.GetUserId() + " " + r.GetRoomId() + " " + r.GetNodeId()
	c.log = append(c.log, "leave "+key)
	if c.failing != codes.OK {
		return nil, status.Error(c.failing, "as the test wants")
	}
	_, ok := c.members[key]
	delete(c.members, key)
	return &pubsub.LeaveRoomResponse{Success: ok}, nil
}

func (c *controller) has(user, room string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.members[user+" "+room+" node-1"]
	return ok
}

func (c *controller) size() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.members)
}

// calls returns the calls about a user and room, in order.
func (c *controller) calls(user, room string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var calls []string
	for _, line := range c.log {
		if what, ok := strings.CutSuffix(line, " "+user+" "+room+" node-1"); ok {
			calls = append(calls, what)
		}
	}
	return calls
}

// start runs a gateway and returns it with a client of its node.
func start(t testing.TB, c *controller, change func(*Config)) (*Gateway, pubsub.ConnectNodeServiceClient) {
	t.Helper()
	cfg := Config{NodeID: "node-1", GRPCAddress: "127.0.0.1:0", HTTPAddress: "127.0.0.1:0", MetricsAddress: "127.0.0.1:0", Members: membership.Config{Controller: c.addr}}
	if change != nil {
		change(&cfg)
	}
	g, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.Close()
		if held, writers, kept, waiting := g.held.Load(), g.writers.Load(), g.kept.Load(), g.waiting.Load(); held != 0 || writers != 0 || kept != 0 || waiting != 0 {
			t.Errorf("%d bytes and %d writers, %d bytes and %d frames in inboxes on the books of a closed gateway", held, writers, kept, waiting)
		}
	})
	conn, err := grpc.NewClient(g.GRPCAddr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return g, pubsub.NewConnectNodeServiceClient(conn)
}

// device is a WebSocket client.
type device struct {
	gws.BuiltinEventHandler

	t      testing.TB
	ws     *gws.Conn
	frames chan string
	closed chan error
}

func (d *device) OnMessage(_ *gws.Conn, m *gws.Message) {
	text := string(m.Bytes())
	_ = m.Close()
	d.frames <- text
}

func (d *device) OnClose(_ *gws.Conn, err error) { d.closed <- err }

func dialQuery(g *Gateway, query string, headers http.Header) (*device, *http.Response, error) {
	return dialWith(g, query, &gws.ClientOption{RequestHeader: headers})
}

func dialWith(g *Gateway, query string, option *gws.ClientOption) (*device, *http.Response, error) {
	d := &device{frames: make(chan string, 10000), closed: make(chan error, 1)}
	option.Addr = "ws://" + g.HTTPAddr().String() + "/ws?" + query
	ws, resp, err := gws.NewClient(d, option)
	d.ws = ws
	return d, resp, err
}

// connect opens a connection and waits until it is confirmed.
func connect(t testing.TB, g *Gateway, user, room string) *device {
	t.Helper()
	q := url.Values{"user_id": {user}, "user_name": {"name of " + user}}
	if room != "" {
		q.Set("room_id", room)
	}
	d, _, err := dialQuery(g, q.Encode(), nil)
	if err != nil {
		t.Fatal(err)
	}
	d.listen(t)
	if room == "" {
		d.want(fmt.Sprintf(`{"type":"ready","user_id":%q,"node_id":"node-1"}`, user))
	} else {
		d.want(fmt.Sprintf(`{"type":"joined","room_id":%q}`, room))
	}
	return d
}

// listen reads what comes until the test ends.
func (d *device) listen(t testing.TB) {
	t.Helper()
	d.t = t
	var wg sync.WaitGroup
	wg.Go(d.ws.ReadLoop)
	t.Cleanup(func() {
		_ = d.ws.NetConn().Close()
		wg.Wait()
	})
}

func (d *device) say(text string) {
	d.t.Helper()
	if err := d.ws.WriteString(text); err != nil {
		d.t.Fatal(err)
	}
}

func (d *device) next() string {
	d.t.Helper()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case text := <-d.frames:
		return text
	case <-timer.C:
		d.t.Fatal("no frame")
		return ""
	}
}

// want demands the next frame, byte for byte.
func (d *device) want(frame string) {
	d.t.Helper()
	if got := d.next(); got != frame {
		d.t.Fatalf("got  %s\nwant %s", got, frame)
	}
}

// wantError demands an error that names the field.
func (d *device) wantError(field string) {
	d.t.Helper()
	var m struct{ Type, Message string }
	got := d.next()
	if err := json.Unmarshal([]byte(got), &m); err != nil || m.Type != "error" || !strings.HasPrefix(m.Message, field+":") {
		d.t.Fatalf("got %s, want an error about %s", got, field)
	}
	for _, word := range []string{"Go ", "json:", "struct", "unmarshal", "gws", "EOF", "\\x"} {
		if strings.Contains(m.Message, word) {
			d.t.Errorf("%q is for those who know Go: %q", m.Message, word)
		}
	}
}

// wantNothing demands that nothing has come, by a question and its answer.
func (d *device) wantNothing() {
	d.t.Helper()
	d.say(`{"type":"ping"}`)
	d.want(`{"type":"pong"}`)
}

func (d *device) wantClose(code uint16) {
	d.t.Helper()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case err := <-d.closed:
		var closed *gws.CloseError
		if code == 0 {
			return
		}
		if !errors.As(err, &closed) || closed.Code != code {
			d.t.Fatalf("closed with %v, want %d", err, code)
		}
	case <-timer.C:
		d.t.Fatal("not closed")
	}
}

func pushTo(t testing.TB, node pubsub.ConnectNodeServiceClient, room, text string, users ...string) *pubsub.PushMessageBatchResponse {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := node.PushMessageBatch(ctx, &pubsub.PushMessageBatchRequest{
		UserIds: users, RoomId: room, Content: &pubsub.MessageContent{Data: []byte(text), Timestamp: 1},
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func textFrame(room, user, text string) string {
	return fmt.Sprintf(`{"type":"text","room_id":%q,"user_id":%q,"timestamp":1,"data":{"content":%q},"metadata":{}}`, room, user, text)
}

func broadcastFrame(user, text string) string {
	return strings.TrimSuffix(textFrame("", user, text), "}") + `,"broadcast":true}`
}

// eventually polls what other goroutines bring about.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}
