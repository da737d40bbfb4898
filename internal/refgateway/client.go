package refgateway

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"math"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/gobwas/ws"

	"github.com/push-manager/push-manager/transport/node/membership"
)

var (
	errNotText   = errors.New("type: only text messages are understood")
	errNoType    = errors.New("type: required")
	errType      = errors.New("type: must be join, leave or ping")
	errNotJSON   = errors.New("message: not valid JSON")
	errNotObject = errors.New("message: must be a JSON object")
)

// readBytes is what a connection keeps for reading: clients say little.
const readBytes = 512

// reader reads the frames of one client. Nothing is kept for what a client announces,
// only for what it has sent.
type reader struct {
	c       *conn
	br      *bufio.Reader
	header  [ws.MaxHeaderSize]byte
	control [ws.MaxControlFramePayloadSize]byte
	message []byte // so far
	op      ws.OpCode
	due     time.Duration // since the gateway's start: see pace
	late    bool          // the frame was held back by pace
}

func newReader(c *conn, from io.Reader) *reader {
	return &reader{c: c, br: bufio.NewReaderSize(from, readBytes), due: math.MinInt64}
}

// loop reads until the connection's end, and returns the close code that the client is
// to get; 0 when it is not there to get one.
func (r *reader) loop() (code uint16) {
	defer r.c.g.caught("reader", func() { code = closeOurFault })
	state := ws.StateServerSide
	for {
		h, err := ws.ReadHeaderBuffer(r.br, r.header[:])
		switch {
		case errors.Is(err, ws.ErrHeaderLengthMSB):
			return closeProtocol
		case err != nil:
			return 0
		case ws.CheckHeader(h, state) != nil:
			return closeProtocol
		}
		r.pace()
		if h.OpCode.IsControl() {
			payload, err := r.payload(r.control[:0], h)
			if err != nil {
				return 0
			}
			if h.OpCode == ws.OpClose {
				return closeAnswer(payload)
			}
			if h.OpCode == ws.OpPing {
				r.c.tell(&frame{op: ws.OpPong, head: append([]byte(nil), payload...)})
			}
			continue
		}
		if h.Length > int64(r.c.g.cfg.MaxMessageBytes-len(r.message)) {
			return closeTooLarge
		}
		if r.message, err = r.payload(r.message, h); err != nil {
			return 0
		}
		if h.OpCode != ws.OpContinuation {
			r.op = h.OpCode
		}
		if !h.Fin {
			state = state.Set(ws.StateFragmented)
			continue
		}
		state = state.Clear(ws.StateFragmented)
		if r.op == ws.OpText && !utf8.Valid(r.message) {
			return closeNotUTF8
		}
		r.c.take(r.op, r.message)
		if r.message = r.message[:0]; cap(r.message) > readBytes {
			r.message = nil
		}
	}
}

// payload appends the payload of a frame, as it comes.
func (r *reader) payload(b []byte, h ws.Header) ([]byte, error) {
	start := len(b)
	for left := int(h.Length); left > 0; {
		n := min(left, readBytes)
		at := len(b)
		b = append(b, make([]byte, n)...)
		if _, err := io.ReadFull(r.br, b[at:]); err != nil {
			return nil, err //nolint:wrapcheck // The client has gone.
		}
		left -= n
	}
	ws.Cipher(b[start:], h.Mask, 0)
	// What had to wait tells nothing about now: its client may be gone since.
	if !r.late {
		r.c.g.hear(r.c)
	}
	return b, nil
}

// closeAnswer is the code that answers a close frame.
func closeAnswer(payload []byte) uint16 {
	if len(payload) == 0 {
		return closeNormal
	}
	if len(payload) == 1 {
		return closeProtocol
	}
	code := binary.BigEndian.Uint16(payload)
	if ws.CheckCloseFrameData(ws.StatusCode(code), string(payload[2:])) != nil {
		return closeProtocol
	}
	return code
}

