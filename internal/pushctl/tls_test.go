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
