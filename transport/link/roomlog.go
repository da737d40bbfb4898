package link

import (
	"math"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/plain"
	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	// logReadsMax bounds the reads of one stream whose pages are not written. One more has an error for
	// its answer, and of these as many again may wait to be written.
	logReadsMax = 64
	// logPartitionsMax bounds the places that a node names at a time.
	logPartitionsMax = 64
	// logMarksBytes and logPagesBytes bound what waits in one stream to be written. Beyond it a mark is
	// not taken, and a page gives way to an error.
	logMarksBytes = 1 << 20
	logPagesBytes = 8 << 20
	// logEntryBytes is what a message of a page counts beside its payload, about.
	logEntryBytes = 128
)

// What nodes hear in place of a page.
const (
	tooManyReads = "too many reads"
	tooMuchWaits = "too much waits for the node"
)

// Field numbers of proto/connect_node.proto.
const (
	reqLogMarks, reqLogPages = 11, 12

	markPartition, markSeq, markAfter, markRooms, markEpoch, markPartitions = 1, 2, 3, 4, 5, 6
	logRoomID, logRoomSeqs                                                  = 1, 2

	pageGate, pagePartition, pageEntries, pageSeq, pageMore, pageGap, pageError, pageEpoch = 1, 2, 3, 4, 5, 6, 7, 8

	delLog                                           = 24
	logPartition, logSeq, logExclude, logPlacesEpoch = 1, 2, 3, 4
)

// RoomLogs answers nodes that follow and read the logs of rooms. Its methods are called by the readers of streams, in the order in which
// things came, and must not block.
type RoomLogs interface {
	// Follow: the node wants marks of all partitions from now on, behind the places by partition that it knows of this epoch.
	// A second call for the same stream takes the place of the first.
	Follow(a LogAsker, epoch uint64, after []uint64)
	// Read: the node wants what the log of the room has behind a place, given by partition. It is answered by one LogAsker.Page.
	Read(a LogAsker, read LogRead)
	// Gone: the stream has ended. It is the last call for a, and comes once for each stream on which nodes may ask.
	Gone(a LogAsker)
}

// LogRead is what a node asks for.
type LogRead struct {
	Room  string
	Gate  uint64
	Epoch uint64
	After []uint64
}

// LogAsker is a stream on which a node asks. It is comparable, and stays valid after the stream's end. Its methods do not block.
type LogAsker interface {
	// Node is the node's id.
	Node() string
	// Mark sends a mark, which must fit into a frame. False: the stream has ended, or is so far behind that nothing
	// more is queued; the node has to be told again later, from the same place.
	Mark(m *LogMark) bool
	// Page answers a read. It does nothing for a gate that is not open, or once the stream has ended.
	Page(p *LogPage)
}

// LogMark is pubsub.LogMark. It is read-only once it is sent, and may be shared by streams.
type LogMark struct {
	Epoch                 uint64
	Partition, Partitions uint32
	After, Seq            uint64
	Rooms                 []LogRoom

	once    sync.Once
	encoded []byte // written by once: a field of a frame
}

// LogRoom is the places of one room's messages.
type LogRoom struct {
	Room string
	Seqs []uint64
}

// LogPage is pubsub.LogPage. It is read-only once it is sent, and may be shared by streams.
type LogPage struct {
	Gate      uint64
	Epoch     uint64
	Partition uint32
	Entries   []LogEntry
	Seq       uint64
	More, Gap bool
	Error     string
}

// LogEntry is a message of a page. Its payload is that of engine.Stored.
type LogEntry struct {
	Message *engine.Stored
	Place   engine.Place
	// Expires is that of store.LogEntry: the link makes ttl_ms of what is left when it writes the page.
	Expires int64 // unix milliseconds
}

var _ LogAsker = (*logAsker)(nil)

