package app_test

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/gobwas/ws/wsutil"
	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/internal/app/connectnode"
	"github.com/push-manager/push-manager/internal/app/controller"
	"github.com/push-manager/push-manager/internal/app/pushmanager"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

// authority signs certificates of a test.
type authority struct {
	*certs.Authority

	pair certs.Pair
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	a, pair, err := certs.NewAuthority("test", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return authority{a, pair}
}

// issue makes a certificate for both sides, for this machine and a URI.
func (a authority) issue(t *testing.T, uri string, change ...func(*certs.Request)) certs.Pair {
	t.Helper()
	r := certs.Request{Hosts: []string{"127.0.0.1", "controller.test"}, URI: uri, Server: true, Client: true, NotAfter: time.Now().Add(time.Hour)}
	for _, f := range change {
		f(&r)
	}
	pair, err := a.Issue(r)
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

// fleet is etcd, the Controller, nodes and Push-Manager, which speak TLS to each other. Each connection has files of its own
// at each end, which a test replaces.
type fleet struct {
	t         *testing.T
	dir       string
	authority authority
	next      authority         // etcd reads its authorities once: it trusts this one from the beginning
	parts     map[string]string // names of sets of files, and the URIs of their certificates
	interval  string            // of reloads
	log       slog.Handler      // of Push-Manager and the nodes

	etcd         *etcdtest.Server
	controller   *controller.Controller
	toController *etcdtest.Proxy
	pm           *pushmanager.PushManager
}

func newFleet(t *testing.T, interval string) *fleet {
	t.Helper()
	f := &fleet{t: t, dir: t.TempDir(), authority: newAuthority(t), next: newAuthority(t), parts: map[string]string{}, interval: interval, log: slog.DiscardHandler}
	files := f.files("etcd", "spiffe://test/etcd")
	f.write("etcd.ca", slices.Concat(f.authority.pair.Cert, f.next.pair.Cert))
	f.etcd = etcdtest.Start(t, etcdtest.WithTLS(files.Cert, files.Key, files.CA))
	f.controller = program(t, &controller.Config{}, f.env(map[string]string{"GRPC_PORT": "0"},
		section{"NODE_TLS", "CLIENT_CA_FILE", "controller", "spiffe://test/controller"}, section{"ETCD_TLS", "CA_FILE", "controller-etcd", "spiffe://test/controller"})).(*controller.Controller)
	f.toController = etcdtest.NewProxy(t, f.controller.GRPCAddr())
	return f
}

func (f *fleet) write(name string, text []byte) {
	f.t.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		f.t.Fatal(err)
	}
}

// files makes a set.
func (f *fleet) files(name, uri string) certs.Files {
	f.t.Helper()
	f.parts[name] = uri
	pair := f.authority.issue(f.t, uri)
	f.write(name+".crt", pair.Cert)
	f.write(name+".key", pair.Key)
	f.write(name+".ca", f.authority.pair.Cert)
	return certs.Files{Cert: filepath.Join(f.dir, name+".crt"), Key: filepath.Join(f.dir, name+".key"), CA: filepath.Join(f.dir, name+".ca")}
}

// section is one of a program's settings, with a set of files.
type section struct{ prefix, ca, name, uri string }

// env are settings of a program with sections.
func (f *fleet) env(more map[string]string, sections ...section) map[string]string {
	env := map[string]string{
		"TRUST_DOMAIN": "test", "TLS_RELOAD_INTERVAL": f.interval, "METRICS_PORT": "0", "ETCD_ENDPOINTS": f.etcd.Endpoint(), "DRAIN_TIMEOUT": "5s",
	}
	if f.toController != nil {
		env["CONTROLLER_ADDRESS"] = f.toController.Addr()
	}
	for _, s := range sections {
		files := f.files(s.name, s.uri)
		env[s.prefix+"_CERT_FILE"], env[s.prefix+"_KEY_FILE"] = files.Cert, files.Key
		if s.ca != "" {
			env[s.prefix+"_"+s.ca] = files.CA
		}
	}
	maps.Copy(env, more)
	return env
}

func (f *fleet) startPushManager(more map[string]string) *pushmanager.PushManager {
	f.t.Helper()
	env := f.env(map[string]string{
		"GRPC_PORT": "0", "HTTP_PORT": "0", "SHARDS": "1", "TLS_CLIENT_AUTH": "require", "CONTROLLER_TLS_ALLOWED_SANS": "spiffe://test/controller", "DRAIN_NOTICE": "0s",
	}, section{"TLS", "CLIENT_CA_FILE", "api", "spiffe://test/api"}, section{"LINK_TLS", "CA_FILE", "link", "spiffe://test/push-manager/pm"},
		section{"CONTROLLER_TLS", "CA_FILE", "pm-controller", "spiffe://test/push-manager/pm"}, section{"ETCD_TLS", "CA_FILE", "pm-etcd", "spiffe://test/push-manager/pm"})
	maps.Copy(env, more)
	f.pm = loggingProgram(f.t, f.log, &pushmanager.Config{}, env).(*pushmanager.PushManager)
	return f.pm
}

// node starts a Connect-Node; plain leaves its port for Push-Managers without TLS.
func (f *fleet) node(id string, plain bool, more ...map[string]string) *connectnode.ConnectNode {
	f.t.Helper()
	uri := "spiffe://test/connect-node/" + id
	sections := []section{
		{"TLS", "", id + "-clients", ""}, {"CONTROLLER_TLS", "CA_FILE", id + "-controller", uri}, {"ETCD_TLS", "CA_FILE", id + "-etcd", uri},
	}
	if !plain {
		sections = append(sections, section{"NODE_TLS", "CLIENT_CA_FILE", id, uri})
	}
	env := f.env(map[string]string{"NODE_ID": id, "GRPC_PORT": "0", "HTTP_PORT": "0", "CONTROLLER_TLS_SERVER_NAME": "controller.test"}, sections...)
	for _, m := range more {
		maps.Copy(env, m)
	}
	n := loggingProgram(f.t, f.log, &connectnode.Config{}, env).(*connectnode.ConnectNode)
	eventually(f.t, id+" is ready", func() bool { return len(n.NotReady()) == 0 })
	return n
}

// join lets a user in over wss, who reads to the end. It returns once pushes arrive.
func (f *fleet) join(n *connectnode.ConnectNode, user string) {
	f.t.Helper()
	dialer := ws.Dialer{TLSConfig: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}} // who it is is tested elsewhere
	conn, _, _, err := dialer.Dial(f.t.Context(), "wss://"+n.HTTPAddr().String()+"/ws?user_id="+user)
	if err != nil {
		f.t.Fatal(err)
	}
	var reader sync.WaitGroup
	reader.Go(func() {
		for err := error(nil); err == nil; {
			_, _, err = wsutil.ReadServerData(conn) // it answers pings
		}
	})
	f.t.Cleanup(func() {
		_ = conn.Close()
		reader.Wait()
	})
}

