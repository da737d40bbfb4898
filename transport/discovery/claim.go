package discovery

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/pause"
	"github.com/push-manager/push-manager/internal/plain"
)

// ClaimConfig is what a Claim needs. The zero values of TTL, CheckInterval and RequestTimeout stand for the defaults.
type ClaimConfig struct {
	// Client reaches etcd. The caller closes it after the Claim.
	Client *clientv3.Client
	// Key is what only one holder may have.
	Key string
	// Holder is compared: a process with the holder of an earlier one takes over at once. Name is for people.
	Holder, Name string

	// TTL of the lease: how long the key outlives a process that was killed. Default 10 s, in whole seconds.
	TTL time.Duration
	// CheckInterval is how often the key is looked at. Default 3 s.
	CheckInterval time.Duration
	// RequestTimeout bounds one request to etcd. Default 3 s.
	RequestTimeout time.Duration

	// Logger, nil to discard.
	Logger *slog.Logger
}

// TakenError says that somebody else has a key.
type TakenError struct{ Name string }

func (e *TakenError) Error() string { return fmt.Sprintf("%q has it", e.Name) }

// Claim keeps a key in etcd that only one holder has, from Hold to Close. While etcd is away for longer than the TTL the key
// is nobody's; whoever comes first when it is back has it.
type Claim struct {
	// Static after Hold.
	cfg   ClaimConfig
	value string
	stop  context.CancelFunc
	wg    sync.WaitGroup
	taken chan *TakenError
	out   absence // owned by loop

	lease atomic.Int64 // the lease last granted, 0 for none
}

// claimValue is what stands in the key.
type claimValue struct {
	Holder string `json:"holder"`
	Name   string `json:"name"`
}

// Hold takes the key. Its error is a *TakenError if somebody else has it. An etcd that does not answer is asked again and
// again: Taken tells then.
func Hold(ctx context.Context, cfg ClaimConfig) (*Claim, error) {
	if cfg.Client == nil || cfg.Key == "" || cfg.Holder == "" {
		return nil, errors.New("claim: Client, Key or Holder is missing")
	}
	defaultTo(&cfg.TTL, 10*time.Second)
	defaultTo(&cfg.CheckInterval, 3*time.Second)
	defaultTo(&cfg.RequestTimeout, 3*time.Second)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	value, err := json.Marshal(claimValue{cfg.Holder, cfg.Name})
	if err != nil {
		return nil, fmt.Errorf("claim: %w", err)
	}
	c := &Claim{
		cfg: cfg, value: string(value), taken: make(chan *TakenError, 1),
		out: absence{log: cfg.Logger, message: "the key is not ours in etcd, trying again"},
	}
	lease, err := c.grant(ctx)
	if err == nil {
		err = c.take(ctx, lease)
	}
	if taken, ok := errors.AsType[*TakenError](err); ok {
		return nil, errors.Join(taken, c.Close(ctx))
	}
	running, cancel := context.WithCancel(context.Background())
	c.stop = cancel
	c.wg.Go(func() { c.loop(running, lease, err) })
	return c, nil
}

// Taken gets an error when somebody else has the key. The Claim has ended then.
func (c *Claim) Taken() <-chan *TakenError { return c.taken }

// Close gives the key back, by revoking its lease. When etcd cannot be told within ctx, it goes with the lease's TTL.
func (c *Claim) Close(ctx context.Context) error {
	if c.stop != nil {
		c.stop()
		c.wg.Wait()
	}
	lease := clientv3.LeaseID(c.lease.Swap(0))
	if lease == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RequestTimeout)
	defer cancel()
	if _, err := c.cfg.Client.Revoke(ctx, lease); err != nil {
		return fmt.Errorf("give back %s: %w", c.cfg.Key, err)
	}
	return nil
}

// loop keeps the key. err is what has kept Hold from taking it.
func (c *Claim) loop(ctx context.Context, lease clientv3.LeaseID, err error) {
	for failures := 0; ; failures++ {
		began := time.Now()
		if err == nil {
			c.out.ends()
			err = c.keep(ctx, lease)
		}
		if ctx.Err() != nil {
			return
		}
		if taken, ok := errors.AsType[*TakenError](err); ok {
			c.taken <- taken
			return
		}
		if time.Since(began) >= settledAfter {
			failures = 0
			c.out.forget()
		}
		c.out.goesOn(err, "key", c.cfg.Key)
		if !pause.For(ctx, retryIn(began, failures, 50*time.Millisecond, time.Second)) {
			return
		}
		if lease, err = c.grant(ctx); err == nil {
			err = c.take(ctx, lease)
		}
	}
}

// keep keeps a lease alive and looks at the key, until either fails.
func (c *Claim) keep(ctx context.Context, lease clientv3.LeaseID) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	alive, err := c.cfg.Client.KeepAlive(ctx, lease)
	if err != nil {
		return fmt.Errorf("keep lease alive: %w", err)
	}
	check := time.NewTicker(c.cfg.CheckInterval)
	defer check.Stop()
	for {
		select {
		case _, ok := <-alive:
			if !ok {
				return errLeaseLost
			}
		case <-check.C:
			if err := ended(alive); err != nil {
				return err
			}
			err := c.take(ctx, lease)
			if _, taken := errors.AsType[*TakenError](err); taken || errors.Is(err, errLeaseLost) {
				return err
			}
			// Any other error: etcd is out of reach, and the keep-alive decides.
		}
	}
}

func (c *Claim) grant(ctx context.Context) (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RequestTimeout)
	defer cancel()
	ctx, below := withRequestError(ctx)
	granted, err := c.cfg.Client.Grant(ctx, int64(c.cfg.TTL/time.Second))
	if err != nil {
		return 0, fmt.Errorf("grant lease: %w", below.explain(err))
	}
	c.lease.Store(int64(granted.ID))
	return granted.ID, nil
}

// take makes the key ours with this lease where it is nobody's, or that of our holder. Two who come at the same moment are
// told apart by etcd.
func (c *Claim) take(ctx context.Context, lease clientv3.LeaseID) error {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RequestTimeout)
	defer cancel()
	ctx, below := withRequestError(ctx)
	put := clientv3.OpPut(c.cfg.Key, c.value, clientv3.WithLease(lease))
	revision := int64(0)
	for range 3 { // somebody may come in between, and go
		txn, err := c.cfg.Client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(c.cfg.Key), "=", revision)).Then(put).Else(clientv3.OpGet(c.cfg.Key)).Commit()
		if err != nil {
			return fmt.Errorf("take %s: %w", c.cfg.Key, leaseError(below.explain(err)))
		}
		if txn.Succeeded {
			return nil
		}
		found := txn.Responses[0].GetResponseRange().GetKvs()
		if len(found) == 0 {
			revision = 0
			continue
		}
		var has claimValue
		if len(found[0].Value) <= maxValueBytes {
			_ = json.Unmarshal(found[0].Value, &has) // what is no claim is somebody else's
		}
		switch {
		case has.Holder != c.cfg.Holder:
			return &TakenError{Name: plain.Line(has.Name, textMax)}
		case found[0].Lease == int64(lease):
			return nil
		}
		revision = found[0].ModRevision
	}
	return fmt.Errorf("take %s: others change it all the time", c.cfg.Key)
}
