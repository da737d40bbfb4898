package refgateway

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/gobwas/ws"
	"github.com/klauspost/compress/flate"
	"github.com/lxzan/gws"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
	"github.com/push-manager/push-manager/transport/node/membership"
)

func withDeflate(c *Config) { c.Deflate = true }

// connectDeflating is connect for a client that offers compression, and compresses what it says.
func connectDeflating(t testing.TB, g *Gateway, query string) *device {
	t.Helper()
	d, resp, err := dialWith(g, query, &gws.ClientOption{PermessageDeflate: gws.PermessageDeflate{Enabled: true, Threshold: 1}})
	if err != nil {
		t.Fatal(err)
	}
	if got := resp.Header.Get("Sec-WebSocket-Extensions"); !strings.HasPrefix(got, "permessage-deflate") {
		t.Fatalf("the answer is %q", got)
	}
	d.listen(t)
	return d
}

func TestDeflatedPushesAreWhatTheyAreWithout(t *testing.T) {
	g, n := start(t, newController(t), withDeflate)
	plain := connect(t, g, "plain", "r")
	var clients []*device
	users := []string{"plain"}
	for i := range 3 {
		users = append(users, fmt.Sprint("u", i))
		clients = append(clients, connectDeflating(t, g, "room_id=r&user_id="+users[i+1]))
		clients[i].want(`{"type":"joined","room_id":"r"}`)
	}
	noise := make([]byte, 3<<10)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise)
	texts := []string{"", "short", base64.StdEncoding.EncodeToString(noise)}
	for _, size := range []int{200, 2 << 10, 5 << 10, 40 << 10, 200 << 10} {
		texts = append(texts, strings.Repeat("as before, and once more ", size/25))
	}
	for _, text := range texts {
		pushTo(t, n, "r", text, users...)
		plain.want(textFrame("r", "plain", text))
		for i, d := range clients {
			d.want(textFrame("r", users[i+1], text))
		}
	}
	if _, err := n.Broadcast(t.Context(), &pubsub.BroadcastRequest{Content: &pubsub.MessageContent{Data: []byte(texts[3]), Timestamp: 1}}); err != nil {
		t.Fatal(err)
	}
	plain.want(broadcastFrame("plain", texts[3]))
	for i, d := range clients {
		d.want(broadcastFrame(users[i+1], texts[3]))
		d.wantNothing() // what it says is compressed, too
	}
	// Those of 2 KiB and more, and the broadcast, for each client; the noise is not worth it for all compressors.
	if got := g.count.deflated.Get() + 3*g.count.incompressible.Get(); got != 3*6 {
		t.Errorf("%d frames were compressed", got)
	}
	if saved, sent := g.count.deflateSaved.Get(), g.count.bytesSent.Get(); saved < 3*240<<10 || sent > 300<<10 {
		t.Errorf("%d bytes are saved, and %d sent", saved, sent)
	}
	eventually(t, "the books are empty", func() bool { return g.held.Load() == 0 })
}

func TestDeflateIsAgreedToAsFarAsItCanBe(t *testing.T) {
	g, _ := start(t, newController(t), withDeflate)
	without, _ := start(t, newController(t), nil)
	const agreed = "permessage-deflate;server_no_context_takeover;client_no_context_takeover"
	for _, test := range []struct{ offer, want string }{
		{"permessage-deflate", agreed},
		{"permessage-deflate; client_max_window_bits", agreed},
		{"permessage-deflate; server_max_window_bits=12; client_max_window_bits=12", agreed + ";server_max_window_bits=12"},
		{"permessage-deflate; unheard_of, permessage-deflate; server_max_window_bits=9", agreed + ";server_max_window_bits=9"},
		{"permessage-deflate; server_max_window_bits=99", ""},
		{"x-webkit-deflate-frame", ""},
		{"permessage-deflate, permessage-deflate", agreed},
	} {
		for _, gateway := range []*Gateway{g, without} {
			d, resp, err := dialWith(gateway, "user_id=u", &gws.ClientOption{RequestHeader: http.Header{"Sec-Websocket-Extensions": {test.offer}}})
			if err != nil {
				t.Fatalf("%s: %v", test.offer, err)
			}
			_ = d.ws.NetConn().Close()
			got := strings.ReplaceAll(resp.Header.Get("Sec-WebSocket-Extensions"), " ", "")
			want := test.want
			if gateway == without {
				want = ""
			}
			if got != want {
				t.Errorf("%s: answered %q, want %q", test.offer, got, want)
			}
		}
	}
}

