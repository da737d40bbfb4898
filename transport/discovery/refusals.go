package discovery

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/pause"
)

// RefusedPrefix is where Push-Managers write whom Connect-Nodes are to refuse.
const RefusedPrefix = "/push-manager/refused/"

// Bounds of a Refusal.
const (
	MaxDeviceBytes = 64
	// MaxCloseReason is what fits into a close frame beside the code, less what escapes of JSON may take.
	MaxCloseReason = 120
)

// Refusal keeps a user, one device of a user, or a room from Connect-Nodes for a time. Ids have their tenant before them.
type Refusal struct {
	User   string `json:"user,omitempty"`
	Device string `json:"device,omitempty"` // of User
	Room   string `json:"room,omitempty"`
	// Code and Reason are those of the close frame.
	Code   uint16 `json:"code"`
	Reason string `json:"reason,omitempty"`
	// Seconds is for how long, from when it was written.
	Seconds int64 `json:"seconds"`
}

// Prefixes of keys. An id with its tenant comes behind them, so a tenant's refusals can be counted.
const (
	refusedUser   = RefusedPrefix + "user/"
	refusedDevice = RefusedPrefix + "device/"
	refusedRoom   = RefusedPrefix + "room/"
)

// Key is what of Refusals there is one. It is the key in etcd, and needs no other field than User, Device and Room.
func (r *Refusal) Key() string {
	switch {
	case r.Room != "":
		return refusedRoom + r.Room
	case r.Device != "": // the length at the end keeps apart what slashes in both could mix up
		return refusedDevice + r.User + "/" + r.Device + "/" + strconv.Itoa(len(r.Device))
	}
	return refusedUser + r.User
}

// Check says what no node can take.
func (r *Refusal) Check() error {
	switch {
	case (r.User == "") == (r.Room == ""):
		return errors.New("one of user and room must be set")
	case r.Device != "" && r.User == "":
		return errors.New("device: needs a user")
	case r.Code < 4000 || r.Code > 4999:
		return fmt.Errorf("code: %d is not from 4000 to 4999", r.Code)
	case len(r.Reason) > MaxCloseReason:
		return fmt.Errorf("reason: more than %d bytes", MaxCloseReason)
	}
	for _, f := range []struct {
		name, text string
		most       int
	}{{"user", r.User, ids.MaxScopedBytes}, {"room", r.Room, ids.MaxScopedBytes}, {"device", r.Device, MaxDeviceBytes}, {"reason", r.Reason, MaxCloseReason}} {
		if f.text == "" {
			continue
		}
		if err := ids.Check(f.text, f.most); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return nil
}

// Errors of Refusals.
var (
	// ErrManyRefusals says that there are as many as there may be, in all or of one tenant.
	ErrManyRefusals = errors.New("too many are refused already, in all or for one tenant")
	// ErrRefusalOpen wraps the error of a write that may have been done.
	ErrRefusalOpen = errors.New("it may have been written")
)

// Refusals writes who is refused.
type Refusals struct {
	Client *clientv3.Client // the caller closes it
	// Most is how many there may be. A tenant has a share of it (ids.TenantShare). Instances that write at the same moment may go
	// beyond it by one each.
	Most int
	// Timeout bounds one request.
	Timeout time.Duration
}

// Refuse writes r, with a lease of r.Seconds, in place of one with the same key. scope is what ids of its tenant begin with. It sets r.Seconds to what etcd has granted, which
// may be a second more. The revision is what nodes compare. An error that does not wrap ErrRefusalOpen means that nothing was written.
// What has begun outlives ctx, until Timeout: a lease that nobody knows would live as long as the refusal.
func (w *Refusals) Refuse(ctx context.Context, scope string, r *Refusal) (revision int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, w.Timeout)
	defer cancel()
	counts := []clientv3.Op{clientv3.OpGet(r.Key(), clientv3.WithCountOnly())}
	for _, prefix := range []string{RefusedPrefix, refusedUser + scope, refusedDevice + scope, refusedRoom + scope} {
		counts = append(counts, clientv3.OpGet(prefix, clientv3.WithPrefix(), clientv3.WithCountOnly()))
	}
	got, err := w.Client.Txn(ctx).Then(counts...).Commit()
	if err != nil {
		return 0, fmt.Errorf("refuse: %w", err)
	}
	count := func(i int) int { return int(got.Responses[i].GetResponseRange().GetCount()) }
	all, own := count(1), count(2)+count(3)+count(4)
	if count(0) == 0 && (all >= w.Most || scope != "" && own >= ids.TenantShare(w.Most, all)) {
		return 0, ErrManyRefusals
	}
	ctx, end := context.WithTimeout(context.WithoutCancel(ctx), w.Timeout)
	defer end()
	lease, err := w.Client.Grant(ctx, r.Seconds)
	if err != nil {
		return 0, fmt.Errorf("refuse: %w", err)
	}
	r.Seconds = lease.TTL
	value, err := json.Marshal(r)
	if err != nil {
		return 0, fmt.Errorf("refuse: %w", err)
	}
	put, err := w.Client.Put(ctx, r.Key(), string(value), clientv3.WithLease(lease.ID), clientv3.WithPrevKV())
	if err != nil {
		return 0, fmt.Errorf("refuse: %w: %w", ErrRefusalOpen, err)
	}
	if put.PrevKv != nil {
		w.revoke(ctx, put.PrevKv.Lease)
	}
	return put.Header.Revision, nil
}

