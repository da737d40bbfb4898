package load

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lxzan/gws"
)

// The habits of the generator's clients.
const (
	dialsAtOnce    = 64
	confirmTimeout = 30 * time.Second // until the gateway has confirmed all of them
	flushEvery     = 25 * time.Millisecond
	flushAt        = 16 // pushes since the last acknowledgement
	remembered     = 1024
	againAfter     = 500 * time.Millisecond
	largestPush    = 4 << 20
)

// Clients is what came to the generator's clients.
type Clients struct {
	Connected int   // at the end
	Lost      int64 // connections that ended too early
	Received  int64 // pushes
	Acked     int64 // of Received: asked for it, and acknowledged
	Replayed  int64 // of Received: marked as sent again
	// Twice counts pushes with a message id that the connection had had among its last thousand, and not
	// marked as sent again. A gateway that de-duplicates has none.
	Twice int64
}

// clients are the generator's WebSocket clients. Each has a goroutine, from connect to close, which
// reads, and connects again when it has to; one more acknowledges for all of them.
type clients struct {
	stop  chan struct{}
	once  sync.Once
	group sync.WaitGroup
	dials chan struct{} // has one for each dial under way
	seed  maphash.Seed
	all   []*client // static after connect

	atEnd     int        // connected; static after close
	confirmed chan error // one for each client: its first connection is confirmed, or failed

	connected                              atomic.Int64
	lost, received, acked, replayed, twice atomic.Int64
}

func newClients() *clients {
	return &clients{stop: make(chan struct{}), dials: make(chan struct{}, dialsAtOnce), seed: maphash.MakeSeed()}
}

// client is one of them, with one connection after the other.
type client struct {
	gws.BuiltinEventHandler

	// Static.
	clients *clients
	address string
	first   sync.Once // for confirmed

	// Owned by the reader of the connection.
	ids  map[uint64]struct{} // the last ones
	ring []uint64            // the same, in the order in which they came
	next int

	mu sync.Mutex
	// Guarded by mu.
	conn    *gws.Conn // nil: there is none
	handled uint64    // the last number
	unsaid  int       // pushes since the last acknowledgement
}

// connect opens the connections and waits until all are confirmed.
func (c *clients) connect(ctx context.Context, cfg *Config, e *encoder) error {
	if cfg.Clients == 0 {
		return nil
	}
	c.confirmed = make(chan error, cfg.Clients)
	for i := range cfg.Clients {
		address, err := url.Parse(cfg.ClientURLs[i%len(cfg.ClientURLs)])
		if err != nil {
			return fmt.Errorf("load: ClientURLs: %w", err)
		}
		q := address.Query()
		q.Set("user_id", string(e.users.append(nil, i)))
		q.Set("room_id", string(e.rooms.append(nil, i%cfg.Rooms)))
		q.Set("ack", "1")
		address.RawQuery = q.Encode()
		c.all = append(c.all, &client{clients: c, address: address.String()})
	}
	for _, one := range c.all {
		c.group.Go(one.loop)
	}
	c.group.Go(c.flushLoop)
	timer := time.NewTimer(confirmTimeout)
	defer timer.Stop()
	for range c.all {
		select {
		case err := <-c.confirmed:
			if err != nil {
				return fmt.Errorf("connect a client: %w: %w", ErrUnreachable, err)
			}
		case <-ctx.Done():
			return ErrNothingMeasured
		case <-timer.C:
			return fmt.Errorf("connect the clients: not all are confirmed within %v: %w", confirmTimeout, ErrUnreachable)
		}
	}
	return nil
}

// close ends the connections, and waits for all goroutines. It may be called again.
func (c *clients) close() {
	c.once.Do(func() {
		c.atEnd = int(c.connected.Load())
		close(c.stop)
	})
	for _, one := range c.all {
		one.end()
	}
	c.group.Wait()
}

func (c *clients) stopped() bool {
	select {
	case <-c.stop:
		return true
	default:
		return false
	}
}

// ledger is read after close.
func (c *clients) ledger() Clients {
	return Clients{
		Connected: c.atEnd, Lost: c.lost.Load(), Received: c.received.Load(), Acked: c.acked.Load(),
		Replayed: c.replayed.Load(), Twice: c.twice.Load(),
	}
}

