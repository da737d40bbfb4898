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
	errType      = errors.New("type: must be join, leave, refresh or ping")
	errTypeOrAck = errors.New("type: must be join, leave, refresh, ping or ack")
	errConnected = errors.New("type: connect comes first, and only where no token came before")
	errNotJSON   = errors.New("message: not valid JSON")
	errNotObject = errors.New("message: must be a JSON object")
)

// compressedBit marks the first frame of a compressed message (RFC 7692, section 6).
var compressedBit = ws.Rsv(true, false, false) //nolint:gochecknoglobals // a constant

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
	state   ws.State      // within fragments or not
	packed  bool          // the message is compressed
	due     time.Duration // since the gateway's start: see pace
	late    bool          // the frame was held back by pace
}

func newReader(c *conn, from io.Reader) *reader {
	r := &reader{c: c, br: bufio.NewReaderSize(from, readBytes), state: ws.StateServerSide, due: math.MinInt64}
	if c.to.deflate != nil {
		r.state = r.state.Set(ws.StateExtended)
	}
	return r
}

// loop reads until the connection's end, and returns the close code that the client is
// to get; 0 when it is not there to get one.
func (r *reader) loop() (code uint16) {
	defer r.c.g.caught("reader", func() { code = closeOurFault })
	for {
		code, err := r.next(r.c.g.cfg.MaxMessageBytes)
		if err == nil && code == 0 {
			if code = r.c.take(r.op, r.message); r.c.progress {
				r.due -= r.c.g.interval() // There are no more of these than the gateway has sent frames.
			}
		}
		if err != nil || code != 0 {
			return code
		}
	}
}

