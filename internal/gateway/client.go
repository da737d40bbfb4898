package gateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/lxzan/gws"
)

var (
	errNotText = errors.New("type: only text messages are understood")
	errNoType  = errors.New("type: required")
)

// events is the gateway as gws sees it. Its methods run on a connection's reader.
type events struct{ g *Gateway }

const connKey = "conn"

// connOf finds our side of a connection.
func connOf(ws *gws.Conn) *conn {
	v, _ := ws.Session().Load(connKey)
	c, _ := v.(*conn)
	return c
}

// OnOpen implements gws.Event. The connection was opened before its reader began.
func (events) OnOpen(*gws.Conn) {}

// OnClose implements gws.Event.
func (e events) OnClose(ws *gws.Conn, _ error) { e.g.end(connOf(ws)) }

// OnPing implements gws.Event.
func (e events) OnPing(ws *gws.Conn, payload []byte) {
	c := connOf(ws)
	e.g.hear(c)
	c.sendFrame(wsFrame(gws.OpcodePong, payload))
}

// OnPong implements gws.Event.
func (e events) OnPong(ws *gws.Conn, _ []byte) { e.g.hear(connOf(ws)) }

// OnMessage implements gws.Event.
func (e events) OnMessage(ws *gws.Conn, message *gws.Message) {
	c := connOf(ws)
	e.g.hear(c)
	e.g.count.messages.Inc()
	err := errNotText
	if message.Opcode == gws.OpcodeText {
		err = c.obey(message.Bytes())
	}
	_ = message.Close() // Gives the buffer back; it has no error.
	if err != nil {
		e.g.count.badMessages.Inc()
		c.sendFrame(control("error", "message", err.Error()))
	}
}

// obey does what a client's message asks for. The error names the field.
func (c *conn) obey(b []byte) error {
	var m struct {
		Type   *string `json:"type"`
		RoomID *string `json:"room_id"`
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return fmt.Errorf("message: %w", err)
	}
	if m.Type == nil {
		return errNoType
	}
	switch *m.Type {
	case "ping":
		c.sendFrame(control("pong"))
		return nil
	case "join", "leave":
		room := ""
		if m.RoomID != nil {
			room = *m.RoomID
		}
		if err := checkRoom(room); err != nil {
			return err
		}
		if *m.Type == "join" {
			return c.g.reports.join(c, room)
		}
		return c.g.reports.leave(c, room)
	}
	return fmt.Errorf("type: %.40q is not join, leave or ping", *m.Type)
}

// checkRoom applies the rule for rooms that a client may name.
func checkRoom(room string) error {
	if err := checkID("room_id", room); err != nil {
		return err
	}
	if strings.HasPrefix(room, presencePrefix) {
		return fmt.Errorf("room_id: %q is reserved", presencePrefix)
	}
	return nil
}

// joined tells the client that pushes to the room reach it. For a connection that
// was opened without a room, the first news is that it is known at all.
func (c *conn) joined(room string) {
	switch {
	case room != c.g.reports.presence:
		c.sendFrame(control("joined", "room_id", room))
	case c.room == "":
		c.sendFrame(control("ready", "user_id", c.user, "node_id", c.g.cfg.NodeID))
	}
}

func (c *conn) left(room string) { c.sendFrame(control("left", "room_id", room)) }

func (c *conn) refused(room, why string) {
	if room == c.g.reports.presence {
		c.sendFrame(control("error", "message", "user_id: "+why))
		return
	}
	c.sendFrame(control("error", "message", "room_id: "+why, "room_id", room))
}

// hear notes that the client lives.
func (g *Gateway) hear(c *conn) {
	c.heard.Store(int64(time.Since(g.began)))
	c.pinged.Store(false)
}

// sweep pings clients that are silent and cuts off those that stay so.
func (g *Gateway) sweep() {
	now := time.Since(g.began)
	g.registry.each(func(conns []*conn) {
		for _, c := range conns {
			silent := now - time.Duration(c.heard.Load())
			switch {
			case silent >= g.cfg.IdleTimeout:
				if c.shut() { // its reader may take longer than until the next sweep to end
					g.count.dead.Inc()
				}
			case silent >= g.cfg.PingInterval && !c.pinged.Swap(true):
				c.sendFrame(wsFrame(gws.OpcodePing, nil))
			}
		}
	})
}
