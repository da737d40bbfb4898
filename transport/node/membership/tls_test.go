package membership

import (
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

func TestTheControllerIsReachedOverTLSUnderItsName(t *testing.T) {
	ca, other := etcdtest.NewCA(t), etcdtest.NewCA(t)
	cert, key := ca.Issue("controller.test", "spiffe://test/controller/1")
	creds, err := credentials.NewServerTLSFromFile(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	gs := grpc.NewServer(grpc.Creds(creds))
	pubsub.RegisterControllerServiceServer(gs, pubsub.UnimplementedControllerServiceServer{})
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
	reaches := func(t *testing.T, tls TLS) bool {
		t.Helper()
		creds, err := NewCredentials(tls)
		if err != nil {
			t.Fatal(err)
		}
		defer creds.Close()
		creds.Reload()
		r, err := New(Config{NodeID: "n1", BootID: "b", Controller: lis.Addr().String(), Credentials: creds})
		if err != nil {
			t.Fatal(err)
		}
		r.Start()
		defer r.Close()
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end) && !r.Ready(); time.Sleep(5 * time.Millisecond) {
			if r.cc.GetState().String() == "TRANSIENT_FAILURE" {
				return false
			}
		}
		return r.Ready()
	}
	for name, tc := range map[string]struct {
		tls  TLS
		want bool
	}{
		"by its name":          {TLS{CAFile: ca.File, ServerName: "controller.test"}, true},
		"by a path":            {TLS{CAFile: ca.File, TrustDomain: "test", AllowedSANs: []string{"controller/*"}}, true},
		"by the host":          {TLS{CAFile: ca.File}, false}, // 127.0.0.1 is not in it
		"another name":         {TLS{CAFile: ca.File, ServerName: "other.test"}, false},
		"another path":         {TLS{CAFile: ca.File, TrustDomain: "test", AllowedSANs: []string{"push-manager/*"}}, false},
		"of another authority": {TLS{CAFile: other.File, ServerName: "controller.test"}, false},
	} {
		if got := reaches(t, tc.tls); got != tc.want {
			t.Errorf("%s: reached: %v", name, got)
		}
	}
	for want, tls := range map[string]TLS{
		"CAFile": {}, "TrustDomain": {CAFile: ca.File, TrustDomain: "a/b"}, "ServerName and": {CAFile: ca.File, ServerName: "a", AllowedSANs: []string{"a"}},
		"AllowedSANs": {CAFile: ca.File, AllowedSANs: []string{"*"}}, "key_file": {CAFile: ca.File, CertFile: cert},
	} {
		if _, err := NewCredentials(tls); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %s", tls, err, want)
		}
	}
}
