package roomlog

import (
	"cmp"
	"context"
	"slices"
	"time"
	"unique"

	"github.com/push-manager/push-manager/transport/link"
)

// indexMost bounds the messages of all partitions whose places are kept, some 50 bytes each and the ids of rooms: an outage
// of a node of ten seconds where 10,000 messages a second are stored.
const indexMost = 100_000

// partition is one as far as it has been followed. Guarded by Service.mu.
type partition struct {
	number uint32

	// The index: all places behind from and up to to.
	from, to uint64
	records  []record
	most     int
	last     map[unique.Handle[string]]uint64 // of each room in records, its last place

	head    uint64             // the store had so much when it was asked last
	floor   uint64             // and must have as much when it is asked now
	waiting []*read            // for to to come as far as they want
	stop    context.CancelFunc // of the call of Follow
	stands  uint64             // to has been there, behind head, since
	since   time.Time          // zero: it is not behind
	broken  time.Time          // since when it is not followed, zero while it is
}

// record is the place of a message.
type record struct {
	seq  uint64
	room unique.Handle[string]
	at   time.Time // it was told
}

func newPartition(number, partitions int, after uint64) *partition {
	return &partition{
		number: uint32(number), from: after, to: after, most: max(indexMost/partitions, 1000),
		last: map[unique.Handle[string]]uint64{},
	}
}

// add takes the next message.
func (p *partition) add(room string, seq uint64, now time.Time) {
	if len(p.records) >= p.most+p.most/4 {
		p.trim(len(p.records) - p.most)
	}
	r := record{seq: seq, room: unique.Make(room), at: now}
	p.records = append(p.records, r)
	p.last[r.room] = seq
	p.to = seq
}

// trim forgets the n oldest messages.
func (p *partition) trim(n int) {
	for _, r := range p.records[:n] {
		if p.last[r.room] == r.seq {
			delete(p.last, r.room)
		}
	}
	p.from = p.records[n-1].seq
	p.records = slices.Delete(p.records, 0, n)
}

// settled is up to where everything has been told before a moment.
func (p *partition) settled(before time.Time) uint64 {
	i, _ := slices.BinarySearchFunc(p.records, before, func(r record, at time.Time) int { return r.at.Compare(at) })
	if i == len(p.records) {
		return p.to
	}
	return p.records[i].seq - 1
}

// behind finds the first record behind a place.
func (p *partition) behind(after uint64) int {
	i, found := slices.BinarySearchFunc(p.records, after, func(r record, seq uint64) int { return cmp.Compare(r.seq, seq) })
	if found {
		i++
	}
	return i
}

// lastOf is the last place of a room that the index knows, 0 for none.
func (p *partition) lastOf(room string) uint64 { return p.last[unique.Make(room)] }

// checkLocked has Follow called anew where the store has more and nothing comes: it may wait for ever.
func (p *partition) checkLocked(now time.Time) {
	switch {
	case p.to >= p.head:
		p.since = time.Time{}
	case p.since.IsZero() || p.to != p.stands:
		p.since, p.stands = now, p.to
	case now.Sub(p.since) >= stuck && p.stop != nil:
		p.since = time.Time{}
		p.stop()
	}
}

const (
	// markMost and markBytes bound a mark, about.
	markMost  = 1024
	markBytes = 32 << 10
)

// mark is the next one behind a place that the index reaches back to, up to a place at most.
func (p *partition) mark(epoch uint64, partitions int, after, to uint64) *link.LogMark {
	m := &link.LogMark{Epoch: epoch, Partition: p.number, Partitions: uint32(partitions), After: after, Seq: to}
	places, size := map[unique.Handle[string]]int{}, 0
	for i, n := p.behind(after), 0; i < len(p.records) && p.records[i].seq <= to; i, n = i+1, n+1 {
		r := &p.records[i]
		if n == markMost || size > markBytes {
			m.Seq = r.seq - 1
			break
		}
		at, ok := places[r.room]
		if !ok {
			at = len(m.Rooms)
			places[r.room] = at
			m.Rooms = append(m.Rooms, link.LogRoom{Room: r.room.Value()})
			size += len(r.room.Value())
		}
		m.Rooms[at].Seqs = append(m.Rooms[at].Seqs, r.seq)
		size += 10
	}
	return m
}
