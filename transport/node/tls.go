package node

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/internal/certs"
)

// TLS says how the port of a node is secured. The three files are required, and TrustDomain unless AllowedSANs does
// without.
type TLS struct {
	// CertFile is a PEM file of the node's certificate, which carries the URI
	// spiffe://<TrustDomain>/connect-node/<NodeID> or the DNS name <NodeID>. KeyFile is
	// that of its key.
	CertFile, KeyFile string
	// ClientCAFile is a PEM file of the authorities that managers' certificates are
	// checked with.
	ClientCAFile string
	// TrustDomain is what AllowedSANs are paths of.
	TrustDomain string
	// AllowedSANs are names of certificates that are let in: paths of the trust domain, URIs,
	// DNS names. A star at the end stands for any rest. Default: push-manager/*.
	AllowedSANs []string
	// ReloadInterval is how often the files are read again. Default 10 s.
	ReloadInterval time.Duration

	// Logger gets what becomes of the files. Default: nothing is logged.
	Logger *slog.Logger
	// Metrics gets counters. Default: a set of its own, not shown.
	Metrics *metrics.Set
}

// Credentials secure the grpc.Server of a node: TLS 1.3, and nobody but managers is let in. They take new files
// over while the server runs.
type Credentials struct {
	credentials.TransportCredentials

	source *certs.Source
}

// NewCredentials reads the files, and goes on to read them until Close.
func NewCredentials(t TLS) (*Credentials, error) {
	if t.CertFile == "" || t.KeyFile == "" || t.ClientCAFile == "" {
		return nil, errors.New("node TLS: CertFile, KeyFile and ClientCAFile are required")
	}
	if err := certs.CheckTrustDomain(t.TrustDomain); err != nil {
		return nil, fmt.Errorf("node TLS: TrustDomain: %w", err)
	}
	if len(t.AllowedSANs) == 0 {
		t.AllowedSANs = []string{certs.KindManager + "/*"}
	}
	managers, err := certs.Allowed(t.TrustDomain, t.AllowedSANs)
	if err != nil {
		return nil, fmt.Errorf("node TLS: AllowedSANs: %w", err)
	}
	source, err := certs.Open(certs.Config{
		Files: certs.Files{Cert: t.CertFile, Key: t.KeyFile, CA: t.ClientCAFile}, Role: "node",
		ReloadInterval: t.ReloadInterval, Logger: t.Logger, Metrics: t.Metrics,
	})
	if err != nil {
		return nil, fmt.Errorf("node TLS: %w", err)
	}
	return &Credentials{source.Server(certs.Side{ClientAuth: tls.RequireAndVerifyClientCert, Check: managers}), source}, nil
}

// Reload has the files read soon. It does not wait.
func (c *Credentials) Reload() { c.source.Reload() }

// Close ends the reading. It is called once, after the grpc.Server has stopped.
func (c *Credentials) Close() { c.source.Close() }
