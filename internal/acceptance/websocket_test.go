package acceptance

import (
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/lxzan/gws"
)

// client is a WebSocket client of a gateway: it keeps the frames that arrive.
type client struct {
	gws.BuiltinEventHandler

	t    *testing.T
	name string
	conn *gws.Conn

	mu     sync.Mutex
	ready  bool             // the gateway says that pushes reach the user
	frames []map[string]any // but for "ready", "joined" and "left"
	rooms  []string         // in which the gateway says it is
	closed error
}

// connect opens a WebSocket as the contract says and waits until the client is in
// its room.
func connect(t *testing.T, addr, user, room string) *client {
	t.Helper()
	c := &client{t: t, name: user + " at " + addr}
	query := url.Values{"user_id": {user}, "user_name": {"name of " + user}}
	if room != "" {
		query.Set("room_id", room)
	}
	conn, _, err := gws.NewClient(c, &gws.ClientOption{Addr: "ws://" + addr + "/ws?" + query.Encode()})
	if err != nil {
		t.Fatalf("%s: %v", c.name, err)
	}
	c.conn = conn
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		conn.ReadLoop()
	}()
	t.Cleanup(func() {
		_ = conn.NetConn().Close()
		<-ended
	})
	if room != "" {
		c.in(room)
	} else {
		c.until("ready", func() bool { return c.ready })
	}
	return c
}

// OnMessage implements gws.Event.
func (c *client) OnMessage(_ *gws.Conn, m *gws.Message) {
	defer m.Close()
	var frame map[string]any
	err := json.Unmarshal(m.Bytes(), &frame)
	c.mu.Lock()
	defer c.mu.Unlock()
	room, _ := frame["room_id"].(string)
	switch {
	case err != nil:
		c.t.Errorf("%s: %v: %s", c.name, err, m.Bytes())
	case frame["type"] == "ready":
		c.ready = true
	case frame["type"] == "joined":
		c.rooms = append(c.rooms, room)
	case frame["type"] == "left":
		c.rooms = slices.DeleteFunc(c.rooms, func(r string) bool { return r == room })
	default:
		c.frames = append(c.frames, frame)
	}
}

// OnClose implements gws.Event.
func (c *client) OnClose(_ *gws.Conn, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = err
}

func (c *client) send(message string) {
	c.t.Helper()
	if err := c.conn.WriteString(message); err != nil {
		c.t.Fatalf("%s: %v", c.name, err)
	}
}

// join enters a further room.
func (c *client) join(room string) {
	c.t.Helper()
	c.send(`{"type":"join","room_id":"` + room + `"}`)
	c.in(room)
}

// leave leaves a room.
func (c *client) leave(room string) {
	c.t.Helper()
	c.send(`{"type":"leave","room_id":"` + room + `"}`)
	c.until("left "+room, func() bool { return !slices.Contains(c.rooms, room) })
}

// in waits until the gateway says that the client is in a room.
func (c *client) in(room string) {
	c.t.Helper()
	c.until("joined "+room, func() bool { return slices.Contains(c.rooms, room) })
}

func (c *client) until(what string, ok func() bool) {
	c.t.Helper()
	eventually(c.t, c.name+": "+what, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.closed != nil {
			return fmt.Errorf("closed: %w", c.closed)
		}
		if !ok() {
			return fmt.Errorf("in %q, got %v", c.rooms, c.frames)
		}
		return nil
	})
}

// frame is the frame of a text push as the contract has it.
func frame(user, room, content string) map[string]any {
	return map[string]any{
		"type": "text", "room_id": room, "user_id": user, "timestamp": float64(1),
		"data": map[string]any{"content": content}, "metadata": map[string]any{},
	}
}

// broadcast is the frame of a text push to everybody.
func broadcast(user, content string) map[string]any {
	f := frame(user, "", content)
	f["broadcast"] = true
	return f
}

// expect waits for frames and checks that they are all that has come, in order.
func (c *client) expect(want ...map[string]any) {
	c.t.Helper()
	c.until(fmt.Sprint(len(want), " frames"), func() bool { return len(c.frames) >= len(want) })
	c.mu.Lock()
	defer c.mu.Unlock()
	if want == nil {
		want = []map[string]any{}
	}
	if diff := cmp.Diff(want, append([]map[string]any{}, c.frames...)); diff != "" {
		c.t.Errorf("%s: frames differ (-want +got):\n%s", c.name, diff)
	}
}
