package refgateway

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/push-manager/push-manager/transport/node"
	"github.com/push-manager/push-manager/transport/node/membership"
)

// rawClient is a socket on which the handshake of a WebSocket was made.
type rawClient struct {
	net.Conn

	br *bufio.Reader
}

// shake makes the handshake, with what is to follow it at once. The client takes little
// before it reads.
func shake(t testing.TB, g *Gateway, query, headers, behind string) *rawClient {
	t.Helper()
	conn, err := net.Dial("tcp", g.HTTPAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	_ = conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(conn, "GET /ws?%s HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n%s\r\n%s", query, headers, behind)
	c := &rawClient{conn, bufio.NewReaderSize(conn, 16)}
	resp, err := http.ReadResponse(c.br, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(resp, err)
	}
	if headers != "" && resp.Header.Get("Sec-WebSocket-Protocol") != "pm.v1" {
		t.Errorf("subprotocol %q", resp.Header.Get("Sec-WebSocket-Protocol"))
	}
	return c
}

// deaf is a client that does not read.
func deaf(t testing.TB, g *Gateway, user string) *rawClient {
	t.Helper()
	before := len(g.users.Of(user))
	c := shake(t, g, "user_id="+user, "", "")
	eventually(t, "raw client is known", func() bool { return len(g.users.Of(user)) > before })
	return c
}

// frame reads what the gateway has sent, which must be a frame as servers send them.
func (c *rawClient) frame() (op ws.OpCode, payload []byte, err error) {
	h, err := ws.ReadHeader(c.br)
	if err != nil {
		return 0, nil, err
	}
	if err := ws.CheckHeader(h, ws.StateClientSide); err != nil || !h.Fin {
		return 0, nil, fmt.Errorf("frame from the gateway: %+v: %w", h, err)
	}
	payload = make([]byte, h.Length)
	_, err = io.ReadFull(c.br, payload)
	return h.OpCode, payload, err
}

// untilClose reads to the close frame and returns its code, and the frames before it. 0:
// there was none.
func (c *rawClient) untilClose(t testing.TB) (code uint16, frames int) {
	t.Helper()
	for {
		op, payload, err := c.frame()
		switch {
		case err != nil:
			return 0, frames
		case op == ws.OpClose && len(payload) >= 2:
			if _, err := c.br.ReadByte(); err == nil {
				t.Error("something follows the close frame")
			}
			return binary.BigEndian.Uint16(payload), frames
		}
		frames++
	}
}

// masked is a frame of a client, whose mask is 0.
func masked(first byte, payload string) string {
	b := []byte{first}
	switch n := len(payload); {
	case n < 126:
		b = append(b, 0x80|byte(n))
	default:
		b = binary.BigEndian.AppendUint16(append(b, 0x80|126), uint16(n))
	}
	return string(b) + "\x00\x00\x00\x00" + payload
}

// topBit is a frame that says its length has the top bit set.
func topBit(first byte) string {
	return string([]byte{first, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
}

var hostile = []struct {
	name, bytes string
	code        uint16
}{
	{"text, length with the top bit", topBit(0x81), 1002},
	{"binary, length with the top bit", topBit(0x82), 1002},
	{"continuation, length with the top bit", topBit(0x80), 1002},
	{"first of fragments, length with the top bit", topBit(0x01), 1002},
	{"ping, length with the top bit", topBit(0x89), 1002},
	{"all bits", strings.Repeat("\xff", 14), 1002},
	{"the largest length there is", "\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00", 1009},
	{"1 GiB", "\x81\xff\x00\x00\x00\x00\x40\x00\x00\x00\x00\x00\x00\x00", 1009},
	{"4 GiB", "\x82\xff\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00", 1009},
	{"fragments over the limit", masked(0x01, strings.Repeat(" ", 16<<10)) + masked(0x80, " "), 1009},
	{"not masked", "\x81\x01x", 1002},
	{"reserved bit", "\xc1\x80\x00\x00\x00\x00", 1002},
	{"unknown opcode", "\x83\x80\x00\x00\x00\x00", 1002},
	{"continuation of nothing", masked(0x80, "x"), 1002},
	{"text within fragments", masked(0x01, "x") + masked(0x81, "y"), 1002},
	{"ping in fragments", masked(0x09, "x"), 1002},
	{"ping of 126 bytes", masked(0x89, strings.Repeat("x", 126)), 1002},
	{"not UTF-8", masked(0x81, "\xff"), 1007},
	{"not UTF-8, in fragments", masked(0x01, "\xe2\x82") + masked(0x80, "\xff"), 1007},
	{"close", masked(0x88, "\x03\xe8bye"), 1000},
	{"close without a code", masked(0x88, ""), 1000},
	{"close of an application", masked(0x88, "\x0f\xa0"), 4000},
	{"close with a code that is none", masked(0x88, "\x03\xed"), 1002},
	{"close of one byte", masked(0x88, "\x03"), 1002},
	{"close with a reason that is not UTF-8", masked(0x88, "\x03\xe8\xff"), 1002},
}

// TestHostileFramesEndTheirConnectionOnly: others do not notice, and the client is told why.
func TestHostileFramesEndTheirConnectionOnly(t *testing.T) {
	g, _ := start(t, newController(t), nil)
	well := connect(t, g, "well", "r")
	for _, test := range hostile {
		c := shake(t, g, "user_id=hostile", "", "")
		if _, err := io.WriteString(c, test.bytes); err != nil {
			t.Fatal(err)
		}
		if code, _ := c.untilClose(t); code != test.code {
			t.Errorf("%s: close code %d, want %d", test.name, code, test.code)
		}
		_ = c.Close()
	}
	eventually(t, "they are forgotten", func() bool { return g.users.Connections() == 1 })
	well.wantNothing()
	if n := g.count.panics.Get(); n != 0 {
		t.Errorf("%d panics", n)
	}
}

func TestFragmentsAndWhatComesBehindTheHandshake(t *testing.T) {
	g, _ := start(t, newController(t), nil)
	// Two fragments with a ping between them, all of it sent with the handshake.
	c := shake(t, g, "user_id=u", "Sec-WebSocket-Protocol: other, pm.v1\r\n", masked(0x01, `{"type":`)+masked(0x89, "are you there")+masked(0x80, `"ping"}`))
	var got []string
	for len(got) < 3 {
		op, payload, err := c.frame()
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(payload), `"ready"`) {
			got = append(got, fmt.Sprint(op, " ", string(payload)))
		} else {
			got = append(got, "ready")
		}
	}
	text := strings.Join(got, "\n")
	for _, want := range []string{"10 are you there", `1 {"type":"pong"}`, "ready"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in %q", want, text)
		}
	}
}

// TestPanicForAClientEndsItsConnectionOnly breaks the gateway on purpose.
func TestPanicForAClientEndsItsConnectionOnly(t *testing.T) {
	for _, test := range []struct {
		goroutine string
		broken    func(g *Gateway)
		code      uint16
	}{
		{"reader", func(g *Gateway) { g.count.messages = nil }, closeOurFault},
		{"writer", func(g *Gateway) { g.count.bytesSent = nil }, 0},
	} {
		t.Run(test.goroutine, func(t *testing.T) {
			var log bytes.Buffer
			c := newController(t)
			g, err := New(Config{
				NodeID: "node-1", GRPCAddress: "127.0.0.1:0", HTTPAddress: "127.0.0.1:0", Members: membership.Config{Controller: c.addr},
				Logger: slog.New(slog.NewJSONHandler(&log, nil)),
			})
			if err != nil {
				t.Fatal(err)
			}
			test.broken(g)
			t.Cleanup(g.Close)
			if err := g.Start(); err != nil {
				t.Fatal(err)
			}
			const clients = 3
			for range clients {
				client := shake(t, g, "user_id=u", "", masked(0x81, `{"type":"ping"}`))
				if code, _ := client.untilClose(t); code != test.code {
					t.Errorf("close code %d, want %d", code, test.code)
				}
				_ = client.Close()
			}
			eventually(t, "they are forgotten", func() bool { return g.users.Connections() == 0 })
			if n := g.count.panics.Get(); n < clients {
				t.Errorf("%d panics counted", n)
			}
			g.Close()
			if g.held.Load() != 0 {
				t.Errorf("%d bytes are held for nobody", g.held.Load())
			}
			if text := log.String(); strings.Count(text, "panic caught") == 0 || !strings.Contains(text, `"goroutine":"`+test.goroutine) || len(text) > 20<<10 {
				t.Errorf("log: %d bytes: %.300s", len(text), text)
			}
		})
	}
}

func TestSlowClientIsToldThatItWasCutOff(t *testing.T) {
	for _, size := range []int{100, 8 << 10, 64 << 10} { // gathered, gathered by the kernel, and shared
		g, n := start(t, newController(t), func(c *Config) {
			c.QueueBytes, c.SocketBuffer, c.CloseTimeout, c.WriteTimeout = 256<<10, 4<<10, patience, patience
		})
		slow := deaf(t, g, "slow")
		pushed := 0
		for text := strings.Repeat("x", size); g.count.slow.Get() == 0; pushed++ {
			if pushed == 50_000 {
				t.Fatal("it is not cut off")
			}
			pushTo(t, n, "", text, "slow")
		}
		if got := g.held.Load(); got > 256<<10 {
			t.Errorf("a client that was cut off still holds %d bytes", got)
		}
		code, frames := slow.untilClose(t) // What was being written is whole. A few large ones may fill the queue before anything is.
		if code != closeSlow || frames == 0 && pushed > 10 || frames >= pushed {
			t.Errorf("close code %d behind %d of %d frames", code, frames, pushed)
		}
	}
}

// TestClientThatReadsLateGetsAllInOrder: its socket is full meanwhile, so that it is written to
// by a goroutine that waits, and before and after by those that do not.
func TestClientThatReadsLateGetsAllInOrder(t *testing.T) {
	g, n := start(t, newController(t), func(c *Config) { c.SocketBuffer = 4 << 10 })
	late := deaf(t, g, "late")
	const rounds, burst = 2, 40
	for range rounds {
		for i := range burst {
			pushTo(t, n, "", strings.Repeat("x", i%3*2500)+fmt.Sprintf("#%d", i), "late")
		}
		for i := 0; i < burst; {
			_, payload, err := late.frame()
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(payload, []byte(`"type":"ready"`)) {
				continue
			}
			if !bytes.Contains(payload, fmt.Appendf(nil, `#%d"`, i)) {
				t.Fatalf("push %d: %.300s", i, payload)
			}
			i++
		}
		eventually(t, "nothing waits", func() bool { return g.writers.Load() == 0 })
	}
	if g.count.slow.Get() != 0 {
		t.Error("it counts as slow")
	}
}

// TestQueuesTogetherAreBounded: the slow ones are cut off, and nobody else.
func TestQueuesTogetherAreBounded(t *testing.T) {
	const bound, size, readers = 2 << 20, 32 << 10, 8
	g, n := start(t, newController(t), func(c *Config) {
		c.QueueTotalBytes, c.QueueBytes, c.SocketBuffer, c.CloseTimeout = bound, bound, 4<<10, 100*time.Millisecond
		c.WriteTimeout = time.Hour // not what cuts them off, however slow this machine is
	})
	well := connect(t, g, "well", "")
	var users []string
	for i := range readers {
		users = append(users, fmt.Sprint("deaf-", i))
		deaf(t, g, users[i])
	}
	text := strings.Repeat("x", size)
	for i := 0; g.users.Connections() > 1; i++ {
		for _, user := range users { // another frame for each
			pushTo(t, n, "", text, user)
			if held := g.held.Load(); held > bound+2*size {
				t.Fatalf("%d bytes are held, the bound is %d", held, bound)
			}
		}
		if r := pushTo(t, n, "", text, "well"); r.GetDeliveredCount() != 1 {
			t.Fatal("the client that reads missed a push: ", r)
		}
		well.want(textFrame("", "well", text))
		if i > 100*bound/size {
			t.Fatal("clients that do not read are never cut off")
		}
	}
	if g.count.crowded.Get() != readers || g.count.slow.Get() != 0 {
		t.Errorf("cut off: %d for all queues, %d for their own", g.count.crowded.Get(), g.count.slow.Get())
	}
	eventually(t, "the books are empty", func() bool { return g.held.Load() == 0 })
}

func TestFrameForManyIsHeldOnce(t *testing.T) {
	const size, readers = 32 << 10, 10
	g, n := start(t, newController(t), func(c *Config) { c.SocketBuffer = 4 << 10 })
	var users []string
	for i := range readers {
		users = append(users, fmt.Sprint("deaf-", i))
		deaf(t, g, users[i])
	}
	text := strings.Repeat("x", size)
	const pushes = 20
	for range pushes {
		if r := pushTo(t, n, "", text, users...); r.GetDeliveredCount() != readers {
			t.Fatal(r)
		}
	}
	if held := g.held.Load(); held < size || held > pushes*(size+1000) {
		t.Errorf("%d pushes of %d bytes to %d clients hold %d bytes", pushes, size, readers, held)
	}
}

// TestFloodOfAClientIsReadAtItsRate: nothing of it is lost, and others are not held.
func TestFloodOfAClientIsReadAtItsRate(t *testing.T) {
	g, _ := start(t, newController(t), func(c *Config) { c.Members.MaxRooms, c.MessageRate = 10, 50 })
	flood, well := connect(t, g, "flood", ""), connect(t, g, "well", "")
	const burst, beyond = 110, 20
	for range burst + beyond {
		flood.say(`{"type":"ping"}`)
	}
	well.wantNothing()
	for range burst + beyond {
		flood.want(`{"type":"pong"}`)
	}
	if n := g.count.paced.Get(); n == 0 || n > beyond {
		t.Errorf("%d messages were read later, want those beyond %d", n, burst)
	}
	well.wantNothing()
}

// TestBacklogOfAClientThatHasGoneIsNoSignOfLife: it is worked off for hours, and pushes to the
// user would be delivered to nobody all the while.
func TestBacklogOfAClientThatHasGoneIsNoSignOfLife(t *testing.T) {
	g, _ := start(t, newController(t), func(c *Config) {
		c.Members.MaxRooms, c.MessageRate = 1, 10
		c.PingInterval, c.IdleTimeout = 100*time.Millisecond, 300*time.Millisecond
	})
	flood := connect(t, g, "flood", "")
	for range 500 { // fifty seconds' worth
		flood.say(`{"type":"leave","room_id":"none"}`)
	}
	eventually(t, "it is cut off", func() bool { return g.users.Connections() == 0 })
	if n := g.count.dead.Get(); n != 1 {
		t.Errorf("%d clients count as dead, want 1", n)
	}
}

// TestCloseEndsAConnectionThatIsJustBeginning: it comes after Close has looked at all.
func TestCloseEndsAConnectionThatIsJustBeginning(t *testing.T) {
	g, _ := start(t, newController(t), func(c *Config) { c.IdleTimeout, c.WriteTimeout, c.CloseTimeout = time.Hour, time.Hour, time.Hour })
	if !g.admit() {
		t.Fatal("not admitted")
	}
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		g.Close()
	}()
	eventually(t, "closed", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.closed
	})
	eventually(t, "its listeners are closed", func() bool {
		conn, err := net.Dial("tcp", g.HTTPAddr().String())
		if err == nil {
			_ = conn.Close()
		}
		return err != nil
	})
	ours, theirs := net.Pipe() // a client that never closes
	defer theirs.Close()
	c := &conn{g: g, user: "late", net: ours}
	c.to.user = appendString(nil, c.user)
	g.begin(c, nil, "")
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-closed:
	case <-timer.C:
		t.Fatal("Close waits for a connection that nobody closes")
	}
}

