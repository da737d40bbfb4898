package web

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/push-manager/push-manager/engine"
)

// lastBytes is how long a reply may be that is remembered.
const lastBytes = 256

// depth is how deep JSON may nest. Requests nest four levels.
const depth = 32

//nolint:gochecknoglobals // constants
var (
	fromJSON = protojson.UnmarshalOptions{RecursionLimit: depth} // a field that is not known is an error
	toJSON   = protojson.MarshalOptions{}
)

// fromJSON makes protobuf of the JSON of a request.
func (m *method) fromJSON(b []byte) ([]byte, error) {
	message := m.in.New().Interface()
	if err := fromJSON.Unmarshal(b, message); err != nil {
		return nil, jsonError(err)
	}
	return encode(message)
}

func encode(message proto.Message) ([]byte, error) {
	if fast, ok := message.(interface{ MarshalVT() ([]byte, error) }); ok {
		return fast.MarshalVT() //nolint:wrapcheck // it cannot fail for what was just decoded
	}
	return proto.Marshal(message) //nolint:wrapcheck // as above
}

// ofField finds the field in what protojson says. Its words are not promised: where they are others, the error names the
// request, and its text the rest.
var ofField = regexp.MustCompile(`^(?:\(line [0-9:]+\): )?(unknown field|invalid value for \w+ field|duplicate field) "?([\w.$@-]{1,128})"?`)

// jsonError is the error for a request that is not the JSON of its message.
func jsonError(err error) error {
	// protojson puts a space of another kind in, at random, so that nobody compares its texts.
	text := strings.ReplaceAll(err.Error(), "\u00a0", " ")
	text = strings.TrimPrefix(strings.TrimPrefix(text, "proto: "), "syntax error ")
	if of := ofField.FindStringSubmatch(text); of != nil {
		description := text
		if of[1] == "unknown field" {
			description = "is not known" + place(text)
		}
		field := of[2]
		if strings.HasPrefix(of[1], "invalid value") && (field == "key" || field == "value") {
			field = "metadata" // the only map of the API: its entries are messages with these two fields
		}
		return &engine.InvalidError{Field: field, Code: engine.CodeMalformed, Description: description}
	}
	return &engine.InvalidError{Field: "request", Code: engine.CodeMalformed, Description: "is not the JSON that is wanted: " + text}
}

// place is where in the JSON something is wrong, as protojson has it in its text.
func place(text string) string {
	if at, _, ok := strings.Cut(text, ": "); ok && strings.HasPrefix(at, "(line ") {
		return " " + at
	}
	return ""
}

// codec has connect read nothing and write answers.
type codec struct{ name string }

var _ connect.Codec = codec{}

// Name implements connect.Codec.
func (c codec) Name() string { return c.name }

// Marshal implements connect.Codec. Its result is not used by anybody else.
func (c codec) Marshal(v any) ([]byte, error) {
	switch v := v.(type) {
	case *answer:
		if c.name == "proto" {
			return v.wire, nil
		}
		return v.json()
	case proto.Message: // the status of an error, which is a message of connect's own
		return proto.Marshal(v) //nolint:wrapcheck // connect says of what
	default:
		return nil, fmt.Errorf("%T: %w", v, errInternal)
	}
}

// Unmarshal implements connect.Codec.
func (codec) Unmarshal([]byte, any) error { return nil }

func (a *answer) json() ([]byte, error) {
	if a.last != nil {
		if w := a.last.Load(); w != nil && bytes.Equal(w.wire, a.wire) {
			return bytes.Clone(w.json), nil // connect keeps what it gets
		}
	}
	message := a.of.New().Interface()
	if err := decode(a.wire, message); err != nil {
		return nil, fmt.Errorf("decode a reply: %w", err)
	}
	text, err := toJSON.Marshal(message)
	if err == nil && a.last != nil && len(text) <= lastBytes {
		a.last.Store(&written{a.wire, bytes.Clone(text)})
	}
	return text, err //nolint:wrapcheck // connect says of what
}

func decode(b []byte, message protoreflect.ProtoMessage) error {
	if fast, ok := message.(interface{ UnmarshalVT(b []byte) error }); ok {
		return fast.UnmarshalVT(b) //nolint:wrapcheck // its caller does
	}
	return proto.Unmarshal(b, message) //nolint:wrapcheck // its caller does
}
