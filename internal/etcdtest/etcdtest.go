package etcdtest

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/authpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/push-manager/push-manager/internal/freeport"
)

// Server is one etcd member on loopback ports that stay the same over restarts.
type Server struct {
	tb                  testing.TB
	front, client, peer string // host:port
	dir, name           string
	cluster             string // all members, "" for one alone
	certFile, keyFile   string // "": plain text
	clientCA            string
	tokenTTL            time.Duration // 0: etcd's own
	etcd                *embed.Etcd
	// Clients come through here: etcd waits up to five seconds for its clients
	// when it stops, unless their connections are gone already.
	proxy *Proxy
}

// Option is something that an etcd does not do by itself.
type Option func(*Server)

// WithTLS has clients speak TLS. clientCA, where it is not empty, is a PEM file of the
// authorities that the client certificates must be from; without it none is asked for.
func WithTLS(certFile, keyFile, clientCA string) Option {
	return func(s *Server) {
		s.certFile, s.keyFile, s.clientCA = certFile, keyFile, clientCA
	}
}

// WithTokenTTL lets tokens of users expire that are not used for so long, in whole seconds.
func WithTokenTTL(ttl time.Duration) Option { return func(s *Server) { s.tokenTTL = ttl } }

// Start runs etcd on an empty data directory until the test ends. Clients are to
// be closed before it: those of Client are, and so is what registers its cleanup
// after this call.
func Start(tb testing.TB, opts ...Option) *Server {
	tb.Helper()
	s := Reserve(tb, opts...)
	s.start()
	return s
}

// Reserve gives an etcd that is not running yet; Restart starts it.
func Reserve(tb testing.TB, opts ...Option) *Server {
	tb.Helper()
	s := &Server{tb: tb, front: freeport.Addr(tb), client: freeport.Addr(tb), peer: freeport.Addr(tb), dir: tb.TempDir(), name: "test"}
	for _, opt := range opts {
		opt(s)
	}
	tb.Cleanup(s.Stop)
	return s
}

// StartCluster runs n members of one etcd, which stop and restart each by itself.
func StartCluster(tb testing.TB, n int) []*Server {
	tb.Helper()
	members, all := make([]*Server, n), make([]string, n)
	for i := range members {
		members[i] = Reserve(tb)
		members[i].name = fmt.Sprint("test", i)
		all[i] = members[i].name + "=http://" + members[i].peer
	}
	for _, s := range members {
		s.cluster = strings.Join(all, ",")
	}
	RestartAll(members...)
	return members
}

// RestartAll starts members together: none of them need be ready before the others are.
func RestartAll(members ...*Server) {
	for _, s := range members {
		s.tb.Helper()
		s.Stop()
		s.launch()
	}
	for _, s := range members {
		s.await()
	}
}

// Endpoint is the host:port for clients.
func (s *Server) Endpoint() string { return s.front }

// Client is a client of the test's own, closed when the test ends.
func (s *Server) Client() *clientv3.Client {
	s.tb.Helper()
	return NewClient(s.tb, s.front)
}

// User is one of an etcd that asks for names and passwords.
type User struct {
	Name, Password string
	Read, Write    string // prefixes: what it may read, and what it may read and write; "" for nothing
}

// EnableAuth makes a user who may read and write all below prefix, and asks everybody for a name
// and password from then on.
func (s *Server) EnableAuth(user, password, prefix string) {
	s.tb.Helper()
	s.EnableAuthFor(s.Client(), User{Name: user, Password: password, Write: prefix})
}

// EnableAuthFor makes users over a client of anybody's, and asks everybody for a name and password from then on.
func (s *Server) EnableAuthFor(client *clientv3.Client, users ...User) {
	s.tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	must := func(_ any, err error) {
		s.tb.Helper()
		if err != nil {
			s.tb.Fatalf("enable authentication: %v", err)
		}
	}
	must(client.UserAdd(ctx, "root", "root"))
	must(client.UserGrantRole(ctx, "root", "root"))
	for _, u := range users {
		must(client.RoleAdd(ctx, u.Name))
		for prefix, permission := range map[string]authpb.Permission_Type{u.Read: clientv3.PermRead, u.Write: clientv3.PermReadWrite} {
			if prefix != "" {
				must(client.RoleGrantPermission(ctx, u.Name, prefix, clientv3.GetPrefixRangeEnd(prefix), clientv3.PermissionType(permission)))
			}
		}
		must(client.UserAdd(ctx, u.Name, u.Password))
		must(client.UserGrantRole(ctx, u.Name, u.Name))
	}
	must(client.AuthEnable(ctx))
}

