package discovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/pause"
)

// errLeaseLost ends a stint whose lease etcd does not know any more.
var errLeaseLost = errors.New("lease lost")

// RegistrationConfig is what a Registration needs. The zero values of all but
// Client, ID and Addr stand for the defaults.
type RegistrationConfig struct {
	// Client reaches etcd. The caller closes it after the Registration.
	Client *clientv3.Client
	// Prefix of the key. Default ConnectNodePrefix.
	Prefix string
	// ID is the last segment of the key and Metadata.node_id.
	ID string
	// Addr is host:port as others reach it.
	Addr string
	// Metadata goes into the value beside node_id.
	Metadata map[string]string

	// TTL of the lease. Default 10 s, at least 2 s. In whole seconds.
	TTL time.Duration
	// CheckInterval is how often the key is looked at: one that was deleted, or
	// lost with etcd's data, is written again. Default 3 s.
	CheckInterval time.Duration
	// RequestTimeout bounds one request to etcd. Default 3 s.
	RequestTimeout time.Duration
	// MinBackoff and MaxBackoff bound the pause after a failure, counted from the beginning
	// of what failed. Default 50 ms, 1 s: an etcd that answers again has the key within two.
	MinBackoff, MaxBackoff time.Duration

	// Logger, nil to discard.
	Logger *slog.Logger
	// Metrics, nil for none. One Registration for each set and MetricsPrefix.
	Metrics *metrics.Set
	// MetricsPrefix begins the metrics' names. Default "push_manager".
	MetricsPrefix string
}

func (c RegistrationConfig) withDefaults() RegistrationConfig {
	c.Prefix = prefixOr(c.Prefix, ConnectNodePrefix)
	defaultTo(&c.TTL, 10*time.Second)
	defaultTo(&c.CheckInterval, 3*time.Second)
	defaultTo(&c.RequestTimeout, 3*time.Second)
	defaultTo(&c.MinBackoff, 50*time.Millisecond)
	defaultTo(&c.MaxBackoff, time.Second)
	defaultTo(&c.MetricsPrefix, defaultMetricsPrefix)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = metrics.NewSet()
	}
	return c
}

// Validate reports everything that is wrong with c.
func (c RegistrationConfig) Validate() error {
	var errs []error
	if c.Client == nil {
		errs = append(errs, errors.New("Client is nil"))
	}
	if err := ids.Check(c.ID, ids.MaxBytes); err != nil {
		errs = append(errs, fmt.Errorf("ID: %w", err))
	}
	if err := checkAddr(c.Addr, nil); err != nil {
		errs = append(errs, fmt.Errorf("Addr: %w", err))
	}
	if c.TTL != 0 && c.TTL < 2*time.Second {
		errs = append(errs, errors.New("TTL is under 2s"))
	}
	if c.CheckInterval < 0 {
		errs = append(errs, errors.New("CheckInterval is negative"))
	}
	if c.RequestTimeout < 0 {
		errs = append(errs, errors.New("RequestTimeout is negative"))
	}
	if c.MinBackoff < 0 || c.MaxBackoff < 0 || (c.MaxBackoff > 0 && c.MinBackoff > c.MaxBackoff) {
		errs = append(errs, errors.New("MinBackoff and MaxBackoff do not fit"))
	}
	value, err := encodeValue(c.ID, c.Addr, c.Metadata)
	if err != nil {
		errs = append(errs, err)
	} else if len(value) > maxValueBytes {
		errs = append(errs, fmt.Errorf("Metadata makes a value of %d bytes, the limit is %d", len(value), maxValueBytes))
	}
	return errors.Join(errs...)
}

// Registration keeps one key in etcd.
type Registration struct {
	// Static after NewRegistration.
	cfg        RegistrationConfig
	key, value string
	grants     *metrics.Counter
	lost       *metrics.Counter
	wg         sync.WaitGroup
	out        absence // owned by loop

	// Written by Start, under once.
	once sync.Once
	stop context.CancelFunc

	// Written by loop.
	registered atomic.Bool
	firstTime  sync.Once
	ready      chan struct{} // closed when registered for the first time
	lease      atomic.Int64  // the lease last granted, 0 for none
}

