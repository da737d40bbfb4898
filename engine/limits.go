package engine

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/push-manager/push-manager/internal/ids"
)

// Limits bound what one push may ask for. The zero value means the defaults.
type Limits struct {
	IDBytes         int // of a room or user id; 0 means 256
	DataBytes       int // of content.data; 0 means 256 KiB
	MetadataEntries int // 0 means 32
	MetadataBytes   int // of keys and values together; 0 means 8 KiB
	Exclude         int // users in an exclude list; 0 means 10,000
	Users           int // users in a user list; 0 means 10,000
	Rooms           int // rooms in a list of rooms; 0 means 1,000
	// MaxTTL bounds Options.TTL. 0 means 168 h.
	MaxTTL time.Duration

	store bool // there is a Spool
}

func (l Limits) withDefaults() Limits {
	for _, f := range []struct {
		v   *int
		def int
	}{
		{&l.IDBytes, ids.MaxBytes},
		{&l.DataBytes, 256 << 10},
		{&l.MetadataEntries, 32},
		{&l.MetadataBytes, 8 << 10},
		{&l.Exclude, 10_000},
		{&l.Users, 10_000},
		{&l.Rooms, 1_000},
	} {
		if *f.v == 0 {
			*f.v = f.def
		}
	}
	if l.MaxTTL == 0 {
		l.MaxTTL = 168 * time.Hour
	}
	return l
}

// Validate reports everything that is wrong with l.
func (l Limits) Validate() error {
	if min(l.IDBytes, l.DataBytes, l.MetadataEntries, l.MetadataBytes, l.Exclude, l.Users, l.Rooms) < 0 || l.MaxTTL < 0 {
		return errors.New("limits must not be negative")
	}
	return nil
}

// InvalidError says what is wrong with a push before anything was done for it.
type InvalidError struct {
	Field       string // path in the request: "room_id", "user_ids[3]", "content.data"
	Code        string // for programs, in CAPITALS
	Description string // for people
}

// Codes of an InvalidError.
const (
	CodeRequired      = "REQUIRED"
	CodeIDTooLong     = "ID_TOO_LONG"
	CodeIDMalformed   = "ID_MALFORMED"
	CodeTooLarge      = "PAYLOAD_TOO_LARGE"
	CodeTooMany       = "TOO_MANY"
	CodeMetadataLarge = "METADATA_TOO_LARGE"
	CodeMalformed     = "MALFORMED"
	CodeOutOfRange    = "OUT_OF_RANGE"
	CodeUnavailable   = "NOT_AVAILABLE" // not here, or not for this kind of push
)

func (e *InvalidError) Error() string { return e.Field + ": " + e.Description }

// Content is what validation needs to know about a payload.
type Content struct {
	Present         bool // the request has content at all
	DataLen         int
	MetadataEntries int
	MetadataBytes   int
	Timestamp       int64
	InvalidUTF8     bool // in a metadata key or value
}

// CheckCount refuses n entries of a list that allows fewer. Field is one of
// "exclude_user_ids", "user_ids", "room_ids" and "content.metadata".
func (l Limits) CheckCount(field string, n int) error {
	limit := l.Exclude
	switch field {
	case "user_ids":
		limit = l.Users
	case "room_ids":
		limit = l.Rooms
	case "content.metadata":
		limit = l.MetadataEntries
	}
	if n > limit {
		return &InvalidError{field, CodeTooMany, fmt.Sprintf("more than %d entries", limit)}
	}
	return nil
}

// Check refuses a request that breaks a limit. All ids that the request keeps are checked here.
func (l Limits) Check(r *Request) error {
	list, field := r.Exclude, "exclude_user_ids"
	var err error
	switch r.Kind {
	case ToRoom:
		err = l.checkID(r.Scope, "room_id", -1, r.Room)
	case ToUser:
		err = l.checkID(r.Scope, "user_id", -1, r.User)
		list = nil
	case ToUsers:
		if list, field = r.Users, "user_ids"; len(list) == 0 {
			err = &InvalidError{field, CodeRequired, "must name at least one user"}
		}
	case ToRooms:
		err = l.checkRooms(r)
	case ToAll:
		list = nil
	default:
		err = &InvalidError{"push", CodeRequired, "must say what to push to"}
	}
	if err != nil {
		return err
	}
	if r.Only != nil && (len(r.Exclude) > 0 || r.Order != nil) {
		return &InvalidError{"exclude_user_ids", CodeUnavailable, "cannot be combined with a choice of members"}
	}
	if len(list) > 0 {
		if err := l.CheckCount(field, len(list)); err != nil {
			return err
		}
	}
	for i, id := range list {
		if err := l.checkID(r.Scope, field, i, id); err != nil {
			return err
		}
	}
	switch c := &r.Content; {
	case !c.Present:
		return &InvalidError{"content", CodeRequired, "must be present"}
	case c.DataLen > l.DataBytes:
		return &InvalidError{"content.data", CodeTooLarge, fmt.Sprintf("%d bytes, more than %d", c.DataLen, l.DataBytes)}
	case c.Timestamp < 0:
		return &InvalidError{"content.timestamp", CodeOutOfRange, "must not be negative"}
	case c.MetadataEntries > l.MetadataEntries:
		return l.CheckCount("content.metadata", c.MetadataEntries)
	case c.MetadataBytes > l.MetadataBytes:
		return &InvalidError{"content.metadata", CodeMetadataLarge, fmt.Sprintf("%d bytes, more than %d", c.MetadataBytes, l.MetadataBytes)}
	case c.InvalidUTF8:
		return &InvalidError{"content.metadata", CodeMalformed, "must be valid UTF-8"}
	}
	if r.Options == nil {
		return nil
	}
	return l.checkOptions(r)
}

