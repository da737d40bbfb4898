package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/pause"
)

// ReceiptLogConfig is what a ReceiptLog needs. Receipts must be set; zero values of the rest stand for the defaults.
type ReceiptLogConfig struct {
	Receipts Receipts
	// QueueBytes and QueueLen bound the receipts that are not stored yet. Default 16 MiB, 65,536.
	QueueBytes, QueueLen int
	// TailBytes bounds the latest receipts that are kept in memory for watchers, while there are any. Default 16 MiB.
	TailBytes int
	// Reads is how many watchers read old receipts from the store at a time. Default 16.
	Reads int

	Logger  *slog.Logger // nil: nothing is logged
	Metrics *metrics.Set // nil: a set of its own
}

func (c ReceiptLogConfig) withDefaults() ReceiptLogConfig {
	defaultTo(&c.QueueBytes, 16<<20)
	defaultTo(&c.QueueLen, 64<<10)
	defaultTo(&c.TailBytes, 16<<20)
	defaultTo(&c.Reads, 16)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = metrics.NewSet()
	}
	return c
}

const (
	// receiptCost is what a receipt takes besides its bytes.
	receiptCost = 128
	// receiptTimeout is how long the store may take for one batch of receipts.
	receiptTimeout = 2 * time.Second
	// Pauses between attempts to store a batch.
	receiptFirstPause, receiptLastPause = 50 * time.Millisecond, time.Second
	// followPause is how often the line is read while it has nothing new, checkInterval how often it is made sure that it is the same line.
	followPause   = 50 * time.Millisecond
	checkInterval = 5 * time.Second
	// pageReceipts and pageBytes bound one read.
	pageReceipts = 256
	pageBytes    = 256 << 10
	// batchReceipts is how many receipts are stored, or sent to a watcher, at a time.
	batchReceipts = 256
)

// Errors of watchers.
var (
	ErrReceiptsGone      = errors.New("what follows the position is not kept any more")
	ErrReceiptPosition   = errors.New("not a position of receipts")
	ErrReceiptsElsewhere = errors.New("the position is of a log of receipts in memory")
)

// ReceiptLog keeps receipts in a store, and feeds watchers of any instance from it.
//
// Invariants:
//
//   - Append never waits. Receipts wait in a bounded queue until they are stored, also while the store is away. What does not
//     fit is lost and counted, and so is what is left at the end.
//   - A receipt whose storing was not answered is stored again, so it may be there twice. Of two receipts of one sender and
//     message id, the first is stored first: they are never under way together.
//   - While there are watchers, one goroutine follows the line of all receipts and keeps its tail in memory. Watchers read from
//     there; who is behind reads pages of its sender's receipts from the store until it has caught up. A store that is away
//     delays watchers who have caught up, and ends the others.
type ReceiptLog struct {
	// Static after NewReceiptLog.
	cfg   ReceiptLogConfig
	lost  *metrics.Counter
	stop  context.CancelFunc
	wg    sync.WaitGroup
	wake  chan struct{} // has room for one: there is something to store
	begin chan struct{} // has room for one: there is a watcher
	reads chan struct{} // a token for each read of old receipts

	queue receiptQueue
	tail  receiptTail
}

// NewReceiptLog starts a ReceiptLog. The store may be away.
func NewReceiptLog(cfg ReceiptLogConfig) (*ReceiptLog, error) {
	if cfg.Receipts == nil {
		return nil, errors.New("log of receipts: Receipts is nil")
	}
	cfg = cfg.withDefaults()
	l := &ReceiptLog{
		cfg: cfg, lost: cfg.Metrics.GetOrCreateCounter("push_manager_receipts_lost_total"),
		wake: make(chan struct{}, 1), begin: make(chan struct{}, 1), reads: make(chan struct{}, cfg.Reads),
		queue: receiptQueue{maxBytes: cfg.QueueBytes, maxLen: cfg.QueueLen, idle: make(chan struct{})},
		tail:  receiptTail{maxBytes: cfg.TailBytes, started: make(chan struct{}), senders: make(map[string]*senderTail)},
	}
	gauge := func(name string, value func() float64) { cfg.Metrics.GetOrCreateGauge(name, value) }
	gauge("push_manager_receipts_queue_entries", func() float64 { n, _ := l.queue.size(); return float64(n) })
	gauge("push_manager_receipts_queue_bytes", func() float64 { _, bytes := l.queue.size(); return float64(bytes) })
	gauge("push_manager_receipts", func() float64 { n, _ := l.tail.size(); return float64(n) })
	gauge("push_manager_receipts_bytes", func() float64 { _, bytes := l.tail.size(); return float64(bytes) })
	var running context.Context
	running, l.stop = context.WithCancel(context.Background())
	l.wg.Go(func() { l.writeLoop(running) })
	l.wg.Go(func() { l.followLoop(running) })
	return l, nil
}

