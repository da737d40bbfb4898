package pushctl

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/invoke"
	"github.com/push-manager/push-manager/transport/discovery"
)

type nodesCmd struct {
	EtcdEndpoints string        `default:"localhost:2379" env:"ETCD_ENDPOINTS" context:"etcd_endpoints" help:"etcd, separated by commas."`
	CA            string        `name:"ca" placeholder:"FILE" env:"ETCD_TLS_CA_FILE" context:"etcd_ca" predictor:"file" help:"PEM file of the authorities that etcd's certificate is checked with. This or --cert asks for TLS, and so does https:// in --etcd-endpoints."`
	Cert          string        `name:"cert" placeholder:"FILE" env:"ETCD_TLS_CERT_FILE" context:"etcd_cert" predictor:"file" help:"PEM file of a certificate to show etcd."`
	Key           string        `name:"key" placeholder:"FILE" env:"ETCD_TLS_KEY_FILE" context:"etcd_key" predictor:"file" help:"PEM file of its key."`
	Timeout       time.Duration `default:"5s" help:"Longest wait for etcd."`
}

// entry is one registered process.
type entry struct {
	Kind    string `json:"kind"`
	ID      string `json:"id"`
	Address string `json:"address"`
	BootID  string `json:"boot_id,omitempty"` // tells its process from an earlier one
}

// The kinds of entries.
const (
	connectNode = "connect-node"
	pushManager = "push-manager"
)

// Run lists what is registered in etcd.
func (c *nodesCmd) Run(ctx context.Context, t *terminal) error {
	if c.Timeout <= 0 || c.Timeout > maxTimeout {
		return &usageError{fmt.Sprintf("--timeout: %v must be above zero and at most %v", c.Timeout, maxTimeout)}
	}
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	entries, err := registered(ctx, c.EtcdEndpoints, certs.Files{Cert: c.Cert, Key: c.Key, CA: c.CA}, "--")
	if err != nil {
		return err
	}
	return t.list(entries)
}

// registered is what is registered in an etcd. files asks for TLS if it holds any; prefix is that of their flags.
func registered(ctx context.Context, endpoints string, files certs.Files, prefix string) ([]entry, error) {
	etcd := discovery.ClientConfig{Endpoints: strings.Split(endpoints, ",")}
	if files != (certs.Files{}) {
		source, err := certs.Open(certs.Config{Files: files, Role: "etcd"})
		if file, is := errors.AsType[*certs.FileError](err); is {
			return nil, &usageError{fmt.Sprintf("%s%s: %v", prefix, strings.TrimSuffix(file.File, "_file"), file.Err)}
		}
		if err != nil {
			return nil, err
		}
		defer source.Close()
		etcd.Credentials = source.Client(certs.Side{MinVersion: tls.VersionTLS12})
	}
	client, err := discovery.NewClient(etcd)
	if err != nil {
		return nil, &usageError{fmt.Sprintf("--etcd-endpoints: %v", err)}
	}
	defer func() { _ = client.Close() }()
	var entries []entry
	for _, kind := range []struct{ name, prefix string }{
		{connectNode, discovery.ConnectNodePrefix},
		{pushManager, discovery.PushManagerPrefix},
	} {
		cfg := discovery.Config{Client: client, Prefix: kind.prefix}
		nodes, err := list(ctx, cfg)
		if err != nil {
			return nil, fmt.Errorf("etcd does not answer at %s (--etcd-endpoints, ETCD_ENDPOINTS): %w", endpoints, err)
		}
		for _, n := range nodes {
			entries = append(entries, entry{kind.name, n.ID, n.Addr, n.BootID})
		}
	}
	return entries, nil
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
	if len(entries) == 0 && !t.structured() {
		return fmt.Errorf("nothing is registered; start everything on this machine with: %s dev", invoke.As("push-manager"))
	}
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	for _, e := range entries {
		if t.structured() {
			if err := t.answer(e, ""); err != nil {
				return err
			}
			continue
		}
		line := []string{e.Kind, clean(e.ID), clean(e.Address)}
		if t.format == formatWide {
			line = append(line, clean(e.BootID))
		}
		_, _ = fmt.Fprintln(w, strings.Join(line, "\t")) // into memory
	}
	_ = w.Flush()
	_, err := io.WriteString(t.out, text.String())
	return err
}
