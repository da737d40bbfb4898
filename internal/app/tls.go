package app

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"strings"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/config"
)

// Certificates are the files of one part of a program, as keys of its configuration.
type Certificates struct {
	certs.Config

	section, caKey string
}

// Bind adds cert_file, key_file and the authorities' file, unless caKey is empty, to a section of keys.
func (c *Certificates) Bind(s *config.Set, section, caKey, caHelp string) {
	c.section, c.caKey = section, caKey
	s.Text(&c.Cert, section+".cert_file", "", "PEM file of our certificate, and after it what leads to its authority. All files of TLS are read again while they change.")
	s.Text(&c.Key, section+".key_file", "", "PEM file of its key.")
	if caKey != "" {
		s.Text(&c.CA, section+"."+caKey, "", caHelp)
	}
}

// BindTrust adds what all files have in common: the trust domain, and how often they are read.
func BindTrust(s *config.Set, domain *string, interval *time.Duration) {
	s.Text(domain, "trust_domain", "", "Whose names certificates carry: spiffe://trust_domain/connect-node/ID for nodes, spiffe://trust_domain/push-manager/ID for Push-Managers. Empty: DNS names alone.")
	s.Duration(interval, "tls.reload_interval", certs.DefaultReloadInterval, 10*time.Millisecond, "How often the files of TLS are read again. SIGHUP has them read at once.")
}

// Report gives several sets of files the same log, metrics and interval.
func Report(log *slog.Logger, set *metrics.Set, interval time.Duration, all ...*Certificates) {
	for _, c := range all {
		c.Logger, c.Metrics, c.ReloadInterval = log, set, interval
	}
}

// CheckTrustDomain refuses what cannot be one.
func CheckTrustDomain(s *config.Set, domain string) error {
	if err := certs.CheckTrustDomain(domain); err != nil {
		return s.Errorf("trust_domain", "%v", err)
	}
	return nil
}

// On tells whether any file is set.
func (c *Certificates) On() bool { return c.Files != certs.Files{} }

// ControllerTLS is the section controller.tls: how a program knows the Controller, and the Controller it.
type ControllerTLS struct {
	Certificates

	ServerName  string
	AllowedSANs []string

	check certs.Check // nil: by name
}

// Bind adds the section.
func (c *ControllerTLS) Bind(s *config.Set) {
	c.Role = "controller"
	c.Certificates.Bind(s, "controller.tls", "ca_file", "PEM file of the authorities that the Controller's certificate is checked with. Set: the Controller is spoken to over TLS.")
	s.Text(&c.ServerName, "controller.tls.server_name", "", "Name that the Controller's certificate must carry, in place of the host in controller_address.")
	s.List(&c.AllowedSANs, "controller.tls.allowed_sans", "", "Names of which the Controller's certificate must carry one, in place of the host: paths of the trust domain such as controller/1, URIs, DNS names; a star at the end stands for any rest.")
}

// Validate reads the files, if there are any, and checks the rest.
func (c *ControllerTLS) Validate(s *config.Set, trustDomain string) (err error) {
	switch {
	case c.CA == "" && (c.On() || c.ServerName != "" || len(c.AllowedSANs) > 0):
		return s.Errorf("controller.tls.ca_file", "missing, while other keys of controller.tls are set")
	case c.ServerName != "" && len(c.AllowedSANs) > 0:
		return s.Errorf("controller.tls.server_name", "set, and controller.tls.allowed_sans, too: one of them decides")
	case len(c.AllowedSANs) > 0:
		if c.check, err = certs.Allowed(trustDomain, c.AllowedSANs); err != nil {
			return s.Errorf("controller.tls.allowed_sans", "%v", err)
		}
	}
	return c.Certificates.Validate(s)
}

// Controller opens the files of controller.tls, if there are any, and returns credentials of them, nil for none.
func (l *Lifecycle) Controller(cfg ControllerTLS) (credentials.TransportCredentials, error) {
	if !cfg.On() {
		return nil, nil //nolint:nilnil // Connections are plain.
	}
	source, err := l.Certificates(cfg.Certificates)
	if err != nil {
		return nil, err
	}
	return source.Client(certs.Side{Check: cfg.check, ServerName: cfg.ServerName}), nil
}

