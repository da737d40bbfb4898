package ingress

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

// optionsField is PushOptions in every request.
const optionsField protowire.Number = 20

// The fields of PushOptions.
const (
	optionMessageID   protowire.Number = 1
	optionTTL         protowire.Number = 2
	optionAck         protowire.Number = 3
	optionOffline     protowire.Number = 4
	optionCollapseKey protowire.Number = 5
	optionPriority    protowire.Number = 6
	optionReceipt     protowire.Number = 7
	optionAckTimeout  protowire.Number = 8
	optionFilter      protowire.Number = 9
	optionTrace       protowire.Number = 10
)

// options are the PushOptions of one push.
type options struct {
	engine engine.Options
	// priority is what the push claims, if it claims any.
	priority       engine.Priority
	claimsPriority bool

	// As they stand on the wire. Of a field that comes again the last one counts.
	messageID, collapseKey          []byte
	ttl, ackTimeout                 uint64
	ack, offline, claimed, receipts uint64
	trace                           bool
}

// read notes the fields of one PushOptions; of several in one request each is read into the
// same options, which merges them as protobuf has it.
func (o *options) read(b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch m.Type() {
		case protowire.BytesType:
			switch m.Number() {
			case optionMessageID:
				o.messageID = m.Bytes
			case optionCollapseKey:
				o.collapseKey = m.Bytes
			case optionFilter:
				if err := o.addMatch(m.Bytes); err != nil {
					return err
				}
				continue
			default:
				continue
			}
			if !utf8.Valid(m.Bytes) { // here, because one that is replaced has to be valid, too
				return invalidUTF8(engine.CodeMalformed, optionName(m.Number()))
			}
		case protowire.VarintType:
			switch m.Number() {
			case optionTTL:
				o.ttl = m.Uint
			case optionAck:
				o.ack = m.Uint
			case optionOffline:
				o.offline = m.Uint
			case optionPriority:
				o.claimed = m.Uint
			case optionReceipt:
				o.receipts = m.Uint
			case optionAckTimeout:
				o.ackTimeout = m.Uint
			case optionTrace:
				o.trace = m.Uint != 0
			}
		}
	}
	if m.Err != nil {
		return malformed("options")
	}
	return nil
}

// addMatch notes one Match of the filter. Of matches and values beyond what the engine allows one is kept, for which it refuses them.
func (o *options) addMatch(b []byte) error {
	i := len(o.engine.Filter)
	if i > engine.MaxFilterMatches {
		return nil
	}
	match := engine.Match{}
	field := fmt.Sprintf("options.filter[%d]", i)
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsBytes(1):
			if !utf8.Valid(m.Bytes) {
				return invalidUTF8(engine.CodeMalformed, field+".key")
			}
			match.Key = wire.String(m.Bytes)
		case m.IsBytes(2):
			if !utf8.Valid(m.Bytes) {
				return invalidUTF8(engine.CodeMalformed, fmt.Sprintf("%s.values[%d]", field, len(match.Values)))
			}
			if len(match.Values) <= engine.MaxFilterValues {
				match.Values = append(match.Values, wire.String(m.Bytes))
			}
		case m.IsUint(3):
			match.Not = m.Uint != 0
		}
	}
	if m.Err != nil {
		return malformed(field)
	}
	o.engine.Filter = append(o.engine.Filter, match)
	return nil
}

func optionName(n protowire.Number) string {
	if n == optionCollapseKey {
		return "options.collapse_key"
	}
	return "options.message_id"
}