// logAsker is a stream's node as RoomLogs know it.
type logAsker struct {
	// Static after newStream.
	link *Link

	// Guarded by link.mu.
	stream    *stream             // nil once it has ended
	open      map[uint64]struct{} // gates of reads without a page; nil while there are none
	marks     []*LogMark          // to be written, in order
	markBytes int                 // of marks
	pages     []waitingPage       // to be written, in order
	pageBytes int                 // of pages
}

// waitingPage is a page with what it counts.
type waitingPage struct {
	*LogPage
	bytes int
}

// Node implements LogAsker.
func (a *logAsker) Node() string { return a.link.node.id }

// Mark implements LogAsker.
func (a *logAsker) Mark(m *LogMark) bool {
	size := len(m.field())
	if size > a.link.set.cfg.MaxFrameBytes-controlBytes-frameSpare {
		return false
	}
	a.link.mu.Lock()
	defer a.link.mu.Unlock()
	if a.stream == nil || a.markBytes > 0 && a.markBytes+size > logMarksBytes {
		return false
	}
	a.marks = append(a.marks, m)
	a.markBytes += size
	a.stream.wakeLocked()
	return true
}

// Page implements LogAsker.
func (a *logAsker) Page(p *LogPage) {
	size := logEntryBytes
	for i := range p.Entries {
		size += len(p.Entries[i].Message.Payload) + logEntryBytes
	}
	a.link.mu.Lock()
	defer a.link.mu.Unlock()
	if _, ok := a.open[p.Gate]; !ok || a.stream == nil {
		return
	}
	if delete(a.open, p.Gate); len(a.open) == 0 {
		a.open = nil
	}
	if a.pageBytes > 0 && a.pageBytes+size > logPagesBytes {
		p, size = &LogPage{Gate: p.Gate, Error: tooMuchWaits}, logEntryBytes
	}
	a.answerLocked(p, size)
}

func (a *logAsker) answerLocked(p *LogPage, size int) {
	a.pages = append(a.pages, waitingPage{p, size})
	a.pageBytes += size
	a.stream.wakeLocked()
}

// askLocked opens a read. False means that it must not be asked for. One for which there is no room
// has an answer at once, and asked is false.
func (a *logAsker) askLocked(gate uint64) (asked, ok bool) {
	if _, twice := a.open[gate]; twice || gate == 0 {
		return false, false
	}
	if len(a.open)+len(a.pages) >= logReadsMax {
		if len(a.pages) >= 2*logReadsMax {
			return false, false // it asks, and does not read
		}
		a.answerLocked(&LogPage{Gate: gate, Error: tooManyReads}, logEntryBytes)
		return false, true
	}
	if a.open == nil {
		a.open = make(map[uint64]struct{})
	}
	a.open[gate] = struct{}{}
	return true, true
}

// wroteLocked lets go of the first marks and pages.
func (a *logAsker) wroteLocked(marks, pages int) {
	for i := range marks {
		a.markBytes -= len(a.marks[i].field())
		a.marks[i] = nil
	}
	if a.marks = a.marks[marks:]; len(a.marks) == 0 {
		a.marks = nil
	}
	for i := range pages {
		a.pageBytes -= a.pages[i].bytes
		a.pages[i].LogPage = nil
	}
	if a.pages = a.pages[pages:]; len(a.pages) == 0 {
		a.pages = nil
	}
}

// closeLocked ends it with its stream.
func (a *logAsker) closeLocked() {
	a.stream, a.open, a.marks, a.pages, a.markBytes, a.pageBytes = nil, nil, nil, nil, 0, 0
}

// roomLogs acts on what a frame asks of the logs of rooms, and counts what cannot be.
func (s *stream) roomLogs() (strikes int) {
	l, r, m := s.link, &s.r.resp, s.link.set.meters
	if len(r.logReads) == 0 && !r.follows {
		return 0
	}
	if !s.can.has(pubsub.Feature_FEATURE_ROOM_LOG) {
		return 1
	}
	to := l.set.cfg.RoomLogs
	if r.follows {
		m.logFollows.Inc()
		to.Follow(s.logs, r.follow.epoch, r.follow.after)
	}
	for i := range r.logReads {
		read := &r.logReads[i]
		asked, ok := false, ids.Check(read.Room, ids.MaxScopedBytes) == nil
		if ok {
			l.mu.Lock()
			asked, ok = s.logs.askLocked(read.Gate)
			l.mu.Unlock()
		}
		switch {
		case !ok:
			strikes++
		case asked:
			m.logReads.Inc()
			to.Read(s.logs, *read)
		default:
			m.logReadsRefused.Inc()
		}
	}
	return strikes
}