// FuzzSocket: whatever bytes come on a connection, the gateway goes on, forgets the
// client, and what it has answered is WebSocket.
func FuzzSocket(f *testing.F) {
	for _, test := range hostile {
		f.Add([]byte(test.bytes))
	}
	f.Add([]byte(masked(0x81, `{"type":"join","room_id":"r"}`) + masked(0x81, `{"type":"leave","room_id":"r"}`) + masked(0x81, `{"type":"ping"}`)))
	f.Add([]byte(masked(0x01, `{"type"`) + masked(0x8a, "") + masked(0x00, `:"pi`) + masked(0x80, `ng"}`) + topBit(0x80)))
	f.Add(bytes.Repeat([]byte(masked(0x00, "")), 100))
	f.Add(bytes.Repeat([]byte(masked(0x89, "ping")), 100))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte{0x81})
	g, err := New(Config{NodeID: "n", GRPCAddress: "127.0.0.1:0", HTTPAddress: "127.0.0.1:0", Members: membership.Config{Controller: "127.0.0.1:1"}, MessageRate: 1 << 20})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(g.Close)
	if err := g.Start(); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		talk(t, g, "user_id=u&room_id=r", "", b)
	})
}

// talk sends b on a connection, and checks what is promised of any bytes.
func talk(t *testing.T, g *Gateway, query, headers string, b []byte) {
	t.Helper()
	c := shake(t, g, query, headers, "")
	tcp := c.Conn.(*net.TCPConn)
	_ = tcp.SetLinger(0)
	_ = tcp.SetReadBuffer(256 << 10)
	sessions{g.users}.Deliver("u", &node.Message{RoomID: "r", Data: b})
	go func() {
		_, _ = tcp.Write(b) // The gateway may have closed.
		_ = tcp.CloseWrite()
	}()
	for closed := false; ; {
		op, payload, err := c.frame()
		if err != nil {
			if e := net.Error(nil); errors.As(err, &e) && e.Timeout() {
				t.Fatalf("%x: not closed", b)
			}
			if strings.HasPrefix(err.Error(), "frame from") {
				t.Fatalf("%x: %v", b, err)
			}
			break
		}
		var m struct{ Type string }
		switch {
		case closed:
			t.Fatalf("%x: %v after a close frame", b, op)
		case op == ws.OpClose:
			closed = true
		case op == ws.OpText && (json.Unmarshal(payload, &m) != nil || m.Type == ""):
			t.Fatalf("%x: answer %q", b, payload)
		}
	}
	_ = c.Close()
	eventually(t, "forgotten", func() bool {
		return g.users.Connections() == 0 && g.unverified.len() == 0 && g.held.Load() == 0 && g.members.Stats().Memberships == 0
	})
	if n := g.count.panics.Get(); n != 0 {
		t.Fatalf("%x: %d panics", b, n)
	}
}