// NewRegistration makes a Registration that does nothing until Start.
func NewRegistration(cfg RegistrationConfig) (*Registration, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("registration: %w", err)
	}
	cfg = cfg.withDefaults()
	value, err := encodeValue(cfg.ID, cfg.Addr, cfg.Metadata)
	if err != nil {
		return nil, err
	}
	name := func(full string) string { return renamed(full, cfg.MetricsPrefix) }
	r := &Registration{
		cfg:    cfg,
		key:    keyOf(cfg.Prefix, cfg.ID),
		value:  value,
		grants: cfg.Metrics.GetOrCreateCounter(name("push_manager_registration_leases_total")),
		lost:   cfg.Metrics.GetOrCreateCounter(name("push_manager_registration_lost_total")),
		ready:  make(chan struct{}),
		out:    absence{log: cfg.Logger, message: "not registered in etcd, trying again"},
	}
	cfg.Metrics.GetOrCreateGauge(name("push_manager_registration_up"), func() float64 {
		if r.Registered() {
			return 1
		}
		return 0
	})
	return r, nil
}

// Register makes a Registration, starts it and waits until the key is there. It
// gives up when ctx ends, which leaves nothing behind.
func Register(ctx context.Context, cfg RegistrationConfig) (*Registration, error) {
	r, err := NewRegistration(cfg)
	if err != nil {
		return nil, err
	}
	r.Start()
	select {
	case <-r.Ready():
		return r, nil
	case <-ctx.Done():
		err := fmt.Errorf("register %q: %w", cfg.ID, context.Cause(ctx))
		closeCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.cfg.RequestTimeout)
		defer cancel()
		return nil, errors.Join(err, r.Close(closeCtx))
	}
}

// Start begins to register. etcd does not have to be there yet.
func (r *Registration) Start() {
	r.once.Do(func() {
		ctx, cancel := context.WithCancel(context.Background())
		r.stop = cancel
		r.wg.Go(func() { r.loop(ctx) })
	})
}

// Ready is closed when the key has been written for the first time.
func (r *Registration) Ready() <-chan struct{} { return r.ready }

// Registered tells whether the key is there, as far as we know.
func (r *Registration) Registered() bool { return r.registered.Load() }

// Why says in a line why the key is not there: that etcd cannot be reached, and for what reason,
// or that another process has it. It is "" while Registered.
func (r *Registration) Why() string { return r.out.Why() }

// Key is the key that is kept.
func (r *Registration) Key() string { return r.key }

// Close deletes the key, by revoking its lease, and ends the Registration. When
// etcd cannot be told within ctx, the key goes with the lease's TTL.
func (r *Registration) Close(ctx context.Context) error {
	r.once.Do(func() { r.stop = func() {} }) // never started
	r.stop()
	r.wg.Wait()
	lease := clientv3.LeaseID(r.lease.Swap(0))
	if lease == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, r.cfg.RequestTimeout)
	defer cancel()
	if _, err := r.cfg.Client.Revoke(ctx, lease); err != nil {
		return fmt.Errorf("deregister %q: %w", r.cfg.ID, err)
	}
	return nil
}

// loop registers, over and over: each stint ends when its lease is lost.
func (r *Registration) loop(ctx context.Context) {
	defer r.registered.Store(false)
	failures := 0
	for {
		began := time.Now()
		err := r.stint(ctx, !r.hasBeenRegistered())
		r.registered.Store(false)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) >= settledAfter {
			failures = 0
			r.out.forget()
		}
		r.out.goesOn(err, "key", r.key)
		if !pause.For(ctx, retryIn(began, failures, r.cfg.MinBackoff, r.cfg.MaxBackoff)) {
			return
		}
		failures++
	}
}

// hasBeenRegistered tells whether the key was ours at any time.
func (r *Registration) hasBeenRegistered() bool {
	select {
	case <-r.ready:
		return true
	default:
		return false
	}
}

