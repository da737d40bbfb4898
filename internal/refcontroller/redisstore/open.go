package redisstore

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

const (
	dialTimeout = 2 * time.Second
	callTimeout = 2 * time.Second
	poolSize    = 32
)

// Target is where Redis is.
type Target struct {
	// Standalone, failover or cluster: one of them is there.
	single   *redis.Options
	failover *redis.FailoverOptions
	cluster  *redis.ClusterOptions
}

// Parse reads one of the forms that go-redis has:
//
//	redis://user:password@host:6379/0
//	redis://user:password@sentinel1:26379/0?master_name=primary&addr=sentinel2:26379
//	redis://user:password@host1:6379?addr=host2:6379&addr=host3:6379    a Cluster
//
// rediss:// is with TLS. The error has no secret in it.
func Parse(text string) (Target, error) {
	u, err := url.Parse(text)
	if err != nil {
		return Target{}, errors.New("is not a URL") // What url.Parse says repeats all of it.
	}
	if u.Scheme != "redis" && u.Scheme != "rediss" {
		return Target{}, errors.New("does not begin with redis:// or rediss://")
	}
	if u.Hostname() == "" {
		return Target{}, errors.New("has no host")
	}
	query := u.Query()
	var t Target
	switch {
	case query.Has("master_name"):
		t.failover, err = redis.ParseFailoverURL(text)
	case query.Has("addr"):
		t.cluster, err = redis.ParseClusterURL(text)
	default:
		t.single, err = redis.ParseURL(text)
	}
	if err != nil {
		return Target{}, fmt.Errorf("is not understood: %w", err)
	}
	return t, nil
}

// Addresses are the hosts that Redis, or who knows where it is, is looked for at.
func (t Target) Addresses() []string {
	switch {
	case t.failover != nil:
		return t.failover.SentinelAddrs
	case t.cluster != nil:
		return t.cluster.Addrs
	case t.single != nil:
		return []string{t.single.Addr}
	}
	return nil
}

// silent takes what go-redis would print by itself: its errors are returned, too.
type silent struct{}

func (silent) Printf(context.Context, string, ...any) {}

var silence = sync.OnceFunc(func() { redis.SetLogger(silent{}) }) //nolint:gochecknoglobals // So is its logger.

// client is one with our times. Calls end with their context, and no reader is sent to a replica.
func (t Target) client() redis.UniversalClient {
	silence()
	off := &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	switch {
	case t.failover != nil:
		o := *t.failover
		o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.PoolSize = dialTimeout, callTimeout, callTimeout, poolSize
		o.ContextTimeoutEnabled, o.DisableIdentity, o.MaxRetries = true, true, 1
		o.ReplicaOnly, o.UseDisconnectedReplicas, o.RouteByLatency, o.RouteRandomly = false, false, false, false
		return redis.NewFailoverClient(&o)
	case t.cluster != nil:
		o := *t.cluster
		o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.PoolSize = dialTimeout, callTimeout, callTimeout, poolSize
		o.ContextTimeoutEnabled, o.DisableIdentity, o.MaxRetries = true, true, 1
		o.ReadOnly, o.RouteByLatency, o.RouteRandomly = false, false, false
		o.MaintNotificationsConfig = off
		return redis.NewClusterClient(&o)
	default:
		o := *t.single
		o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.PoolSize = dialTimeout, callTimeout, callTimeout, poolSize
		o.ContextTimeoutEnabled, o.DisableIdentity, o.MaxRetries = true, true, 1
		o.MaintNotificationsConfig = off
		return redis.NewClient(&o)
	}
}

func (t Target) tls() *tls.Config {
	switch {
	case t.failover != nil:
		return t.failover.TLSConfig
	case t.cluster != nil:
		return t.cluster.TLSConfig
	case t.single != nil:
		return t.single.TLSConfig
	}
	return nil
}

// TLS tells whether it is spoken to with TLS.
func (t Target) TLS() bool { return t.tls() != nil }

// Unverified tells whether its certificate is not checked.
func (t Target) Unverified() bool { return t.TLS() && t.tls().InsecureSkipVerify }

// Trust has its certificate checked with these authorities. It is for one with TLS.
func (t Target) Trust(roots *x509.CertPool) { t.tls().RootCAs = roots }
