package membership

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/internal/certs"
)

// TLS says how the connection to the Controller is secured. CAFile is required.
type TLS struct {
	// CAFile is a PEM file of the authorities that the Controller's certificate is checked
	// with.
	CAFile string
	// CertFile is a PEM file of the node's certificate, KeyFile that of its key: both, or
	// none where the Controller asks for none. A Controller like the reference one lets
	// spiffe://<TrustDomain>/connect-node/<NodeID> report about NodeID alone.
	CertFile, KeyFile string
	// ServerName is what the Controller's certificate must carry. Default: the host of
	// Config.Controller.
	ServerName string
	// AllowedSANs are names of which it must carry one, in place of ServerName: paths of
	// TrustDomain, URIs, DNS names. A star at the end stands for any rest.
	AllowedSANs []string
	// TrustDomain is what AllowedSANs are paths of.
	TrustDomain string
	// ReloadInterval is how often the files are read again. Default 10 s.
	ReloadInterval time.Duration

	// Logger gets what becomes of the files. Default: nothing is logged.
	Logger *slog.Logger
	// Metrics gets counters. Default: a set of its own, not shown.
	Metrics *metrics.Set
}

// Credentials secure the connection to a Controller: TLS 1.3. They take new files over while it is used.
type Credentials struct {
	credentials.TransportCredentials

	source *certs.Source
}

// NewCredentials reads the files, and goes on to read them until Close.
func NewCredentials(t TLS) (*Credentials, error) {
	if t.CAFile == "" {
		return nil, errors.New("controller TLS: CAFile is required")
	}
	if err := certs.CheckTrustDomain(t.TrustDomain); err != nil {
		return nil, fmt.Errorf("controller TLS: TrustDomain: %w", err)
	}
	side := certs.Side{ServerName: t.ServerName}
	if len(t.AllowedSANs) > 0 {
		if t.ServerName != "" {
			return nil, errors.New("controller TLS: ServerName and AllowedSANs: one of them decides")
		}
		var err error
		if side.Check, err = certs.Allowed(t.TrustDomain, t.AllowedSANs); err != nil {
			return nil, fmt.Errorf("controller TLS: AllowedSANs: %w", err)
		}
	}
	source, err := certs.Open(certs.Config{
		Files: certs.Files{Cert: t.CertFile, Key: t.KeyFile, CA: t.CAFile}, Role: "controller",
		ReloadInterval: t.ReloadInterval, Logger: t.Logger, Metrics: t.Metrics,
	})
	if err != nil {
		return nil, fmt.Errorf("controller TLS: %w", err)
	}
	return &Credentials{source.Client(side), source}, nil
}

// Reload has the files read soon. It does not wait.
func (c *Credentials) Reload() { c.source.Reload() }

// Close ends the reading. It is called once, after Reporter.Close.
func (c *Credentials) Close() { c.source.Close() }