// pace holds the client to its rate of frames. One that sends more is read later: its
// messages wait in its own socket, and nothing is lost. Who has been quiet may send what
// rejoining all rooms takes at once. Who is never within its rate for Config.IdleTimeout
// counts as gone: nobody could tell it from a client that has gone and left a backlog.
func (r *reader) pace() {
	cfg := &r.c.g.cfg
	interval := time.Second / time.Duration(cfg.MessageRate)
	burst := interval * time.Duration(cfg.Members.MaxRooms+2*cfg.MessageRate)
	now := time.Since(r.c.g.began)
	r.due = max(r.due, now-burst) + interval
	if r.late = r.due > now; r.late {
		r.c.g.count.paced.Inc()
		time.Sleep(r.due - now) // an interval at most: a second
	}
}

// take handles a message of the client.
func (c *conn) take(op ws.OpCode, message []byte) {
	c.g.count.messages.Inc()
	room, err := "", errNotText
	if op == ws.OpText {
		room, err = c.obey(message)
	}
	switch {
	case err == nil:
		return
	case room != "":
		c.tell(control("error", "message", err.Error(), "room_id", room))
	default:
		c.tell(control("error", "message", err.Error()))
	}
	c.g.count.badMessages.Inc()
}

// obey does what a client's message asks for. The error is for the client: it names the
// field, in words that need no knowledge of Go. room is the one that it is about, empty
// when the message names none, or none that can be.
func (c *conn) obey(b []byte) (room string, err error) {
	var m struct {
		Type   *string `json:"type"`
		RoomID *string `json:"room_id"`
	}
	if err := json.Unmarshal(b, &m); err != nil {
		var wrong *json.UnmarshalTypeError
		switch {
		case !errors.As(err, &wrong):
			return "", errNotJSON
		case wrong.Field == "":
			return "", errNotObject
		}
		return "", errors.New(wrong.Field + ": must be a string")
	}
	if m.Type == nil {
		return "", errNoType
	}
	switch *m.Type {
	case "ping":
		c.tell(control("pong"))
		return "", nil
	case "join", "leave":
		if m.RoomID != nil {
			room = *m.RoomID
		}
		if err := checkID("room_id", room); err != nil {
			return "", err
		}
		if err := checkRoom(room); err != nil {
			return room, err
		}
		if *m.Type == "join" {
			return room, c.member.Join(room)
		}
		return room, c.member.Leave(room)
	}
	return "", errType
}

// checkRoom applies the rule for rooms that a client may name.
func checkRoom(room string) error {
	if err := checkID("room_id", room); err != nil {
		return err
	}
	if strings.HasPrefix(room, membership.Reserved) {
		return membership.ErrReserved
	}
	return nil
}

// Joined implements membership.Client, as Left and Refused do. For a connection that
// was opened without a room, the first news is that it is known at all.
func (c *conn) Joined(room string) {
	switch {
	case room != "":
		c.tell(control("joined", "room_id", room))
	case c.room == "":
		c.tell(control("ready", "user_id", c.user, "node_id", c.g.cfg.NodeID))
	}
}

// Left implements membership.Client.
func (c *conn) Left(room string) { c.tell(control("left", "room_id", room)) }

// Refused implements membership.Client.
func (c *conn) Refused(room, why string) {
	if room == "" {
		c.tell(control("error", "message", "user_id: "+why))
		return
	}
	c.tell(control("error", "message", "room_id: "+why, "room_id", room))
}

// hear notes that the client lives.
func (g *Gateway) hear(c *conn) {
	c.heard.Store(int64(time.Since(g.began)))
	c.pinged.Store(false)
}

// sweep pings clients that are silent and cuts off those that stay so.
func (g *Gateway) sweep() {
	now := time.Since(g.began)
	g.users.Each(func(conns []*conn) {
		for _, c := range conns {
			silent := now - time.Duration(c.heard.Load())
			switch {
			case silent >= g.cfg.IdleTimeout:
				if c.shut() { // its reader may take longer than until the next sweep to end
					g.count.dead.Inc()
				}
			case silent >= g.cfg.PingInterval && !c.pinged.Swap(true):
				c.tell(&frame{op: ws.OpPing})
			}
		}
	})
}