// NodeTLS is the section node.tls: who may come to the port of a Connect-Node or a Controller. All three files are set, or
// none.
type NodeTLS struct {
	Certificates

	AllowedSANs []string

	check certs.Check
}

// Bind adds the section. peers are the kinds of programs that may come, and whose certificates the authorities sign.
func (c *NodeTLS) Bind(s *config.Set, role, peers string, kinds ...string) {
	c.Role = role
	c.Certificates.Bind(s, "node.tls", "client_ca_file", "PEM file of the authorities that certificates of "+peers+" are checked with. All three files are set, or none.")
	s.List(&c.AllowedSANs, "node.tls.allowed_sans", strings.Join(kinds, "/*,")+"/*", "Names of certificates that may use the gRPC port: paths of the trust domain, URIs, DNS names; a star at the end stands for any rest.")
}

// Validate reads the files, if there are any, and checks the rest.
func (c *NodeTLS) Validate(s *config.Set, trustDomain string) (err error) {
	if !c.On() {
		return nil
	}
	for _, file := range []struct{ key, path string }{{certs.CertFile, c.Cert}, {certs.KeyFile, c.Key}, {c.caKey, c.CA}} {
		if file.path == "" {
			return s.Errorf(c.section+"."+file.key, "missing, while another file of %s is set", c.section)
		}
	}
	if err := c.Certificates.Validate(s); err != nil {
		return err
	}
	if c.check, err = certs.Allowed(trustDomain, c.AllowedSANs); err != nil {
		return s.Errorf("node.tls.allowed_sans", "%v", err)
	}
	return nil
}

// Missing is what others who can reach the port would not need.
func (c *NodeTLS) Missing() string {
	if c.On() {
		return ""
	}
	return "TLS and certificates on GRPC_PORT (NODE_TLS_CERT_FILE, NODE_TLS_KEY_FILE, NODE_TLS_CLIENT_CA_FILE)"
}

// Node opens the files of node.tls, if there are any, and returns credentials of them, nil for none.
func (l *Lifecycle) Node(cfg NodeTLS) (credentials.TransportCredentials, error) {
	if !cfg.On() {
		return nil, nil //nolint:nilnil // The port is plain.
	}
	source, err := l.Certificates(cfg.Certificates)
	if err != nil {
		return nil, err
	}
	return source.Server(certs.Side{ClientAuth: tls.RequireAndVerifyClientCert, Check: cfg.check}), nil
}

// BindMinVersion adds the lowest version of TLS of a section, "1.2" or "1.3".
func BindMinVersion(s *config.Set, version *string, section, of string) {
	s.Choice(version, section+".min_version", "1.3", "Lowest version of TLS on "+of+".", "1.2", "1.3")
}

// MinVersion is the number of a version.
func MinVersion(version string) uint16 {
	if version == "1.2" {
		return tls.VersionTLS12
	}
	return tls.VersionTLS13
}

// Validate reads the files, if there are any.
func (c *Certificates) Validate(s *config.Set) error {
	err := c.Check()
	var file *certs.FileError
	if !errors.As(err, &file) {
		return err
	}
	key := file.File
	if key == certs.CAFile {
		key = c.caKey
	}
	return s.Errorf(c.section+"."+key, "%v", file.Err)
}

// Certificates opens files and adds their Source.
func (l *Lifecycle) Certificates(cfg Certificates) (*certs.Source, error) {
	source, err := certs.Open(cfg.Config)
	if err != nil {
		return nil, err
	}
	l.AddFiles("certificates of "+cfg.Role, source)
	return source, nil
}

// files is what is read again while a program runs.
type files interface {
	Reload()
	Close()
}

// AddFiles adds a part that Reload has read its files again.
func (l *Lifecycle) AddFiles(name string, f files) {
	l.files = append(l.files, f)
	l.Add(name, Closing(f.Close))
}

// Reload has all files read again soon.
func (l *Lifecycle) Reload() {
	for _, f := range l.files {
		f.Reload()
	}
}
