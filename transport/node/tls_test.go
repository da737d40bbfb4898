package node

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

// silentSessions has nobody.
type silentSessions struct{}

func (silentSessions) Deliver(string, *Message) Outcome      { return NotHere }
func (silentSessions) Broadcast(*Message) (delivered, f int) { return 0, 0 }
func (silentSessions) Online() int                           { return 0 }

func TestManagersAloneReachANodeOverTLS(t *testing.T) {
	ca, stranger := etcdtest.NewCA(t), etcdtest.NewCA(t)
	cert, key := ca.Issue("spiffe://test/connect-node/n1")
	creds, err := NewCredentials(TLS{CertFile: cert, KeyFile: key, ClientCAFile: ca.File, TrustDomain: "test"})
	if err != nil {
		t.Fatal(err)
	}
	defer creds.Close()
	creds.Reload()
	srv, err := New(Config{NodeID: "n1", Sessions: silentSessions{}})
	if err != nil {
		t.Fatal(err)
	}
	gs := grpc.NewServer(append(ServerOptions(), grpc.Creds(creds))...)
	srv.Attach(gs)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- gs.Serve(lis) }()
	defer func() {
		gs.Stop()
		<-served
		srv.Close()
	}()
	as := func(by *etcdtest.CA, name string) credentials.TransportCredentials {
		cert, key := by.Issue(name)
		source, err := certs.Open(certs.Config{Files: certs.Files{Cert: cert, Key: key, CA: ca.File}, Role: "test"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(source.Close)
		return source.Client(certs.Side{Check: certs.Node("test", "n1")})
	}
	for name, who := range map[string]struct {
		creds credentials.TransportCredentials
		ok    bool
	}{
		"a manager":   {as(ca, "spiffe://test/push-manager/pm"), true},
		"a node":      {as(ca, "spiffe://test/connect-node/n2"), false},
		"a caller":    {as(ca, "billing"), false},
		"a stranger":  {as(stranger, "spiffe://test/push-manager/pm"), false},
		"in the open": {insecure.NewCredentials(), false},
	} {
		conn, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(who.creds))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		_, err = pubsub.NewConnectNodeServiceClient(conn).PushMessage(ctx, &pubsub.PushMessageRequest{})
		cancel()
		_ = conn.Close()
		if refused := status.Code(err) == codes.Unavailable; refused == who.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCredentialsThatCannotWorkAreNamed(t *testing.T) {
	ca := etcdtest.NewCA(t)
	cert, key := ca.Issue("n1")
	good := TLS{CertFile: cert, KeyFile: key, ClientCAFile: ca.File, TrustDomain: "test"}
	for want, change := range map[string]func(*TLS){
		"required":     func(c *TLS) { c.ClientCAFile = "" },
		"TrustDomain":  func(c *TLS) { c.TrustDomain = "a/b" },
		"trust_domain": func(c *TLS) { c.TrustDomain = "" },
		"AllowedSANs":  func(c *TLS) { c.AllowedSANs = []string{"*"} },
		"cert_file":    func(c *TLS) { c.CertFile = "/nowhere" },
	} {
		bad := good
		change(&bad)
		if _, err := NewCredentials(bad); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}
