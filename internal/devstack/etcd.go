package devstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// etcdServer is an etcd of one member in this process.
type etcdServer struct {
	etcd      *embed.Etcd
	endpoint  string
	dir       string
	temporary bool
}

// startEtcd runs etcd on loopback. Without a directory its data goes into a
// temporary one.
func startEtcd(ctx context.Context, dir string, clientPort, peerPort int) (_ *etcdServer, err error) {
	s := &etcdServer{dir: dir}
	if dir == "" {
		if s.dir, err = os.MkdirTemp("", "push-manager-dev-"); err != nil {
			return nil, fmt.Errorf("directory for etcd: %w", err)
		}
		s.temporary = true
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.remove())
		}
	}()
	cfg := embed.NewConfig()
	cfg.Name = "dev"
	cfg.Dir = s.dir
	cfg.LogLevel = "panic"
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	// Data that is removed at the end need not survive a power cut.
	cfg.UnsafeNoFsync = s.temporary
	cfg.TickMs, cfg.ElectionMs = 10, 100 // the only member elects itself in 0.1 s
	client, err := loopbackURL(clientPort)
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	peer, err := loopbackURL(peerPort)
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	s.endpoint = client.Host
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	if s.etcd, err = embed.StartEtcd(cfg); err != nil {
		return nil, fmt.Errorf("start etcd at %s: %w", client.Host, err)
	}
	select {
	case <-s.etcd.Server.ReadyNotify():
		return s, nil
	case err := <-s.etcd.Err():
		s.etcd.Close()
		return nil, fmt.Errorf("start etcd: %w", err)
	case <-ctx.Done():
		s.etcd.Close()
		return nil, fmt.Errorf("start etcd: %w", context.Cause(ctx))
	}
}

// stop ends etcd, whose clients have been closed.
func (s *etcdServer) stop(context.Context) error {
	s.etcd.Close()
	return s.remove()
}

func (s *etcdServer) remove() error {
	if !s.temporary {
		return nil
	}
	return os.RemoveAll(s.dir)
}

// loopbackURL is an address to listen on. etcd wants to know its port before it
// listens, so port 0 is resolved here. A port in use is an error that names it.
func loopbackURL(port int) (url.URL, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(context.Background(), "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return url.URL{}, err
	}
	host := l.Addr().String()
	return url.URL{Scheme: "http", Host: host}, l.Close()
}
