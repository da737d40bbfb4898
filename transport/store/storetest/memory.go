package storetest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"sync"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/store"
)

var (
	_ store.Logs = (*Logs)(nil)

	errRenewed = errors.New("the logs were made anew")
	errBehind  = errors.New("the log ends before this place")
	errSize    = fmt.Errorf("%w: takes messages of at most %d bytes", engine.ErrSpoolFull, maxMessage)
)

// maxMessage is the largest message that Logs take.
const maxMessage = 16 << 20

// Logs are store.Logs in memory, for tests of what stands on them. They keep the contract of RunLogs, and
// a test may hold up a call, have it fail, or have messages dropped.
type Logs struct {
	partitions int // static

	mu      sync.Mutex
	before  func(ctx context.Context, call, room string) error
	calls   map[string]int
	perRoom int // 0: no limit
	bytes   int // of a partition's payloads; 0: no limit
	epoch   uint64
	parts   []logPart
	changed chan struct{} // closed and replaced with each change
}

// logPart is a partition.
type logPart struct {
	entries []store.LogEntry // those that are kept, in order
	last    uint64
	dropped uint64            // all up to here are gone
	ofRoom  map[string]uint64 // the last one of a room that went because the room has too many
}

// NewLogs makes empty logs with so many partitions.
func NewLogs(partitions int) *Logs {
	l := &Logs{partitions: partitions, calls: map[string]int{}, changed: make(chan struct{})}
	l.renewLocked()
	return l
}

// The calls that Before and Calls know of. CallTell is each message before Follow tells it.
const (
	CallAppend = "AppendLog"
	CallRead   = "ReadLog"
	CallHeads  = "Heads"
	CallFollow = "Follow"
	CallTell   = "tell"
)

// Before has hook called at the beginning of each call, without a lock. Its error is that of the call. room is "" for Heads
// and Follow, and that of the first entry for AppendLog. nil: no hook.
func (l *Logs) Before(hook func(ctx context.Context, call, room string) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.before = hook
}

// Calls is how often something was called.
func (l *Logs) Calls(call string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.calls[call]
}

// Limit has at most so many messages kept for a room, and so many bytes of payload in a partition: the oldest ones go. 0: no limit.
func (l *Logs) Limit(perRoom, bytes int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.perRoom, l.bytes = perRoom, bytes
}

// Drop drops a partition's messages up to a place, as for want of room.
func (l *Logs) Drop(partition int, through uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &l.parts[partition]
	p.dropped = max(p.dropped, min(through, p.last))
	p.entries = slices.DeleteFunc(p.entries, func(e store.LogEntry) bool { return e.Place.Seq <= p.dropped })
}

// Renew empties the logs and gives them another epoch, as where servers were replaced. Each Follow ends with an error.
func (l *Logs) Renew() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.renewLocked()
}

func (l *Logs) renewLocked() {
	l.epoch += 1<<32 + 1
	l.parts = make([]logPart, l.partitions)
	for i := range l.parts {
		l.parts[i].ofRoom = map[string]uint64{}
	}
	l.wakeLocked()
}

func (l *Logs) wakeLocked() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// begin is the beginning of each call.
func (l *Logs) begin(ctx context.Context, call, room string) error {
	l.mu.Lock()
	l.calls[call]++
	before := l.before
	l.mu.Unlock()
	if before != nil {
		if err := before(ctx, call, room); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", engine.ErrSpoolDown, context.Cause(ctx))
	}
	return nil
}

