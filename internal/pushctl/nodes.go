package pushctl

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/invoke"
	"github.com/push-manager/push-manager/transport/discovery"
)

type nodesCmd struct {
	EtcdEndpoints string        `default:"localhost:2379" env:"ETCD_ENDPOINTS" help:"etcd, separated by commas."`
	CA            string        `name:"ca" placeholder:"FILE" env:"ETCD_TLS_CA_FILE" help:"PEM file of the authorities that etcd's certificate is checked with. This or --cert asks for TLS, and so does https:// in --etcd-endpoints."`
	Cert          string        `name:"cert" placeholder:"FILE" env:"ETCD_TLS_CERT_FILE" help:"PEM file of a certificate to show etcd."`
	Key           string        `name:"key" placeholder:"FILE" env:"ETCD_TLS_KEY_FILE" help:"PEM file of its key."`
	Timeout       time.Duration `default:"5s" help:"Longest wait for etcd."`
}

// entry is one registered process.
type entry struct {
	Kind    string `json:"kind"`
	ID      string `json:"id"`
	Address string `json:"address"`
}

// Run lists what is registered in etcd.
func (c *nodesCmd) Run(ctx context.Context, t *terminal) error {
	if c.Timeout <= 0 || c.Timeout > maxTimeout {
		return &usageError{fmt.Sprintf("--timeout: %v must be above zero and at most %v", c.Timeout, maxTimeout)}
	}
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	etcd := discovery.ClientConfig{Endpoints: strings.Split(c.EtcdEndpoints, ",")}
	if files := (certs.Files{Cert: c.Cert, Key: c.Key, CA: c.CA}); files != (certs.Files{}) {
		source, err := certs.Open(certs.Config{Files: files, Role: "etcd"})
		if file, is := errors.AsType[*certs.FileError](err); is {
			return &usageError{fmt.Sprintf("--%s: %v", strings.TrimSuffix(file.File, "_file"), file.Err)}
		}
		if err != nil {
			return err
		}
		defer source.Close()
		etcd.Credentials = source.Client(certs.Side{MinVersion: tls.VersionTLS12})
	}
	client, err := discovery.NewClient(etcd)
	if err != nil {
		return &usageError{fmt.Sprintf("--etcd-endpoints: %v", err)}
	}
	defer func() { _ = client.Close() }()
	var entries []entry
	for _, kind := range []struct{ name, prefix string }{
		{"connect-node", discovery.ConnectNodePrefix},
		{"push-manager", discovery.PushManagerPrefix},
	} {
		cfg := discovery.Config{Client: client, Prefix: kind.prefix}
		nodes, err := list(ctx, cfg)
		if err != nil {
			return fmt.Errorf("etcd does not answer at %s (--etcd-endpoints, ETCD_ENDPOINTS): %w", c.EtcdEndpoints, err)
		}
		for _, n := range nodes {
			entries = append(entries, entry{kind.name, n.ID, n.Addr})
		}
	}
	return t.list(entries)
}

// list waits for the first answer of etcd.
func list(ctx context.Context, cfg discovery.Config) ([]discovery.Node, error) {
	got := make(chan []discovery.Node, 1)
	cfg.OnChange = func(nodes []discovery.Node) {
		select {
		case got <- nodes:
		default: // only the first one counts
		}
	}
	w, err := discovery.New(cfg)
	if err != nil {
		return nil, err
	}
	w.Start()
	defer w.Close()
	select {
	case nodes := <-got:
		return nodes, nil
	case <-ctx.Done():
		if why := w.Why(); why != "" {
			return nil, errors.New(why)
		}
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return nil, errors.New("out of time (--timeout)")
		}
		return nil, context.Cause(ctx)
	}
}

func (t *terminal) list(entries []entry) error {
	if t.json {
		enc := json.NewEncoder(t.out)
		for _, e := range entries {
			if err := enc.Encode(e); err != nil {
				return fmt.Errorf("print: %w", err)
			}
		}
		return nil
	}
	if len(entries) == 0 {
		return fmt.Errorf("nothing is registered; start everything on this machine with: %s dev", invoke.As("push-manager"))
	}
	w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	for _, e := range entries {
		if _, err := fmt.Fprintf(w, "%s\t%s\t%s\n", e.Kind, clean(e.ID), clean(e.Address)); err != nil {
			return fmt.Errorf("print: %w", err)
		}
	}
	return w.Flush()
}
