package ingress

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/internal/wire"
)

const (
	// receiptsMost is how many receipts are kept for one sender, receiptsBytes for all together.
	receiptsMost  = 100_000
	receiptsBytes = 64 << 20
	// receiptCost is what a receipt takes besides its bytes.
	receiptCost = 64
	// receiptsAtOnce is how many a watcher takes out at a time.
	receiptsAtOnce = 64
	// watchLook is how often a watcher that has nothing to send looks whether its caller may still watch.
	watchLook = time.Second
)

var (
	// errReceiptsGone ends a watch: what follows its position is not kept.
	errReceiptsGone = errors.New("what follows the position is not kept any more")
	errPosition     = &engine.InvalidError{Field: "after", Code: engine.CodeMalformed, Description: "must be a position that WatchReceipts has answered, or empty"}
)

// receipts keeps the receipts of this instance, for each sender of pushes a log of its own. A caller sees those of its own
// pushes, and cannot push out another's: when all together take too much, the log that is largest loses its oldest.
type receipts struct {
	// Static after newReceipts.
	epoch  uint64 // of positions: they mean nothing to another instance
	most   int    // in one log
	bytes  int    // of all
	total  *metrics.Counter
	lost   *metrics.Counter
	faults func(where string, v any)
	booked func(p *engine.Push, res *engine.Result) // is told of each push that is over; nil for nobody

	mu sync.Mutex
	// Guarded by mu, and so are the logs.
	logs  map[string]*receiptLog // by sender, as receiptSender has it
	taken int                    // bytes
	kept  int                    // receipts
}

// receiptLog has the receipts of one sender.
type receiptLog struct {
	first   uint64 // the place of the first that is kept
	kept    [][]byte
	bytes   int
	changed chan struct{} // closed when there are more; nil while nobody waits
}

var _ engine.Receipts = (*receipts)(nil)

