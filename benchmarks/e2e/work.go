package e2e

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
)

// class is what a request asks for.
type class int

const (
	toUser class = iota
	toRoom
	toAll
	classes
)

// String is the name of the class in results.
func (c class) String() string { return [...]string{"user", "room", "broadcast"}[c] }

func (c class) method() string {
	return "/pubsub.PushManagerService/" + [...]string{"PushToUser", "PushToRoom", "BroadcastMessage"}[c]
}

// Work is what is pushed to whom. Shares of users, rooms and broadcasts are
// relative; one that is 0 does not come.
type Work struct {
	Users   string `json:"users"`   // prefix of the users, see UserID
	UserN   int    `json:"user_n"`  // so many of them
	Rooms   string `json:"rooms"`   // prefix of the rooms, see RoomID
	RoomN   int    `json:"room_n"`  // so many of them
	Mix     [3]int `json:"mix"`     // shares of users, rooms, broadcasts
	Payload int    `json:"payload"` // bytes of data
	Store   bool   `json:"store"`   // messages for those who are away are stored
	JSON    bool   `json:"json"`    // for an access with JSON
}

func (w Work) inJSON() Work {
	w.JSON = true
	return w
}

// RoomID is the id of the i-th room of a kind.
func RoomID(prefix string, i int) string { return "room-" + prefix + "-" + strconv.Itoa(i) }

// messages is a Work, encoded.
type messages struct {
	unary  [classes][]raw // with the prefix of gRPC
	stream []raw          // pushes of the one class that has a share, each with its place as id
	batch  []raw          // the same as parts of a batch
	mix    [3]int
	sum    int
}

func (w Work) encode() (*messages, error) {
	m := &messages{mix: w.Mix}
	for _, n := range w.Mix {
		m.sum += n
	}
	if m.sum == 0 || w.Mix[toUser] > 0 && w.UserN == 0 || w.Mix[toRoom] > 0 && w.RoomN == 0 {
		return nil, fmt.Errorf("work without anything to do: %+v", w)
	}
	content := &pubsub.MessageContent{Type: pubsub.MessageType_TEXT, Data: letters(w.Payload), Timestamp: 1_700_000_000}
	add := func(c class, request proto.Message) error {
		if w.JSON {
			b, err := protojson.Marshal(request)
			m.unary[c] = append(m.unary[c], raw{b})
			return err
		}
		b, err := proto.Marshal(request)
		m.unary[c] = append(m.unary[c], raw{append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(b))), b...)})
		return err
	}
	var options *pubsub.PushOptions
	if w.Store {
		options = &pubsub.PushOptions{Offline: pubsub.OfflinePolicy_OFFLINE_STORE} // each push gets an id of its own there
	}
	for i := range w.UserN {
		if err := add(toUser, &pubsub.PushToUserRequest{UserId: UserID(w.Users, i), Content: content, Options: options}); err != nil {
			return nil, err
		}
	}
	for i := range w.RoomN {
		if err := add(toRoom, &pubsub.PushToRoomRequest{RoomId: RoomID(w.Rooms, i), Content: content}); err != nil {
			return nil, err
		}
	}
	return m, add(toAll, &pubsub.BroadcastMessageRequest{Content: content})
}

// letters is a payload.
func letters(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = 'a' + byte(i%26)
	}
	return b
}

// forStream returns at least least pushes for a PushStream, whose ids are their
// places. All are of the first class that has a share.
func (m *messages) forStream(least int) []raw {
	if len(m.stream) >= least {
		return m.stream
	}
	field := protowire.Number(3)
	if m.streamClass() == toRoom {
		field = 2
	}
	from := m.unary[m.streamClass()]
	m.stream = make([]raw, max(least, min(len(from), 1<<14)))
	m.batch = make([]raw, len(m.stream))
	for i := range m.stream {
		b := protowire.AppendTag(nil, 1, protowire.VarintType)
		b = protowire.AppendVarint(b, uint64(i))
		b = protowire.AppendTag(b, field, protowire.BytesType)
		m.stream[i].b = protowire.AppendBytes(b, from[i%len(from)].b[prefix:])
		m.batch[i].b = protowire.AppendBytes([]byte{batchTag}, m.stream[i].b)
	}
	return m.stream
}

// batchTag starts a part of a batch, in PushStreamRequest and PushStreamResponse alike.
const batchTag = 10<<3 | byte(protowire.BytesType)

// eachReply yields the replies in a message of a PushStream.
func eachReply(b []byte, yield func(reply []byte) error) error {
	if len(b) == 0 || b[0] != batchTag {
		return yield(b)
	}
	for len(b) > 0 {
		reply, n := protowire.ConsumeBytes(b[1:])
		if n < 0 || b[0] != batchTag {
			return errors.New("a broken batch")
		}
		if err := yield(reply); err != nil {
			return err
		}
		b = b[1+n:]
	}
	return nil
}

// streamClass is the one class of a PushStream.
func (m *messages) streamClass() class {
	if m.mix[toUser] == 0 {
		return toRoom
	}
	return toUser
}

// succeeded reads success from the reply of a unary call, where it stands first.
func succeeded(reply []byte) bool { return len(reply) >= 2 && reply[0] == 1<<3 && reply[1] == 1 }

// succeededJSON reads the same from a reply in JSON.
func succeededJSON(reply []byte) bool { return bytes.HasPrefix(reply, []byte(`{"success":true`)) }

// streamReply reads the id of a PushStreamResponse and whether its push succeeded.
func streamReply(b []byte) (id int, ok bool) {
	if len(b) > 0 && b[0] == 1<<3 {
		v, n := protowire.ConsumeVarint(b[1:])
		if n < 0 {
			return 0, false
		}
		id, b = int(v), b[1+n:]
	}
	num, typ, n := protowire.ConsumeTag(b)
	if n < 0 || typ != protowire.BytesType || num < 3 {
		return id, false
	}
	reply, n := protowire.ConsumeBytes(b[n:])
	return id, n > 0 && succeeded(reply)
}
