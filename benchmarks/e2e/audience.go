package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gobwas/ws"
	"github.com/gobwas/ws/wsutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Audience is a room with one WebSocket client for each member.
type Audience struct {
	Room    string `json:"room"`
	Clients int    `json:"clients"`
	Gateway string `json:"gateway"` // where clients connect
	API     string `json:"api"`     // where is pushed
	// Centrifugo tells that both are a Centrifugo: its clients speak its JSON protocol, and
	// pushes go through its HTTP API.
	Centrifugo bool `json:"centrifugo"`
	// Acks tells that clients acknowledge what asks for it, at the latest ackAfter later.
	Acks bool `json:"acks"`
}

// ackAfter is how long a client may gather what it acknowledges at once.
const ackAfter = 50 * time.Millisecond

// Pushing is what one turn pushes to an audience.
type Pushing struct {
	Room     string        `json:"room"`
	Rate     float64       `json:"rate"` // per second, evenly
	Duration time.Duration `json:"duration"`
	Users    bool          `json:"users"` // each push is to one member, in turn, and not to the room
	IDs      bool          `json:"ids"`   // each push has a message id of its own
	Acks     bool          `json:"acks"`  // clients acknowledge each push
}

func (p Pushing) pushes() int { return int(p.Rate * p.Duration.Seconds()) }

// Heard is what the clients got of it.
type Heard struct {
	Pushes    int           `json:"pushes"`
	Failed    int           `json:"failed"` // of Pushes
	Error     string        `json:"error"`
	Delivered int           `json:"delivered"`
	Elapsed   time.Duration `json:"elapsed"`
	Latency   *Histogram    `json:"latency"` // from the moment when a push was due
}

// hall is an Audience that is connected.
type hall struct {
	Audience

	api       pubsub.PushManagerServiceClient
	joined    atomic.Int64
	delivered atomic.Int64
	ears      [16]ear // clients share them
}

// ear counts what some of the clients get.
type ear struct {
	mu      sync.Mutex
	latency Histogram
	clients []*acker
}

// acker is a client that owes an acknowledgement, or does not.
type acker struct {
	conn       net.Conn
	got, acked uint64 // guarded by ear.mu
}

// tell sends a frame at once, whoever else does.
func tell(conn net.Conn, op ws.OpCode, payload []byte) error {
	frame, err := ws.CompileFrame(ws.MaskFrame(ws.NewFrame(op, true, payload)))
	if err == nil {
		_, err = conn.Write(frame)
	}
	return err
}

// acknowledge sends what some of the clients owe, until they are gone.
func (e *ear) acknowledge() {
	for {
		time.Sleep(ackAfter)
		e.mu.Lock()
		clients := slices.Clone(e.clients)
		e.mu.Unlock()
		for _, c := range clients {
			e.mu.Lock()
			n := c.got
			owed := n != c.acked
			c.acked = n
			e.mu.Unlock()
			if owed {
				_ = tell(c.conn, ws.OpText, []byte(`{"type":"ack","ack":`+strconv.FormatUint(n, 10)+`}`)) // what is missing shows
			}
		}
	}
}

// audienceRole holds the clients of all audiences, and pushes to them.
func audienceRole(_ context.Context, p *part) error {
	halls := map[string]*hall{}
	handle(p, "connect", func(ctx context.Context, a Audience) (none, error) {
		h := &hall{Audience: a}
		halls[a.Room] = h
		if !a.Centrifugo {
			cc, err := grpc.NewClient("passthrough:///"+a.API, grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				return none{}, err
			}
			h.api = pubsub.NewPushManagerServiceClient(cc)
		}
		if a.Acks {
			for i := range h.ears {
				go h.ears[i].acknowledge() // as long as the process
			}
		}
		for i := range a.Clients {
			if err := h.connect(ctx, i); err != nil {
				return none{}, fmt.Errorf("client %d: %w", i, err)
			}
		}
		for deadline := time.Now().Add(startTimeout); h.joined.Load() < int64(a.Clients); {
			if time.Now().After(deadline) {
				return none{}, fmt.Errorf("%d of %d clients are in the room", h.joined.Load(), a.Clients)
			}
			if err := pause(ctx, 10*time.Millisecond); err != nil {
				return none{}, err
			}
		}
		return none{}, nil
	})
	handle(p, "push", func(ctx context.Context, p Pushing) (*Heard, error) {
		if h := halls[p.Room]; h != nil && p.Rate > 0 && p.Duration < maxRun {
			return h.push(ctx, p), nil
		}
		return nil, errors.New("out of bounds")
	})
	return nil
}

// connect opens the i-th client. It ends with the process or the gateway.
func (h *hall) connect(ctx context.Context, i int) error {
	url := "ws://" + h.Gateway + "/ws?user_id=" + UserID(h.Room, i) + "&room_id=" + h.Room
	if h.Acks {
		url += "&ack=1"
	}
	if h.Centrifugo {
		url = "ws://" + h.Gateway + "/connection/websocket"
	}
	conn, br, _, err := ws.Dial(ctx, url)
	if err != nil {
		return err
	}
	if h.Centrifugo {
		hello := `{"id":1,"connect":{}}` + "\n" + `{"id":2,"subscribe":{"channel":"` + h.Room + `"}}`
		if err := wsutil.WriteClientText(conn, []byte(hello)); err != nil {
			return err
		}
	}
	if br == nil {
		br = bufio.NewReader(conn)
	}
	e, c := &h.ears[i%len(h.ears)], &acker{conn: conn}
	e.mu.Lock()
	e.clients = append(e.clients, c)
	e.mu.Unlock()
	go h.listen(c, br, e)
	return nil
}