// Append takes a receipt to be stored.
func (l *ReceiptLog) Append(sender, messageID string, receipt []byte) {
	if !l.queue.push(waitingReceipt{Receipt{Sender: strings.Clone(sender), Content: receipt}, strings.Clone(messageID)}) {
		l.lost.Inc()
		return
	}
	signal(l.wake)
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Close takes no more receipts, waits until those that it has are stored, and ends the log. At the end of ctx the rest is lost.
func (l *ReceiptLog) Close(ctx context.Context) error {
	l.queue.close()
	var err error
	select {
	case <-l.queue.idle:
	case <-ctx.Done():
	}
	l.stop()
	l.wg.Wait()
	if n, _ := l.queue.size(); n > 0 {
		l.lost.Add(n)
		err = fmt.Errorf("store: %d receipts were not stored in time: %w", n, context.Cause(ctx))
	}
	return err
}

// writeLoop stores what is in the queue, batch by batch. A batch is tried until all of it is stored.
func (l *ReceiptLog) writeLoop(ctx context.Context) {
	for {
		batch := l.queue.take(batchReceipts)
		if len(batch) == 0 {
			select {
			case <-l.wake:
				continue
			case <-ctx.Done():
				return
			}
		}
		for wait, down := receiptFirstPause, false; len(batch) > 0; wait = min(2*wait, receiptLastPause) {
			rest, err := l.write(ctx, batch)
			l.queue.settle(batch, rest)
			batch = rest
			switch {
			case err == nil && down:
				l.cfg.Logger.Info("receipts: are stored again")
			case err == nil:
			case !down && wait > receiptFirstPause: // the second attempt failed, too
				down = true
				l.cfg.Logger.Warn("receipts: cannot be stored, trying again; those that do not fit into the queue are lost", "err", err)
			}
			if err != nil && !pause.For(ctx, pause.Jitter(wait)) {
				return
			}
		}
	}
}

// write tries to store a batch, and returns what is to be tried again.
func (l *ReceiptLog) write(ctx context.Context, batch []waitingReceipt) (rest []waitingReceipt, err error) {
	ctx, cancel := context.WithTimeout(ctx, receiptTimeout)
	defer cancel()
	list := make([]Receipt, len(batch))
	for i := range batch {
		list[i] = batch[i].Receipt
	}
	for i, failed := range l.cfg.Receipts.AppendReceipts(ctx, list) {
		switch {
		case failed == nil:
		case errors.Is(failed, ErrReceiptSize):
			l.lost.Inc()
		default:
			rest, err = append(rest, batch[i]), failed
		}
	}
	return rest, err
}

// waitingReceipt waits to be stored.
type waitingReceipt struct {
	Receipt
	messageID string
}

func (r *waitingReceipt) cost() int {
	return len(r.Sender) + len(r.Content) + len(r.messageID) + receiptCost
}

// receiptQueue has the receipts that are not stored, those under way included.
type receiptQueue struct {
	// Static.
	maxBytes, maxLen int
	idle             chan struct{} // closed when nothing is left, of a queue that is closed

	mu      sync.Mutex
	waiting []waitingReceipt // guarded by mu, as the rest
	bytes   int
	length  int
	closed  bool
}

func (q *receiptQueue) push(r waitingReceipt) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || q.length >= q.maxLen || q.bytes+r.cost() > q.maxBytes {
		return false
	}
	q.waiting = append(q.waiting, r)
	q.length, q.bytes = q.length+1, q.bytes+r.cost()
	return true
}

// take takes out the next receipts, of one sender and message id no more than one. They count until settle.
func (q *receiptQueue) take(most int) (batch []waitingReceipt) {
	type key struct{ sender, messageID string }
	seen := make(map[key]bool)
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, r := range q.waiting {
		k := key{r.Sender, r.messageID}
		if len(batch) == most || seen[k] {
			break
		}
		seen[k] = true
		batch = append(batch, r)
	}
	clear(q.waiting[:len(batch)])
	if q.waiting = q.waiting[len(batch):]; len(q.waiting) == 0 {
		q.waiting = nil
	}
	return batch
}

// settle forgets those of a batch that are not in rest.
func (q *receiptQueue) settle(batch, rest []waitingReceipt) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i := range batch {
		q.bytes -= batch[i].cost()
	}
	for i := range rest {
		q.bytes += rest[i].cost()
	}
	q.length -= len(batch) - len(rest)
	if q.closed && q.length == 0 {
		close(q.idle)
	}
}

