package client

import (
	"fmt"
	"math"
	"slices"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Message is what the clients get. Push-Manager never looks into Data.
type Message struct {
	Type Type
	// Data is at most 256 KiB by default. It may be empty.
	Data []byte
	// Time is shown in whole seconds. The zero Time: Push-Manager stamps its own.
	Time time.Time
	// Metadata has at most 32 entries and 8 KiB by default.
	Metadata map[string]string
}

// Text is a message of text.
func Text(text string) Message { return Message{Data: []byte(text)} }

// Type tells clients how to show a message. Other numbers than these pass through unchanged.
type Type int32

// The types with names.
const (
	TypeText        = Type(pubsub.MessageType_TEXT)
	TypeAudio       = Type(pubsub.MessageType_AUDIO)
	TypeVideo       = Type(pubsub.MessageType_VIDEO)
	TypeTranslation = Type(pubsub.MessageType_TRANSLATION)
	TypeSystem      = Type(pubsub.MessageType_SYSTEM)
)

// Target says to whom a push goes: [User], [Users], [Room] or [Everybody].
type Target struct {
	kind   kind
	id     string
	ids    []string
	except []string
}

// User is all connections of one user.
func User(id string) Target { return Target{kind: toUser, id: id} }

// Users are several users. The slice must not change before the push has ended.
func Users(ids ...string) Target { return Target{kind: toUsers, ids: ids} }

// Room is all members of a room.
func Room(id string) Target { return Target{kind: toRoom, id: id} }

// Everybody is everybody who is connected.
func Everybody() Target { return Target{kind: toAll} }

// Except leaves members of a room out. It is for rooms only.
func (t Target) Except(users ...string) Target {
	t.except = append(slices.Clip(t.except), users...)
	return t
}

// String is "room:lobby", "user:alice", "users" or "everybody", as in receipts.
func (t Target) String() string {
	switch t.kind {
	case toUser:
		return "user:" + t.id
	case toUsers:
		return "users"
	case toRoom:
		return "room:" + t.id
	case toAll:
		return "everybody"
	case ofJob:
		return "job:" + t.id
	default:
		return "nobody"
	}
}

// PushOption says what a push is worth.
type PushOption func(*pushOptions)

type pushOptions struct {
	MessageID string
	wire      *pubsub.PushOptions // nil: none are asked for
	err       error
}

func (o *pushOptions) set() *pubsub.PushOptions {
	if o.wire == nil {
		o.wire = new(pubsub.PushOptions)
	}
	return o.wire
}

// MessageID names the message: 1 to 64 bytes, the same whenever it is pushed again. No connection gets two pushes with the
// same id, through whichever instance they come. With an id, a push whose fate is unknown is repeated.
func MessageID(id string) PushOption {
	return func(o *pushOptions) { o.MessageID, o.set().MessageId = id, id }
}

// TTL is how long the message is worth showing, in whole milliseconds. Without it that is until the deadline of the push, and
// in the store as long as the store keeps.
func TTL(d time.Duration) PushOption {
	return func(o *pushOptions) { o.set().TtlMs = o.milliseconds("options.ttl_ms", d) }
}

// AckByClient makes a message delivered when the client itself has acknowledged it, if the client can. timeout is how long
// that may take; 0: 2 s.
func AckByClient(timeout time.Duration) PushOption {
	return func(o *pushOptions) {
		o.set().Ack = pubsub.AckPolicy_ACK_CLIENT
		if timeout != 0 {
			o.wire.AckTimeoutMs = o.milliseconds("options.ack_timeout_ms", timeout)
		}
	}
}

// StoreIfOffline stores the message for whoever is not reached. Not for broadcasts, and only where there is a store.
func StoreIfOffline() PushOption {
	return func(o *pushOptions) { o.set().Offline = pubsub.OfflinePolicy_OFFLINE_STORE }
}

// CollapseKey has a newer message to the same user with the same key, of at most 64 bytes, take the place of this one while it
// waits.
func CollapseKey(key string) PushOption {
	return func(o *pushOptions) { o.set().CollapseKey = key }
}

// AtPriority decides which pushes are refused first when there is too much to do. Without it that is [Normal].
func AtPriority(p Priority) PushOption {
	return func(o *pushOptions) { o.set().Priority = pubsub.Priority(p) }
}

// AsyncReceipt answers the push without waiting for clients; what they say comes with [Client.Receipts]. It needs AckByClient and
// a MessageID.
func AsyncReceipt() PushOption {
	return func(o *pushOptions) { o.set().Receipt = pubsub.ReceiptMode_RECEIPT_ASYNC }
}

// Priority of a push.
type Priority int32

// The priorities.
const (
	Low      = Priority(pubsub.Priority_PRIORITY_LOW)
	Normal   = Priority(pubsub.Priority_PRIORITY_NORMAL)
	High     = Priority(pubsub.Priority_PRIORITY_HIGH)
	Critical = Priority(pubsub.Priority_PRIORITY_CRITICAL)
)

func (o *pushOptions) milliseconds(field string, d time.Duration) uint32 {
	ms := d.Milliseconds()
	if ms < 1 || ms > math.MaxUint32 {
		o.err = invalid(field, fmt.Sprintf("%v is not between 1 ms and %v", d, math.MaxUint32*time.Millisecond))
		return 0
	}
	return uint32(ms)
}

// kind is the method of a push.
type kind uint8

const (
	toNobody kind = iota
	toUser
	toUsers
	toRoom
	toAll
	ofJob // a call about a broadcast job: no push
)

// method is the name of the method.
func (k kind) method() string {
	switch k {
	case toUser:
		return "PushToUser"
	case toUsers:
		return "PushToUsers"
	case toRoom:
		return "PushToRoom"
	default:
		return "BroadcastMessage"
	}
}

func (k kind) path() string {
	switch k {
	case toUser:
		return pubsub.PushManagerService_PushToUser_FullMethodName
	case toUsers:
		return pubsub.PushManagerService_PushToUsers_FullMethodName
	case toRoom:
		return pubsub.PushManagerService_PushToRoom_FullMethodName
	default:
		return pubsub.PushManagerService_BroadcastMessage_FullMethodName
	}
}

func (k kind) newReply() Reply {
	switch k {
	case toUser:
		return new(pubsub.PushToUserResponse)
	case toUsers:
		return new(pubsub.PushToUsersResponse)
	case toRoom:
		return new(pubsub.PushToRoomResponse)
	default:
		return new(pubsub.BroadcastMessageResponse)
	}
}

// request is what all requests of pushes have in common.
type request interface {
	SizeVT() int
	MarshalToSizedBufferVT([]byte) (int, error)
}

// newRequest makes the request of a push. It refuses what cannot be encoded, for that would cost a Stream all pushes of a
// message; limits are Push-Manager's to hold.
func newRequest(to Target, m Message, options []PushOption) (request, pushOptions, error) {
	var o pushOptions
	for _, option := range options {
		option(&o)
	}
	if o.err != nil {
		return nil, o, o.err
	}
	if err := check(to, m, &o); err != nil {
		return nil, o, err
	}
	content := &pubsub.MessageContent{Type: pubsub.MessageType(m.Type), Data: m.Data, Metadata: m.Metadata}
	if !m.Time.IsZero() {
		content.Timestamp = m.Time.Unix()
	}
	switch to.kind {
	case toUser:
		return &pubsub.PushToUserRequest{UserId: to.id, Content: content, Options: o.wire}, o, nil
	case toUsers:
		return &pubsub.PushToUsersRequest{UserIds: to.ids, Content: content, Options: o.wire}, o, nil
	case toRoom:
		return &pubsub.PushToRoomRequest{RoomId: to.id, Content: content, ExcludeUserIds: to.except, Options: o.wire}, o, nil
	case toAll:
		return &pubsub.BroadcastMessageRequest{Content: content, Options: o.wire}, o, nil
	case toNobody, ofJob:
	}
	return nil, o, invalid("target", "is missing: User, Users, Room or Everybody makes one")
}

func check(to Target, m Message, o *pushOptions) error {
	if len(to.except) > 0 && to.kind != toRoom {
		return invalid("exclude_user_ids", "are for rooms only")
	}
	if !utf8.ValidString(to.id) {
		return invalid(map[kind]string{toUser: "user_id", toRoom: "room_id"}[to.kind], notUTF8)
	}
	for _, list := range []struct {
		field string
		ids   []string
	}{{"user_ids", to.ids}, {"exclude_user_ids", to.except}} {
		for i, id := range list.ids {
			if !utf8.ValidString(id) {
				return invalid(fmt.Sprintf("%s[%d]", list.field, i), notUTF8)
			}
		}
	}
	for k, v := range m.Metadata {
		if !utf8.ValidString(k) || !utf8.ValidString(v) {
			return invalid("content.metadata", notUTF8)
		}
	}
	if !utf8.ValidString(o.MessageID) {
		return invalid("options.message_id", notUTF8)
	}
	if !utf8.ValidString(o.wire.GetCollapseKey()) {
		return invalid("options.collapse_key", notUTF8)
	}
	return nil
}

const notUTF8 = "is not valid UTF-8"

// invalid is the error for what is refused here.
func invalid(field, text string) *Error {
	return &Error{Code: codes.InvalidArgument, Field: field, Message: field + ": " + text, NotSent: true}
}
