package program

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"time"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/transport/discovery"
)

// EtcdConfig is the section etcd.
type EtcdConfig struct {
	discovery.ClientConfig

	RequestTimeout            time.Duration
	CertFile, KeyFile, CAFile string
}

// Bind adds the section to a program's keys. Settle must follow Load.
func (c *EtcdConfig) Bind(s *config.Set) {
	s.List(&c.Endpoints, "etcd.endpoints", "localhost:2379", "etcd, as HOST:PORT or URLs separated by commas.")
	s.Duration(&c.DialTimeout, "etcd.dial_timeout", time.Second, time.Millisecond, "Longest attempt to connect to etcd.")
	s.Duration(&c.RequestTimeout, "etcd.request_timeout", 3*time.Second, time.Millisecond, "Longest request to etcd.")
	s.Text(&c.Username, "etcd.username", "", "User at etcd, where it asks for one.")
	s.Text(&c.Password, "etcd.password", "", "Password at etcd.").Secret()
	s.Text(&c.CAFile, "etcd.tls.ca_file", "", "PEM file of the authorities that etcd's certificate is checked with. Any file of this section switches TLS on.")
	s.Text(&c.CertFile, "etcd.tls.cert_file", "", "PEM file of our certificate for etcd.")
	s.Text(&c.KeyFile, "etcd.tls.key_file", "", "PEM file of its key.")
}

// Settle reads the files.
func (c *EtcdConfig) Settle(s *config.Set) error {
	if c.CAFile == "" && c.CertFile == "" && c.KeyFile == "" {
		return nil
	}
	c.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		pem, err := os.ReadFile(c.CAFile)
		if err != nil {
			return s.Problem("etcd.tls.ca_file", "%v", err)
		}
		c.TLS.RootCAs = x509.NewCertPool()
		if !c.TLS.RootCAs.AppendCertsFromPEM(pem) {
			return s.Problem("etcd.tls.ca_file", "%s holds no certificate", c.CAFile)
		}
	}
	switch {
	case c.CertFile == "" && c.KeyFile == "":
		return nil
	case c.CertFile == "":
		return s.Problem("etcd.tls.cert_file", "missing, while etcd.tls.key_file is set")
	case c.KeyFile == "":
		return s.Problem("etcd.tls.key_file", "missing, while etcd.tls.cert_file is set")
	}
	if _, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile); err != nil {
		return s.Problem("etcd.tls.cert_file", "%v", err)
	}
	// Read again for each handshake: certificates are renewed while we run.
	cert, key := c.CertFile, c.KeyFile
	c.TLS.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		pair, err := tls.LoadX509KeyPair(cert, key)
		return &pair, err
	}
	return nil
}
