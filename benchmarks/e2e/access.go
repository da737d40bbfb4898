package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/push-manager/push-manager/internal/auth/jwt"
	"github.com/push-manager/push-manager/internal/certs"
)

// access is how a server is called. The zero value: in plain text, by nobody in particular.
type access struct {
	Files certs.Files `json:"files"` // with a CA: over TLS
	Token string      `json:"token"`
	JSON  bool        `json:"json"` // over HTTP/2 on HTTP_PORT, in place of gRPC: unary calls alone
}

func (a access) scheme() string {
	if a.Files.CA != "" {
		return "https"
	}
	return "http"
}

func (a access) bearer() string {
	if a.Token == "" {
		return ""
	}
	return "Bearer " + a.Token
}

// dial connects, and makes the handshake of TLS that the product's own clients make.
func (a access) dial(ctx context.Context, addr string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil || a.Files.CA == "" {
		return conn, err
	}
	source, err := certs.Open(certs.Config{Role: "bench", Files: a.Files})
	if err != nil {
		_ = conn.Close() // nothing was sent
		return nil, err
	}
	defer source.Close()
	secure, _, err := source.Client(certs.Side{}).ClientHandshake(ctx, addr, conn)
	if err != nil {
		_ = conn.Close() // nothing was sent
		return nil, fmt.Errorf("handshake with %s: %w", addr, err)
	}
	return secure, nil
}

// entrance is one way to serve and call the push API: the environment of Push-Manager, and what its callers have.
type entrance struct {
	env []string
	as  access
}

// entrances are those that are held against plain text. Callers who show who they are may push to all users.
type entrances struct {
	tls, certificate, token entrance
	unread                  entrance // a token is shown to a Push-Manager that asks for none
}

const (
	trustDomain = "bench.example"
	issuer      = "https://idp.bench.example"
	audience    = "push-manager"
	callerID    = "caller"
)

// entrances writes the files of all of them.
func (b *Bench) entrances() (*entrances, error) {
	folder := certs.Folder{Path: filepath.Join(b.dir, "trust"), TrustDomain: trustDomain}
	until := time.Now().Add(12 * time.Hour)
	if err := folder.WriteAuthority("pushbench", until, "127.0.0.1", trustDomain); err != nil {
		return nil, err
	}
	if err := folder.WriteCertificate("server", certs.KindManager, "bench", certs.Request{Hosts: []string{"127.0.0.1"}, Server: true, NotAfter: until}); err != nil {
		return nil, err
	}
	if err := folder.WriteCertificate(callerID, certs.KindClient, callerID, certs.Request{Client: true, NotAfter: until}); err != nil {
		return nil, err
	}
	secret := []byte(strings.Repeat("s", 64))
	token, err := jwt.Mint(secret, map[string]any{"iss": issuer, "aud": audience, "sub": callerID, "exp": until.Unix()})
	if err != nil {
		return nil, err
	}
	policy := func(match string) []byte {
		return fmt.Appendf(nil, "version: 1\ncallers:\n- name: bench\n  match: [%s]\n  allow: [{methods: [PushToUser], users: [\"*\"]}]\n", match)
	}
	secretFile, byName, byToken := folder.File("secret"), folder.File("policy-san.yaml"), folder.File("policy-jwt.yaml")
	for path, text := range map[string][]byte{
		secretFile: secret,
		byName:     policy("{san: spiffe://" + trustDomain + "/" + certs.KindClient + "/" + callerID + "}"),
		byToken:    policy("{jwt: {issuer: " + issuer + ", subject: " + callerID + "}}"),
	} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			return nil, err
		}
	}
	server, caller := folder.Files("server"), folder.Files(callerID)
	overTLS := []string{"TLS_CERT_FILE=" + server.Cert, "TLS_KEY_FILE=" + server.Key}
	with := func(more ...string) []string { return append(slices.Clip(overTLS), more...) }
	return &entrances{
		tls: entrance{with(), access{Files: certs.Files{CA: server.CA}}},
		certificate: entrance{
			with("TLS_CLIENT_CA_FILE="+server.CA, "TLS_CLIENT_AUTH=require", "AUTH_MODE=required", "AUTH_POLICY_FILE="+byName),
			access{Files: caller},
		},
		token: entrance{
			with("AUTH_MODE=required", "AUTH_POLICY_FILE="+byToken,
				"AUTH_JWT=[{issuer: "+issuer+", audience: "+audience+", hs_secret_file: "+secretFile+"}]"),
			access{Files: certs.Files{CA: server.CA}, Token: token},
		},
		unread: entrance{with(), access{Files: certs.Files{CA: server.CA}, Token: token}},
	}, nil
}
