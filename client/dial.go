package client

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/health" // what health checks of a service config are done by
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/push-manager/push-manager/internal/certs"
)

// Every instance gets its turn. retryPolicy of gRPC looks at the code alone and would repeat what is unknown: nothing brings one in.
const (
	roundRobin        = `{"loadBalancingConfig":[{"round_robin":{}}]}`
	roundRobinHealthy = `{"loadBalancingConfig":[{"round_robin":{}}],"healthCheckConfig":{"serviceName":"pubsub.PushManagerService"}}`
)

// maxReply bounds a message from Push-Manager. The longest has a failure for each node and reason.
const maxReply = 4 << 20

// DialOptions are what New dials with, for programs that make connections of their own. They are good for any target that needs no
// list; release ends what keeps files up to date.
func DialOptions(target string, options ...Option) (dial []grpc.DialOption, release func(), err error) {
	cfg, err := newConfig(options)
	if err != nil {
		return nil, nil, err
	}
	_, dial, release, err = cfg.dial(target)
	return dial, release, err
}

// ErrPlain is why New refuses to show a token to an address that is not on this machine.
var ErrPlain = errors.New("the token would go there in plain text")

// dial is the target and the options of a connection to it, and what is to be called after its end.
func (c *config) dial(target string) (_ string, _ []grpc.DialOption, release func(), err error) {
	service := roundRobinHealthy
	if c.unhealthy {
		service = roundRobin
	}
	options := []grpc.DialOption{
		grpc.WithDefaultServiceConfig(service),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(!c.failFast), grpc.MaxCallRecvMsgSize(maxReply)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           grpcbackoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxBackoff},
			MinConnectTimeout: 5 * time.Second,
		}),
		// Push-Manager takes a ping every 5 s. A connection that is dead is noticed within 15 s.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}),
		grpc.WithResolvers(c.resolvers...),
	}
	if c.token != nil {
		if c.tls == nil && c.credentials == nil {
			for address := range strings.SplitSeq(target, ",") {
				if !loopback(strings.TrimSpace(address)) {
					return "", nil, nil, fmt.Errorf("token: %q: %w", address, ErrPlain)
				}
			}
		}
		options = append(options, grpc.WithPerRPCCredentials(bearer{c.token}))
	}
	release = func() {}
	var transport credentials.TransportCredentials
	switch {
	case c.credentials != nil:
		transport = c.credentials
	case c.tls != nil:
		source, err := certs.Open(certs.Config{Files: certs.Files{Cert: c.tls.CertFile, Key: c.tls.KeyFile, CA: c.tls.CAFile}, Role: "client"})
		if err != nil {
			return "", nil, nil, fmt.Errorf("TLS: %w", err)
		}
		release = source.Close
		transport = source.Client(certs.Side{MinVersion: tls.VersionTLS12, ServerName: c.tls.ServerName}) // a proxy may have no more
	default:
		transport = insecure.NewCredentials()
	}
	options = append(options, grpc.WithTransportCredentials(transport))
	if strings.Contains(target, ",") {
		var list resolver.State
		for address := range strings.SplitSeq(target, ",") {
			if address = strings.TrimSpace(address); address != "" {
				// Without a name of its own each would be asked for a certificate with the name of the list.
				list.Endpoints = append(list.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: address, ServerName: address}}})
			}
		}
		builder := manual.NewBuilderWithScheme("list")
		builder.InitialState(list)
		options = append(options, grpc.WithResolvers(builder))
		target = "list:///push-managers"
	}
	return target, append(options, c.dialOptions...), release, nil
}

// loopback tells whether what is sent to a target stays on this machine.
func loopback(target string) bool {
	if strings.HasPrefix(target, "unix:") {
		return true
	}
	for _, scheme := range []string{"dns:///", "passthrough:///"} {
		target = strings.TrimPrefix(target, scheme)
	}
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}
