package webhook

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

const (
	// queueLen and queueBytes bound the receipts that wait in memory, queueAge how long they do.
	queueLen   = 100_000
	queueBytes = 64 << 20
	queueAge   = 24 * time.Hour
	// queuedCost is what one takes besides its bytes.
	queuedCost = 96
)

// Queue has the receipts of this instance that are not sent, in memory: a Source and Turns where there is no store. When it is
// full, or a receipt is a day old, the oldest go.
type Queue struct {
	mu      sync.Mutex
	waiting []queued // guarded by mu, as the rest
	first   uint64   // the place of the first one
	bytes   int
	kept    Position
}

type queued struct {
	Receipt
	at time.Time
}

// NewQueue makes an empty one. Its gauge goes into set.
func NewQueue(set *metrics.Set) *Queue {
	q := &Queue{first: 1}
	set.GetOrCreateGauge("push_manager_receipt_webhook_queue_entries", func() float64 { return float64(q.Len()) })
	return q
}

// Append takes a receipt. It never waits.
func (q *Queue) Append(sender string, receipt []byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting = append(q.waiting, queued{Receipt{Sender: strings.Clone(sender), Content: receipt}, time.Now()})
	q.bytes += len(receipt) + queuedCost
	for len(q.waiting) > queueLen || q.bytes > queueBytes {
		q.dropLocked()
	}
}

func (q *Queue) dropLocked() {
	q.bytes -= len(q.waiting[0].Content) + queuedCost
	q.waiting[0] = queued{}
	q.waiting = q.waiting[1:]
	q.first++
}

// Len is how many wait.
func (q *Queue) Len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.waiting)
}

// Read implements Source.
func (q *Queue) Read(_ context.Context, after Position, most, bytes int) (Page, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.waiting) > 0 && time.Since(q.waiting[0].at) > queueAge {
		q.dropLocked()
	}
	page := Page{Last: after}
	if after.Seq+1 < q.first {
		page.Missed = q.first - after.Seq - 1
		page.Last.Seq = q.first - 1
	}
	for _, r := range q.waiting[page.Last.Seq+1-q.first:] {
		if len(page.Receipts) == most || bytes < 0 {
			break
		}
		page.Receipts = append(page.Receipts, r.Receipt)
		page.Last.Seq++
		bytes -= len(r.Content)
	}
	return page, nil
}

// Head implements Source. What came before there was anybody to send it counts, too.
func (q *Queue) Head(context.Context) (Position, error) { return Position{}, nil }

// Next implements Turns: it is always this instance's turn.
func (q *Queue) Next(ctx context.Context) (Turn, error) { return queueTurn{q}, ctx.Err() }

type queueTurn struct{ queue *Queue }

func (queueTurn) Over() <-chan struct{} { return nil }
func (queueTurn) End(context.Context)   {}

func (t queueTurn) Position(context.Context) (Position, bool, error) {
	t.queue.mu.Lock()
	defer t.queue.mu.Unlock()
	return t.queue.kept, true, nil
}

// Keep forgets what is up to the position.
func (t queueTurn) Keep(_ context.Context, p Position) error {
	q := t.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	q.kept = p
	for len(q.waiting) > 0 && q.first <= p.Seq {
		q.dropLocked()
	}
	return nil
}
