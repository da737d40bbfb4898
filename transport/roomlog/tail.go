package roomlog

import (
	"container/list"
	"slices"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/link"
	"github.com/push-manager/push-manager/transport/store"
)

const (
	// tailMost and tailBytes bound a tail.
	tailMost, tailBytes = 256, 256 << 10
	// messageBytes, userBytes and roomBytes are what a message, a user who does not get it, and a tail take beside
	// the payload, about.
	messageBytes, userBytes, roomBytes = 256, 32, 512
)

// tails are the newest messages of the rooms that are read. Guarded by Service.mu.
type tails struct {
	byRoom map[string]*tail
	recent list.List // of *tail, the one that was read last in front
	bytes  int
	most   int
}

// tail is that of a room: everything behind from, and up to where its partition is followed.
type tail struct {
	room    string
	from    uint64
	entries []link.LogEntry // pages share it: what stands in it stays
	bytes   int             // of entries
	dropped int             // bytes that are not in entries any more, but in its memory
	at      *list.Element
}

// make begins a tail behind a place.
func (t *tails) make(room string, from uint64) *tail {
	l := &tail{room: room, from: from}
	l.at = t.recent.PushFront(l)
	t.byRoom[room] = l
	t.bytes += roomBytes
	return l
}

// of finds the tail of a room, nil for none, and notes that it is read.
func (t *tails) of(room string) *tail {
	l := t.byRoom[room]
	if l != nil {
		t.recent.MoveToFront(l.at)
	}
	return l
}

// add appends a message to the tail of its room, if that has one.
func (t *tails) add(e *store.LogEntry) {
	l := t.byRoom[e.Message.Room]
	if l == nil {
		return
	}
	if n := len(l.entries); n > 0 && l.entries[n-1].Place.Seq >= e.Place.Seq {
		return // ReadLog was ahead of the follower
	}
	t.set(l, append(l.entries, entryOf(e)), l.bytes+sizeOf(e.Message))
}

// put puts older messages in front of a tail, which now reaches back to from.
func (t *tails) put(l *tail, from uint64, older []link.LogEntry) {
	if n := len(older); n > 0 {
		for len(l.entries) > 0 && l.entries[0].Place.Seq <= older[n-1].Place.Seq { // both have brought it
			l.entries = l.entries[1:]
		}
	}
	all, bytes := append(slices.Clip(older), l.entries...), 0
	for i := range all {
		bytes += sizeOf(all[i].Message)
	}
	t.bytes -= l.dropped
	l.from, l.dropped = from, 0
	t.set(l, all, bytes)
}

// set gives a tail its messages, and drops what is too much.
func (t *tails) set(l *tail, entries []link.LogEntry, bytes int) {
	t.bytes -= l.bytes + l.dropped
	for len(entries) > tailMost || bytes > tailBytes {
		size := sizeOf(entries[0].Message)
		l.from = entries[0].Place.Seq
		l.dropped += size
		bytes -= size
		entries = entries[1:]
	}
	if l.dropped > bytes/4 { // pages that share the old memory keep it for as long as they are on their way
		entries, l.dropped = append(make([]link.LogEntry, 0, len(entries)+8), entries...), 0
	}
	l.entries, l.bytes = entries, bytes
	t.bytes += l.bytes + l.dropped
	for t.bytes > t.most {
		t.drop(t.recent.Back().Value.(*tail)) //nolint:forcetypeassert // see recent
	}
}

func (t *tails) drop(l *tail) {
	t.recent.Remove(l.at)
	delete(t.byRoom, l.room)
	t.bytes -= l.bytes + l.dropped + roomBytes
}

func sizeOf(m *engine.Stored) int { return messageBytes + len(m.Payload) + userBytes*len(m.Exclude) }

func entryOf(e *store.LogEntry) link.LogEntry {
	return link.LogEntry{Message: e.Message, Place: e.Place, Expires: e.Expires}
}
