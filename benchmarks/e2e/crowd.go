package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gobwas/ws"
)

const (
	dialers     = 32               // clients that one process connects at once
	dialTimeout = 20 * time.Second // of one client
	readBuffer  = 512              // of one client; a message is shorter
	numbered    = `{"content":"`   // what the number of a push follows
)

// Crowd is the clients of one process: the users First and following, each on the gateway that Town says.
type Crowd struct {
	Town Town `json:"town"`

	First int `json:"first"`
	Count int `json:"count"`
}

// Town is who is where: each client is in one of the small rooms, the first Big of them in the big one, too.
type Town struct {
	Clients  int      `json:"clients"`
	Rooms    int      `json:"rooms"`
	Big      int      `json:"big"`
	Gateways []string `json:"gateways"`
}

const bigRoom = "big"

// Room is the i-th small room.
func (Town) Room(i int) string { return "room-" + strconv.Itoa(i) }

// User is the i-th client.
func (Town) User(i int) string { return UserID("town", i) }

// gateway is that of the i-th client: the members of a room are on several.
func (t Town) gateway(i int) string { return t.Gateways[(i+i/t.Rooms)%len(t.Gateways)] }

// members is how many clients the i-th small room has.
func (t Town) members(i int) int { return (t.Clients - i + t.Rooms - 1) / t.Rooms }

// PushTarget is to whom the pushes of a phase go.
type PushTarget string

// The kinds of pushes.
const (
	ToBig       PushTarget = "room of many"
	ToRooms     PushTarget = "small rooms"
	ToUsers     PushTarget = "users"
	ToEverybody PushTarget = "everybody"
)

// PushRun is pushes of one kind, numbered from 0 to Pushes-1. IDs are not used twice.
type PushRun struct {
	ID     int        `json:"id"`
	To     PushTarget `json:"to"`
	Pushes int        `json:"pushes"`
}

// concerns tells whether the push is for the client.
func (p PushRun) concerns(t Town, client, push int) bool {
	switch p.To {
	case ToBig:
		return client < t.Big
	case ToRooms:
		return client%t.Rooms == push%t.Rooms
	case ToUsers:
		return client == push%t.Clients
	default:
		return true
	}
}

// deliveries is how many the push is to make.
func (p PushRun) deliveries(t Town, push int) int {
	switch p.To {
	case ToBig:
		return t.Big
	case ToRooms:
		return t.members(push % t.Rooms)
	case ToUsers:
		return 1
	default:
		return t.Clients
	}
}

// CrowdHeard is what the clients of a process got of a run.
type CrowdHeard struct {
	Delivered int        `json:"delivered"` // the first time
	Twice     int        `json:"twice"`
	Stray     int        `json:"stray"` // not for the client, or of another run
	Ended     int        `json:"ended"` // connections, so far
	Latency   *Histogram `json:"latency"`
}

// crowd is a Crowd that is connected.
type crowd struct {
	Crowd

	joined, ended atomic.Int64
	run           atomic.Pointer[hearing]
}

// hearing is what came of one run.
type hearing struct {
	PushRun

	twice, stray, delivered atomic.Int64
	ears                    [16]struct {
		mu      sync.Mutex
		latency Histogram
		seen    map[uint64]struct{} // client and push
	}
}

func newHearing(p PushRun) *hearing {
	h := &hearing{PushRun: p}
	for i := range h.ears {
		h.ears[i].seen = make(map[uint64]struct{})
	}
	return h
}

