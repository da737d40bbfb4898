package app_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/certs"
	pubsub "github.com/push-manager/push-manager/proto"
)

// named makes a certificate whose common name says what its alternative names do not.
func (a authority) named(t *testing.T, commonName, uri string) certs.Pair {
	t.Helper()
	signer, err := tls.X509KeyPair(a.pair.Cert, a.pair.Key)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: commonName, Organization: []string{commonName}}, URIs: []*url.URL{u},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, signer.Leaf, &key.PublicKey, signer.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return certs.Pair{Cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), Key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})}
}

// TestWhoIsLetInAtEachPort has the attacks on the handshake, on all gRPC ports of a running fleet. That a session is not resumed past
// an authority that has gone is in TestEverythingIsRotatedUnderLoadWithoutAFailedPush, swapped addresses in
// TestSwappedAddressesInEtcdReachNobody.
func TestWhoIsLetInAtEachPort(t *testing.T) {
	f := newFleet(t, "1h")
	m := f.startPushManager(nil)
	n := f.node("n1", false)
	f.join(n, "alice")
	eventually(t, "the node is reached", func() bool { return m.Reachable() == 1 })
	const manager = "spiffe://test/push-manager/pm-9"
	good := f.authority.issue(t, manager)
	change := func(change func(*certs.Request)) certs.Pair { return f.authority.issue(t, manager, change) }
	config := func(pair certs.Pair, change func(*tls.Config)) *tls.Config {
		c := as(t, pair)
		if change != nil {
			change(c)
		}
		return c
	}
	attempts := map[string]struct {
		cfg    *tls.Config
		letIn  bool
		andAPI bool // the push API lets it in, too: whoever has a certificate may call it
	}{
		"a Push-Manager":    {config(good, nil), true, true},
		"no certificate":    {config(certs.Pair{}, nil), false, false},
		"another authority": {config(newAuthority(t).issue(t, manager), nil), false, false},
		"expired":           {config(change(func(r *certs.Request) { r.NotAfter = time.Now().Add(-time.Minute) }), nil), false, false},
		"not valid yet": {config(change(func(r *certs.Request) {
			r.NotBefore = time.Now().Add(time.Hour)
			r.NotAfter = time.Now().Add(2 * time.Hour)
		}), nil), false, false},
		"for servers only":        {config(change(func(r *certs.Request) { r.Client = false }), nil), false, false},
		"TLS 1.2":                 {config(good, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }), false, false},
		"without ALPN":            {config(good, func(c *tls.Config) { c.NextProtos = nil }), false, false},
		"HTTP/1.1":                {config(good, func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }), false, false},
		"a caller":                {config(f.authority.issue(t, "spiffe://test/billing"), nil), false, true},
		"a common name":           {config(f.authority.named(t, manager, "spiffe://test/billing"), nil), false, true},
		"of another trust domain": {config(f.authority.issue(t, "spiffe://evil/push-manager/pm"), nil), false, true},
	}
	ports := map[string]string{"push API": m.GRPCAddr(), "node": n.GRPCAddr().String(), "Controller": f.controller.GRPCAddr()}
	for port, addr := range ports {
		for name, a := range attempts {
			want := a.letIn || a.andAPI && port == "push API"
			if _, letIn := knock(addr, a.cfg); letIn != want {
				t.Errorf("%s: %s: let in: %v", port, name, letIn)
			}
		}
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if speaks(conn) {
			t.Errorf("%s: speaks plain text", port)
		}
		_ = conn.Close()
	}
	// A node comes to the Controller, and to nobody else but the push API.
	node := as(t, f.authority.issue(t, "spiffe://test/connect-node/n9"))
	for port, want := range map[string]bool{"push API": true, "node": false, "Controller": true} {
		if _, letIn := knock(ports[port], node); letIn != want {
			t.Errorf("%s: a node: let in: %v", port, letIn)
		}
	}
	if text := metricsOf(t, m); strings.Contains(text, `push_manager_tls_handshake_failures_total{role="api"} 0`) {
		t.Error("nobody has counted the refusals")
	}
}