// AppendLog implements store.Logs.
func (l *Logs) AppendLog(ctx context.Context, entries []store.LogEntry) []error {
	errs := make([]error, len(entries))
	if len(entries) == 0 {
		return errs
	}
	if err := l.begin(ctx, CallAppend, entries[0].Message.Room); err != nil {
		for i := range errs {
			errs[i] = err
		}
		return errs
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range entries {
		e := &entries[i]
		if len(e.Message.Payload) > maxMessage {
			errs[i] = errSize
			continue
		}
		partition := l.Partition(e.Message.Room)
		p := &l.parts[partition]
		p.last++
		e.Place = engine.Place{Epoch: l.epoch, Partition: uint32(partition), Seq: p.last}
		kept := *e.Message
		kept.Expires = e.Expires
		p.entries = append(p.entries, store.LogEntry{Message: &kept, Expires: e.Expires, Place: e.Place})
		if l.perRoom > 0 || l.bytes > 0 {
			l.trimLocked(p, e.Message.Room)
		}
	}
	l.wakeLocked()
	return errs
}

// trimLocked drops what a room or the partition has too much.
func (l *Logs) trimLocked(p *logPart, room string) {
	ofRoom := func(e store.LogEntry) bool { return e.Message.Room == room }
	count, size := 0, 0
	for _, e := range p.entries {
		if size += len(e.Message.Payload); ofRoom(e) {
			count++
		}
	}
	if l.perRoom > 0 && count > l.perRoom {
		i := slices.IndexFunc(p.entries, ofRoom)
		p.ofRoom[room] = p.entries[i].Place.Seq
		p.entries = slices.Delete(p.entries, i, i+1)
	}
	for l.bytes > 0 && size > l.bytes {
		size -= len(p.entries[0].Message.Payload)
		p.dropped, p.entries = p.entries[0].Place.Seq, p.entries[1:]
	}
}

// ReadLog implements store.Logs.
func (l *Logs) ReadLog(ctx context.Context, room string, after uint64, most, bytes int) (store.LogPage, error) {
	if err := l.begin(ctx, CallRead, room); err != nil {
		return store.LogPage{}, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	p, now, size := &l.parts[l.Partition(room)], time.Now(), 0
	page := store.LogPage{Last: after, Gap: after < p.dropped || after < p.ofRoom[room] || after > p.last}
	for _, e := range p.entries {
		if e.Place.Seq <= after || e.Message.Room != room {
			continue
		}
		if e.Expires.After(now) {
			if n := len(page.Entries); n > 0 && (n >= most || size+len(e.Message.Payload) > bytes) {
				page.More = true
				break
			}
			page.Entries, size = append(page.Entries, e), size+len(e.Message.Payload)
		}
		page.Last = e.Place.Seq
	}
	return page, nil
}

// Heads implements store.Logs.
func (l *Logs) Heads(ctx context.Context) (epoch uint64, heads []uint64, err error) {
	if err := l.begin(ctx, CallHeads, ""); err != nil {
		return 0, nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.parts {
		heads = append(heads, l.parts[i].last)
	}
	return l.epoch, heads, nil
}

// Follow implements store.Logs.
func (l *Logs) Follow(ctx context.Context, partition int, after uint64, f func(e store.LogEntry) bool, caughtUp func(seq uint64)) error {
	if err := l.begin(ctx, CallFollow, ""); err != nil {
		return ended(ctx, err)
	}
	l.mu.Lock()
	epoch := l.epoch
	l.mu.Unlock()
	for told, first := after, true; ; first = false {
		l.mu.Lock()
		p := &l.parts[partition]
		renewed, last := l.epoch != epoch, p.last
		changed := l.changed
		i, _ := slices.BinarySearchFunc(p.entries, told+1, func(e store.LogEntry, seq uint64) int { return cmp.Compare(e.Place.Seq, seq) })
		next := slices.Clone(p.entries[i:])
		l.mu.Unlock()
		switch {
		case renewed:
			return errRenewed
		case last < told:
			return errBehind
		}
		for _, e := range next {
			if err := l.begin(ctx, CallTell, e.Message.Room); err != nil {
				return ended(ctx, err)
			}
			if !f(e) {
				return nil
			}
		}
		if told < last || first {
			told = last
			caughtUp(told)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ended(ctx, nil)
		}
	}
}

// ended is the error of a Follow: that ctx has ended is none.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil //nolint:nilerr // see above
	}
	return err
}

// Partition implements store.Logs.
func (l *Logs) Partition(room string) int {
	return int(crc32.ChecksumIEEE([]byte(room)) % uint32(l.partitions))
}
