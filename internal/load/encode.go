package load

import (
	"math/rand/v2"

	"google.golang.org/protobuf/encoding/protowire"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Fields of the requests, the same in all of them where they have them.
const (
	fieldTarget  protowire.Number = 1 // room_id, user_id, user_ids
	fieldContent protowire.Number = 2 // 1 in a BroadcastMessageRequest
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
}

// chooser draws the pushes of a lane. One goroutine has it.
type chooser struct {
	random *rand.Rand
	limits [kinds]float64 // cumulative, of 1
	cfg    *Config
}

func newChooser(cfg *Config, lane int) *chooser {
	c := &chooser{random: rand.New(rand.NewPCG(cfg.Seed, uint64(lane))), cfg: cfg}
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
		userCount: cfg.Users, perPush: cfg.UsersPerPush,
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
	return b
}

// streamHead appends the head of a PushStreamRequest.
func (e *encoder) streamHead(b []byte, id uint64, o order) []byte {
	b = protowire.AppendVarint(protowire.AppendTag(b, 1, protowire.VarintType), id)
	b = protowire.AppendTag(b, o.kind.streamField(), protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(e.headSize(o)+len(e.content.of(o.kind))))
	return e.head(b, o)
}

func (e *encoder) headSize(o order) int {
	switch o.kind {
	case ToUser:
		return idSize(&e.users, o.key)
	case ToRoom:
		return idSize(&e.rooms, o.key)
	case ToUsers:
		random, n := rand.NewPCG(o.seed, 0), 0
		for range e.perPush {
			n += idSize(&e.users, int(random.Uint64()%uint64(e.userCount)))
		}
		return n
	default:
		return 0
	}
}

func appendID(b []byte, p *pattern, n int) []byte {
	b = protowire.AppendTag(b, fieldTarget, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(p.size(n)))
	return p.append(b, n)
}

func idSize(p *pattern, n int) int {
	return protowire.SizeTag(fieldTarget) + protowire.SizeBytes(p.size(n))
}
