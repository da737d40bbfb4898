package controller

import (
	"crypto/x509"
	"net"
	"strings"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/refcontroller/redisstore"
)

const (
	storeMemory = "memory"
	storeRedis  = "redis"
	// maxRoots bounds redis_ca_file.
	maxRoots = 1 << 20
)

// StoreConfig says where the memberships are.
type StoreConfig struct {
	Kind        string
	RedisURL    string
	RedisPrefix string
	RedisCAFile string

	redis redisstore.Target // Found by validate.
}

func (c *StoreConfig) bind(s *config.Set) {
	s.Choice(&c.Kind, "controller_store", storeMemory, "Where memberships are. memory: in this process, which is then the only Controller. redis: in a Redis, 7.0 or later, which any number of Controllers share; see docs/controller.md.",
		storeMemory, storeRedis)
	s.Secret(&c.RedisURL, "redis_url", "Redis of the store, as redis://USER:PASSWORD@HOST:PORT/DB, or rediss:// with TLS. Sentinel: with ?master_name=NAME&addr=HOST:PORT for more Sentinels. Cluster: with ?addr=HOST:PORT for more of its nodes.")
	s.Text(&c.RedisCAFile, "redis_ca_file", "", "PEM file of the authorities that Redis's certificate is checked with; without one, those of the system.")
	s.ID(&c.RedisPrefix, "redis_prefix", "pm", "What all keys in Redis begin with: one for each deployment that shares a Redis.")
}

func (c *StoreConfig) validate(s *config.Set, risks *app.Risks) (err error) {
	if c.Kind != storeRedis {
		if c.RedisURL != "" {
			return s.Errorf("redis_url", "set, while controller_store is not redis")
		}
		return nil
	}
	if c.RedisURL == "" {
		return s.Errorf("redis_url", "missing, while controller_store is redis")
	}
	if c.redis, err = redisstore.Parse(c.RedisURL); err != nil {
		return s.Errorf("redis_url", "%v", err)
	}
	if strings.ContainsAny(c.RedisPrefix, "{}") {
		return s.Errorf("redis_prefix", "must not have braces")
	}
	if c.RedisCAFile != "" {
		if !c.redis.TLS() {
			return s.Errorf("redis_ca_file", "set, while redis_url does not begin with rediss://")
		}
		text, err := config.ReadFile(c.RedisCAFile, maxRoots)
		if err != nil {
			return s.Errorf("redis_ca_file", "%v", err)
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(text) {
			return s.Errorf("redis_ca_file", "%s has no certificate", c.RedisCAFile)
		}
		c.redis.Trust(roots)
	}
	if c.redis.TLS() {
		if c.redis.Unverified() {
			return risks.Add("redis_url", "the certificate of Redis is not checked (skip_verify)")
		}
		return nil
	}
	for _, addr := range c.redis.Addresses() {
		if host, _, err := net.SplitHostPort(addr); err != nil || !config.Loopback(host) {
			return risks.Add("redis_url", "Redis at %q is spoken to without TLS (rediss://)", addr)
		}
	}
	return nil
}