// field is the mark as a field of a frame. All streams share it.
func (m *LogMark) field() []byte {
	m.once.Do(func() {
		seqs := func(r *LogRoom) (n int) {
			for _, seq := range r.Seqs {
				n += protowire.SizeVarint(seq)
			}
			return n
		}
		room := func(r *LogRoom) int {
			return wire.SizeString(logRoomID, r.Room) + wire.SizeLen(logRoomSeqs, seqs(r))
		}
		n := wire.SizeUint(markPartition, uint64(m.Partition)) + wire.SizeUint(markSeq, m.Seq) + wire.SizeUint(markAfter, m.After) +
			wire.SizeFixed64(markEpoch, m.Epoch) + wire.SizeUint(markPartitions, uint64(m.Partitions))
		for i := range m.Rooms {
			n += wire.SizeLen(markRooms, room(&m.Rooms[i]))
		}
		b := wire.AppendLen(make([]byte, 0, wire.SizeLen(reqLogMarks, n)), reqLogMarks, n)
		b = wire.AppendUint(b, markPartition, uint64(m.Partition))
		b = wire.AppendUint(b, markSeq, m.Seq)
		b = wire.AppendUint(b, markAfter, m.After)
		for i := range m.Rooms {
			r := &m.Rooms[i]
			b = wire.AppendLen(b, markRooms, room(r))
			b = wire.AppendString(b, logRoomID, r.Room)
			b = wire.AppendLen(b, logRoomSeqs, seqs(r))
			for _, seq := range r.Seqs {
				b = protowire.AppendVarint(b, seq)
			}
		}
		b = wire.AppendFixed64(b, markEpoch, m.Epoch)
		m.encoded = wire.AppendUint(b, markPartitions, uint64(m.Partitions))
	})
	return m.encoded
}

// appendLogs appends to a frame the marks and pages for which it has room below most bytes. Deliveries wait for one page at
// most: a frame has more of them only while it is short without.
func (w *writing) appendLogs(b []byte, frameBytes, most int, now time.Time) []byte {
	w.marked, w.paged, w.entries = 0, 0, 0
	for _, m := range w.control.marks {
		if len(b)+len(m.field()) > most {
			break
		}
		b = append(b, m.field()...)
		w.marked++
	}
	for i, p := range w.control.pages {
		if i > 0 && len(b) >= frameBytes {
			break
		}
		written, entries, ok := w.appendPage(b, p, most, now)
		if !ok {
			break
		}
		b = written
		w.paged++
		w.entries += entries
	}
	return b
}

