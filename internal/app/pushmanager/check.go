package pushmanager

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/transport/controller"
	"github.com/push-manager/push-manager/transport/discovery"
	"github.com/push-manager/push-manager/transport/store/jetstream"
)

const (
	// checkTimeout is how long a peer may take to answer a check. A whole node set shares it.
	checkTimeout = 5 * time.Second
	// checkDials is how many nodes are asked at a time.
	checkDials = 64
	// checkNamed is how many peers of a kind that cannot be reached are named.
	checkNamed = 5
	// expiresSoon is when a certificate is worth a word.
	expiresSoon = 7 * 24 * time.Hour
)

// CheckCommand is push-manager check: it tells whether Push-Manager would work with these settings, from this machine. It
// listens nowhere, registers nothing and stores nothing, so it may run beside a Push-Manager.
func CheckCommand() cli.Command {
	return cli.Command{
		Name: "check", Help: "Check the settings, and whether etcd, Controller, nodes and store can be reached with them.", File: true,
		New: func() cli.Settings { return &Config{} },
		Check: func(ctx context.Context, settings cli.Settings, r *cli.Report) {
			if cfg, ok := settings.(*Config); ok {
				cfg.check(ctx, r)
			}
		},
	}
}

func (c *Config) check(ctx context.Context, r *cli.Report) {
	c.report(slog.New(slog.DiscardHandler))
	var life app.Lifecycle
	defer func() { _ = life.Stop(ctx) }() // nothing was served
	c.checkFiles(r)
	nodes, err := c.checkEtcd(ctx, &life)
	if err != nil {
		r.Fail("etcd", err)
	} else {
		r.OK("etcd", "answers at %s", strings.Join(c.Etcd.Endpoints, ","))
	}
	c.checkController(ctx, &life, r)
	if err == nil {
		c.checkNodes(ctx, &life, nodes, r)
	} else {
		r.Warn("nodes", "not checked: they are read from etcd")
	}
	c.checkStore(ctx, &life, r)
}

// checkFiles tells when certificates end. That they fit together and are valid has been checked with the settings, and so
// have the policy, keys and issuers.
func (c *Config) checkFiles(r *cli.Report) {
	for _, files := range []*app.Certificates{&c.TLS.Certificates, &c.LinkTLS.Certificates, &c.ControllerTLS.Certificates, &c.Etcd.TLS, &c.Store.Files} {
		if !files.On() {
			continue
		}
		check := "tls " + files.Role
		expires, err := files.Expires()
		switch {
		case err != nil:
			r.Fail(check, err)
		case time.Until(expires) < expiresSoon:
			r.Warn(check, "expires at %s", expires.Format(time.RFC3339))
		default:
			r.OK(check, "good until %s", expires.Format(time.RFC3339))
		}
	}
	if c.Auth.on() {
		r.OK("policy", "%s", c.Auth.PolicyFile)
	}
	for _, risk := range c.insecure {
		r.Warn("insecure", "%s", risk)
	}
}

// checkEtcd returns the nodes that are registered.
func (c *Config) checkEtcd(ctx context.Context, life *app.Lifecycle) ([]discovery.Node, error) {
	client, err := life.Etcd(c.Etcd)
	if err != nil {
		return nil, err
	}
	known := make(chan []discovery.Node, 1)
	cfg := c.Discovery
	cfg.Client = client
	cfg.OnChange = func(nodes []discovery.Node) {
		select {
		case known <- nodes:
		default: // the first list is what was asked for
		}
	}
	w, err := discovery.New(cfg)
	if err != nil {
		return nil, err
	}
	w.Start()
	defer w.Close()
	bound := time.NewTimer(checkTimeout)
	defer bound.Stop()
	select {
	case nodes := <-known:
		return nodes, nil
	case <-bound.C:
	case <-ctx.Done():
	}
	if why := w.Why(); why != "" {
		return nil, errors.New(why)
	}
	return nil, fmt.Errorf("no answer within %v", checkTimeout)
}

