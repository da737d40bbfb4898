package pushmanager

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"

	"github.com/push-manager/push-manager/internal/etcdtest"
)

// near is where a listener on all addresses is reached from this machine.
func near(addr string) string { return "127.0.0.1" + addr[strings.LastIndex(addr, ":"):] }

// trust are credentials of a client with a certificate, if there is one.
func trust(t *testing.T, caFile, certFile, keyFile string) credentials.TransportCredentials {
	t.Helper()
	text, err := os.ReadFile(caFile)
	if err != nil {
		t.Fatal(err)
	}
	c := &tls.Config{RootCAs: x509.NewCertPool()}
	c.RootCAs.AppendCertsFromPEM(text)
	if certFile != "" {
		pair, err := tls.LoadX509KeyPair(certFile, keyFile)
		if err != nil {
			t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return credentials.NewTLS(c)
}

// ask makes one call over a connection of its own, and returns the serial number of the server's certificate.
func ask(t *testing.T, addr string, creds credentials.TransportCredentials) (serial string, err error) {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var p peer.Peer
	if _, err = grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.Peer(&p)); err != nil {
		return "", err
	}
	return p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates[0].SerialNumber.String(), nil
}

func TestPushAPIOverTLSAsksForCertificatesAndTakesNewOnes(t *testing.T) {
	etcd := etcdtest.Start(t)
	ca, next := etcdtest.NewCA(t), etcdtest.NewCA(t)
	cert, key := ca.Issue("localhost", "127.0.0.1")
	callerCert, callerKey := ca.Issue("billing")
	m := startPushManager(t, map[string]string{
		"ETCD_ENDPOINTS": etcd.Endpoint(), "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key, "TLS_CLIENT_CA_FILE": ca.File, "TLS_CLIENT_AUTH": "require",
		"TLS_RELOAD_INTERVAL": "1h", "LISTEN_ADDRESS": "0.0.0.0",
	})
	defer drain(t, m, 8*time.Second)
	addr := near(m.GRPCAddr())
	caller := trust(t, ca.File, callerCert, callerKey)
	first, err := ask(t, addr, caller)
	if err != nil {
		t.Fatal(err)
	}
	strangerCert, strangerKey := next.Issue("billing")
	for name, creds := range map[string]credentials.TransportCredentials{
		"plain text": insecure.NewCredentials(), "no certificate": trust(t, ca.File, "", ""), "a stranger's": trust(t, ca.File, strangerCert, strangerKey),
	} {
		if _, err := ask(t, addr, creds); err == nil {
			t.Errorf("%s: let in", name)
		}
	}
	if _, text := get(t, "http://"+near(m.HTTPAddr())+"/metrics"); !strings.Contains(text, "push_manager_insecure 0") {
		t.Error("it says that it is insecure")
	}

	newCert, newKey := next.Issue("localhost", "127.0.0.1")
	for from, to := range map[string]string{newCert: cert, newKey: key, next.File: ca.File} {
		text, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m.Reload() // as SIGHUP does
	renewed := trust(t, next.File, strangerCert, strangerKey)
	eventually(t, "the new certificate is shown", func() bool {
		serial, err := ask(t, addr, renewed)
		return err == nil && serial != first
	})
	if _, err := ask(t, addr, caller); err == nil {
		t.Error("the old authority is still good")
	}
}

func TestInsecureIsShownAndLogged(t *testing.T) {
	etcd := etcdtest.Start(t)
	m := startPushManager(t, map[string]string{"ETCD_ENDPOINTS": etcd.Endpoint(), "LISTEN_ADDRESS": "0.0.0.0", "ALLOW_INSECURE": "true"})
	defer drain(t, m, 8*time.Second)
	if _, text := get(t, "http://"+near(m.HTTPAddr())+"/metrics"); !strings.Contains(text, "push_manager_insecure 1") {
		t.Error("it does not say that it is insecure")
	}
}
