package load

import (
	"fmt"
	"math/rand/v2"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Fields of the requests, the same in all of them where they have them.
const (
	fieldTarget  protowire.Number = 1 // room_id, user_id, user_ids
	fieldContent protowire.Number = 2 // 1 in a BroadcastMessageRequest
	fieldOptions protowire.Number = 20
)

// streamField is the field of a kind in PushStreamRequest and PushStreamResponse;
// the latter's are one higher.
func (k Kind) streamField() protowire.Number {
	switch k {
	case ToRoom:
		return 2
	case ToUser:
		return 3
	case ToAll:
		return 4
	default:
		return 5
	}
}

func (k Kind) method() string {
	switch k {
	case ToRoom:
		return pubsub.PushManagerService_PushToRoom_FullMethodName
	case ToUser:
		return pubsub.PushManagerService_PushToUser_FullMethodName
	case ToAll:
		return pubsub.PushManagerService_BroadcastMessage_FullMethodName
	default:
		return pubsub.PushManagerService_PushToUsers_FullMethodName
	}
}

// content is a payload as the last field of a request, encoded once for all of them.
type content struct {
	push, broadcast []byte
}

func newContent(payload []byte) content {
	var message []byte // type 0 is TEXT, timestamp 0 is stamped by the server
	if len(payload) > 0 {
		message = protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), payload)
	}
	field := func(number protowire.Number) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), message)
	}
	return content{push: field(fieldContent), broadcast: field(1)}
}

// of is the content of a request of kind k. It is shared: nobody writes to it.
func (c *content) of(k Kind) []byte {
	if k == ToAll {
		return c.broadcast
	}
	return c.push
}

// order is one push, chosen and not encoded yet.
type order struct {
	kind Kind
	key  int    // the room or the user
	seed uint64 // of the users of kind ToUsers
	id   string // of the message; empty: it has none
}

// chooser draws the pushes of a lane. One goroutine has it.
type chooser struct {
	random *rand.Rand
	limits [kinds]float64 // cumulative, of 1
	cfg    *Config
	ids    string // begin of its message ids; empty: it gives none
	given  int
	again  *order // to be sent once more; nil for none
}

func newChooser(r *run, lane int) *chooser {
	cfg := &r.cfg
	c := &chooser{random: rand.New(rand.NewPCG(cfg.Seed, uint64(lane))), cfg: cfg}
	if cfg.IDs {
		c.ids = fmt.Sprintf("%s-%d-", r.ids, lane)
	}
	sum := 0.0
	for k, weight := range cfg.Mix {
		sum += weight
		c.limits[k] = sum
	}
	last := ToUser
	for k := range c.limits {
		c.limits[k] /= sum
		if cfg.Mix[k] > 0 {
			last = Kind(k)
		}
	}
	c.limits[last] = 1 // whatever the rounding did
	return c
}

func (c *chooser) next() order {
	if c.again != nil {
		o := *c.again
		c.again = nil
		return o
	}
	o := c.draw()
	if c.ids != "" {
		c.given++
		o.id = c.ids + strconv.Itoa(c.given)
	}
	if c.cfg.Repeat > 0 && c.random.Float64() < c.cfg.Repeat {
		c.again = &o
	}
	return o
}

func (c *chooser) draw() order {
	x := c.random.Float64()
	var o order
	for o.kind < ToAll && x >= c.limits[o.kind] {
		o.kind++
	}
	switch o.kind {
	case ToUser:
		o.key = c.random.IntN(c.cfg.Users)
	case ToRoom:
		o.key = c.random.IntN(c.cfg.Rooms)
	case ToUsers:
		o.seed = c.random.Uint64()
	default: // everybody
	}
	return o
}

// encoder writes the heads of requests: all that stands before the content.
// It is shared and never changes.
type encoder struct {
	content      content
	users, rooms pattern
	userCount    int
	perPush      int
	clientAck    bool
}

func newEncoder(cfg *Config) (*encoder, error) {
	users, err := parsePattern(cfg.UserPattern)
	if err != nil {
		return nil, err
	}
	rooms, err := parsePattern(cfg.RoomPattern)
	if err != nil {
		return nil, err
	}
	return &encoder{
		content: newContent(cfg.Payload), users: users, rooms: rooms,
		userCount: cfg.Users, perPush: cfg.UsersPerPush, clientAck: cfg.ClientAck,
	}, nil
}

// head appends the head of a unary request.
func (e *encoder) head(b []byte, o order) []byte {
	switch o.kind {
	case ToUser:
		b = appendID(b, &e.users, o.key)
	case ToRoom:
		b = appendID(b, &e.rooms, o.key)
	case ToUsers:
		random := rand.NewPCG(o.seed, 0)
		for range e.perPush {
			b = appendID(b, &e.users, int(random.Uint64()%uint64(e.userCount)))
		}
	default: // everybody
	}
	if n := e.optionsSize(o); n > 0 {
		b = protowire.AppendVarint(protowire.AppendTag(b, fieldOptions, protowire.BytesType), uint64(n))
		if o.id != "" {
			b = protowire.AppendString(protowire.AppendTag(b, 1, protowire.BytesType), o.id)
		}
		if e.clientAck {
			b = protowire.AppendVarint(protowire.AppendTag(b, 3, protowire.VarintType), uint64(pubsub.AckPolicy_ACK_CLIENT))
		}
	}
	return b
}

// optionsSize is the length of a push's PushOptions; 0: it has none.
func (e *encoder) optionsSize(o order) (n int) {
	if o.id != "" {
		n += protowire.SizeTag(1) + protowire.SizeBytes(len(o.id))
	}
	if e.clientAck {
		n += protowire.SizeTag(3) + protowire.SizeVarint(uint64(pubsub.AckPolicy_ACK_CLIENT))
	}
	return n
}

// streamHead appends the head of a PushStreamRequest.
func (e *encoder) streamHead(b []byte, id uint64, o order) []byte {
	b = protowire.AppendVarint(protowire.AppendTag(b, 1, protowire.VarintType), id)
	b = protowire.AppendTag(b, o.kind.streamField(), protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(e.headSize(o)+len(e.content.of(o.kind))))
	return e.head(b, o)
}

func (e *encoder) headSize(o order) (n int) {
	if options := e.optionsSize(o); options > 0 {
		n = protowire.SizeTag(fieldOptions) + protowire.SizeBytes(options)
	}
	switch o.kind {
	case ToUser:
		n += idSize(&e.users, o.key)
	case ToRoom:
		n += idSize(&e.rooms, o.key)
	case ToUsers:
		random := rand.NewPCG(o.seed, 0)
		for range e.perPush {
			n += idSize(&e.users, int(random.Uint64()%uint64(e.userCount)))
		}
	default: // everybody
	}
	return n
}

func appendID(b []byte, p *pattern, n int) []byte {
	b = protowire.AppendTag(b, fieldTarget, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(p.size(n)))
	return p.append(b, n)
}

func idSize(p *pattern, n int) int {
	return protowire.SizeTag(fieldTarget) + protowire.SizeBytes(p.size(n))
}
