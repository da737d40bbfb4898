package pushmanager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/shard"
	"github.com/push-manager/push-manager/transport/discovery"
	"github.com/push-manager/push-manager/transport/ingress"
	"github.com/push-manager/push-manager/transport/link"
)

// refusalsMost is how many may be refused by default: some 500 bytes each in etcd, and in the memory of each node.
const refusalsMost = 10_000

func (c *Config) bindRefusals(s *config.Set) {
	s.DurationUpTo(&c.Ingress.RefuseMax, "refuse_max", ingress.Defaults().RefuseMax, time.Second, 30*24*time.Hour, "Longest time for which Disconnect may keep somebody away (refuse_for).")
	s.Int(&c.Refusals, "refusals", refusalsMost, 1, 100_000, "How many users, devices and rooms may be kept away at a time, by all instances. A tenant has a quarter of it, and less when most are taken.")
}

// disconnector closes connections over the links, and writes who is refused to etcd first: a node that is not reached now, or starts
// later, reads it there.
type disconnector struct {
	refusals discovery.Refusals
	links    *link.Set
	shards   *shard.Set
}

func (m *PushManager) disconnector(cfg *Config) *disconnector {
	return &disconnector{
		refusals: discovery.Refusals{Client: cfg.Discovery.Client, Most: cfg.Refusals, Timeout: cfg.Etcd.RequestTimeout},
		links:    m.links, shards: m.shards,
	}
}

// Disconnect implements ingress.Disconnector.
func (d *disconnector) Disconnect(ctx context.Context, r *ingress.Disconnect) ([]ingress.NodeDisconnected, error) {
	ask := link.Disconnect{User: r.User, Device: r.Device, Room: r.Room, Code: r.Code, Reason: r.Reason, AllowAgain: r.AllowAgain}
	refusal := discovery.Refusal{User: r.User, Device: r.Device, Room: r.Room, Code: r.Code, Reason: r.Reason, Seconds: int64(r.RefuseFor / time.Second)}
	var err error
	switch {
	case r.AllowAgain:
		ask.Revision, err = d.refusals.Lift(ctx, &refusal)
	case r.RefuseFor > 0:
		ask.Revision, err = d.refusals.Refuse(ctx, r.Scope, &refusal)
		ask.Refuse = time.Duration(refusal.Seconds) * time.Second
	}
	switch {
	case errors.Is(err, discovery.ErrManyRefusals):
		return nil, ingress.ErrManyRefusals
	case errors.Is(err, discovery.ErrRefusalOpen):
		return nil, fmt.Errorf("%w: %w", ingress.ErrRefusalOpen, err)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ingress.ErrRefusalsAway, err)
	}
	answers := d.links.Disconnect(ctx, d.shards.For(cmp.Or(r.User, r.Room)).Index(), &ask)
	nodes := make([]ingress.NodeDisconnected, len(answers))
	for i, a := range answers {
		nodes[i] = ingress.NodeDisconnected(a)
	}
	return nodes, nil
}
