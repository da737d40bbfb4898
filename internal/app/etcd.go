package app

import (
	"crypto/tls"
	"crypto/x509"
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

// Bind adds the section to a program's keys. Validate must follow Load.
func (c *EtcdConfig) Bind(s *config.Set) {
	s.List(&c.Endpoints, "etcd.endpoints", "localhost:2379", "etcd, as HOST:PORT or URLs separated by commas.")
	s.Duration(&c.DialTimeout, "etcd.dial_timeout", discovery.DefaultDialTimeout, time.Millisecond, "Longest attempt to connect to etcd.")
	s.Duration(&c.RequestTimeout, "etcd.request_timeout", discovery.Defaults().RequestTimeout, time.Millisecond, "Longest request to etcd.")
	s.Text(&c.Username, "etcd.username", "", "User at etcd, where it asks for one.")
	s.Secret(&c.Password, "etcd.password", "Password at etcd.")
	s.Text(&c.CAFile, "etcd.tls.ca_file", "", "PEM file of the authorities that etcd's certificate is checked with. Any file of this section switches TLS on.")
	s.Text(&c.CertFile, "etcd.tls.cert_file", "", "PEM file of our certificate for etcd.")
	s.Text(&c.KeyFile, "etcd.tls.key_file", "", "PEM file of its key.")
}

// Validate reads the files and checks the rest.
func (c *EtcdConfig) Validate(s *config.Set) error {
	if err := c.loadTLS(s); err != nil {
		return err
	}
	if err := c.CheckEndpoints(); err != nil {
		return s.Errorf("etcd.endpoints", "%v", err)
	}
	switch {
	case c.Username != "" && c.Password == "":
		return s.Errorf("etcd.password", "missing, while etcd.username is set")
	case c.Username == "" && c.Password != "":
		return s.Errorf("etcd.username", "missing, while etcd.password is set")
	}
	return nil
}

func (c *EtcdConfig) loadTLS(s *config.Set) error {
	if c.CAFile == "" && c.CertFile == "" && c.KeyFile == "" {
		return nil
	}
	c.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		pem, err := config.ReadFile(c.CAFile, maxPEM)
		if err != nil {
			return s.Errorf("etcd.tls.ca_file", "%v", err)
		}
		c.TLS.RootCAs = x509.NewCertPool()
		if !c.TLS.RootCAs.AppendCertsFromPEM(pem) {
			return s.Errorf("etcd.tls.ca_file", "%s holds no certificate", c.CAFile)
		}
	}
	switch {
	case c.CertFile == "" && c.KeyFile == "":
		return nil
	case c.CertFile == "":
		return s.Errorf("etcd.tls.cert_file", "missing, while etcd.tls.key_file is set")
	case c.KeyFile == "":
		return s.Errorf("etcd.tls.key_file", "missing, while etcd.tls.cert_file is set")
	}
	for key, file := range map[string]string{"etcd.tls.cert_file": c.CertFile, "etcd.tls.key_file": c.KeyFile} {
		if _, err := config.ReadFile(file, maxPEM); err != nil {
			return s.Errorf(key, "%v", err)
		}
	}
	if _, err := keyPair(c.CertFile, c.KeyFile); err != nil {
		return s.Errorf("etcd.tls.cert_file", "%v", err)
	}
	// Read again for each handshake: certificates are renewed while we run.
	cert, key := c.CertFile, c.KeyFile
	c.TLS.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		pair, err := keyPair(cert, key)
		return &pair, err
	}
	return nil
}

// maxPEM bounds a file of certificates or keys. All authorities that a system trusts have 300 KB.
const maxPEM = 1 << 20

func keyPair(certFile, keyFile string) (tls.Certificate, error) {
	cert, err := config.ReadFile(certFile, maxPEM)
	if err != nil {
		return tls.Certificate{}, err
	}
	key, err := config.ReadFile(keyFile, maxPEM)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.X509KeyPair(cert, key)
}