// listen reads the messages of one client. A connection that breaks shows in what is missing.
func (h *hall) listen(c *acker, br *bufio.Reader, e *ear) {
	conn := c.conn
	defer func() { _ = conn.Close() }()
	var payload []byte
	for {
		head, err := ws.ReadHeader(br)
		if err != nil || head.Length > maxLine {
			return
		}
		payload = slices.Grow(payload[:0], int(head.Length))[:head.Length]
		if _, err := io.ReadFull(br, payload); err != nil {
			return
		}
		switch {
		case head.OpCode == ws.OpPing:
			err = tell(conn, ws.OpPong, payload)
		default:
			h.hear(payload, e)
			if _, rest, found := bytes.Cut(payload, []byte(`"ack":`)); found {
				e.mu.Lock()
				c.got = digits(rest)
				e.mu.Unlock()
			}
			// Its ping is a line of its own, maybe beside others.
			if h.Centrifugo && bytes.Contains(append(append([]byte("\n"), payload...), '\n'), []byte("\n{}\n")) {
				err = tell(conn, ws.OpText, []byte("{}"))
			}
		}
		if err != nil {
			return
		}
	}
}

// hear counts the pushes in a message; Centrifugo may put several into one.
func (h *hall) hear(message []byte, e *ear) {
	if bytes.Contains(message, []byte(`"type":"joined"`)) || bytes.Contains(message, []byte(`"subscribe":`)) {
		h.joined.Add(1)
		return
	}
	now := time.Now().UnixNano()
	for {
		_, rest, found := bytes.Cut(message, []byte(`"timestamp":`))
		if !found {
			return
		}
		e.mu.Lock()
		e.latency.Add(time.Duration(now - int64(digits(rest))))
		e.mu.Unlock()
		h.delivered.Add(1)
		message = rest
	}
}

// digits reads the number that b begins with.
func digits(b []byte) (n uint64) {
	for len(b) > 0 && b[0] >= '0' && b[0] <= '9' {
		n, b = 10*n+uint64(b[0]-'0'), b[1:]
	}
	return n
}

// push pushes at an even rate and waits until all clients have all.
func (h *hall) push(ctx context.Context, p Pushing) *Heard {
	for i := range h.ears {
		h.ears[i].latency = Histogram{}
	}
	h.delivered.Store(0)
	out := &Heard{Pushes: p.pushes(), Latency: &Histogram{}}
	var mu sync.Mutex // guards out
	var calls sync.WaitGroup
	begin := time.Now()
	for n := range out.Pushes {
		due := begin.Add(time.Duration(float64(n) / p.Rate * float64(time.Second)))
		time.Sleep(time.Until(due))
		calls.Go(func() {
			if err := h.send(ctx, p, n, due); err != nil {
				mu.Lock()
				defer mu.Unlock()
				out.Failed++
				out.Error = err.Error()
			}
		})
	}
	calls.Wait()
	want := int64(out.Pushes)
	if !p.Users {
		want *= int64(h.Clients)
	}
	for deadline := time.Now().Add(2 * time.Second); h.delivered.Load() < want && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	out.Elapsed, out.Delivered = time.Since(begin), int(h.delivered.Load())
	for i := range h.ears {
		e := &h.ears[i]
		e.mu.Lock()
		out.Latency.Merge(&e.latency)
		e.mu.Unlock()
	}
	return out
}

// send makes the n-th push, which was due at a time.
func (h *hall) send(ctx context.Context, p Pushing, n int, due time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	data := letters(payload)
	if !h.Centrifugo {
		content := &pubsub.MessageContent{Type: pubsub.MessageType_TEXT, Data: data, Timestamp: due.UnixNano()}
		var options *pubsub.PushOptions
		if p.IDs {
			options = &pubsub.PushOptions{MessageId: strconv.FormatInt(due.UnixNano(), 36)}
			if p.Acks {
				options.Ack = pubsub.AckPolicy_ACK_CLIENT
			}
		}
		if p.Users {
			reply, err := h.api.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: UserID(h.Room, n%h.Clients), Content: content, Options: options})
			if err == nil && !reply.GetSuccess() {
				err = fmt.Errorf("%w: %s", errNoSuccess, reply.GetMessage())
			}
			return err
		}
		reply, err := h.api.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: h.Room, Content: content, Options: options})
		if err == nil && int(reply.GetDeliveredCount()) != h.Clients {
			err = fmt.Errorf("%d of %d: %w", reply.GetDeliveredCount(), h.Clients, errNoSuccess)
		}
		return err
	}
	// As long as a message of the reference Connect-Node.
	body := `{"channel":"` + h.Room + `","data":{"type":"text","room_id":"` + h.Room + `","user_id":"` + UserID(h.Room, 0) +
		`","timestamp":` + strconv.FormatInt(due.UnixNano(), 10) + `,"data":{"content":"` + string(data) + `"},"metadata":{}}}`
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+h.API+"/api/publish", bytes.NewReader([]byte(body)))
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("publish: %s", resp.Status)
	}
	return nil
}
