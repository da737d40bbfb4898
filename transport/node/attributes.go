package node

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/push-manager/push-manager/internal/ids"
)

// Bounds of attributes and filters, which are part of the protocol.
const (
	// MaxAttributes bounds the attributes of one connection.
	MaxAttributes = 16
	// maxAttributeBytes bounds a key, and a value.
	maxAttributeBytes = 64
	// maxMatches bounds a filter, and maxMatchValues each of its matches.
	maxMatches, maxMatchValues = 8, 32
)

// Attributes are what a client, or better its token, says of a connection, such as device_id, platform and app_version. They are
// immutable, and may be read from any goroutine. The zero value has none. Equal ones are ==.
type Attributes struct {
	// Ordered by key, of each the lengths of key and value, a byte each, and then the two. A push with a filter looks at those of every
	// connection of a room: they stand in one place, so that each costs one or two cache lines.
	packed string
}

// NewAttributes takes at most [MaxAttributes], with keys and values of 1 to 64 bytes of valid UTF-8 without control characters. The error
// names the one that is refused, and no value.
func NewAttributes(given map[string]string) (Attributes, error) {
	if n := len(given); n > MaxAttributes {
		return Attributes{}, fmt.Errorf("attr: %d attributes, more than %d", n, MaxAttributes)
	}
	var packed strings.Builder
	for _, key := range slices.Sorted(maps.Keys(given)) {
		value := given[key]
		if err := ids.Check(key, maxAttributeBytes); err != nil {
			return Attributes{}, fmt.Errorf("attr: key %.64q: %w", key, err)
		}
		if err := ids.Check(value, maxAttributeBytes); err != nil {
			return Attributes{}, fmt.Errorf("attr.%s: %w", key, err)
		}
		packed.WriteByte(byte(len(key)))
		packed.WriteByte(byte(len(value)))
		packed.WriteString(key)
		packed.WriteString(value)
	}
	return Attributes{packed.String()}, nil
}

// Get returns the value of an attribute. None of them is empty.
func (a Attributes) Get(key string) (value string, ok bool) {
	for rest := a.packed; len(rest) >= 2; {
		k, end := 2+int(rest[0]), 2+int(rest[0])+int(rest[1])
		if rest[2:k] == key {
			return rest[k:end], true
		}
		rest = rest[end:]
	}
	return "", false
}

// Map returns them as a map of the caller's own, nil if there are none.
func (a Attributes) Map() map[string]string {
	var m map[string]string
	for rest := a.packed; len(rest) >= 2; {
		k, end := 2+int(rest[0]), 2+int(rest[0])+int(rest[1])
		if m == nil {
			m = make(map[string]string)
		}
		m[rest[2:k]] = rest[k:end]
		rest = rest[end:]
	}
	return m
}

// With returns the attributes with those of over, which win. The error is that of too many.
func (a Attributes) With(over Attributes) (Attributes, error) {
	switch (Attributes{}) {
	case a:
		return over, nil
	case over:
		return a, nil
	}
	all := a.Map()
	maps.Copy(all, over.Map())
	return NewAttributes(all)
}

// Match is one condition of a [Filter].
type Match struct {
	// Key names the attribute.
	Key string
	// Values: it must have one of them. A connection without the attribute has none.
	Values []string
	// Not turns it round: the attribute is absent, or has none of Values.
	Not bool
}

// Filter is for which connections a push is: those for which all its matches hold. An empty one is for all.
type Filter []Match

// Matches tells whether a connection with these attributes gets the push. It takes no memory.
func (f Filter) Matches(a Attributes) bool {
	for i := range f {
		m := &f[i]
		value, ok := a.Get(m.Key)
		if (ok && slices.Contains(m.Values, value)) == m.Not {
			return false
		}
	}
	return true
}

var errFilter = errors.New("filter")

// check refuses what no manager sends.
func (f Filter) check() error {
	if len(f) > maxMatches {
		return fmt.Errorf("%w: %d matches, more than %d", errFilter, len(f), maxMatches)
	}
	for i := range f {
		switch m := &f[i]; {
		case m.Key == "" || len(m.Values) == 0:
			return fmt.Errorf("%w: match %d: needs a key and values", errFilter, i)
		case len(m.Values) > maxMatchValues:
			return fmt.Errorf("%w: match %d: %d values, more than %d", errFilter, i, len(m.Values), maxMatchValues)
		}
	}
	return nil
}

// Attributed is a connection that has attributes. [Users] of such connections evaluate filters.
type Attributed interface {
	// Attributes are those of the connection now. The method is called for each push with a filter: it takes no lock.
	Attributes() Attributes
	// InRoom tells whether the connection is in a room, as pushes name it: whether Deliver would not answer NotHere. It is asked for
	// connections that a filter leaves out.
	InRoom(room string) bool
}

// Filtering is what Sessions also are that can tell for which connections a push with a filter is, as [Users] of [Attributed] connections
// do. Other Sessions get no push with a filter.
type Filtering interface {
	// Filters tells whether they can. It is asked once, by New.
	Filters() bool
	// DeliverFiltered is Deliver, or DeliverLasting for a message with Options, to those connections of the user for which f is. A
	// user who is here, with a RoomID in the room, and has no such connection is Filtered.
	DeliverFiltered(user string, f Filter, m *Message, c *Confirmation) Outcome
	// BroadcastFiltered is Broadcast, or BroadcastScope where scope is not empty, to those connections for which f is. It also
	// returns how many users are Filtered.
	BroadcastFiltered(scope string, f Filter, m *Message) (delivered, failed, filtered int)
}
