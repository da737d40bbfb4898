package app

import (
	"net/url"
	"strings"
	"time"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/transport/discovery"
)

// EtcdConfig is the section etcd.
type EtcdConfig struct {
	discovery.ClientConfig

	RequestTimeout time.Duration
	TLS            Certificates
	ServerName     string
}

// Bind adds the section to a program's keys. Validate must follow Load.
func (c *EtcdConfig) Bind(s *config.Set) {
	s.List(&c.Endpoints, "etcd.endpoints", "localhost:2379", "etcd, as HOST:PORT or URLs separated by commas. One that is not on this machine needs TLS, or allow_insecure.")
	s.Duration(&c.DialTimeout, "etcd.dial_timeout", discovery.DefaultDialTimeout, time.Millisecond, "Longest attempt to connect to etcd.")
	s.Duration(&c.RequestTimeout, "etcd.request_timeout", discovery.Defaults().RequestTimeout, time.Millisecond, "Longest request to etcd.")
	s.Text(&c.Username, "etcd.username", "", "User at etcd, where it asks for one.")
	s.Secret(&c.Password, "etcd.password", "Password at etcd.")
	c.TLS.Role = "etcd"
	c.TLS.Bind(s, "etcd.tls", "ca_file", "PEM file of the authorities that etcd's certificate is checked with; without one, those of the system. Any file of this section switches TLS on.")
	s.Text(&c.ServerName, "etcd.tls.server_name", "", "Name that etcd's certificate must carry, in place of the host in etcd.endpoints.")
}

// Validate reads the files and checks the rest.
func (c *EtcdConfig) Validate(s *config.Set, risks *Risks) error {
	if err := c.TLS.Validate(s); err != nil {
		return err
	}
	if err := discovery.CheckEndpoints(c.Endpoints, c.TLS.On()); err != nil {
		return s.Errorf("etcd.endpoints", "%v", err)
	}
	switch {
	case c.Username != "" && c.Password == "":
		return s.Errorf("etcd.password", "missing, while etcd.username is set")
	case c.Username == "" && c.Password != "":
		return s.Errorf("etcd.username", "missing, while etcd.password is set")
	case c.Secured():
		return nil
	case c.ServerName != "":
		return s.Errorf("etcd.tls.server_name", "set, while etcd is spoken to without TLS")
	}
	for _, endpoint := range c.Endpoints {
		if u, err := url.Parse("http://" + strings.TrimPrefix(endpoint, "http://")); err != nil || !config.Loopback(u.Hostname()) {
			return risks.Add("etcd.endpoints", "etcd at %q is spoken to without TLS (ETCD_TLS_CA_FILE)", endpoint)
		}
	}
	return nil
}

// Secured tells whether etcd is spoken to over TLS. The endpoints agree about it: see Validate.
func (c *EtcdConfig) Secured() bool {
	return c.TLS.On() || strings.HasPrefix(c.Endpoints[0], "https://")
}