func newReceipts(most, bytes int, set *metrics.Set, faults func(where string, v any)) *receipts {
	r := &receipts{
		epoch: rand.Uint64(), logs: make(map[string]*receiptLog), most: most, bytes: bytes, faults: faults,
		total: set.GetOrCreateCounter("push_manager_receipts_total"),
		lost:  set.GetOrCreateCounter("push_manager_receipts_dropped_total"),
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

// Receipt implements engine.Receipts.
func (r *receipts) Receipt(p *engine.Push, res engine.Result, unacked []string, final bool) {
	defer func() {
		if v := recover(); v != nil { // it is the engine's goroutine
			r.faults("receipts", v)
		}
	}()
	if final && r.booked != nil {
		r.booked(p, &res)
	}
	r.append(p.Scope+p.Options.Sender, encodeReceipt(p, &res, unacked, final, time.Now()))
}

// encodeReceipt encodes a PushReceipt.
func encodeReceipt(p *engine.Push, res *engine.Result, unacked []string, final bool, at time.Time) []byte {
	var b []byte
	b = wire.AppendString(b, 1, p.Options.MessageID)
	b = wire.AppendString(b, 2, targetOf(p))
	b = wire.AppendLen(b, 3, sizeSummary(p, res))
	b = appendSummary(b, p, res)
	if final {
		b = wire.AppendUint(b, 4, 1)
	}
	for _, user := range unacked {
		b = wire.AppendBytes(b, 5, shown(user, p))
	}
	seconds, nanos := uint64(at.Unix()), uint64(at.Nanosecond())
	b = wire.AppendLen(b, 6, wire.SizeUint(1, seconds)+wire.SizeUint(2, nanos))
	return wire.AppendUint(wire.AppendUint(b, 1, seconds), 2, nanos)
}

// targetOf is what a push was for, as its caller knows it.
func targetOf(p *engine.Push) string {
	switch p.Kind {
	case engine.ToRoom:
		return "room:" + shown(p.Room, p)
	case engine.ToUser:
		return "user:" + shown(p.User, p)
	case engine.ToUsers:
		return "users"
	default:
		return "everybody"
	}
}

// logLocked is the log of a sender.
func (r *receipts) logLocked(sender string) *receiptLog {
	l := r.logs[sender]
	if l == nil {
		l = &receiptLog{first: 1}
		r.logs[strings.Clone(sender)] = l
	}
	return l
}

func (r *receipts) append(sender string, receipt []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.logLocked(sender)
	l.kept = append(l.kept, receipt)
	l.bytes += len(receipt) + receiptCost
	r.taken += len(receipt) + receiptCost
	r.kept++
	r.total.Inc()
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
func (r *receipts) dropLocked(l *receiptLog) {
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
func (r *receipts) position(place uint64) string {
	return strconv.FormatUint(r.epoch, 36) + "-" + strconv.FormatUint(place, 36)
}

func (r *receipts) parse(position string) (place uint64, err error) {
	epoch, rest, found := strings.Cut(position, "-")
	of, err1 := strconv.ParseUint(epoch, 36, 64)
	place, err2 := strconv.ParseUint(rest, 36, 64)
	switch {
	case !found || err1 != nil || err2 != nil:
		return 0, errPosition
	case of != r.epoch:
		return 0, errReceiptsGone
	default:
		return place, nil
	}
}

// end is the place of the last receipt of a sender.
func (r *receipts) end(sender string) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.logLocked(sender)
	return l.first + uint64(len(l.kept)) - 1
}

// next returns the receipts of a sender behind a place, the first of them in place+1, or a channel that is closed when
// there are any.
func (r *receipts) next(sender string, place uint64) (some [][]byte, changed <-chan struct{}, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.logLocked(sender)
	switch end := l.first + uint64(len(l.kept)); {
	case place >= end:
		return nil, nil, errPosition
	case place+1 < l.first:
		return nil, nil, errReceiptsGone
	case place+1 == end:
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		return nil, l.changed, nil
	}
	behind := l.kept[place+1-l.first:]
	return append([][]byte(nil), behind[:min(len(behind), receiptsAtOnce)]...), nil, nil
}

// watchReceipts serves WatchReceipts. It reads from the log as fast as its client reads the stream, so a slow client costs
// no memory; one that falls behind the log is told so.
func (s *Server) watchReceipts(_ any, ss grpc.ServerStream) (err error) {
	ctx, name := ss.Context(), watchReceipts.String()
	info, err := s.admit(ctx, watchReceipts)
	if err != nil {
		if s.cfg.Audit != nil {
			s.auditRefusal(info.auditEntry(ctx, name), nil, err)
		}
		return s.rejectStream(ss, name, info.priority, err)
	}
	defer s.leave(&info)
	defer func() {
		if v := recover(); v != nil {
			s.panicked(name, v)
			err = s.statuses.internal.status.Err()
		}
	}()
	s.metrics.watchers.Add(1)
	defer s.metrics.watchers.Add(-1)
	over := make(chan struct{})
	defer close(over)
	s.readers.Go(func() { s.endWatch(&info, over) })
	err = s.watch(ctx, ss, &info)
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	if _, ended := status.FromError(err); ended { // by a write
		return err
	}
	if s.cfg.Audit != nil {
		s.auditRefusal(info.auditEntry(ctx, name), nil, err)
	}
	return s.rejectStream(ss, name, info.priority, err)
}

// watch sends receipts until the stream is over. The error says why.
func (s *Server) watch(ctx context.Context, ss grpc.ServerStream, info *callInfo) error {
	after, err := s.readAfter(info)
	if err != nil {
		return err
	}
	sender := info.receiptSender()
	place := s.receipts.end(sender)
	if after != "" {
		if place, err = s.receipts.parse(after); err != nil {
			return err
		}
	}
	look := time.NewTicker(watchLook)
	defer look.Stop()
	for {
		if err := s.mayWatch(ctx, info, sender); err != nil {
			return err
		}
		some, changed, err := s.receipts.next(sender, place)
		if err != nil {
			return err
		}
		for _, receipt := range some {
			place++
			r := new(reply)
			r.set(wire.AppendBytes(wire.AppendString(r.small[:0], 1, s.receipts.position(place)), 2, receipt))
			if err := ss.SendMsg(r); err != nil {
				return err
			}
		}
		if some != nil {
			select {
			case <-s.drained:
				return engine.ErrDraining
			default:
				continue
			}
		}
		select {
		case <-changed:
		case <-look.C:
		case <-s.drained:
			return engine.ErrDraining
		case <-info.conn.ToldToGo():
			return engine.ErrDraining
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// endWatch ends a watch when the server drains, if the watch does not do so itself: it may wait for its client to send its
// request, or to read. It returns when over is closed.
func (s *Server) endWatch(info *callInfo, over <-chan struct{}) {
	select {
	case <-over:
		return
	case <-s.drained:
	case <-info.conn.ToldToGo():
	}
	linger := time.NewTimer(lingerWatchers)
	defer linger.Stop()
	select {
	case <-over:
	case <-linger.C:
		_ = info.wire.WriteStatus(s.statuses.draining.status) // it fails for a client that has gone
	}
}

// readAfter reads the request.
func (s *Server) readAfter(info *callInfo) (after string, err error) {
	b, err := s.readSmall(info)
	if err != nil {
		return "", err
	}
	m := wire.Reader{Rest: b}
	for m.Next() {
		if m.IsBytes(1) {
			after = string(m.Bytes)
		}
	}
	if m.Err != nil {
		return "", malformed("request")
	}
	return after, nil
}

// mayWatch tells whether the caller is still who it was, and may watch.
func (s *Server) mayWatch(ctx context.Context, info *callInfo, sender string) error {
	if s.cfg.Auth == nil || s.cfg.Auth.Valid(info.principal, time.Now()) {
		return nil
	}
	if err := s.authenticate(ctx, info); err != nil {
		return err
	}
	if !info.principal.May(auth.WatchReceipts) || info.receiptSender() != sender {
		return deniedError{api: watchReceipts, method: true}
	}
	return nil
}

// receiptSender names the log with the receipts of the caller's pushes.
func (e *callInfo) receiptSender() string {
	return scopeOf(e.tenant()) + e.sender()
}

// readSmall reads the request of a method that has a small one.
func (s *Server) readSmall(info *callInfo) ([]byte, error) {
	var in inbound
	var head [messageHead]byte
	size, err := s.next(info.wire, head[:])
	switch {
	case err != nil:
		return nil, unread(err)
	case size > smallBody:
		return nil, &engine.InvalidError{Field: "request", Code: engine.CodeTooLarge, Description: fmt.Sprintf("%d bytes, more than %d", size, smallBody)}
	}
	if err := in.only(info.wire, nil, size, head[:]); err != nil {
		return nil, unread(err)
	}
	return in.wire, nil
}