// stint takes a lease, writes the key and keeps both until the lease is lost or
// ctx ends. Only a process that has never held the key claims it: one that comes
// back from an outage leaves it to whoever has taken over since.
func (r *Registration) stint(ctx context.Context, claim bool) error {
	ctx, cancel := context.WithCancel(ctx) // ends the keep-alive with the stint
	defer cancel()
	lease, err := r.grant(ctx)
	if err != nil {
		return err
	}
	alive, err := r.cfg.Client.KeepAlive(ctx, lease)
	if err != nil {
		return fmt.Errorf("keep lease alive: %w", err)
	}
	if err := r.check(ctx, lease, claim); err != nil {
		return err
	}
	check := time.NewTicker(r.cfg.CheckInterval)
	defer check.Stop()
	for {
		select {
		case _, ok := <-alive:
			if !ok {
				r.lost.Inc()
				return errLeaseLost
			}
		case <-check.C:
			// While etcd is away a check lasts until the next one is due, and select would
			// pick it as often as the end of the keep-alive.
			err := ended(alive)
			if err == nil {
				err = r.check(ctx, lease, false)
			}
			if errors.Is(err, errLeaseLost) {
				r.lost.Inc()
				return err
			}
			// Any other error: etcd is out of reach, and the keep-alive decides.
		}
	}
}

// ended is errLeaseLost when nothing keeps the lease alive any more.
func ended(alive <-chan *clientv3.LeaseKeepAliveResponse) error {
	for {
		select {
		case _, ok := <-alive:
			if !ok {
				return errLeaseLost
			}
		default:
			return nil
		}
	}
}

func (r *Registration) grant(ctx context.Context) (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.RequestTimeout)
	defer cancel()
	ctx, below := withRequestError(ctx)
	granted, err := r.cfg.Client.Grant(ctx, int64(r.cfg.TTL/time.Second))
	if err != nil {
		return 0, fmt.Errorf("grant lease: %w", below.explain(err))
	}
	r.grants.Inc()
	r.lease.Store(int64(granted.ID))
	return granted.ID, nil
}

// check makes sure that the key is ours and writes it where it is not. With
// claim the key is taken whoever has it: who registers last is the node. Without,
// one that another process has taken since is left to it.
func (r *Registration) check(ctx context.Context, lease clientv3.LeaseID, claim bool) error {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.RequestTimeout)
	defer cancel()
	ctx, below := withRequestError(ctx)
	put := clientv3.OpPut(r.key, r.value, clientv3.WithLease(lease))
	if claim {
		if _, err := r.cfg.Client.Do(ctx, put); err != nil {
			return fmt.Errorf("write %s: %w", r.key, leaseError(below.explain(err)))
		}
		r.setRegistered(true)
		return nil
	}
	got, err := r.cfg.Client.Get(ctx, r.key)
	if err != nil {
		return fmt.Errorf("read %s: %w", r.key, below.explain(err))
	}
	unchanged := clientv3.Compare(clientv3.ModRevision(r.key), "=", 0)
	if len(got.Kvs) == 1 {
		kv := got.Kvs[0]
		same := string(kv.Value) == r.value
		if same && kv.Lease == int64(lease) {
			r.setRegistered(true)
			return nil
		}
		if !same && kv.Lease != int64(lease) {
			r.setRegistered(false)
			return nil
		}
		unchanged = clientv3.Compare(clientv3.ModRevision(r.key), "=", kv.ModRevision)
	}
	txn, err := r.cfg.Client.Txn(ctx).If(unchanged).Then(put).Commit()
	if err != nil {
		return fmt.Errorf("write %s: %w", r.key, leaseError(below.explain(err)))
	}
	if txn.Succeeded {
		r.lost.Inc()
		r.cfg.Logger.Warn("the key was gone from etcd: written again", "key", r.key)
		r.setRegistered(true)
	}
	return nil
}

// setRegistered notes whether the key is ours and logs when that changes.
func (r *Registration) setRegistered(ours bool) {
	if ours {
		r.out.ends()
	} else {
		r.out.because("another process has registered under this id")
	}
	if r.registered.Swap(ours) == ours {
		return
	}
	if !ours {
		r.cfg.Logger.Error("another process has registered under our id", "key", r.key)
		return
	}
	r.firstTime.Do(func() { close(r.ready) })
	r.cfg.Logger.Info("registered in etcd", "key", r.key, "addr", r.cfg.Addr)
}

// leaseError names the one failure that a new lease cures.
func leaseError(err error) error {
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return fmt.Errorf("%w: %w", errLeaseLost, err)
	}
	return err
}
