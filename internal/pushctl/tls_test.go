package pushctl

import (
	"crypto/tls"
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/discovery"
)

func TestPushOverTLS(t *testing.T) {
	ca, other := etcdtest.NewCA(t), etcdtest.NewCA(t)
	cert, key := ca.Issue("localhost", "127.0.0.1")
	source, err := certs.Open(certs.Config{Files: certs.Files{Cert: cert, Key: key, CA: ca.File}, Role: "test"})
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	gs := grpc.NewServer(grpc.Creds(source.Server(certs.Side{ClientAuth: tls.RequireAndVerifyClientCert})))
	pubsub.RegisterPushManagerServiceServer(gs, &server{success: true, summary: &pubsub.DeliverySummary{Targets: 1, Delivered: 1}})
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- gs.Serve(lis) }()
	defer func() {
		gs.Stop()
		<-served
	}()
	mine, mineKey := ca.Issue("me")
	for name, tc := range map[string]struct {
		args []string
		code int
		text string
	}{
		"all files":         {[]string{"--ca", ca.File, "--cert", mine, "--key", mineKey}, 0, ""},
		"plain text":        {nil, 1, ""},
		"no certificate":    {[]string{"--tls", "--ca", ca.File}, 1, ""},
		"system's":          {[]string{"--tls", "--cert", mine, "--key", mineKey}, 1, "unknown authority"},
		"another authority": {[]string{"--ca", other.File, "--cert", mine, "--key", mineKey}, 1, "unknown authority"},
		"no key":            {[]string{"--cert", mine}, exitUsage, "--key: missing"},
		"another key":       {[]string{"--cert", mine, "--key", key}, exitUsage, "--cert: "},
		"no authority":      {[]string{"--ca", "/nowhere"}, exitUsage, "--ca: "},
	} {
		code, _, errOut := pushctl(t, "", append([]string{"user", "bob", "x", "--address", lis.Addr().String()}, tc.args...)...)
		if code != tc.code || !strings.Contains(errOut, tc.text) {
			t.Errorf("%s: exit %d, %q", name, code, errOut)
		}
	}
}

func TestNodesOverTLS(t *testing.T) {
	ca := etcdtest.NewCA(t)
	cert, key := ca.Issue("localhost", "127.0.0.1")
	etcd := etcdtest.Start(t, etcdtest.WithTLS(cert, key, ca.File))
	mine, mineKey := ca.Issue("me")
	source, err := certs.Open(certs.Config{Files: certs.Files{Cert: mine, Key: mineKey, CA: ca.File}, Role: "test"})
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	client, err := discovery.NewClient(discovery.ClientConfig{Endpoints: []string{etcd.Endpoint()}, Credentials: source.Client(certs.Side{})})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	_, err = client.Put(t.Context(), discovery.ConnectNodePrefix+"n1", `{"Op":0,"Addr":"10.0.0.1:50052","Metadata":{"node_id":"n1"}}`)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		args []string
		code int
		text string
	}{
		"all files":      {[]string{"--ca", ca.File, "--cert", mine, "--key", mineKey}, 0, "n1"},
		"no certificate": {[]string{"--ca", ca.File}, 1, "etcd does not answer"},
		"no key":         {[]string{"--ca", ca.File, "--cert", mine}, exitUsage, "--key: missing"},
		"no authority":   {[]string{"--ca", "/nowhere"}, exitUsage, "--ca: "},
	} {
		code, out, errOut := pushctl(t, "", append([]string{"nodes", "--timeout=2s", "--etcd-endpoints", etcd.Endpoint()}, tc.args...)...)
		if code != tc.code || !strings.Contains(out+errOut, tc.text) {
			t.Errorf("%s: exit %d, %q, %q", name, code, out, errOut)
		}
	}
}
