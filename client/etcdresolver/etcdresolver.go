// Package etcdresolver finds Push-Managers in etcd, for package client and any other gRPC client.
//
//	etcd, err := clientv3.New(clientv3.Config{Endpoints: []string{"localhost:2379"}})
//	...
//	c, err := client.New("etcd:///", client.WithResolver(etcdresolver.New(etcd)))
//
// It goes on where the resolver of etcd's own client ends for good: after a compaction, a restart or a loss of etcd, and if etcd is away at
// the start. While etcd is away, the instances that are known stay.
package etcdresolver

import (
	"log/slog"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/resolver"

	"github.com/push-manager/push-manager/transport/discovery"
)

// Option is one of a Builder.
type Option func(*builder)

// WithLogger has values that cannot be read, and absences of etcd, logged. Default: not.
func WithLogger(log *slog.Logger) Option { return func(b *builder) { b.log = log } }

// New makes a resolver for targets with the scheme etcd: etcd:/// are all Push-Managers, etcd:///some/prefix are what is registered below another
// prefix. The caller owns the etcd client, and closes it after all connections.
func New(etcd *clientv3.Client, options ...Option) resolver.Builder {
	b := &builder{etcd: etcd}
	for _, option := range options {
		option(b)
	}
	return b
}

type builder struct {
	etcd *clientv3.Client
	log  *slog.Logger
}

// Scheme implements resolver.Builder.
func (*builder) Scheme() string { return "etcd" }

// Build implements resolver.Builder. It does not wait for etcd.
func (b *builder) Build(target resolver.Target, cc resolver.ClientConn, _ resolver.BuildOptions) (resolver.Resolver, error) {
	prefix := strings.Trim(target.Endpoint(), "/")
	if prefix == "" {
		prefix = strings.Trim(discovery.PushManagerPrefix, "/")
	}
	w, err := discovery.New(discovery.Config{
		Client: b.etcd, Prefix: "/" + prefix + "/", Logger: b.log,
		OnChange: func(nodes []discovery.Node) {
			var state resolver.State
			for _, n := range nodes {
				// Without a name of its own each would be asked for a certificate with the name of the target.
				state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: n.Addr, ServerName: n.Addr}}})
			}
			_ = cc.UpdateState(state) // the balancer has nothing against a set; for an empty one there is no better
		},
	})
	if err != nil {
		return nil, err
	}
	w.Start()
	return watching{w}, nil
}

// watching is one target.
type watching struct{ w *discovery.Watcher }

// ResolveNow implements resolver.Resolver. Changes come by themselves.
func (watching) ResolveNow(resolver.ResolveNowOptions) {}

// Close implements resolver.Resolver.
func (r watching) Close() { r.w.Close() }