// Lift ends a refusal, of which only User, Device and Room count. That there is none is no error.
func (w *Refusals) Lift(ctx context.Context, r *Refusal) (revision int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, w.Timeout)
	defer cancel()
	gone, err := w.Client.Delete(ctx, r.Key(), clientv3.WithPrevKV())
	if err != nil {
		return 0, fmt.Errorf("lift a refusal: %w: %w", ErrRefusalOpen, err)
	}
	for _, kv := range gone.PrevKvs {
		w.revoke(ctx, kv.Lease)
	}
	return gone.Header.Revision, nil
}

// revoke ends the lease of a key that is gone or has another one, also after the end of ctx. If it fails the lease ends by itself.
func (w *Refusals) revoke(ctx context.Context, lease int64) {
	if lease != 0 {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), w.Timeout)
		defer cancel()
		_, _ = w.Client.Revoke(ctx, clientv3.LeaseID(lease))
	}
}

// RefusalSink gets what etcd says, from one goroutine.
type RefusalSink interface {
	// List is all that there are, as of a revision. It comes first, again after each loss of the connection, and each minute.
	List(all map[string]KnownRefusal, revision int64)
	// Put is a new one, Delete the end of one. Revisions rise until the next List.
	Put(key string, r KnownRefusal)
	Delete(key string, revision int64)
	// Tick comes about each second while etcd answers.
	Tick()
}

// KnownRefusal is a Refusal as it stands in etcd.
type KnownRefusal struct {
	Refusal

	Revision int64 // at which it was written
}

const (
	// refusalsListEvery is how often the list is read while nothing seems wrong: a watch is silent when nothing changes, and
	// also when etcd was restored from a backup.
	refusalsListEvery = time.Minute
	refusalsTick      = time.Second
)

// RefusalWatch tells a sink who is refused, from WatchRefusals to Close.
type RefusalWatch struct {
	// Static.
	client  *clientv3.Client
	most    int
	timeout time.Duration
	sink    RefusalSink
	out     absence // owned by loop
	stop    context.CancelFunc
	wg      sync.WaitGroup
}

// WatchRefusals begins. etcd need not be there yet, and most bounds what is read. The caller closes the client after the watch.
func WatchRefusals(client *clientv3.Client, most int, sink RefusalSink, log *slog.Logger) *RefusalWatch {
	w := &RefusalWatch{
		client: client, most: most, timeout: 3 * time.Second, sink: sink,
		out: absence{log: log, message: "who is refused cannot be read in etcd, what is known counts, trying again"},
	}
	var ctx context.Context
	ctx, w.stop = context.WithCancel(context.Background())
	w.wg.Go(func() { w.loop(ctx) })
	return w
}

// Close ends it and waits for that.
func (w *RefusalWatch) Close() {
	w.stop()
	w.wg.Wait()
}

func (w *RefusalWatch) loop(ctx context.Context) {
	for failures := 0; ctx.Err() == nil; {
		began := time.Now()
		err := w.follow(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			failures = 0
			w.out.forget()
			continue
		}
		w.out.goesOn(err, "prefix", RefusedPrefix)
		if !pause.For(ctx, retryIn(began, failures, 50*time.Millisecond, time.Second)) {
			return
		}
		failures++
	}
}

// follow lists and watches. nil means that it is time for another list.
func (w *RefusalWatch) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	asking, answered := context.WithTimeout(ctx, w.timeout)
	defer answered()
	got, err := w.client.Get(asking, RefusedPrefix, clientv3.WithPrefix(), clientv3.WithLimit(int64(w.most)))
	if err != nil {
		return fmt.Errorf("list: %w", err)
	}
	all := make(map[string]KnownRefusal, len(got.Kvs))
	for _, kv := range got.Kvs {
		if r, ok := parseRefusal(string(kv.Key), kv.Value); ok {
			all[string(kv.Key)] = KnownRefusal{r, kv.ModRevision}
		}
	}
	w.out.ends()
	w.sink.List(all, got.Header.Revision)
	events := w.client.Watch(clientv3.WithRequireLeader(ctx), RefusedPrefix, clientv3.WithPrefix(), clientv3.WithRev(got.Header.Revision+1))
	again := time.NewTimer(pause.Jitter(refusalsListEvery))
	defer again.Stop()
	tick := time.NewTicker(refusalsTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-again.C:
			return nil
		case <-tick.C:
			w.sink.Tick()
		case answer, ok := <-events:
			if !ok {
				return errors.New("watch: it has ended")
			}
			if err := answer.Err(); err != nil {
				return fmt.Errorf("watch: %w", err)
			}
			for _, e := range answer.Events {
				key := string(e.Kv.Key)
				if e.Type == clientv3.EventTypeDelete {
					w.sink.Delete(key, e.Kv.ModRevision)
				} else if r, ok := parseRefusal(key, e.Kv.Value); ok {
					w.sink.Put(key, KnownRefusal{r, e.Kv.ModRevision})
				}
			}
		}
	}
}

// parseRefusal reads a value. What cannot be read, or stands at another key than its own, is none of ours.
func parseRefusal(key string, value []byte) (r Refusal, ok bool) {
	if len(value) > maxValueBytes || json.Unmarshal(value, &r) != nil || r.Check() != nil {
		return r, false
	}
	return r, r.Seconds > 0 && r.Key() == key
}