// checkRooms checks the list of a push to several rooms.
func (l Limits) checkRooms(r *Request) error {
	const field = "room_ids"
	switch {
	case r.Rooms.Len() == 0:
		return &InvalidError{field, CodeRequired, "must name at least one room"}
	}
	if r.Rooms.checked.Load() {
		return nil
	}
	if err := l.CheckCount(field, r.Rooms.Len()); err != nil {
		return err
	}
	for i, room := range r.Rooms.ids {
		if err := l.checkID(r.Scope, field, i, room); err != nil {
			return err
		}
	}
	r.Rooms.checked.Store(true)
	return nil
}

// Limits of Options that no setting changes.
const (
	optionIDBytes = 64          // of a message id, of a collapse key, and of keys and values of a filter
	maxAckTimeout = time.Minute // a node holds on to what is not acknowledged for so long
)

// Bounds of Options.Filter, which are those of nodes, too: its matches, and the values of each.
const (
	MaxFilterMatches = 8
	MaxFilterValues  = 32
)

func (l Limits) checkOptions(r *Request) error {
	o := r.Options
	for _, id := range []struct{ field, id string }{{"options.message_id", o.MessageID}, {"options.collapse_key", o.CollapseKey}} {
		if id.id == "" {
			continue // not given
		}
		if err := checkID(id.field, -1, id.id, optionIDBytes); err != nil {
			return err
		}
	}
	switch {
	case o.TTL < 0 || o.TTL > l.MaxTTL:
		return &InvalidError{"options.ttl_ms", CodeOutOfRange, fmt.Sprintf("must be between 0 and %d", l.MaxTTL.Milliseconds())}
	case o.AckTimeout < 0 || o.AckTimeout > maxAckTimeout:
		return &InvalidError{"options.ack_timeout_ms", CodeOutOfRange, fmt.Sprintf("must be between 0 and %d", maxAckTimeout.Milliseconds())}
	case o.Async && (!o.ClientAck || o.MessageID == ""):
		return &InvalidError{"options.receipt", CodeRequired, "needs acknowledgements by clients and a message id"}
	case o.Store && !l.store:
		return &InvalidError{"options.offline", CodeUnavailable, "there is no store here"}
	case o.Store && r.Kind == ToAll:
		return &InvalidError{"options.offline", CodeUnavailable, "a broadcast cannot be stored"}
	case o.Store && r.Kind == ToRooms && !r.Rooms.one:
		return &InvalidError{"options.offline", CodeUnavailable, "a push to several rooms cannot be stored"}
	case o.Replay != nil && (r.Kind != ToUser || o.Store || o.Async):
		return &InvalidError{"options.replay", CodeMalformed, "goes to one user, and is not stored again"}
	case len(o.Filter) > 0 && (o.Store || o.Replay != nil):
		return &InvalidError{filterField, CodeUnavailable, "cannot be combined with the store, which does not know devices"}
	}
	return CheckFilter(o.Filter)
}

// filterField is Options.Filter in a request.
const filterField = "options.filter"

// CheckFilter refuses a filter that breaks a limit.
func CheckFilter(filter []Match) error {
	if n := len(filter); n > MaxFilterMatches {
		return &InvalidError{filterField, CodeTooMany, fmt.Sprintf("more than %d matches", MaxFilterMatches)}
	}
	for i := range filter {
		m := &filter[i]
		field := filterField + "[" + strconv.Itoa(i) + "]"
		if err := checkID(field+".key", -1, m.Key, optionIDBytes); err != nil {
			return err
		}
		switch n := len(m.Values); {
		case n == 0:
			return &InvalidError{field + ".values", CodeRequired, "must name at least one value"}
		case n > MaxFilterValues:
			return &InvalidError{field + ".values", CodeTooMany, fmt.Sprintf("more than %d values", MaxFilterValues)}
		}
		for j, value := range m.Values {
			if err := checkID(field+".values", j, value, optionIDBytes); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkID checks what an id has behind its scope, which is the caller's own part.
func (l Limits) checkID(scope, field string, index int, id string) error {
	return checkID(field, index, strings.TrimPrefix(id, scope), l.IDBytes)
}

// checkID checks an id that may have so many bytes. An index below 0 is for a field that is no
// list.
func checkID(field string, index int, id string, most int) error {
	err := ids.Check(id, most)
	if err == nil {
		return nil
	}
	code := CodeIDMalformed
	switch {
	case errors.Is(err, ids.ErrEmpty):
		code = CodeRequired
	case errors.Is(err, ids.ErrTooLong):
		code = CodeIDTooLong
	}
	if index >= 0 {
		field += "[" + strconv.Itoa(index) + "]"
	}
	return &InvalidError{field, code, err.Error()}
}
