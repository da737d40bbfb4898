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
// immutable, and may be read from any goroutine. The zero value has none.
type Attributes struct {
	// A push with a filter looks at those of every connection of a room. It compares hashes: to compare the texts would cost several
	// times as much.
	marks []mark
	texts []string // keys and values in turn, those of marks
}

// mark is the keyed hash of a key, and that of the key with its value. The key is chosen by the process, so that nobody can look for two
// that are the same: that two are by chance happens in one of 2^64 comparisons.
type mark struct{ key, pair uint64 }

func markOf(key, value string) mark { return mark{hashOf('a', "", key), hashOf('v', key, value)} }

// NewAttributes takes at most [MaxAttributes], with keys and values of 1 to 64 bytes of valid UTF-8 without control characters. The error
// names the one that is refused, and no value.
func NewAttributes(given map[string]string) (Attributes, error) {
	if n := len(given); n > MaxAttributes {
		return Attributes{}, fmt.Errorf("attr: %d attributes, more than %d", n, MaxAttributes)
	}
	if len(given) == 0 {
		return Attributes{}, nil
	}
	a := Attributes{make([]mark, 0, len(given)), make([]string, 0, 2*len(given))}
	for _, key := range slices.Sorted(maps.Keys(given)) {
		value := given[key]
		if err := ids.Check(key, maxAttributeBytes); err != nil {
			return Attributes{}, fmt.Errorf("attr: key %.64q: %w", key, err)
		}
		if err := ids.Check(value, maxAttributeBytes); err != nil {
			return Attributes{}, fmt.Errorf("attr.%s: %w", key, err)
		}
		a.marks = append(a.marks, markOf(key, value))
		a.texts = append(a.texts, strings.Clone(key), strings.Clone(value)) // They outlive what they came with.
	}
	return a, nil
}

// Len is how many there are.
func (a Attributes) Len() int { return len(a.marks) }

// Get returns the value of an attribute. None of them is empty.
func (a Attributes) Get(key string) (value string, ok bool) {
	for i := 0; i < len(a.texts); i += 2 {
		if a.texts[i] == key {
			return a.texts[i+1], true
		}
	}
	return "", false
}

// Map returns them as a map of the caller's own, nil if there are none.
func (a Attributes) Map() map[string]string {
	if len(a.texts) == 0 {
		return nil
	}
	m := make(map[string]string, len(a.marks))
	for i := 0; i < len(a.texts); i += 2 {
		m[a.texts[i]] = a.texts[i+1]
	}
	return m
}

// With returns the attributes with those of over, which win. The error is that of too many.
func (a Attributes) With(over Attributes) (Attributes, error) {
	switch {
	case a.Len() == 0:
		return over, nil
	case over.Len() == 0:
		return a, nil
	}
	all := a.Map()
	maps.Copy(all, over.Map())
	return NewAttributes(all)
}

// Filter is for which connections a push is: those for which all its matches hold. The zero value is for all.
type Filter struct{ matches []match }

// match asks that the attribute has one of the values or, with not, that it is absent or has none of them.
type match struct {
	key    uint64
	values []uint64 // of mark.pair
	not    bool
}

// Matches tells whether a connection with these attributes gets the push. It takes no memory.
func (f Filter) Matches(a Attributes) bool {
	for i := range f.matches {
		m := &f.matches[i]
		if m.holds(a.marks) == m.not {
			return false
		}
	}
	return true
}

func (m *match) holds(marks []mark) bool {
	for i := range marks {
		if marks[i].key == m.key {
			return slices.Contains(m.values, marks[i].pair)
		}
	}
	return false
}

var errFilter = errors.New("filter")

// filterOf is the filter of a delivery. The error breaks the stream: no manager sends such a one.
func filterOf(matches []wireMatch) (f Filter, err error) {
	if len(matches) > maxMatches {
		return f, fmt.Errorf("%w: more than %d matches", errFilter, maxMatches)
	}
	for i := range matches {
		switch m := &matches[i]; {
		case m.key == "" || len(m.values) == 0:
			return f, fmt.Errorf("%w: match %d: needs a key and values", errFilter, i)
		case len(m.values) > maxMatchValues:
			return f, fmt.Errorf("%w: match %d: more than %d values", errFilter, i, maxMatchValues)
		default:
			hashed := match{not: m.not, values: make([]uint64, len(m.values))}
			for k, value := range m.values {
				mark := markOf(m.key, value)
				hashed.key, hashed.values[k] = mark.key, mark.pair
			}
			f.matches = append(f.matches, hashed)
		}
	}
	return f, nil
}

// Attributed is a connection that has attributes. [Users] of such connections evaluate filters.
type Attributed interface {
	// Attributes are those of the connection now. The method is called for each push with a filter: it takes no lock.
	Attributes() Attributes
	// IsFor tells whether the connection is in the room of m, or in one of its rooms: whether Deliver would not answer NotHere. It is
	// asked for connections that a filter leaves out, where m has rooms.
	IsFor(m *Message) bool
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
