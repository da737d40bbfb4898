package webhook

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/pause"
)

const (
	// turnTTL is how long the turn outlives an instance that was killed, in whole seconds.
	turnTTL = 10 * time.Second
	// turnLook is how often it is looked whether the turn is free.
	turnLook = time.Second
)

// EtcdTurns has the turn and the position in etcd, below Prefix.
type EtcdTurns struct {
	Client *clientv3.Client // the caller closes it
	Prefix string           // such as /push-manager/webhook/receipts
	Name   string           // of this instance, for people
	TTL    time.Duration    // 0: 10 s
	// RequestTimeout bounds one request. 0: 3 s.
	RequestTimeout time.Duration
}

func (e *EtcdTurns) request(ctx context.Context) (context.Context, context.CancelFunc) {
	timeout := e.RequestTimeout
	defaultTo(&timeout, 3*time.Second)
	return context.WithTimeout(ctx, timeout)
}

// Next implements Turns. Whoever waits asks each second.
func (e *EtcdTurns) Next(ctx context.Context) (Turn, error) {
	for {
		free, err := e.free(ctx)
		if err != nil {
			return nil, err
		}
		if free {
			turn, err := e.take(ctx)
			if turn != nil || err != nil {
				return turn, err
			}
		}
		if !pause.For(ctx, pause.Jitter(turnLook)) {
			return nil, context.Cause(ctx)
		}
	}
}

func (e *EtcdTurns) turnKey() string     { return e.Prefix + "/turn" }
func (e *EtcdTurns) positionKey() string { return e.Prefix + "/position" }

func (e *EtcdTurns) free(ctx context.Context) (bool, error) {
	ctx, cancel := e.request(ctx)
	defer cancel()
	got, err := e.Client.Get(ctx, e.turnKey(), clientv3.WithCountOnly())
	if err != nil {
		return false, fmt.Errorf("etcd: %w", err)
	}
	return got.Count == 0, nil
}

// take tries to have the turn. It is nil if somebody else was faster.
func (e *EtcdTurns) take(ctx context.Context) (Turn, error) {
	ttl := e.TTL
	defaultTo(&ttl, turnTTL)
	asking, cancel := e.request(ctx)
	defer cancel()
	lease, err := e.Client.Grant(asking, int64(ttl/time.Second))
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	// The turn outlives ctx: what is under way is finished.
	living, end := context.WithCancel(context.WithoutCancel(ctx))
	t := &etcdTurn{turns: e, lease: lease.ID, end: end, over: make(chan struct{})}
	alive, err := e.Client.KeepAlive(living, lease.ID)
	if err != nil {
		close(t.over)
		t.End(asking)
		return nil, fmt.Errorf("etcd: %w", err)
	}
	t.wg.Go(func() {
		defer close(t.over)
		for range alive { // it is closed when the lease has ended, or may have
		}
	})
	key := e.turnKey()
	txn, err := e.Client.Txn(asking).If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
		Then(clientv3.OpPut(key, e.Name, clientv3.WithLease(lease.ID))).Commit()
	if err != nil || !txn.Succeeded {
		ending, cancel := e.request(context.WithoutCancel(ctx))
		defer cancel()
		t.End(ending)
		if err != nil {
			err = fmt.Errorf("etcd: %w", err)
		}
		return nil, err
	}
	t.revision = txn.Header.Revision
	return t, nil
}

// etcdTurn is a Turn as long as its lease lives.
type etcdTurn struct {
	turns    *EtcdTurns
	lease    clientv3.LeaseID
	revision int64 // of the key that is ours
	end      context.CancelFunc
	over     chan struct{}
	wg       sync.WaitGroup
}

// Over implements Turn.
func (t *etcdTurn) Over() <-chan struct{} { return t.over }

// Position implements Turn.
func (t *etcdTurn) Position(ctx context.Context) (p Position, known bool, err error) {
	ctx, cancel := t.turns.request(ctx)
	defer cancel()
	key := t.turns.positionKey()
	got, err := t.turns.Client.Get(ctx, key)
	if err != nil {
		return p, false, fmt.Errorf("etcd: %w", err)
	}
	if len(got.Kvs) == 0 {
		return p, false, nil
	}
	p, ok := parsePosition(string(got.Kvs[0].Value))
	if !ok {
		return p, false, fmt.Errorf("etcd: %s does not hold a position", key)
	}
	return p, true, nil
}

// String is how a position stands in etcd.
func (p Position) String() string {
	return strconv.FormatUint(p.Epoch, 36) + "." + strconv.FormatUint(p.Seq, 36)
}

// parsePosition reads what String has written.
func parsePosition(text string) (p Position, ok bool) {
	epoch, seq, _ := strings.Cut(text, ".")
	var err1, err2 error
	p.Epoch, err1 = strconv.ParseUint(epoch, 36, 64)
	p.Seq, err2 = strconv.ParseUint(seq, 36, 64)
	return p, err1 == nil && err2 == nil
}

var errTurnOver = errors.New("the turn is somebody else's")

// Keep implements Turn.
func (t *etcdTurn) Keep(ctx context.Context, p Position) error {
	ctx, cancel := t.turns.request(ctx)
	defer cancel()
	ours := clientv3.Compare(clientv3.CreateRevision(t.turns.turnKey()), "=", t.revision)
	txn, err := t.turns.Client.Txn(ctx).If(ours).Then(clientv3.OpPut(t.turns.positionKey(), p.String())).Commit()
	switch {
	case err != nil:
		return fmt.Errorf("etcd: %w", err)
	case !txn.Succeeded:
		return errTurnOver
	}
	return nil
}

// End implements Turn.
func (t *etcdTurn) End(ctx context.Context) {
	t.end()
	t.wg.Wait()
	_, _ = t.turns.Client.Revoke(ctx, t.lease) // or it ends by itself
}