// caller is a caller of the push API with files of its own.
func (f *fleet) caller() (*certs.Source, credentials.TransportCredentials) {
	f.t.Helper()
	source, err := certs.Open(certs.Config{Files: f.files("caller", "spiffe://test/billing"), Role: "caller", ReloadInterval: 20 * time.Millisecond})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(source.Close)
	return source, source.Client(certs.Side{})
}

// load pushes to users at a rate until it is stopped, over connections that it makes anew all the time.
type load struct {
	sent, wrong atomic.Int64
	bad         atomic.Pointer[string] // the first push that was not as it must be
	end         context.CancelFunc
	all         sync.WaitGroup
}

func startLoad(addr string, creds credentials.TransportCredentials, rate int, users []string, wrong func(*pubsub.PushToUserResponse, error) string) *load {
	workers := min(max(rate/50, 4), 64)
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{end: cancel}
	for i := range workers {
		l.all.Go(func() {
			tick := time.NewTicker(time.Second * time.Duration(workers) / time.Duration(rate))
			defer tick.Stop()
			for ctx.Err() == nil {
				conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(creds))
				for n := 0; err == nil && n < max(rate/workers, 4) && ctx.Err() == nil; n++ {
					<-tick.C
					user := users[(i+n)%len(users)]
					call, done := context.WithTimeout(context.Background(), time.Minute) // the machine may be busy
					reply, callErr := pubsub.NewPushManagerServiceClient(conn).PushToUser(call, &pubsub.PushToUserRequest{UserId: user, Content: &pubsub.MessageContent{Data: []byte("hello")}}, grpc.WaitForReady(true))
					done()
					l.sent.Add(1)
					if text := wrong(reply, callErr); text != "" {
						l.wrong.Add(1)
						l.bad.CompareAndSwap(nil, &text)
					}
				}
				if conn != nil {
					_ = conn.Close()
				}
			}
		})
	}
	return l
}

// stop ends the load, and reports what was wrong.
func (l *load) stop(t *testing.T) {
	t.Helper()
	l.end()
	l.all.Wait()
	if bad := l.bad.Load(); bad != nil {
		t.Errorf("%d of %d pushes, the first: %s", l.wrong.Load(), l.sent.Load(), *bad)
	}
}

// knock makes a TLS connection to a gRPC port, and tells whether it is let in: whether the server speaks HTTP/2 with it.
func knock(addr string, cfg *tls.Config) (serial *big.Int, letIn bool) {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", addr, cfg)
	if err != nil {
		return nil, false
	}
	defer func() { _ = conn.Close() }()
	return conn.ConnectionState().PeerCertificates[0].SerialNumber, speaks(conn)
}

// speaks tells whether the other side answers HTTP/2 with its settings.
func speaks(conn net.Conn) bool {
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = io.WriteString(conn, http2.ClientPreface)
	framer := http2.NewFramer(conn, conn)
	_ = framer.WriteSettings()
	frame, err := framer.ReadFrame()
	if err != nil {
		return false
	}
	_, ok := frame.(*http2.SettingsFrame)
	return ok
}

// as is a client with a certificate, which believes whoever answers.
func as(t *testing.T, pair certs.Pair) *tls.Config {
	t.Helper()
	c := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}} // it plays an attacker
	if len(pair.Cert) > 0 {
		cert, err := tls.X509KeyPair(pair.Cert, pair.Key)
		if err != nil {
			t.Fatal(err)
		}
		// Whatever the server asks for: a client of Go would show nothing where the authorities are other ones.
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
	}
	return c
}