// flushLoop acknowledges what has waited long enough.
func (c *clients) flushLoop() {
	ticker := time.NewTicker(flushEvery)
	defer ticker.Stop()
	for {
		select {
		case <-c.stop:
			return
		case <-ticker.C:
			for _, one := range c.all {
				one.flush(1)
			}
		}
	}
}

// loop has one connection after the other.
func (c *client) loop() {
	for !c.clients.stopped() {
		err := c.read()
		c.confirm(err)
		if c.clients.stopped() {
			return
		}
		timer := time.NewTimer(againAfter + rand.N(againAfter))
		select {
		case <-timer.C:
		case <-c.clients.stop:
			timer.Stop()
		}
	}
}

// read is one connection, from its handshake to its end.
func (c *client) read() (err error) {
	defer func() {
		// What a gateway sends must not end the generator, whatever it is.
		if e := recover(); e != nil {
			err = fmt.Errorf("what came cannot be read: %v", e)
		}
	}()
	c.ids, c.ring, c.next = map[uint64]struct{}{}, nil, 0
	select {
	case c.clients.dials <- struct{}{}:
	case <-c.clients.stop:
		return ErrNothingMeasured
	}
	conn, resp, err := gws.NewClient(c, &gws.ClientOption{Addr: c.address, HandshakeTimeout: connectTimeout, ReadMaxPayloadSize: largestPush})
	<-c.clients.dials
	if resp != nil && resp.Body != nil {
		_ = resp.Body.Close()
	}
	if err != nil {
		return err //nolint:wrapcheck // connect does.
	}
	c.mu.Lock()
	c.conn, c.handled, c.unsaid = conn, 0, 0
	c.mu.Unlock()
	if c.clients.stopped() { // close may have passed before
		c.end()
	}
	c.clients.connected.Add(1)
	defer c.clients.connected.Add(-1)
	conn.ReadLoop()
	if !c.clients.stopped() {
		c.clients.lost.Add(1)
	}
	return errors.New("the gateway has closed the connection")
}

// confirm tells connect what became of the first connection.
func (c *client) confirm(err error) { c.first.Do(func() { c.clients.confirmed <- err }) }

// end closes the connection, after a last acknowledgement.
func (c *client) end() {
	c.flush(1)
	c.mu.Lock()
	conn := c.conn
	c.mu.Unlock()
	if conn != nil {
		_ = conn.WriteClose(1000, nil)
		_ = conn.NetConn().Close()
	}
}

// flush acknowledges if so many pushes wait for it.
func (c *client) flush(least int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.unsaid < least {
		return
	}
	// An error shows in the reader.
	_ = c.conn.WriteMessage(gws.OpcodeText, append(strconv.AppendUint([]byte(`{"type":"ack","ack":`), c.handled, 10), '}'))
	c.clients.acked.Add(int64(c.unsaid))
	c.unsaid = 0
}

// OnMessage implements gws.Event.
func (c *client) OnMessage(_ *gws.Conn, m *gws.Message) {
	defer func() { _ = m.Close() }()
	var f struct {
		Type     string          `json:"type"`
		Data     json.RawMessage `json:"data"`
		ID       string          `json:"id"`
		Ack      uint64          `json:"ack"`
		Replayed bool            `json:"replayed"`
	}
	if json.Unmarshal(m.Bytes(), &f) != nil {
		return
	}
	if f.Data == nil {
		if f.Type == "joined" {
			c.confirm(nil)
		}
		return
	}
	c.clients.received.Add(1)
	switch {
	case f.Replayed:
		c.clients.replayed.Add(1)
		c.had(f.ID)
	case f.ID != "" && c.had(f.ID):
		c.clients.twice.Add(1)
	}
	if f.Ack == 0 {
		return
	}
	c.mu.Lock()
	c.handled = max(c.handled, f.Ack)
	c.unsaid++
	c.mu.Unlock()
	c.flush(flushAt)
}

// had tells whether the id has come on this connection, and remembers it.
func (c *client) had(id string) bool {
	key := maphash.String(c.clients.seed, id)
	if _, ok := c.ids[key]; ok {
		return true
	}
	c.ids[key] = struct{}{}
	if len(c.ring) < remembered {
		c.ring = append(c.ring, key)
		return false
	}
	delete(c.ids, c.ring[c.next])
	c.ring[c.next] = key
	c.next = (c.next + 1) % remembered
	return false
}