// NewClient connects to any endpoint and is closed when the test ends.
func NewClient(tb testing.TB, endpoint string) *clientv3.Client {
	tb.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{endpoint},
		Logger:    zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond},
			MinConnectTimeout: time.Second,
		})},
	})
	if err != nil {
		tb.Fatalf("etcd client: %v", err)
	}
	tb.Cleanup(func() { _ = client.Close() }) // an error here is only the client's own cancelled context
	return client
}

// Stop ends etcd; its data stays. Stopping twice is fine.
func (s *Server) Stop() {
	if s.etcd == nil {
		return
	}
	if s.proxy != nil { // it was ready
		s.proxy.close()
		s.proxy = nil
	}
	s.etcd.Close()
	s.etcd = nil
}

// Restart starts etcd again on its old data, or for the first time.
func (s *Server) Restart() {
	s.tb.Helper()
	s.Stop()
	s.start()
}

// Wipe starts etcd again with nothing in it: its revisions begin anew.
func (s *Server) Wipe() {
	s.tb.Helper()
	s.Stop()
	if err := os.RemoveAll(s.dir); err != nil {
		s.tb.Fatalf("wipe etcd: %v", err)
	}
	s.start()
}

func (s *Server) start() {
	s.tb.Helper()
	s.launch()
	s.await()
}

// launch starts etcd; one of several members is ready only when most are there.
func (s *Server) launch() {
	s.tb.Helper()
	cfg := embed.NewConfig()
	cfg.Name = s.name
	cfg.Dir = s.dir
	cfg.ListenClientUrls = []url.URL{{Scheme: "http", Host: s.client}}
	cfg.AdvertiseClientUrls = cfg.ListenClientUrls
	cfg.ListenPeerUrls = []url.URL{{Scheme: "http", Host: s.peer}}
	cfg.AdvertisePeerUrls = cfg.ListenPeerUrls
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.TickMs, cfg.ElectionMs = 10, 100 // a leader in 0.1 s
	if s.cluster != "" {
		cfg.InitialCluster = s.cluster
		cfg.TickMs, cfg.ElectionMs = 100, 1000 // a busy machine must not cost the leader its place
	}
	if s.certFile != "" {
		cfg.ListenClientUrls[0].Scheme = "https"
		tls := &cfg.ClientTLSInfo
		tls.CertFile, tls.KeyFile, tls.TrustedCAFile, tls.ClientCertAuth = s.certFile, s.keyFile, s.clientCA, s.clientCA != ""
	}
	if s.tokenTTL != 0 {
		cfg.AuthTokenTTL = uint(s.tokenTTL / time.Second)
	}
	cfg.BcryptCost = 4 // the least: a test need not make guessing slow
	cfg.UnsafeNoFsync = true
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	var err error
	if s.etcd, err = listening(func() (*embed.Etcd, error) { return embed.StartEtcd(cfg) }); err != nil {
		s.etcd = nil
		s.tb.Fatalf("start etcd: %v", err)
	}
}

// listening calls start until it finds its addresses free. They are ours alone, but a process
// that another test starts has a copy of what listened at them until it runs its own program.
func listening[T any](start func() (T, error)) (T, error) {
	for began := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		what, err := start()
		if !errors.Is(err, syscall.EADDRINUSE) || time.Since(began) > 20*time.Second {
			return what, err
		}
	}
}

func (s *Server) await() {
	s.tb.Helper()
	etcd := s.etcd
	late := time.NewTimer(20 * time.Second)
	defer late.Stop()
	select {
	case <-etcd.Server.ReadyNotify():
	case err := <-etcd.Err():
		s.tb.Fatalf("start etcd: %v", err)
	case <-late.C:
		s.tb.Fatal("etcd not ready after 20s")
	}
	s.proxy = listen(s.tb, s.front, s.client)
}