// appendPage appends a page, without what has expired, and as much of it as there is room for. False: not even its first
// message, which goes into a later frame. One that no frame can hold is missing from now on.
func (w *writing) appendPage(b []byte, p *LogPage, most int, now time.Time) (_ []byte, entries int, ok bool) {
	const beside = 64 // the other fields of a page, and its length
	reason := plain.Line(p.Error, textMax)
	out := LogPage{Seq: p.Seq, More: p.More, Gap: p.Gap}
	size, room := 0, most-len(b)-beside-len(reason)
	w.sizes = w.sizes[:0]
	for i := range p.Entries {
		e := &p.Entries[i]
		n, left := 0, e.Expires-now.UnixMilli()
		if left > 0 {
			n = e.size(left)
		}
		field := wire.SizeLen(pageEntries, n)
		if n > 0 && field > most-beside {
			out.Gap, n = true, 0
		}
		if n > 0 && size+field > room {
			if entries == 0 {
				return b, 0, false
			}
			out.Seq, out.More = p.Entries[i-1].Place.Seq, true
			break
		}
		w.sizes = append(w.sizes, n)
		if n > 0 {
			size += field
			entries++
		}
	}
	if room < 0 {
		return b, 0, false
	}
	size += wire.SizeUint(pageGate, p.Gate) + wire.SizeUint(pagePartition, uint64(p.Partition)) + wire.SizeUint(pageSeq, out.Seq) +
		wire.SizeUint(pageMore, bit(out.More)) + wire.SizeUint(pageGap, bit(out.Gap)) + wire.SizeString(pageError, reason) +
		wire.SizeFixed64(pageEpoch, p.Epoch)
	b = wire.AppendLen(b, reqLogPages, size)
	b = wire.AppendUint(b, pageGate, p.Gate)
	b = wire.AppendUint(b, pagePartition, uint64(p.Partition))
	for i, n := range w.sizes {
		if e := &p.Entries[i]; n > 0 {
			b = e.append(b, n, e.Expires-now.UnixMilli())
		}
	}
	b = wire.AppendUint(b, pageSeq, out.Seq)
	b = wire.AppendUint(b, pageMore, bit(out.More))
	b = wire.AppendUint(b, pageGap, bit(out.Gap))
	b = wire.AppendString(b, pageError, reason)
	return wire.AppendFixed64(b, pageEpoch, p.Epoch), entries, true
}

func bit(set bool) uint64 {
	if set {
		return 1
	}
	return 0
}

// size is that of the message as a delivery with so many milliseconds left.
func (e *LogEntry) size(left int64) int {
	m := e.Message
	n := wire.SizeLen(delContent, len(m.Payload)) + wire.SizeString(delRoom, m.Room) +
		wire.SizeUint(delTTL, ttlOf(left)) + wire.SizeString(delCollapseKey, m.CollapseKey) + wire.SizeLen(delLog, sizeLogPlace(e.Place, m.Exclude))
	if m.MessageID != "" {
		n += wire.SizeString(delMessageID, m.MessageID) + protowire.SizeTag(delPayloadHash) + protowire.SizeFixed32() + wire.SizeString(delSender, m.Sender)
	}
	return n
}

func (e *LogEntry) append(b []byte, size int, left int64) []byte {
	m := e.Message
	b = wire.AppendLen(b, pageEntries, size)
	b = wire.AppendBytes(b, delContent, m.Payload)
	b = wire.AppendString(b, delRoom, m.Room)
	if m.MessageID != "" {
		b = wire.AppendString(b, delMessageID, m.MessageID)
		b = protowire.AppendFixed32(protowire.AppendTag(b, delPayloadHash, protowire.Fixed32Type), m.PayloadHash)
	}
	b = wire.AppendUint(b, delTTL, ttlOf(left))
	b = wire.AppendString(b, delCollapseKey, m.CollapseKey)
	b = appendLogPlace(b, e.Place, m.Exclude)
	if m.MessageID != "" {
		b = wire.AppendString(b, delSender, m.Sender)
	}
	return b
}

func ttlOf(left int64) uint64 { return uint64(min(left, math.MaxUint32)) }

// sizeLogPlace is the length of a place in the logs, without its own tag and length.
func sizeLogPlace(p engine.Place, exclude []string) int {
	return wire.SizeUint(logPartition, uint64(p.Partition)) + wire.SizeUint(logSeq, p.Seq) + wire.SizeStrings(logExclude, exclude) +
		wire.SizeFixed64(logPlacesEpoch, p.Epoch)
}

// appendLogPlace appends a place in the logs to a delivery.
func appendLogPlace(b []byte, p engine.Place, exclude []string) []byte {
	b = wire.AppendLen(b, delLog, sizeLogPlace(p, exclude))
	b = wire.AppendUint(b, logPartition, uint64(p.Partition))
	b = wire.AppendUint(b, logSeq, p.Seq)
	b = wire.AppendStrings(b, logExclude, exclude)
	return wire.AppendFixed64(b, logPlacesEpoch, p.Epoch)
}
