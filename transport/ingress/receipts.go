package ingress

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/internal/wire"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

const (
	// watchLook is how often a watcher that has nothing to send looks whether its caller may still watch.
	watchLook = time.Second
	// unreadWatches is Server.unread. Connections whose watches are unread for longer are closed.
	unreadWatches = 2 * time.Second
)

var (
	// ErrReceiptsGone is an error of a ReceiptLog: what follows a position is not kept.
	ErrReceiptsGone = errors.New("what follows the position is not kept any more")
	// ErrReceiptPosition is an error of a ReceiptLog: nobody has been told such a position.
	ErrReceiptPosition = errors.New("must be a position that WatchReceipts has answered, or empty")
	// ErrReceiptsElsewhere is an error of a ReceiptLog: a log of another kind has told the position.
	ErrReceiptsElsewhere = errors.New("the position is of an instance that keeps receipts elsewhere")
)

// ReceiptLog keeps receipts, for each sender of pushes a log of its own. Its methods are safe for concurrent use.
type ReceiptLog interface {
	// Append takes a receipt, and keeps it. It never waits. Of receipts with the same sender and id, the first stands first.
	Append(sender, messageID string, receipt []byte)
	// Watch begins behind a position, or behind what has been kept until now if that is empty. Its error is or wraps one of
	// those above, or engine.ErrSpoolDown.
	Watch(ctx context.Context, sender, after string) (ReceiptReader, error)
}

// ReceiptReader reads the log of one sender. It is used by one goroutine.
type ReceiptReader interface {
	// Next calls send with some receipts that follow those before, in order. changed is not nil where none follows: there
	// may be more when it is closed, or without that. Its errors are those of send and of Watch.
	Next(ctx context.Context, send func(position string, receipt []byte) error) (changed <-chan struct{}, err error)
	Close()
}

// receipts books the pushes with receipts, and hands their receipts to a log.
type receipts struct {
	// Static.
	log    ReceiptLog
	told   func(sender string, receipt []byte)      // of each receipt; nil for nobody
	booked func(p *engine.Push, res *engine.Result) // of each push that is over; nil for nobody
	total  *metrics.Counter
	faults func(where string, v any)
}

var _ engine.Receipts = (*receipts)(nil)

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
	r.total.Inc()
	sender, receipt := p.Scope+p.Options.Sender, encodeReceipt(p, &res, unacked, final, time.Now())
	r.log.Append(sender, p.Options.MessageID, receipt)
	if r.told != nil {
		r.told(sender, receipt)
	}
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
	stamp := timestamppb.New(at)
	seconds, nanos := uint64(stamp.GetSeconds()), uint64(stamp.GetNanos())
	b = wire.AppendLen(b, 6, wire.SizeUint(1, seconds)+wire.SizeUint(2, nanos))
	return wire.AppendUint(wire.AppendUint(b, 1, seconds), 2, nanos)
}

// targetOf is what a push was for, as its caller knows it.
func targetOf(p *engine.Push) string {
	if p.Rooms != nil { // the engine may have made one of one of them
		return "rooms"
	}
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
	s.watching.begin(info.conn)
	defer s.watching.end(info.conn, s.drained)
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
	reader, err := s.receipts.log.Watch(ctx, sender, after)
	if err != nil {
		return receiptError(err)
	}
	defer reader.Close()
	send := func(position string, receipt []byte) error {
		r := new(reply)
		r.set(wire.AppendBytes(wire.AppendString(r.small[:0], 1, position), 2, receipt))
		return ss.SendMsg(r)
	}
	look := time.NewTicker(watchLook)
	defer look.Stop()
	for {
		if err := s.mayWatch(ctx, info, sender); err != nil {
			return err
		}
		changed, err := reader.Next(ctx, send)
		if err != nil {
			return receiptError(err)
		}
		if changed == nil {
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

// serveWatch lets a stream in that shows its caller what changes, and counts it as open. run sends until ctx ends, which it does when
// the caller goes or is to go elsewhere; its error says why it has ended.
func (s *Server) serveWatch(ss grpc.ServerStream, a api, open *atomic.Int64, run func(ctx context.Context, info *callInfo) error) (err error) {
	name := a.String()
	info, err := s.admit(ss.Context(), a)
	if err != nil {
		if s.cfg.Audit != nil {
			s.auditRefusal(info.auditEntry(ss.Context(), name), nil, err)
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
	open.Add(1)
	defer open.Add(-1)
	s.watching.begin(info.conn)
	defer s.watching.end(info.conn, s.drained)
	ctx, cancel := context.WithCancelCause(ss.Context())
	over := make(chan struct{})
	defer close(over)
	s.readers.Go(func() {
		select {
		case <-over:
		case <-s.drained:
		case <-info.conn.ToldToGo():
		}
		cancel(engine.ErrDraining)
	})
	s.readers.Go(func() { s.endWatch(&info, over) })
	err = run(ctx, &info)
	switch {
	case err == nil:
		return nil
	case ss.Context().Err() != nil:
		return status.FromContextError(ss.Context().Err()).Err()
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	}
	if _, ended := status.FromError(err); ended { // by a write
		return err
	}
	if s.cfg.Audit != nil {
		s.auditRefusal(info.auditEntry(ss.Context(), name), nil, err)
	}
	return s.rejectStream(ss, name, info.priority, err)
}

// receiptError names the field that a wrong position stands in.
func receiptError(err error) error {
	if errors.Is(err, ErrReceiptPosition) {
		return &engine.InvalidError{Field: "after", Code: engine.CodeMalformed, Description: ErrReceiptPosition.Error()}
	}
	return err
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

// watching has the connections on which receipts are watched, with the number of watches. Once the server drains, none is taken out: what
// was sent, and the end of the watch, may wait for a client that does not read.
type watching struct {
	mu    sync.Mutex
	conns map[*throttle.Conn]int // guarded by mu
}

func (w *watching) begin(c *throttle.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conns == nil {
		w.conns = make(map[*throttle.Conn]int)
	}
	w.conns[c]++
}

func (w *watching) end(c *throttle.Conn, drained <-chan struct{}) {
	select {
	case <-drained:
		return
	default:
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conns[c]--; w.conns[c] == 0 {
		delete(w.conns, c)
	}
}

// cutOff closes all connections, and those that are closed already.
func (w *watching) cutOff() {
	w.mu.Lock()
	conns := slices.Collect(maps.Keys(w.conns))
	w.mu.Unlock()
	for _, c := range conns {
		_ = c.Conn.Close() // it may be closed. Its reader notices, and closes the rest of it.
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
	m, err := s.next(info.wire, head[:])
	if err == nil && m.size <= smallBody {
		err = m.begin(info.wire)
	}
	switch {
	case err != nil:
		return nil, unread(err)
	case m.becomes > smallBody:
		m.begun.Free()
		return nil, &engine.InvalidError{Field: "request", Code: engine.CodeTooLarge, Description: fmt.Sprintf("more than %d bytes", smallBody)}
	}
	err = in.only(info.wire, m, head[:])
	if err == nil {
		err = s.convert(context.Background(), info.wire, &in, m, 0) // a small one waits for nothing
	}
	if err != nil {
		return nil, unread(err)
	}
	return in.wire, nil
}
