package ingress

import (
	"context"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"

	"github.com/VictoriaMetrics/metrics"
)

const (
	// receiptsMost is how many receipts are kept for one sender, receiptsBytes for all together.
	receiptsMost  = 100_000
	receiptsBytes = 64 << 20
	// receiptCost is what a receipt takes besides its bytes.
	receiptCost = 64
	// receiptsAtOnce is how many a watcher takes out at a time.
	receiptsAtOnce = 64
)

// receiptRing is a ReceiptLog in memory, of this instance alone. A caller cannot push out the receipts of another: when all
// together take too much, the log that is largest loses its oldest.
type receiptRing struct {
	// Static after newReceiptRing.
	epoch uint64 // of positions: they mean nothing to another instance
	most  int    // in one log
	bytes int    // of all
	lost  *metrics.Counter

	mu sync.Mutex
	// Guarded by mu, and so are the logs.
	logs  map[string]*senderRing // by sender, as receiptSender has it
	taken int                    // bytes
	kept  int                    // receipts
}

// senderRing has the receipts of one sender.
type senderRing struct {
	first   uint64 // the place of the first that is kept
	kept    [][]byte
	bytes   int
	changed chan struct{} // closed when there are more; nil while nobody waits
}

var _ ReceiptLog = (*receiptRing)(nil)

func newReceiptRing(most, bytes int, set *metrics.Set) *receiptRing {
	r := &receiptRing{
		epoch: rand.Uint64(), logs: make(map[string]*senderRing), most: most, bytes: bytes,
		lost: set.GetOrCreateCounter("push_manager_receipts_dropped_total"),
	}
	gauge := func(name string, value *int) {
		set.GetOrCreateGauge(name, func() float64 {
			r.mu.Lock()
			defer r.mu.Unlock()
			return float64(*value)
		})
	}
	gauge("push_manager_receipts", &r.kept)
	gauge("push_manager_receipts_bytes", &r.taken)
	return r
}

// logLocked is the log of a sender.
func (r *receiptRing) logLocked(sender string) *senderRing {
	l := r.logs[sender]
	if l == nil {
		l = &senderRing{first: 1}
		r.logs[strings.Clone(sender)] = l
	}
	return l
}

// Append implements ReceiptLog.
func (r *receiptRing) Append(sender, _ string, receipt []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.logLocked(sender)
	l.kept = append(l.kept, receipt)
	l.bytes += len(receipt) + receiptCost
	r.taken += len(receipt) + receiptCost
	r.kept++
	if len(l.kept) > r.most {
		r.dropLocked(l)
	}
	for r.taken > r.bytes {
		largest := l
		for _, other := range r.logs { // no more than the callers of a policy
			if other.bytes > largest.bytes {
				largest = other
			}
		}
		r.dropLocked(largest)
	}
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// dropLocked drops the oldest of a log. The slice moves to new memory when it has to grow the next time.
func (r *receiptRing) dropLocked(l *senderRing) {
	cost := len(l.kept[0]) + receiptCost
	l.kept[0] = nil
	l.kept = l.kept[1:]
	l.first++
	l.bytes -= cost
	r.taken -= cost
	r.kept--
	r.lost.Inc()
}

// position is what a caller gets for a place, and parse the place of it.
func (r *receiptRing) position(place uint64) string {
	return strconv.FormatUint(r.epoch, 36) + "-" + strconv.FormatUint(place, 36)
}

func (r *receiptRing) parse(position string) (place uint64, err error) {
	if strings.ContainsRune(position, '.') { // as in those of a store
		return 0, ErrReceiptsElsewhere
	}
	epoch, rest, found := strings.Cut(position, "-")
	of, err1 := strconv.ParseUint(epoch, 36, 64)
	place, err2 := strconv.ParseUint(rest, 36, 64)
	switch {
	case !found || err1 != nil || err2 != nil:
		return 0, ErrReceiptPosition
	case of != r.epoch:
		return 0, ErrReceiptsGone
	default:
		return place, nil
	}
}

// end is the place of the last receipt of a sender.
func (r *receiptRing) end(sender string) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.logLocked(sender)
	return l.first + uint64(len(l.kept)) - 1
}

// next returns the receipts of a sender behind a place, the first of them in place+1, or a channel that is closed when
// there are any.
func (r *receiptRing) next(sender string, place uint64) (some [][]byte, changed <-chan struct{}, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.logLocked(sender)
	switch end := l.first + uint64(len(l.kept)); {
	case place >= end:
		return nil, nil, ErrReceiptPosition
	case place+1 < l.first:
		return nil, nil, ErrReceiptsGone
	case place+1 == end:
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		return nil, l.changed, nil
	}
	behind := l.kept[place+1-l.first:]
	return append([][]byte(nil), behind[:min(len(behind), receiptsAtOnce)]...), nil, nil
}

// Watch implements ReceiptLog.
func (r *receiptRing) Watch(_ context.Context, sender, after string) (ReceiptReader, error) {
	place := r.end(sender)
	if after != "" {
		var err error
		if place, err = r.parse(after); err != nil {
			return nil, err
		}
	}
	return &ringReader{ring: r, sender: sender, place: place}, nil
}

// ringReader is a ReceiptReader.
type ringReader struct {
	ring   *receiptRing
	sender string
	place  uint64
}

// Next implements ReceiptReader.
func (r *ringReader) Next(_ context.Context, send func(position string, receipt []byte) error) (changed <-chan struct{}, err error) {
	some, changed, err := r.ring.next(r.sender, r.place)
	if err != nil {
		return nil, err
	}
	for _, receipt := range some {
		r.place++
		if err := send(r.ring.position(r.place), receipt); err != nil {
			return nil, err
		}
	}
	return changed, nil
}

// Close implements ReceiptReader.
func (r *ringReader) Close() {}