// crowdRole holds many clients, and counts what they get.
func crowdRole(_ context.Context, p *part) error {
	c := &crowd{}
	c.run.Store(newHearing(PushRun{ID: -1}))
	handle(p, "connect", func(ctx context.Context, all Crowd) (none, error) {
		c.Crowd = all
		next := atomic.Int64{}
		errs := make(chan error, dialers)
		var wg sync.WaitGroup
		for range dialers {
			wg.Go(func() {
				for i := next.Add(1) - 1; i < int64(c.Count); i = next.Add(1) - 1 {
					if err := c.connect(ctx, c.First+int(i)); err != nil {
						errs <- fmt.Errorf("client %d: %w", c.First+int(i), err)
						return
					}
				}
			})
		}
		wg.Wait()
		select {
		case err := <-errs:
			return none{}, err
		default:
			return none{}, nil
		}
	})
	handle(p, "joined", func(context.Context, none) (int, error) { return int(c.joined.Load()), nil })
	handle(p, "run", func(_ context.Context, p PushRun) (none, error) {
		c.run.Store(newHearing(p))
		return none{}, nil
	})
	handle(p, "heard", func(context.Context, none) (*CrowdHeard, error) { return c.heard(), nil })
	return nil
}

func (c *crowd) heard() *CrowdHeard {
	h := c.run.Load()
	out := &CrowdHeard{
		Delivered: int(h.delivered.Load()), Twice: int(h.twice.Load()), Stray: int(h.stray.Load()), Ended: int(c.ended.Load()),
		Latency: &Histogram{},
	}
	for i := range h.ears {
		e := &h.ears[i]
		e.mu.Lock()
		out.Latency.Merge(&e.latency)
		e.mu.Unlock()
	}
	return out
}

// connect opens the i-th client. It ends with the process or the gateway.
func (c *crowd) connect(ctx context.Context, i int) error {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	url := "ws://" + c.Town.gateway(i) + "/ws?user_id=" + c.Town.User(i) + "&room_id=" + c.Town.Room(i%c.Town.Rooms)
	conn, br, _, err := ws.Dial(ctx, url)
	if err != nil {
		return err
	}
	var from io.Reader = conn
	if br != nil { // what came with the handshake's answer
		rest, _ := br.Peek(br.Buffered()) // no error: it is there
		from = io.MultiReader(bytes.NewReader(slices.Clone(rest)), conn)
		ws.PutReader(br)
	}
	if i < c.Town.Big {
		if err := tell(conn, ws.OpText, []byte(`{"type":"join","room_id":"`+bigRoom+`"}`)); err != nil {
			return err
		}
	}
	go c.listen(i, conn, bufio.NewReaderSize(from, readBuffer))
	return nil
}

// listen reads the messages of one client. A connection that breaks is counted, and shows in what is missing.
func (c *crowd) listen(i int, conn net.Conn, br *bufio.Reader) {
	defer c.ended.Add(1)
	defer func() { _ = conn.Close() }()
	for {
		head, err := ws.ReadHeader(br)
		if err != nil || head.Length > readBuffer {
			return
		}
		payload, err := br.Peek(int(head.Length))
		if err != nil {
			return
		}
		if head.OpCode == ws.OpPing {
			err = tell(conn, ws.OpPong, payload)
		} else {
			c.hear(i, payload)
		}
		if _, discarded := br.Discard(int(head.Length)); errors.Join(err, discarded) != nil {
			return
		}
	}
}

// hear counts one message.
func (c *crowd) hear(client int, message []byte) {
	if bytes.Contains(message, []byte(`"type":"joined"`)) {
		c.joined.Add(1)
		return
	}
	h := c.run.Load()
	_, due, timed := bytes.Cut(message, []byte(`"timestamp":`))
	_, content, found := bytes.Cut(message, []byte(numbered))
	run, rest, parted := bytes.Cut(content, []byte("."))
	if !timed || !found || !parted {
		return
	}
	push := int(digits(rest))
	if int(digits(run)) != h.ID || push >= h.Pushes || !h.concerns(c.Town, client, push) {
		h.stray.Add(1)
		return
	}
	took := time.Duration(time.Now().UnixNano() - int64(digits(due)))
	e := &h.ears[client%len(h.ears)]
	key := uint64(client)<<32 | uint64(push)
	e.mu.Lock()
	_, again := e.seen[key]
	e.seen[key] = struct{}{}
	if !again {
		e.latency.Add(took)
	}
	e.mu.Unlock()
	if again {
		h.twice.Add(1)
	} else {
		h.delivered.Add(1)
	}
}
