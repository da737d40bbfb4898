package app

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/config"
)

// Certificates are the files of one part of a program, as keys of its configuration.
type Certificates struct {
	certs.Config

	section, caKey string
}

// Bind adds cert_file, key_file and the authorities' file to a section of keys.
func (c *Certificates) Bind(s *config.Set, section, caKey, caHelp string) {
	c.section, c.caKey = section, caKey
	s.Text(&c.Cert, section+".cert_file", "", "PEM file of our certificate, and after it what leads to its authority. All files of TLS are read again while they change.")
	s.Text(&c.Key, section+".key_file", "", "PEM file of its key.")
	s.Text(&c.CA, section+"."+caKey, "", caHelp)
}

// BindTrust adds what all files have in common: the trust domain, and how often they are read.
func BindTrust(s *config.Set, domain *string, interval *time.Duration) {
	s.Text(domain, "trust_domain", "", "Whose names certificates carry: spiffe://trust_domain/connect-node/ID for nodes, spiffe://trust_domain/push-manager/ID for Push-Managers. Empty: DNS names alone.")
	s.Duration(interval, "tls.reload_interval", certs.DefaultReloadInterval, 10*time.Millisecond, "How often the files of TLS are read again. SIGHUP has them read at once.")
}

// CheckTrustDomain refuses what cannot be one.
func CheckTrustDomain(s *config.Set, domain string) error {
	if err := certs.CheckTrustDomain(domain); err != nil {
		return s.Errorf("trust_domain", "%v", err)
	}
	return nil
}

// Missing names the first of the files that are not set.
func (c *Certificates) Missing(s *config.Set) error {
	for _, file := range []struct{ key, path string }{{certs.CertFile, c.Cert}, {certs.KeyFile, c.Key}, {c.caKey, c.CA}} {
		if file.path == "" {
			return s.Errorf(c.section+"."+file.key, "missing, while another file of %s is set", c.section)
		}
	}
	return nil
}

// On tells whether any file is set.
func (c *Certificates) On() bool { return c.Files != certs.Files{} }

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
	l.sources = append(l.sources, source)
	l.Add("certificates of "+cfg.Role, Closing(source.Close))
	return source, nil
}

// Reload has all files of certificates read again soon.
func (l *Lifecycle) Reload() {
	for _, source := range l.sources {
		source.Reload()
	}
}

// warnInsecure is how often it is said that a program listens insecurely.
const warnInsecure = time.Hour

// Insecure shows whether others can reach the program although TLS or authentication is missing, and warns of it.
func (l *Lifecycle) Insecure(log *slog.Logger, set *metrics.Set, insecure bool) {
	value := 0.0
	if insecure {
		value = 1
	}
	set.GetOrCreateGauge("push_manager_insecure", func() float64 { return value })
	if !insecure {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for tick := time.NewTicker(warnInsecure); ; {
			log.Warn("others can reach this program, without TLS or without authentication: allow_insecure is set")
			select {
			case <-tick.C:
			case <-ctx.Done():
				tick.Stop()
				return
			}
		}
	}()
	l.Add("warning", Closing(func() {
		cancel()
		<-ended
	}))
}