// finish makes the engine's options of what read has noted. content is that of the request, without a stamp. It checks
// what is lost by that: numbers that are none of ours. All else is the engine's to check.
func (o *options) finish(content []byte) error {
	e := &o.engine
	e.MessageID, e.CollapseKey = wire.String(o.messageID), wire.String(o.collapseKey)
	for _, field := range []struct {
		name  string
		value uint64
		names map[int32]string
	}{
		{"ack", o.ack, pubsub.AckPolicy_name},
		{"offline", o.offline, pubsub.OfflinePolicy_name},
		{"priority", o.claimed, pubsub.Priority_name},
		{"receipt", o.receipts, pubsub.ReceiptMode_name},
	} {
		if field.value >= uint64(len(field.names)) { // they count from 0
			return optionOutOfRange(field.name, fmt.Sprintf("is none of the %d values that are known", len(field.names)))
		}
	}
	for _, field := range []struct {
		name  string
		value uint64
		into  *time.Duration
	}{{"ttl_ms", o.ttl, &e.TTL}, {"ack_timeout_ms", o.ackTimeout, &e.AckTimeout}} {
		if field.value > math.MaxUint32 {
			return optionOutOfRange(field.name, "must not be negative, nor 2^32 or more")
		}
		*field.into = time.Duration(field.value) * time.Millisecond
	}
	e.ClientAck = o.ack == uint64(pubsub.AckPolicy_ACK_CLIENT)
	e.Store = o.offline == uint64(pubsub.OfflinePolicy_OFFLINE_STORE)
	e.Async = o.receipts == uint64(pubsub.ReceiptMode_RECEIPT_ASYNC)
	if o.claimsPriority = o.claimed != uint64(pubsub.Priority_PRIORITY_UNSPECIFIED); o.claimsPriority {
		o.priority = priorityOf(pubsub.Priority(o.claimed))
	}
	if e.Store && e.MessageID == "" {
		id, err := uuid.NewV7()
		if err != nil {
			return fmt.Errorf("make a message id: %w", err)
		}
		e.MessageID = id.String()
	}
	if e.MessageID != "" {
		e.PayloadHash = contentHash(content)
	}
	return nil
}

func optionOutOfRange(name, description string) error {
	return &engine.InvalidError{Field: "options." + name, Code: engine.CodeOutOfRange, Description: description}
}

func priorityOf(p pubsub.Priority) engine.Priority {
	switch p {
	case pubsub.Priority_PRIORITY_LOW:
		return engine.Low
	case pubsub.Priority_PRIORITY_HIGH:
		return engine.High
	case pubsub.Priority_PRIORITY_CRITICAL:
		return engine.Critical
	default:
		return engine.Normal
	}
}

// contentHash is a CRC-32C of an encoded MessageContent. Entries of its metadata count in any order:
// generated code writes those of one map in another order each time, and a retry must have the hash
// of the first try.
func contentHash(content []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	var hash, entries uint32
	m := wire.Reader{Rest: content}
	for rest := content; m.Next(); rest = m.Rest {
		field := rest[:len(rest)-len(m.Rest)]
		if m.IsBytes(contentMetadata) {
			entries += crc32.Checksum(field, table)
		} else {
			hash = crc32.Update(hash, table, field)
		}
	}
	if entries == 0 {
		return hash
	}
	return crc32.Update(hash, table, binary.LittleEndian.AppendUint32(nil, entries))
}

// applyOptions does what the options of a push ask of the API: o is nil for none. The push must have been decoded,
// and info must be of now.
func (s *Server) applyOptions(info *callInfo, p *engine.Push, o *options) error {
	if o == nil {
		return nil
	}
	o.engine.Sender = info.sender()
	if o.engine.Async {
		o.engine.Receipts = s.receipts
	}
	if o.trace {
		if info.principal != nil && !info.principal.May(auth.Explain) {
			return deniedError{api: explain, method: true}
		}
		p.Trace = newStages(p.Trace, p.Arrived)
	}
	if !o.claimsPriority {
		return nil
	}
	p.Priority = min(o.priority, info.priorityMax)
	if p.Priority >= info.priority {
		return nil
	}
	return s.cfg.Engine.Admit(p.Priority) // it was let in as more than it is
}

// sender is the name by which the ids of the caller's messages are told apart from those of others.
func (e *callInfo) sender() string {
	if e.principal == nil {
		return ""
	}
	return e.principal.Name
}