func (q *receiptQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.closed && q.length == 0 {
		close(q.idle)
	}
	q.closed = true
}

func (q *receiptQueue) size() (n, bytes int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.length, q.bytes
}

// ReceiptPosition is the text of a place in the line of receipts.
func ReceiptPosition(epoch, seq uint64) string {
	return "s." + strconv.FormatUint(epoch, 36) + "." + strconv.FormatUint(seq, 36)
}

// ParseReceiptPosition reads what ReceiptPosition has written.
func ParseReceiptPosition(text string) (epoch, seq uint64, err error) {
	parts := strings.Split(text, ".")
	if len(parts) == 1 && strings.Contains(text, "-") {
		return 0, 0, ErrReceiptsElsewhere
	}
	if len(parts) != 3 || parts[0] != "s" {
		return 0, 0, ErrReceiptPosition
	}
	epoch, err1 := strconv.ParseUint(parts[1], 36, 64)
	seq, err2 := strconv.ParseUint(parts[2], 36, 64)
	if err1 != nil || err2 != nil {
		return 0, 0, ErrReceiptPosition
	}
	return epoch, seq, nil
}

// Watch begins to read a sender's receipts behind a position, or from now on if that is empty.
func (l *ReceiptLog) Watch(ctx context.Context, sender, after string) (*ReceiptReader, error) {
	r := &ReceiptReader{log: l, sender: strings.Clone(sender)}
	var err error
	if after != "" {
		if r.epoch, r.place, err = ParseReceiptPosition(after); err != nil {
			return nil, err
		}
	}
	epoch, head, err := l.cfg.Receipts.ReceiptsHead(ctx)
	switch {
	case err != nil:
		return nil, err
	case after == "":
		r.epoch, r.place = epoch, head
	case r.epoch != epoch:
		return nil, ErrReceiptsGone
	case r.place > head:
		return nil, ErrReceiptPosition
	}
	l.tail.enter()
	signal(l.begin)
	return r, nil
}

// ReceiptReader reads the receipts of one sender. It is used by one goroutine.
type ReceiptReader struct {
	log    *ReceiptLog
	sender string
	epoch  uint64
	place  uint64 // up to which everything was sent
}

// Close ends the reading.
func (r *ReceiptReader) Close() { r.log.tail.leave() }

// Next calls send with some receipts that follow those before. changed is not nil where none follows at the moment.
func (r *ReceiptReader) Next(ctx context.Context, send func(position string, receipt []byte) error) (changed <-chan struct{}, err error) {
	some, place, changed, err := r.log.tail.next(r.sender, r.epoch, r.place)
	switch {
	case errors.Is(err, errBehindTail):
		return r.readPage(ctx, place, changed, send)
	case err != nil:
		return nil, err
	}
	for i := range some {
		if err := send(ReceiptPosition(r.epoch, some[i].Seq), some[i].Content); err != nil {
			return nil, err
		}
		r.place = some[i].Seq
	}
	r.place = max(r.place, place)
	return changed, nil
}

// readPage reads from the store. Once it has nothing more, the tail goes on from floor; started is closed when there is one.
func (r *ReceiptReader) readPage(ctx context.Context, floor uint64, started <-chan struct{}, send func(string, []byte) error) (changed <-chan struct{}, err error) {
	select {
	case r.log.reads <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	page, err := r.log.cfg.Receipts.ReadReceipts(ctx, r.sender, r.place, pageReceipts, pageBytes)
	<-r.log.reads
	switch {
	case err != nil:
		return nil, err
	case page.Gap:
		return nil, ErrReceiptsGone
	}
	for i := range page.Receipts {
		if err := send(ReceiptPosition(r.epoch, page.Receipts[i].Seq), page.Receipts[i].Content); err != nil {
			return nil, err
		}
		r.place = page.Receipts[i].Seq
	}
	if r.place = max(r.place, page.Last); page.More {
		return nil, nil
	}
	r.place = max(r.place, floor)
	return started, nil
}

// followLoop follows the line while there are watchers.
func (l *ReceiptLog) followLoop(ctx context.Context) {
	for ctx.Err() == nil {
		if !l.tail.watched() {
			l.tail.reset()
			select {
			case <-l.begin:
				continue
			case <-ctx.Done():
				return
			}
		}
		if err := l.follow(ctx); err != nil && ctx.Err() == nil {
			l.cfg.Logger.Debug("receipts: the store does not answer", "err", err)
			pause.For(ctx, pause.Jitter(receiptLastPause))
		}
	}
}

// follow follows the line until nobody watches, or it is another one, or the store does not answer.
func (l *ReceiptLog) follow(ctx context.Context) error {
	var checked time.Time
	for l.tail.watched() && ctx.Err() == nil {
		if time.Since(checked) > checkInterval {
			epoch, head, err := l.cfg.Receipts.ReceiptsHead(ctx)
			if err != nil {
				return err
			}
			l.tail.start(epoch, head)
			checked = time.Now()
		}
		page, err := l.cfg.Receipts.FollowReceipts(ctx, l.tail.place(), pageReceipts, pageBytes)
		if err != nil {
			return err
		}
		l.tail.add(page)
		if !page.More {
			pause.For(ctx, followPause)
		}
	}
	return nil
}

// errBehindTail is told to whoever has to read from the store.
var errBehindTail = errors.New("behind the tail")

// receiptTail is the end of the line of all receipts: everything behind floor up to head.
type receiptTail struct {
	maxBytes int // static

	mu       sync.Mutex
	watchers int // guarded by mu, as the rest
	started  chan struct{}
	live     bool // started is closed
	epoch    uint64
	floor    uint64
	head     uint64
	line     []Receipt // in order
	senders  map[string]*senderTail
	bytes    int
}

// senderTail is that of one sender.
type senderTail struct {
	receipts []Receipt
	changed  chan struct{} // closed when there are more; nil while nobody waits
}

func (t *receiptTail) enter() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.watchers++
}