// extended is a handshake with compression.
const extended = "Sec-WebSocket-Protocol: pm.v1\r\nSec-WebSocket-Extensions: permessage-deflate\r\n"

// deflatedText is what a client sends for b.
func deflatedText(t testing.TB, b []byte) string {
	t.Helper()
	var out bytes.Buffer
	w, err := flate.NewWriter(&out, 9)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write(b)
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(out.String(), "\x00\x00\xff\xff")
}

// What a client compresses is bounded by what it becomes.
func TestHostileDeflateEndsItsConnectionOnly(t *testing.T) {
	g, _ := start(t, newController(t), withDeflate)
	well := connect(t, g, "well", "r")
	ping := deflatedText(t, []byte(`{"type":"ping"}`))
	for name, test := range map[string]struct {
		bytes string
		code  uint16
	}{
		"bomb":                        {masked(0xc1, deflatedText(t, make([]byte, 8<<20))), 1009},
		"a byte too many":             {masked(0xc1, deflatedText(t, bytes.Repeat([]byte(" "), 16<<10+1))), 1009},
		"bomb in fragments":           {masked(0x41, deflatedText(t, make([]byte, 8<<20))[:100]) + masked(0x80, deflatedText(t, make([]byte, 8<<20))[100:]), 1009},
		"no DEFLATE":                  {masked(0xc1, "\xff\xff\xff"), 1002},
		"cut short":                   {masked(0xc1, ping[:len(ping)-4]), 1002},
		"something behind its end":    {masked(0xc1, "\x01\x01\x00\xfe\xffxyyy"), 1002},
		"not UTF-8":                   {masked(0xc1, deflatedText(t, []byte("\xff"))), 1007},
		"bit of another extension":    {masked(0xa1, ping), 1002},
		"marked, in a later fragment": {masked(0x41, ping[:3]) + masked(0xc0, ping[3:]), 1002},
		"marked ping":                 {masked(0xc9, ping), 1002},
	} {
		c := shake(t, g, "user_id=hostile", extended, "")
		if _, err := io.WriteString(c, test.bytes); err != nil {
			t.Fatal(err)
		}
		if code, _ := c.untilClose(t); code != test.code {
			t.Errorf("%s: close code %d, want %d", name, code, test.code)
		}
		_ = c.Close()
	}
	// In fragments, ended with a last block of its own, and as it is: all three are understood.
	last := deflatedText(t, nil) // an empty block
	c := shake(t, g, "user_id=u", extended, masked(0x41, ping[:3])+masked(0x80, ping[3:])+masked(0xc1, "\x01\x0f\x00\xf0\xff"+`{"type":"ping"}`+last)+masked(0x81, `{"type":"ping"}`))
	for pongs := 0; pongs < 3; {
		_, payload, err := c.frame()
		if err != nil {
			t.Fatal(err)
		}
		if string(payload) == `{"type":"pong"}` {
			pongs++
		}
	}
	well.wantNothing()
	if n := g.count.panics.Get(); n != 0 {
		t.Errorf("%d panics", n)
	}
}

