package load

import (
	"errors"
	"fmt"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	stdproto "google.golang.org/protobuf/proto"
)

var errMalformed = errors.New("malformed reply")

// request is an encoded request. Who sends one keeps it until it is answered: gRPC
// may read it until then.
type request struct {
	slice   [2]mem.Buffer
	head    mem.SliceBuffer
	content mem.SliceBuffer
}

// set points the request to its parts. gRPC changes the slice while it reads, so
// every sending sets it again.
func (r *request) set(head, content []byte) {
	r.head, r.content = head, content
	r.slice = [2]mem.Buffer{&r.head, &r.content}
}

// Targets counts users by what became of the push to them.
type Targets struct {
	Targets   int64 `json:"targets"`
	Delivered int64 `json:"delivered"`
	Offline   int64 `json:"offline"`
	Failed    int64 `json:"failed"`
	Unknown   int64 `json:"unknown"`

	// Parts of the above, of pushes with options.
	Stored     int64 `json:"stored"`     // of offline
	Unsure     int64 `json:"unsure"`     // of stored
	Acked      int64 `json:"acked"`      // of delivered
	Duplicates int64 `json:"duplicates"` // of delivered
}

func (t *Targets) add(o *Targets) {
	t.Targets += o.Targets
	t.Delivered += o.Delivered
	t.Offline += o.Offline
	t.Failed += o.Failed
	t.Unknown += o.Unknown
	t.Stored += o.Stored
	t.Unsure += o.Unsure
	t.Acked += o.Acked
	t.Duplicates += o.Duplicates
}

// reply is what a load generator wants to know of any reply.
type reply struct {
	id      uint64 // of a PushStreamResponse
	success bool
	nodes   int // that failed
	targets Targets
	err     *spb.Status // of a PushStreamResponse
}

// streamReply is a reply that came on a PushStream.
type streamReply struct{ reply }

// codec puts requests on the wire as they are and reads replies by hand.
type codec struct{}

// Name is that of protobuf, which is what is spoken.
func (codec) Name() string { return proto.Name }

// Marshal takes the bytes of a request.
func (codec) Marshal(v any) (mem.BufferSlice, error) {
	r, ok := v.(*request)
	if !ok {
		return nil, fmt.Errorf("cannot encode a %T", v)
	}
	return r.slice[:], nil
}

// Unmarshal reads data into a reply and keeps nothing of it. Whatever a server sends is
// an error at worst.
func (codec) Unmarshal(data mem.BufferSlice, v any) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("decode a reply: panic: %v", p)
		}
	}()
	wire := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer wire.Free()
	switch r := v.(type) {
	case *reply:
		*r = reply{}
		return r.read(wire.ReadOnlyData())
	case *streamReply:
		*r = streamReply{}
		return r.read(wire.ReadOnlyData())
	default:
		return fmt.Errorf("cannot decode into a %T", v)
	}
}

// read takes a PushToUserResponse or any of its siblings: they have what counts in
// the same fields.
func (r *reply) read(b []byte) error {
	return eachField(b, func(tag, value uint64, text []byte) error {
		switch tag {
		case 1<<3 | varint:
			r.success = value != 0
		case 10<<3 | bytes:
			return r.readSummary(text)
		default: // the count, which the summary has as well, and a message for people
		}
		return nil
	})
}

func (r *reply) readSummary(b []byte) error {
	return eachField(b, func(tag, value uint64, _ []byte) error {
		n := int64(int32(value))
		switch tag {
		case 1<<3 | varint:
			r.targets.Targets = n
		case 2<<3 | varint:
			r.targets.Delivered = n
		case 3<<3 | varint:
			r.targets.Offline = n
		case 4<<3 | varint:
			r.targets.Failed = n
		case 5<<3 | varint:
			r.targets.Unknown = n
		case 6<<3 | bytes:
			r.nodes++
		case 7<<3 | varint:
			r.targets.Stored = n
		case 8<<3 | varint:
			r.targets.Unsure = n
		case 9<<3 | varint:
			r.targets.Acked = n
		case 10<<3 | varint:
			r.targets.Duplicates = n
		default: // newer than this
		}
		return nil
	})
}

// read takes a PushStreamResponse.
func (r *streamReply) read(b []byte) error {
	return eachField(b, func(tag, value uint64, text []byte) error {
		switch tag {
		case 1<<3 | varint:
			r.id = value
		case 2<<3 | bytes:
			r.err = new(spb.Status)
			return stdproto.Unmarshal(text, r.err)
		case 3<<3 | bytes, 4<<3 | bytes, 5<<3 | bytes, 6<<3 | bytes:
			return r.reply.read(text)
		default: // newer than this
		}
		return nil
	})
}

// The wire types of the fields that are read. A field of another type is another field.
const (
	varint = uint64(protowire.VarintType)
	bytes  = uint64(protowire.BytesType)
)

// eachField calls f with the fields of a message, number and type in the tag: with the value of a varint, with
// the bytes of what has a length.
func eachField(b []byte, f func(tag, value uint64, text []byte) error) error {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return errMalformed
		}
		b = b[n:]
		var value uint64
		var text []byte
		switch kind {
		case protowire.VarintType:
			value, n = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			text, n = protowire.ConsumeBytes(b)
		default:
			n = protowire.ConsumeFieldValue(number, kind, b)
		}
		if n < 0 {
			return errMalformed
		}
		if err := f(protowire.EncodeTag(number, kind), value, text); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// Outcome is what became of a push as a whole.
type Outcome uint8

// The outcomes.
const (
	Delivered Outcome = iota // success: everybody who is there has it
	Offline                  // no success because nobody is there: an offline user, an unknown room
	Failed                   // known not to have reached somebody
	Refused                  // by the server, nothing was sent
	Unknown                  // it may have been delivered: no answer, or one that says so
	outcomes
)

// Outcomes lists all outcomes in the order of reports.
func Outcomes() []Outcome { return []Outcome{Delivered, Offline, Failed, Refused, Unknown} }

// String is the name of an outcome in reports.
func (o Outcome) String() string {
	switch o {
	case Delivered:
		return "delivered"
	case Offline:
		return "offline"
	case Failed:
		return "failed"
	case Refused:
		return "refused"
	default:
		return "unknown"
	}
}

// Bad tells whether the outcome counts as an error.
func (o Outcome) Bad() bool { return o == Failed || o == Refused || o == Unknown }

func (r *reply) outcome() Outcome {
	switch {
	case r.success:
		return Delivered
	case r.targets.Unknown > 0:
		return Unknown
	case r.targets.Failed > 0 || r.nodes > 0:
		return Failed
	default:
		return Offline
	}
}

// outcomeOf tells what a status means. With an ErrorInfo the server says that nothing
// was sent; a bare one may come from anywhere on the way.
func outcomeOf(s *spb.Status) (Outcome, codes.Code) {
	for _, detail := range s.GetDetails() {
		if detail.MessageIs((*errdetails.ErrorInfo)(nil)) {
			return Refused, codes.Code(s.GetCode())
		}
	}
	return Unknown, codes.Code(s.GetCode())
}

func outcomeOfError(err error) (Outcome, codes.Code) {
	s := status.Convert(err)
	if s.Code() == codes.Unimplemented {
		return Refused, codes.Unimplemented // nobody there who could have sent anything
	}
	return outcomeOf(s.Proto())
}
