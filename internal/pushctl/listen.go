package pushctl

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/lxzan/gws"

	"github.com/push-manager/push-manager/internal/invoke"
)

type listenCmd struct {
	User  string   `help:"User to be. Default: pushctl and a number."`
	Name  string   `help:"Name of the user. Default: the user."`
	Room  []string `help:"Room to join, may be repeated."`
	URL   string   `name:"url" default:"ws://localhost:8080/ws" env:"CONNECT_NODE_URL" help:"WebSocket of a Connect-Node."`
	Count int      `help:"Exit after so many pushes. 0: go on until Ctrl-C."`
}

// The bounds of a connection.
const (
	handshakeTimeout = 5 * time.Second
	maxFrame         = 4 << 20
	pingInterval     = 10 * time.Second
	silence          = 3 * pingInterval // a connection that gives no sign of life for so long is dead
)

// The pauses between attempts to connect again: twice as long each time, and each
// drawn from the upper half, so that those who were cut off together do not come back
// together. They begin anew after a connection that held for steady.
const (
	againFirst = 250 * time.Millisecond
	againMost  = 15 * time.Second
	steady     = 10 * time.Second
)

// Run prints pushes until it is interrupted. A connection that is lost comes back, in
// the same rooms; one that was never there is an error.
func (c *listenCmd) Run(ctx context.Context, t *terminal) error {
	address, err := c.address()
	if err != nil {
		return err
	}
	l := &listener{t: t, count: c.Count}
	pause := againFirst
	for first := true; ; first = false {
		opened := time.Now()
		joined, err := c.connected(ctx, l, address)
		var final *finalError
		switch {
		case err == nil || ctx.Err() != nil:
			return nil //nolint:nilerr // Whoever interrupts it has seen enough.
		case first && !joined:
			return c.explain(err)
		case errors.As(err, &final):
			return err
		}
		if joined && time.Since(opened) > steady {
			pause = againFirst
		}
		wait := pause/2 + rand.N(pause/2)
		_, _ = fmt.Fprintf(t.err, "%v; connecting again in %v\n", err, wait.Round(10*time.Millisecond))
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
		pause = min(2*pause, againMost)
	}
}

// finalError is an end that would come again.
type finalError struct{ error }

// connected is one connection, from its handshake to its end. It tells whether there
// was one, and why it ended: nil when enough was seen.
func (c *listenCmd) connected(ctx context.Context, l *listener, address string) (joined bool, err error) {
	l.done = make(chan error, 1)
	conn, resp, err := gws.NewClient(l, &gws.ClientOption{
		Addr: address, HandshakeTimeout: handshakeTimeout, ReadMaxPayloadSize: maxFrame,
		PermessageDeflate: gws.PermessageDeflate{},
	})
	if resp != nil && resp.Body != nil {
		defer func() { _ = resp.Body.Close() }()
	}
	if err != nil {
		return false, refusal(resp, err)
	}
	var readDone = make(chan struct{})
	go func() {
		defer close(readDone)
		defer func() {
			// What a node sends must not end this process, whatever it is.
			if e := recover(); e != nil {
				l.end(fmt.Errorf("the Connect-Node sent what cannot be read: %v", e))
			}
		}()
		conn.ReadLoop()
	}()
	defer func() {
		_ = conn.WriteClose(1000, nil)
		_ = conn.NetConn().Close()
		<-readDone
	}()
	for _, room := range c.Room[min(1, len(c.Room)):] {
		join, err := json.Marshal(map[string]string{"type": "join", "room_id": room})
		if err != nil {
			return true, &finalError{fmt.Errorf("join %q: %w", room, err)}
		}
		if err := conn.WriteMessage(gws.OpcodeText, join); err != nil {
			return true, fmt.Errorf("join %q: %w", room, err)
		}
	}
	where := "no room"
	if len(c.Room) > 0 {
		where = "room " + strings.Join(c.Room, ", ")
	}
	_, _ = fmt.Fprintf(l.t.err, "listening as %q in %s at %s (Ctrl-C ends)\n", c.User, where, c.URL)
	return true, l.wait(ctx, conn)
}

// refusal is why a handshake failed. What the node says of the request itself, it will
// say again.
func refusal(resp *http.Response, err error) error {
	switch {
	case resp == nil && strings.Contains(err.Error(), "malformed HTTP"): // with what came instead
		return errors.New("no connection: what answers there does not speak HTTP/1, as a gRPC port does not; a Connect-Node has its WebSocket at its HTTP port")
	case resp == nil || resp.StatusCode == http.StatusSwitchingProtocols:
		return fmt.Errorf("no connection: %w", err)
	}
	said := fmt.Sprintf("%d (%s)", resp.StatusCode, http.StatusText(resp.StatusCode))
	if resp.Body != nil {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 256)) // what there is of it
		line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
		if line = clean(strings.TrimSpace(line)); line != "" {
			said = fmt.Sprintf("%d: %s", resp.StatusCode, line)
		}
	}
	switch code := resp.StatusCode; {
	case code >= 500 || code == http.StatusRequestTimeout || code == http.StatusTooManyRequests:
		return fmt.Errorf("no connection: the Connect-Node does not take it now, with %s", said)
	case code >= 400:
		return &finalError{fmt.Errorf("the Connect-Node refuses the connection with %s", said)}
	}
	return fmt.Errorf("no connection: what answers there opens no WebSocket, but says %s", said)
}

// ended is why a connection ended, as the other side has put it.
func ended(err error) error {
	var said *gws.CloseError
	if !errors.As(err, &said) {
		return fmt.Errorf("the connection was lost: %w", err)
	}
	lost := fmt.Errorf("the Connect-Node closed the connection (%d %s)", said.Code, clean(string(said.Reason)))
	// In the range of applications: 4408 and 4429 pass, a client that is not wanted stays so.
	if said.Code >= 4400 && said.Code < 4500 && said.Code != 4408 && said.Code != 4429 {
		return &finalError{lost}
	}
	return lost
}