func (t *receiptTail) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.watchers--
}

func (t *receiptTail) watched() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.watchers > 0
}

func (t *receiptTail) place() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.head
}

func (t *receiptTail) size() (n, bytes int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.line), t.bytes
}

// start begins at head, unless it follows this epoch already. Watchers of another one are told.
func (t *receiptTail) start(epoch, head uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.live && t.epoch == epoch {
		return
	}
	t.resetLocked()
	t.live, t.epoch, t.floor, t.head = true, epoch, head, head
	close(t.started)
}

// reset forgets everything. Whoever waits looks again.
func (t *receiptTail) reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.resetLocked()
}

func (t *receiptTail) resetLocked() {
	if t.live {
		t.started = make(chan struct{})
	}
	for _, s := range t.senders {
		s.wake()
	}
	t.live, t.line, t.bytes, t.senders = false, nil, 0, make(map[string]*senderTail)
}

func (s *senderTail) wake() {
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// add adds what follows head.
func (t *receiptTail) add(page ReceiptPage) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range page.Receipts {
		s := t.senderLocked(r.Sender)
		s.receipts = append(s.receipts, r)
		t.line = append(t.line, r)
		t.bytes += len(r.Content) + receiptCost
		s.wake()
	}
	t.head = max(t.head, page.Last)
	if page.Gap {
		t.floor = t.head // what is missing was somebody's: the store knows whose
	}
	n := 0
	for t.bytes > t.maxBytes {
		r := t.line[n]
		s := t.senders[r.Sender]
		s.receipts[0] = Receipt{}
		s.receipts = s.receipts[1:]
		t.forgetLocked(r.Sender, s)
		t.bytes -= len(r.Content) + receiptCost
		t.floor = max(t.floor, r.Seq)
		t.line[n] = Receipt{}
		n++
	}
	t.line = t.line[n:]
}

func (t *receiptTail) senderLocked(sender string) *senderTail {
	s := t.senders[sender]
	if s == nil {
		s = new(senderTail)
		t.senders[sender] = s
	}
	return s
}

func (t *receiptTail) forgetLocked(sender string, s *senderTail) {
	if len(s.receipts) == 0 && s.changed == nil {
		delete(t.senders, sender)
	}
}

// next returns some receipts of a sender behind after. Where there is none, place is up to where that is so, and changed is
// closed when there are more. Its error is errBehindTail where the tail begins after that: at place, if it has begun, and
// changed is closed when it does.
func (t *receiptTail) next(sender string, epoch, after uint64) (some []Receipt, place uint64, changed <-chan struct{}, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case !t.live:
		return nil, 0, t.started, errBehindTail
	case t.epoch != epoch:
		return nil, 0, nil, ErrReceiptsGone
	case after < t.floor:
		return nil, t.floor, nil, errBehindTail
	}
	s := t.senderLocked(sender)
	first, _ := slices.BinarySearchFunc(s.receipts, after+1, func(r Receipt, seq uint64) int {
		return cmp.Compare(r.Seq, seq)
	})
	if first < len(s.receipts) {
		behind := s.receipts[first:]
		return slices.Clone(behind[:min(len(behind), batchReceipts)]), 0, nil, nil
	}
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return nil, t.head, s.changed, nil
}
