package certs

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"runtime/debug"
	"sync/atomic"

	"google.golang.org/grpc/credentials"
)

// Side says how one side of a connection uses a Source.
type Side struct {
	// MinVersion is the lowest version of TLS. 0 means 1.3.
	MinVersion uint16
	// Check judges who the other side is, once its chain is verified. nil: a client asks for the name of the host that it
	// dials, a server takes anybody.
	Check Check

	// ServerName is what a client without Check asks for, instead of the host that it dials.
	ServerName string
	// ClientAuth is whether a server asks for certificates.
	ClientAuth tls.ClientAuthType
}

// Server are credentials of a server. The Source must have a certificate, and authorities if ClientAuth verifies.
func (s *Source) Server(side Side) credentials.TransportCredentials {
	return &live{source: s, side: side, config: side.serverConfig}
}

func (side *Side) serverConfig(now *set) *tls.Config {
	c := side.config(now)
	c.ClientAuth, c.ClientCAs = side.ClientAuth, now.cas
	c.SessionTicketsDisabled = side.ClientAuth != tls.NoClientCert
	if side.Check != nil {
		c.VerifyConnection = func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return nil // ClientAuth has decided about that
			}
			return side.Check(state.PeerCertificates[0])
		}
	}
	return c
}

// ServerConfig is Server for what is not gRPC. protocols are what the server speaks, the preferred one first.
func (s *Source) ServerConfig(side Side, protocols ...string) *tls.Config {
	return &tls.Config{
		MinVersion: side.MinVersion, // for whoever reads it; that of GetConfigForClient counts
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			c := side.serverConfig(s.current.Load())
			c.NextProtos = protocols
			return c, nil
		},
	}
}

// Client are credentials of a client. Where the Source has no authorities, those of the system count.
func (s *Source) Client(side Side) credentials.TransportCredentials {
	return &live{source: s, side: side, config: func(now *set) *tls.Config {
		c := side.config(now)
		c.RootCAs, c.ServerName = now.cas, side.ServerName
		if side.Check != nil {
			c.InsecureSkipVerify = true // It would ask for a name of the host. VerifyConnection does all the rest.
			c.VerifyConnection = func(state tls.ConnectionState) error { return verifyServer(state, now.cas, side.Check) }
		}
		return c
	}}
}

// ClientConfig is Client for what is not gRPC and goes by the name of the host, or of side. Files that were read again
// count for the next connection.
func (s *Source) ClientConfig(side Side) *tls.Config {
	c := side.config(s.current.Load())
	c.Certificates = nil
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if cert := s.current.Load().cert; cert != nil {
			return cert, nil
		}
		return &tls.Certificate{}, nil // none
	}
	c.ServerName = side.ServerName
	c.InsecureSkipVerify = true // Authorities that were there at first would count for ever. VerifyConnection does all of it.
	c.VerifyConnection = func(state tls.ConnectionState) error {
		return verifyServer(state, s.current.Load().cas, func(leaf *x509.Certificate) error {
			return leaf.VerifyHostname(cmp.Or(side.ServerName, state.ServerName)) // the latter is empty for an IP address
		})
	}
	return c
}

func (side *Side) config(now *set) *tls.Config {
	c := &tls.Config{MinVersion: side.MinVersion}
	if c.MinVersion == 0 {
		c.MinVersion = tls.VersionTLS13
	}
	if now.cert != nil {
		c.Certificates = []tls.Certificate{*now.cert}
	}
	return c
}

// verifyServer is what crypto/tls does for a client, with a Check in place of the name of the host.
func verifyServer(state tls.ConnectionState, cas *x509.CertPool, check Check) error {
	if len(state.PeerCertificates) == 0 {
		return errors.New("the server has sent no certificate")
	}
	chain := x509.NewCertPool()
	for _, c := range state.PeerCertificates[1:] {
		chain.AddCert(c)
	}
	if _, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: cas, Intermediates: chain}); err != nil {
		return &tls.CertificateVerificationError{UnverifiedCertificates: state.PeerCertificates, Err: err}
	}
	return check(state.PeerCertificates[0])
}

// live is credentials that use the set of the moment for each handshake.
type live struct {
	source *Source
	side   Side
	config func(*set) *tls.Config
	made   atomic.Pointer[made]
}

// made is what live has made of a set.
type made struct {
	of    *set
	creds credentials.TransportCredentials
}

func (l *live) now() credentials.TransportCredentials {
	current := l.source.current.Load()
	m := l.made.Load()
	if m == nil || m.of != current {
		m = &made{current, credentials.NewTLS(l.config(current))}
		l.made.Store(m)
	}
	return m.creds
}

// ClientHandshake implements credentials.TransportCredentials.
func (l *live) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (conn net.Conn, info credentials.AuthInfo, err error) {
	if l.side.ServerName != "" {
		authority = l.side.ServerName
	}
	defer l.end(raw, &err)
	return l.now().ClientHandshake(ctx, authority, raw)
}

// ServerHandshake implements credentials.TransportCredentials.
func (l *live) ServerHandshake(raw net.Conn) (conn net.Conn, info credentials.AuthInfo, err error) {
	defer l.end(raw, &err)
	return l.now().ServerHandshake(raw)
}

var errPanic = errors.New("panic in the handshake")

// end counts a handshake that has failed with *failure, and logs one in ten seconds. Who connects and goes is no failure:
// probes do so. It is to be deferred: what the other side sends ends in a panic of this handshake at worst.
func (l *live) end(raw net.Conn, failure *error) {
	s := l.source
	if v := recover(); v != nil {
		*failure = errPanic
		s.cfg.Logger.Error("panic", "role", s.cfg.Role, "panic", v, "stack", string(debug.Stack()))
	}
	err := *failure
	if err == nil || errors.Is(err, io.EOF) {
		return
	}
	s.handshakeFailures.Inc()
	s.sayHandshakeFailure.Do(func() {
		s.cfg.Logger.Warn("TLS handshake failed", "role", s.cfg.Role, "peer", raw.RemoteAddr().String(), "error", err)
	})
}

// Info implements credentials.TransportCredentials.
func (l *live) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials. Nothing in it changes.
func (l *live) Clone() credentials.TransportCredentials { return l }

// OverrideServerName implements credentials.TransportCredentials.
func (*live) OverrideServerName(string) error {
	return errors.New("the name of the server stands in Side")
}