// address builds the WebSocket's address and fills in who is missing.
func (c *listenCmd) address() (string, error) {
	u, err := url.Parse(c.URL)
	if err != nil || u.Scheme != "ws" && u.Scheme != "wss" || u.Host == "" {
		return "", &usageError{fmt.Sprintf("--url: %q is not like ws://HOST:PORT/ws", c.URL)}
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/ws"
	}
	c.User = cmp.Or(c.User, fmt.Sprintf("pushctl-%d", os.Getpid()))
	q := u.Query()
	q.Set("user_id", c.User)
	q.Set("user_name", cmp.Or(c.Name, c.User))
	if len(c.Room) > 0 {
		q.Set("room_id", c.Room[0])
	}
	u.RawQuery = q.Encode()
	return u.String(), nil
}

func (c *listenCmd) explain(err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) && op.Op == "dial" {
		return fmt.Errorf("no Connect-Node answers at %s; start everything on this machine with: %s dev", c.URL, invoke.As("push-manager"))
	}
	return fmt.Errorf("%s: %w", c.URL, err)
}

// listener prints what arrives. gws calls it from one goroutine, one for each connection,
// one connection after the other.
type listener struct {
	gws.BuiltinEventHandler

	// Static.
	t     *terminal
	count int

	// Static while there is a connection.
	done chan error // its end, once

	// Owned by the reader.
	seen int
}

func (l *listener) wait(ctx context.Context, conn *gws.Conn) error {
	ping := time.NewTicker(pingInterval)
	defer ping.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-l.done:
			return err
		case <-ping.C:
			// When it cannot be written the reader has noticed, too.
			_ = conn.WritePing(nil)
		}
	}
}

func (l *listener) end(err error) {
	select {
	case l.done <- err:
	default: // it has ended before
	}
}

// OnOpen implements gws.Event.
func (l *listener) OnOpen(conn *gws.Conn) { _ = conn.SetReadDeadline(time.Now().Add(silence)) }

// OnPong implements gws.Event.
func (l *listener) OnPong(conn *gws.Conn, _ []byte) {
	_ = conn.SetReadDeadline(time.Now().Add(silence))
}

// OnPing implements gws.Event.
func (l *listener) OnPing(conn *gws.Conn, payload []byte) {
	_ = conn.SetReadDeadline(time.Now().Add(silence))
	_ = conn.WritePong(payload)
}

// OnClose implements gws.Event.
func (l *listener) OnClose(_ *gws.Conn, err error) {
	l.end(ended(err))
}

// OnMessage implements gws.Event.
func (l *listener) OnMessage(conn *gws.Conn, message *gws.Message) {
	defer func() { _ = message.Close() }()
	_ = conn.SetReadDeadline(time.Now().Add(silence))
	raw := message.Bytes()
	var f frame
	isPush := json.Unmarshal(raw, &f) == nil && f.Data != nil
	line := string(raw)
	switch {
	case l.t.json:
	case isPush:
		line = f.push(l.t)
	default:
		line = l.t.paint(grey, f.control(line))
	}
	if _, err := fmt.Fprintln(l.t.out, line); err != nil {
		l.end(&finalError{fmt.Errorf("print: %w", err)})
		return
	}
	if !isPush {
		return
	}
	if l.seen++; l.count > 0 && l.seen >= l.count {
		l.end(nil)
	}
}

// frame is what the reference Connect-Node sends to clients: a push when it has
// data, otherwise an answer to what the client asked for.
type frame struct {
	Type      string            `json:"type"`
	Room      string            `json:"room_id"`
	Broadcast bool              `json:"broadcast"`
	User      string            `json:"user_id"`
	Timestamp int64             `json:"timestamp"`
	Data      *frameData        `json:"data"`
	Metadata  map[string]string `json:"metadata"`
	Message   string            `json:"message"`
	Node      string            `json:"node_id"`
}

type frameData struct {
	Content *string `json:"content"`
	Base64  string  `json:"content_base64"`
}

// push is a push as one line.
func (f *frame) push(t *terminal) string {
	var b strings.Builder
	b.WriteString(t.paint(grey, time.Unix(f.Timestamp, 0).Format(time.TimeOnly)) + "  ")
	switch {
	case f.Broadcast:
		b.WriteString(t.paint(yellow, "to everybody") + "  ")
	case f.Room != "":
		b.WriteString(t.paint(yellow, clean(f.Room)) + "  ")
	}
	if f.Type != "text" {
		b.WriteString("[" + clean(f.Type) + "] ")
	}
	b.WriteString(f.text())
	for _, k := range slices.Sorted(maps.Keys(f.Metadata)) {
		b.WriteString("  " + t.paint(grey, clean(k)+"="+clean(f.Metadata[k])))
	}
	return b.String()
}

// control is an answer as one line, as it came when it is not known.
func (f *frame) control(raw string) string {
	switch f.Type {
	case "joined", "left":
		return f.Type + " " + clean(f.Room)
	case "ready":
		return "ready at " + clean(f.Node)
	case "error":
		return "error: " + clean(f.Message)
	}
	return clean(raw)
}

func (f *frame) text() string {
	if f.Data.Content != nil {
		return clean(*f.Data.Content)
	}
	raw, err := base64.StdEncoding.DecodeString(f.Data.Base64)
	if err != nil {
		return "(data that is not base64)"
	}
	return fmt.Sprintf("(%d bytes of data) %x", len(raw), raw[:min(len(raw), 32)])
}
