package link

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/pause"
)

// stableAfter is how long a stream must have lived for its break to be answered
// with an attempt at once: a node in a crash loop stays on the backoff curve.
const stableAfter = 500 * time.Millisecond

var (
	errNobody      = errors.New("nobody answers")
	errDialTimeout = fmt.Errorf("%w within the dial timeout", errNobody)
	errHandshake   = errors.New("the handshake has failed")
)

// run keeps the link connected until it is closed.
func (l *Link) run() {
	defer close(l.done)
	defer l.finish()
	var (
		wait  = l.set.cfg.BackoffMin
		first = true // the queue takes deliveries while this attempt runs
		fresh = true // the last attempt has not failed
	)
	for {
		l.mu.Lock()
		if l.endsLocked() {
			l.mu.Unlock()
			return
		}
		if first {
			l.setLocked(connecting)
		}
		l.healthy = false
		l.mu.Unlock()
		t, err := l.await(!fresh)
		switch {
		case t == nil && err == nil:
			return
		case err != nil:
			l.fail(err)
			first, fresh = false, false
			continue
		}
		started := time.Now()
		reached, err := l.session(t)
		l.mu.Lock()
		over, healthy := l.endsLocked(), l.healthy
		l.mu.Unlock()
		if over {
			return
		}
		fresh = reached
		if reached && !errors.Is(err, errDrained) && !errors.Is(err, errUpgraded) {
			l.node.breaks.Inc()
		}
		// An attempt at once would not mend these.
		atFault := errors.Is(err, errDrained) || errors.Is(err, errSilent) || errors.Is(err, errOwing)
		switch {
		case errors.Is(err, errViolation):
			l.fail(err)
			l.quarantine()
			first, wait = false, l.set.cfg.BackoffMin
		case reached && time.Since(started) >= stableAfter && !atFault:
			first, wait = true, l.set.cfg.BackoffMin
			l.set.meters.reconnects.Inc()
		case !reached:
			l.fail(err)
			first = false // its address has the pause
		default:
			// An outage of a node that has done its part for a while is over as soon as it can
			// be; one that takes streams and owes what they bring stays on the backoff curve.
			if healthy {
				wait = l.set.cfg.BackoffMin
			}
			l.fail(err)
			if l.sleep(jitter(wait)) {
				wait = l.set.cfg.BackoffMin // announced anew
			} else {
				wait = min(2*wait, l.set.cfg.BackoffMax)
			}
			first = false
		}
	}
}

// await waits for the link's turn to dial. An error is what another link has found at the
// same address. Without either the link is over.
func (l *Link) await(failing bool) (*turn, error) {
	d := l.set.dials
	t := d.join(l, failing)
	timer := time.NewTimer(l.set.cfg.DialTimeout)
	defer timer.Stop()
	for {
		select {
		case err := <-t.verdict:
			if err != nil {
				return nil, err
			}
			return t, nil
		case <-l.retry:
			if l.needless() {
				d.leave(t)
				return nil, nil //nolint:nilnil // See above.
			}
			d.hurry(t)
		case <-timer.C:
			if !failing {
				l.fail(errNoTurn) // callers do not wait for longer than for a dial
			}
			if l.needless() {
				d.leave(t)
				return nil, nil //nolint:nilnil // See above.
			}
		}
	}
}

// needless tells that a link without a stream need not dial any more: it is closed, or
// leaves and has nothing to send.
func (l *Link) needless() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closing != engine.Sent || l.leaving && l.queue.len == 0
}

// fail makes the link refuse deliveries and drops what is queued.
func (l *Link) fail(err error) {
	l.mu.Lock()
	l.setLocked(down)
	list := l.popLocked()
	l.mu.Unlock()
	drop(list, engine.DropUnreachable)
	l.node.unreachable(err)
}

// finish settles what is left when run ends.
func (l *Link) finish() {
	l.mu.Lock()
	if l.closing == engine.Sent {
		l.closing = engine.DropDraining
	}
	why := l.closing
	l.setLocked(closed)
	list := l.popLocked()
	l.mu.Unlock()
	drop(list, why)
}

// sleep waits for the backoff. True means that it was cut short.
func (l *Link) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return false
	case <-l.retry:
		return true
	}
}