// A push is compressed once, whoever gets it, and no further back than a client's window.
func TestDeflatedPartIsShared(t *testing.T) {
	g, err := New(Config{NodeID: "n", GRPCAddress: "127.0.0.1:0", HTTPAddress: "127.0.0.1:0", Members: membership.Config{Controller: "127.0.0.1:1"}, Deflate: true})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	f := newPush(&node.Message{Data: bytes.Repeat([]byte("much of the same "), 40)}, "r", false)
	first := g.deflater.shared(f, math.MaxInt)
	second := g.deflater.shared(f, 1<<10)
	if len(first) == 0 || &first[0] != &second[0] {
		t.Error("it is compressed twice, or not at all")
	}
	if g.deflater.shared(f, 1<<9) != nil {
		t.Error("it is compressed for a window that is smaller")
	}
	g.held.Add(-f.more.Load())
}

// FuzzDeflatedFrame: a push that is compressed becomes what it is without.
func FuzzDeflatedFrame(f *testing.F) {
	g, err := New(Config{NodeID: "n", GRPCAddress: "127.0.0.1:0", HTTPAddress: "127.0.0.1:0", Members: membership.Config{Controller: "127.0.0.1:1"}, Deflate: true, DeflateMinBytes: 64})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(g.Close)
	for _, marks := range []uint8{0, 1, 2, 7} {
		f.Add("r", "u", []byte(strings.Repeat("Hello", 20)), marks)
		f.Add("\"\\", "\u2028\x00", []byte(strings.Repeat("\xff", 9000)), marks)
		f.Add("", "", []byte(strings.Repeat("x", 40<<10)), marks)
	}
	f.Fuzz(func(t *testing.T, room, user string, data []byte, marks uint8) {
		if len(room) > 256 || len(user) > 256 { // ids are no longer
			return
		}
		m := &node.Message{Data: data, RoomID: room, Options: &node.Options{}}
		if marks&1 != 0 {
			m.Options.ID = "an id"
		}
		q := queued{frame: newPush(m, room, false), entry: &entry{}}
		if marks&2 != 0 {
			q.entry.Ack = uint64(len(data)) << 32
		}
		q.entry.Replayed = marks&4 != 0
		plain := recipient{user: appendString(nil, user), ids: true}
		packed := plain
		packed.deflate, packed.window = g.deflater, math.MaxInt
		begin, tail, end := q.appendTo([]byte("before"), &plain)
		want := slices.Concat(begin, tail, end)[len("before"):]
		want = want[len(want)-q.size(&plain):]
		begin, tail, end = q.appendTo([]byte("before"), &packed)
		got := slices.Concat(begin, tail, end)[len("before"):]
		h, err := ws.ReadHeader(bytes.NewReader(got))
		if err != nil {
			t.Fatal(err)
		}
		got = got[len(appendHeader(nil, ws.OpText, int(h.Length))):]
		if int64(len(got)) != h.Length {
			t.Fatalf("%d bytes, the header says %d", len(got), h.Length)
		}
		if h.Rsv != 0 {
			message, code := g.deflater.inflate(got, 1<<20)
			if code != 0 {
				t.Fatalf("%x: close code %d", got, code)
			}
			got = message
		}
		if !bytes.Equal(got, want) {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		g.held.Add(-q.more.Load())
	})
}

// FuzzDeflatingSocket is FuzzSocket for a client that may compress.
func FuzzDeflatingSocket(f *testing.F) {
	for _, test := range hostile {
		f.Add([]byte(test.bytes))
	}
	ping := deflatedText(f, []byte(`{"type":"ping"}`))
	f.Add([]byte(masked(0xc1, ping) + masked(0x41, ping[:3]) + masked(0x80, ping[3:])))
	f.Add([]byte(masked(0xc1, deflatedText(f, make([]byte, 1<<20)))))
	g, err := New(Config{
		NodeID: "n", GRPCAddress: "127.0.0.1:0", HTTPAddress: "127.0.0.1:0", Members: membership.Config{Controller: "127.0.0.1:1"},
		MessageRate: 1 << 20, Deflate: true, DeflateMinBytes: 1 << 20, // what comes back is plain
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(g.Close)
	if err := g.Start(); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		talk(t, g, "user_id=u&room_id=r", extended, b)
	})
}
