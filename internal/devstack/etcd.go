package devstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"runtime"
	"strconv"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/push-manager/push-manager/internal/certs"
)

// etcdServer is an etcd of one member in this process.
type etcdServer struct {
	etcd     *embed.Etcd
	endpoint string
	dir      string
	failed   chan error  // what it cannot go on with, once; the goroutine that found it has ended
	broken   atomic.Bool // set before that
}

// OnWrite ends the goroutine that has logged the end of etcd, and not the process. etcd panics or
// exits where its disk is full, for example: then whoever runs it can say so and stop the rest.
func (s *etcdServer) OnWrite(entry *zapcore.CheckedEntry, fields []zapcore.Field) {
	err := errors.New(entry.Message)
	for _, f := range fields {
		if cause, ok := f.Interface.(error); ok {
			err = fmt.Errorf("%s: %w", entry.Message, cause)
		}
	}
	s.fail(err)
	runtime.Goexit()
}

// fail notes the first error that etcd cannot go on with.
func (s *etcdServer) fail(err error) {
	s.broken.Store(true)
	select {
	case s.failed <- fmt.Errorf("etcd in %s: %w", s.dir, err):
	default:
	}
}

// startEtcd runs etcd on loopback, over TLS where files is not nil. A crash may lose what is in a temporary directory.
func startEtcd(ctx context.Context, dir string, temporary bool, files *certs.Files, clientPort, peerPort int) (_ *etcdServer, err error) {
	s := &etcdServer{dir: dir, failed: make(chan error, 1)}
	cfg := embed.NewConfig()
	cfg.Name = "dev"
	cfg.Dir = s.dir
	cfg.LogLevel = "panic"
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop().WithOptions(zap.WithFatalHook(s), zap.WithPanicHook(s)))
	// Data that is removed at the end need not survive a power cut.
	cfg.UnsafeNoFsync = temporary
	cfg.TickMs, cfg.ElectionMs = 10, 100 // the only member elects itself in 0.1 s
	scheme := "http"
	if files != nil {
		scheme = "https"
		cfg.ClientTLSInfo = transport.TLSInfo{CertFile: files.Cert, KeyFile: files.Key, TrustedCAFile: files.CA, ClientCertAuth: true}
		cfg.PeerTLSInfo = cfg.ClientTLSInfo
	}
	client, err := loopbackURL(scheme, clientPort)
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	peer, err := loopbackURL(scheme, peerPort)
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	s.endpoint = client.Host
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	started := make(chan *embed.Etcd, 1)
	go func() { // whose end OnWrite may be; then it has told
		defer func() {
			if e := recover(); e != nil {
				s.fail(fmt.Errorf("panic: %v", e))
			}
		}()
		etcd, err := embed.StartEtcd(cfg)
		if err != nil {
			s.fail(err)
			return
		}
		started <- etcd
	}()
	select {
	case s.etcd = <-started:
	case err := <-s.failed:
		return nil, fmt.Errorf("start %w", err)
	case <-ctx.Done():
		return nil, fmt.Errorf("start etcd: %w", context.Cause(ctx))
	}
	select {
	case <-s.etcd.Server.ReadyNotify():
		return s, nil
	case err = <-s.etcd.Err():
	case err = <-s.failed:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	s.close(ctx)
	return nil, fmt.Errorf("start etcd: %w", err)
}

// close ends etcd. One that has failed may wait for a goroutine of its own that is gone, or for a
// lock that it had: it is left behind at the end of ctx, or after a second.
func (s *etcdServer) close(ctx context.Context) {
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		s.etcd.Close()
	}()
	if !s.broken.Load() {
		<-closed
		return
	}
	late := time.NewTimer(time.Second)
	defer late.Stop()
	select {
	case <-closed:
	case <-late.C:
	case <-ctx.Done():
	}
}

// loopbackURL is an address to listen on. etcd wants to know its port before it
// listens, so port 0 is resolved here. A port in use is an error that names it.
func loopbackURL(scheme string, port int) (url.URL, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(context.Background(), "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return url.URL{}, err
	}
	host := l.Addr().String()
	return url.URL{Scheme: scheme, Host: host}, l.Close()
}