// TestSilentConnectionsAreInNobodysWay opens connections that say nothing, half a hello, or a byte now and then.
func TestSilentConnectionsAreInNobodysWay(t *testing.T) {
	f := newFleet(t, "1h")
	m := f.startPushManager(map[string]string{"API_HANDSHAKES": "100"})
	n := f.node("n1", false)
	f.join(n, "alice")
	eventually(t, "the node is reached", func() bool { return m.Reachable() == 1 })
	_, creds := f.caller()
	// What a client begins with, as a proxy sees it.
	hello := make(chan []byte, 1)
	ours, theirs := net.Pipe()
	go func() {
		b := make([]byte, 4096)
		n, _ := theirs.Read(b)
		hello <- b[:n]
		_ = theirs.Close()
	}()
	_ = tls.Client(ours, as(t, certs.Pair{})).HandshakeContext(t.Context())
	first := <-hello

	var conns []net.Conn
	for addr, count := range map[string]int{m.GRPCAddr(): 2000, n.GRPCAddr().String(): 200, f.controller.GRPCAddr(): 200} {
		for i := range count {
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			if i%2 == 1 {
				_, _ = conn.Write(first[:len(first)/2]) // it may be closed already
			}
			conns = append(conns, conn)
		}
	}
	var open int
	for line := range strings.Lines(metricsOf(t, m)) {
		_, _ = fmt.Sscanf(line, "push_manager_api_handshakes %d", &open)
	}
	if open > 100+1 {
		t.Errorf("%d handshakes at a time, API_HANDSHAKES is 100", open)
	}
	l := startLoad(m.GRPCAddr(), creds, 20, []string{"alice"}, func(r *pubsub.PushToUserResponse, err error) string {
		if err != nil || !r.GetSuccess() {
			return fmt.Sprint(r, err)
		}
		return ""
	})
	defer l.stop(t)
	crumbs := time.NewTicker(500 * time.Millisecond)
	defer crumbs.Stop()
	for end := time.Now().Add(time.Minute); len(conns) > 0; <-crumbs.C {
		conns = slices.DeleteFunc(conns, func(conn net.Conn) bool {
			_, _ = conn.Write(first[len(first)/2 : len(first)/2+1]) // the read tells
			_ = conn.SetReadDeadline(time.Now().Add(time.Millisecond))
			_, err := io.Copy(io.Discard, conn)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return false
			}
			_ = conn.Close()
			return true
		})
		if time.Now().After(end) {
			t.Fatalf("%d silent connections are open after a minute", len(conns))
		}
	}
}

// TestANodeReportsAsItselfAlone is the Controller against a node that lies.
func TestANodeReportsAsItselfAlone(t *testing.T) {
	f := newFleet(t, "1h")
	n1 := f.node("n1", false)
	f.join(n1, "alice")
	client := func(uri string, hosts ...string) pubsub.ControllerServiceClient {
		pair := f.authority.issue(t, uri, func(r *certs.Request) {
			if hosts != nil {
				r.Hosts = hosts
			}
		})
		conn, err := grpc.NewClient(f.controller.GRPCAddr(), grpc.WithTransportCredentials(credentials.NewTLS(as(t, pair))))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return pubsub.NewControllerServiceClient(conn)
	}
	found := func() bool {
		r, err := client("spiffe://test/push-manager/pm").GetUserNode(t.Context(), &pubsub.GetUserNodeRequest{UserId: "alice"})
		return err == nil && r.GetNodeId() == "n1"
	}
	eventually(t, "alice is known", found)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	liars := map[string]pubsub.ControllerServiceClient{"another node": client("spiffe://test/connect-node/n2"), "a Push-Manager": client("spiffe://test/push-manager/pm")}
	for who, c := range liars {
		for what, call := range map[string]func() error{
			"JoinRoom": func() error {
				_, err := c.JoinRoom(ctx, &pubsub.JoinRoomRequest{UserId: "eve", RoomId: "r", NodeId: "n1"})
				return err
			},
			"LeaveRoom": func() error {
				_, err := c.LeaveRoom(ctx, &pubsub.LeaveRoomRequest{UserId: "alice", RoomId: "@node:n1", NodeId: "n1"})
				return err
			},
			"LeaveRoom on all nodes": func() error {
				_, err := c.LeaveRoom(ctx, &pubsub.LeaveRoomRequest{UserId: "alice", RoomId: "@node:n1"})
				return err
			},
			"LeaveRoom of everybody": func() error {
				_, err := c.LeaveRoom(ctx, &pubsub.LeaveRoomRequest{NodeId: "n1", BootId: "b", Seq: 1})
				return err
			},
			"SyncNode": func() error {
				_, err := c.SyncNode(ctx, &pubsub.SyncNodeRequest{NodeId: "n1", BootId: "b"})
				return err
			},
		} {
			if err := call(); status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "n1") && what != "LeaveRoom on all nodes" {
				t.Errorf("%s as n1 by %s: %v", what, who, err)
			}
		}
	}
	if !found() {
		t.Error("alice is gone")
	}
	if _, err := liars["another node"].JoinRoom(ctx, &pubsub.JoinRoomRequest{UserId: "dora", RoomId: "r", NodeId: "n2"}); err != nil {
		t.Errorf("as itself: %v", err)
	}
}