// checkController looks up a room that nobody is in, at each Controller of a list: together they answer while one of them does.
func (c *Config) checkController(ctx context.Context, life *app.Lifecycle, r *cli.Report) {
	creds, err := life.Controller(c.ControllerTLS)
	if err != nil {
		r.Fail("controller", err)
		return
	}
	addresses := strings.FieldsFunc(c.Controller.Address, func(char rune) bool { return char == ',' || char == ' ' })
	if len(addresses) == 1 || strings.Contains(c.Controller.Address, "://") {
		addresses = []string{c.Controller.Address} // a target of gRPC may hold commas of its own
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	failures := make([]error, len(addresses))
	var asked sync.WaitGroup
	for i, address := range addresses {
		asked.Go(func() {
			cfg := c.Controller
			cfg.Address, cfg.Credentials = address, creds
			if err := reachController(ctx, cfg); err != nil {
				failures[i] = fmt.Errorf("%s: %w", address, err)
			}
		})
	}
	asked.Wait()
	if len(addresses) == 1 && failures[0] == nil {
		r.OK("controller", "answers at %s", c.Controller.Address)
		return
	}
	verdict(r, "controller", failures)
}

func reachController(ctx context.Context, cfg controller.Config) error {
	ctl, err := controller.New(cfg)
	if err != nil {
		return err
	}
	defer func() { _ = ctl.Close() }() // the answer is there
	_, _, err = ctl.Room(ctx, "push-manager-check", func(_, _ []byte) {})
	return err
}

func (c *Config) checkNodes(ctx context.Context, life *app.Lifecycle, nodes []discovery.Node, r *cli.Report) {
	secured := func(string) credentials.TransportCredentials { return insecure.NewCredentials() }
	if c.LinkTLS.On() {
		source, err := life.Certificates(c.LinkTLS.Certificates)
		if err != nil {
			r.Fail("nodes", err)
			return
		}
		secured = func(id string) credentials.TransportCredentials {
			return source.Client(certs.Side{Check: c.nodeCheck(id)})
		}
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	failures := make([]error, len(nodes))
	var asked sync.WaitGroup
	places := make(chan struct{}, checkDials)
	for i, n := range nodes {
		places <- struct{}{}
		asked.Go(func() {
			defer func() { <-places }()
			err := reachNode(ctx, n.Addr, secured(n.ID))
			if err != nil && c.LinkTLS.Migrate {
				err = reachNode(ctx, n.Addr, insecure.NewCredentials())
			}
			if err != nil {
				failures[i] = fmt.Errorf("%s: %w", n.ID, err)
			}
		})
	}
	asked.Wait()
	if len(nodes) == 0 {
		r.Warn("nodes", "none is registered: pushes would reach nobody")
		return
	}
	verdict(r, "nodes", failures)
}

// verdict fails if none of those asked has answered, and warns if some have not. A nil stands for an answer.
func verdict(r *cli.Report, check string, failures []error) {
	all := len(failures)
	failures = slices.DeleteFunc(failures, func(err error) bool { return err == nil })
	reached := fmt.Sprintf("%d of %d answer", all-len(failures), all)
	named := failures[:min(len(failures), checkNamed)]
	switch len(failures) {
	case 0:
		r.OK(check, "%s", reached)
	case all:
		r.Fail(check, fmt.Errorf("%s: %w", reached, errors.Join(named...)))
	default:
		r.Warn(check, "%s: %v", reached, errors.Join(named...))
	}
}

// reachNode asks for health. Any answer does: a node need not serve it.
func reachNode(ctx context.Context, addr string, creds credentials.TransportCredentials) error {
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(creds), grpc.WithNoProxy(), grpc.WithDisableServiceConfig())
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // the answer is there
	_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	if code := status.Code(err); code == codes.Unavailable || code == codes.DeadlineExceeded {
		return err
	}
	return nil
}

// checkStore asks a store elsewhere. An embedded one may belong to a Push-Manager that runs: only its directory is looked at.
func (c *Config) checkStore(ctx context.Context, life *app.Lifecycle, r *cli.Report) {
	switch {
	case !c.Store.on():
		r.OK("store", "off")
		return
	case c.Store.embedded():
		if err := writable(c.Store.Dir); err != nil {
			r.Fail("store", err)
		} else {
			r.OK("store", "embedded in %s", c.Store.Dir)
		}
		return
	}
	cfg := c.Store.Config
	if c.Store.Files.On() || strings.HasPrefix(cfg.URLs[0], "tls://") {
		source, err := life.Certificates(c.Store.Files)
		if err != nil {
			r.Fail("store", err)
			return
		}
		cfg.TLS = source.ClientConfig(certs.Side{MinVersion: tls.VersionTLS12, ServerName: c.Store.ServerName})
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	server, err := jetstream.Reach(ctx, cfg)
	if err != nil {
		r.Fail("store", err)
		return
	}
	r.OK("store", "JetStream answers at %s", server)
}

// writable makes a file in a directory and removes it. A directory that is not there is made at the start, in the nearest one that is.
func writable(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("find %s: %w", dir, err)
	}
	for {
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) || dir == filepath.Dir(dir) {
			break // What else is wrong with it, the next lines find.
		}
		dir = filepath.Dir(dir)
	}
	f, err := os.CreateTemp(dir, "check-*")
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}