// next reads the next message, of most bytes, into op and message, which are valid until it is
// called again. It returns the close code of a client that is to go, or the error of its socket.
func (r *reader) next(most int) (code uint16, err error) {
	if r.message = r.message[:0]; cap(r.message) > readBytes {
		r.message = nil
	}
	for {
		h, err := ws.ReadHeaderBuffer(r.br, r.header[:])
		switch {
		case errors.Is(err, ws.ErrHeaderLengthMSB):
			return closeProtocol, nil
		case err != nil:
			return 0, err //nolint:wrapcheck // The client has gone.
		case ws.CheckHeader(h, r.state) != nil:
			return closeProtocol, nil //nolint:nilerr // The code says it.
		case h.Rsv != 0 && (h.Rsv != compressedBit || h.OpCode.IsControl() || h.OpCode == ws.OpContinuation):
			return closeProtocol, nil
		}
		r.pace()
		if h.OpCode.IsControl() {
			payload, err := r.payload(r.control[:0], h)
			if err != nil {
				return 0, err
			}
			if h.OpCode == ws.OpClose {
				return closeAnswer(payload), nil
			}
			if h.OpCode == ws.OpPing && r.c.member != nil { // who is nobody yet gets no answers
				r.c.tell(&frame{op: ws.OpPong, head: append([]byte(nil), payload...)})
			}
			continue
		}
		if h.Length > int64(most-len(r.message)) {
			return closeTooLarge, nil
		}
		if r.message, err = r.payload(r.message, h); err != nil {
			return 0, err
		}
		if h.OpCode != ws.OpContinuation {
			r.op, r.packed = h.OpCode, h.Rsv != 0
		}
		if !h.Fin {
			r.state = r.state.Set(ws.StateFragmented)
			continue
		}
		r.state = r.state.Clear(ws.StateFragmented)
		if r.packed {
			if r.message, code = r.c.to.deflate.inflate(r.message, most); code != 0 {
				return code, nil
			}
		}
		if r.op == ws.OpText && !utf8.Valid(r.message) {
			return closeNotUTF8, nil
		}
		return 0, nil
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
	interval := r.c.g.interval()
	burst := interval * time.Duration(cfg.Members.MaxRooms+2*cfg.MessageRate)
	now := time.Since(r.c.g.began)
	r.due = max(r.due, now-burst) + interval
	if r.late = r.due > now; r.late {
		r.c.g.count.paced.Inc()
		time.Sleep(r.due - now) // an interval at most: a second
	}
}

// interval is the distance of a client's frames at Config.MessageRate.
func (g *Gateway) interval() time.Duration { return time.Second / time.Duration(g.cfg.MessageRate) }

// take handles a message of the client. It returns the close code of one that is to go.
func (c *conn) take(op ws.OpCode, message []byte) (code uint16) {
	c.g.count.messages.Inc()
	c.progress = false
	room, err := "", errNotText
	if op == ws.OpText {
		if number, ok := ackOf(message); ok && c.to.acks {
			err = c.acknowledge(number)
		} else {
			room, err = c.obey(message)
		}
	}
	if err == nil {
		return 0
	}
	code = c.g.deny(c, err)
	switch {
	case code != 0: // the close frame says it
	case room != "":
		c.tell(control("error", "message", err.Error(), "room_id", room))
	default:
		c.tell(control("error", "message", err.Error()))
	}
	c.g.count.badMessages.Inc()
	return code
}

// request is a message of a client.
type request struct {
	Type   *string `json:"type"`
	RoomID *string `json:"room_id"`
	Token  *string `json:"token"`

	Ack json.RawMessage `json:"ack"`
}

// parse reads a message. The error is for the client: it names the field, in words that need no
// knowledge of Go.
func parse(b []byte) (m request, err error) {
	if err := json.Unmarshal(b, &m); err != nil {
		var wrong *json.UnmarshalTypeError
		switch {
		case !errors.As(err, &wrong):
			return m, errNotJSON
		case wrong.Field == "":
			return m, errNotObject
		}
		return m, errors.New(wrong.Field + ": must be a string")
	}
	if m.Type == nil {
		return m, errNoType
	}
	return m, nil
}

// obey does what a client's message asks for. The error is for the client, as parse's is, or a
// denial. room is the one that it is about, empty when the message names none, or none that
// can be.
func (c *conn) obey(b []byte) (room string, err error) {
	m, err := parse(b)
	if err != nil {
		return "", err
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
		if *m.Type == "leave" {
			if err := c.member.Leave(room); err != nil {
				return room, err
			}
			c.unfollow(c.tenant.ID(room))
			return room, nil
		}
		if !c.identity.Load().allows(room) {
			return room, &denial{deniedRoom, closeForbidden}
		}
		return room, c.join(room)
	case "refresh":
		return "", c.refresh(m.Token)
	case "ack":
		if c.to.acks {
			return "", c.acknowledgeJSON(m.Ack)
		}
	case "connect":
		return "", errConnected
	}
	if c.to.acks {
		return "", errTypeOrAck
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
	if room == "" {
		c.gate.Ready()
	}
	switch {
	case room != "":
		c.tell(control("joined", "room_id", room))
		c.follow(c.tenant.ID(room))
		c.entered(room)
	case c.room == "":
		c.tell(control("ready", "user_id", c.user, "node_id", c.g.cfg.NodeID))
	}
}

// Left implements membership.Client.
func (c *conn) Left(room string) {
	c.exited(room)
	c.tell(control("left", "room_id", room))
}

// Refused implements membership.Client.
func (c *conn) Refused(room, why string) {
	if room == "" {
		c.tell(control("error", "message", "user_id: "+why))
		return
	}
	c.unfollow(c.tenant.ID(room))
	c.exited(room)
	c.tell(control("error", "message", "room_id: "+why, "room_id", room))
}

// hear notes that the client lives.
func (g *Gateway) hear(c *conn) {
	c.heard.Store(int64(time.Since(g.began)))
	c.pinged.Store(false)
	if c.to.acks {
		c.mu.Lock()
		c.inbox.Heard()
		c.mu.Unlock()
	}
}

// sweep pings clients that are silent, cuts off those that stay so, and closes those whose
// token counts no more.
func (g *Gateway) sweep() {
	now, date := time.Since(g.began), time.Now()
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
			g.checkIdentity(c, date)
		}
	})
}