// quarantine keeps the link down for as long as a violation costs.
func (l *Link) quarantine() {
	l.set.meters.quarantines.Inc()
	if left, ok := l.node.say(); ok {
		l.set.log.Warn("link quarantined", "node", l.node.id, "addr", l.node.addr, "shard", l.shard,
			"for", l.set.cfg.Quarantine, "unreported", left)
	}
	until := time.Now().Add(l.set.cfg.Quarantine)
	for !l.over() && time.Until(until) > 0 {
		l.sleep(time.Until(until))
	}
}

// jitter spreads the attempts of many links: five to ten eighths of d.
func jitter(d time.Duration) time.Duration { return pause.Jitter(d * 5 / 4) }

// session is one connection from dial to end. It tells whether the node was
// reached and why the connection has ended. It ends the turn that it has been given.
func (l *Link) session(t *turn) (reached bool, err error) {
	// The stream outlives every caller: its life ends with close or leave.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	l.mu.Lock()
	l.cancel, l.cause = cancel, nil
	isClosed := l.closing != engine.Sent
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		l.cancel, l.plain, l.conn = func() {}, false, nil
		l.mu.Unlock()
	}()
	if isClosed {
		l.set.dials.leave(t)
		return false, context.Canceled
	}
	l.set.meters.dials.Inc()
	raw := &rawConn{dial: l.set.cfg.Dialer}
	defer raw.close()
	began := time.Now()
	conn, s, err := l.connect(ctx, cancel, raw, l.set.cfg.Credentials)
	if l.set.cfg.Migrate && errors.As(err, new(tls.RecordHeaderError)) {
		if conn != nil {
			_ = conn.Close() // it has failed
		}
		conn, s, err = l.connect(ctx, cancel, raw, nil)
		if err == nil || errors.Is(err, errUnimplemented) {
			l.mu.Lock()
			l.plain = true
			l.mu.Unlock()
			l.node.inPlain.Do(func() {
				l.set.log.Warn("node does not know TLS, spoken to in plain text", "node", l.node.id, "addr", l.node.addr)
			})
		}
	}
	l.set.dials.done(t, time.Since(began), err)
	if conn != nil {
		defer conn.Close() //nolint:errcheck // it is gone either way
	}
	if err == nil || errors.Is(err, errUnimplemented) {
		l.mu.Lock()
		l.conn = conn
		l.mu.Unlock()
	}
	switch {
	case errors.Is(err, errUnimplemented):
		return true, l.serveCalls(ctx, conn)
	case err != nil:
		l.set.meters.dialFailures.Inc()
		if wrong, ok := errors.AsType[*wrongNodeError](err); ok {
			l.set.wrongNode(l.node.id, wrong.said)
		}
		return false, err
	}
	err = s.serve(cancel)
	if !errors.Is(err, errDrained) && !errors.Is(err, io.EOF) {
		raw.abort()
	}
	return true, err
}

// connect dials the node and opens a stream, over TLS if there are credentials.
func (l *Link) connect(ctx context.Context, cancel context.CancelFunc, raw *rawConn, of func(string) credentials.TransportCredentials) (*grpc.ClientConn, *stream, error) {
	timer := time.AfterFunc(l.set.cfg.DialTimeout, cancel)
	defer timer.Stop()
	if err := raw.connect(ctx, l.node.addr); err != nil {
		if !timer.Stop() {
			return nil, nil, errDialTimeout
		}
		return nil, nil, fmt.Errorf("%w: dial: %w", errNobody, err)
	}
	opts := append([]grpc.DialOption{grpc.WithContextDialer(raw.take)}, l.set.dial...)
	var secured *handshake
	if of != nil {
		secured = &handshake{TransportCredentials: of(l.node.id)}
		opts = append(opts, grpc.WithTransportCredentials(secured))
	}
	conn, err := grpc.NewClient("passthrough:///"+l.node.addr, opts...)
	if err != nil {
		return nil, nil, fmt.Errorf("dial: %w", err)
	}
	s, err := l.open(ctx, timer, conn)
	if err != nil && secured != nil && !errors.Is(err, errDialTimeout) {
		err = cmp.Or(secured.failure(), err)
	}
	return conn, s, err
}
