package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strconv"
	"sync"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/transport/discovery"
	"github.com/push-manager/push-manager/transport/node"
)

// argKey is the environment variable with the JSON of a role's argument.
const argKey = "PUSH_MANAGER_BENCH_ARG"

func roleArg[A any]() (arg A, err error) {
	if err := json.Unmarshal([]byte(os.Getenv(argKey)), &arg); err != nil {
		return arg, fmt.Errorf("argument: %w", err)
	}
	return arg, nil
}

type none struct{}

// listen opens a port of this machine that nobody else reaches.
func listen(ctx context.Context) (net.Listener, error) {
	var lc net.ListenConfig
	return lc.Listen(ctx, "tcp", "127.0.0.1:0")
}

// freePort is a port for a program that wants to listen itself.
func freePort(ctx context.Context) (address, port string, err error) {
	l, err := listen(ctx)
	if err != nil {
		return "", "", err
	}
	address = l.Addr().String()
	_ = l.Close() // nobody has connected
	_, port, err = net.SplitHostPort(address)
	return address, port, err
}

// etcdRole is an etcd of one member, whose data is gone with it.
func etcdRole(ctx context.Context, p *part) error {
	dir, err := os.MkdirTemp("", "etcd-")
	if err != nil {
		return fmt.Errorf("directory for etcd: %w", err)
	}
	p.onStop(func() { _ = os.RemoveAll(dir) })
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir, cfg.UnsafeNoFsync = "bench", dir, true
	cfg.LogLevel, cfg.ZapLoggerBuilder = "panic", embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.TickMs, cfg.ElectionMs = 50, 500
	urls := make([]url.URL, 2)
	for i := range urls {
		l, err := listen(ctx)
		if err != nil {
			return err
		}
		urls[i] = url.URL{Scheme: "http", Host: l.Addr().String()}
		_ = l.Close() // etcd wants to listen itself
	}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = urls[:1], urls[:1]
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = urls[1:], urls[1:]
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	etcd, err := embed.StartEtcd(cfg)
	if err != nil {
		return fmt.Errorf("start etcd: %w", err)
	}
	<-etcd.Server.ReadyNotify()
	handle(p, "address", func(context.Context, none) (string, error) { return urls[0].Host, nil })
	return nil
}

// Room is a room that the Controller knows. Its members are the users First and
// following of Prefix; user i is on the i-th of the first Nodes nodes in turn.
type Room struct {
	ID      string `json:"id"`
	Prefix  string `json:"prefix"`
	First   int    `json:"first"`
	Members int    `json:"members"`
	Nodes   int    `json:"nodes"`
	// Of, unless 0, is how many users there are: after the last comes the first.
	Of int `json:"of"`
	// Block, unless 0, is how many neighbours share a node.
	Block int `json:"block"`
}

// member is the i-th member and its node.
func (r Room) member(i int) (user, node string) {
	i += r.First
	if r.Of > 0 {
		i %= r.Of
	}
	return UserID(r.Prefix, i), NodeID(i / max(r.Block, 1) % r.Nodes)
}

// UserID is the id of the i-th user of a room, 16 bytes and more.
func UserID(prefix string, i int) string { return fmt.Sprintf("%s-user-%07d", prefix, i) }

// Change lets the first members of Prefix join a room, or leave it when Leave is set.
type Change struct {
	Room   string `json:"room"`
	Prefix string `json:"prefix"`
	Count  int    `json:"count"`
	Node   string `json:"node"`
	Leave  bool   `json:"leave"`
}

// controllerRole is the reference Controller with rooms from memory.
func controllerRole(ctx context.Context, p *part) error {
	cli.TuneMemory(slog.New(slog.DiscardHandler)) // as cmd/controller does
	memory := refcontroller.NewMemory(0)
	srv, err := refcontroller.New(refcontroller.Config{Store: memory})
	if err != nil {
		return err
	}
	l, err := listen(ctx)
	if err != nil {
		return err
	}
	var serving sync.WaitGroup
	serving.Go(func() { _ = srv.Serve(l) })
	p.onStop(func() { srv.Close(); serving.Wait() })
	handle(p, "address", func(context.Context, none) (string, error) { return l.Addr().String(), nil })
	handle(p, "rooms", func(ctx context.Context, rooms []Room) (none, error) {
		for _, r := range rooms {
			for i := range r.Members {
				user, node := r.member(i)
				join := refcontroller.Join{User: user, Room: r.ID, Name: "somebody", Reporter: refcontroller.Reporter{Node: node}}
				if _, err := memory.Join(ctx, join); err != nil {
					return none{}, err
				}
			}
		}
		return none{}, nil
	})
	handle(p, "change", func(ctx context.Context, c Change) (none, error) {
		for i := range c.Count {
			user := UserID(c.Prefix, i)
			var err error
			if c.Leave {
				_, err = memory.Leave(ctx, refcontroller.Leave{User: user, Room: c.Room, Reporter: refcontroller.Reporter{Node: c.Node}})
			} else {
				_, err = memory.Join(ctx, refcontroller.Join{User: user, Room: c.Room, Reporter: refcontroller.Reporter{Node: c.Node}})
			}
			if err != nil {
				return none{}, err
			}
		}
		return none{}, nil
	})
	return nil
}

// nodesArg says which Connect-Nodes a process is.
type nodesArg struct {
	Etcd  string `json:"etcd"`
	Count int    `json:"count"`
	Users int    `json:"users"` // online, on each node
}

// NodeID is the id of the i-th node of a world.
func NodeID(i int) string { return "connect-node-" + strconv.Itoa(i+1) }

// nodesRole is several Connect-Nodes on transport/node.
func nodesRole(ctx context.Context, p *part) error {
	cli.TuneMemory(slog.New(slog.DiscardHandler)) // as cmd/push-manager does
	arg, err := roleArg[nodesArg]()
	if err != nil {
		return err
	}
	etcd, err := discovery.NewClient(discovery.ClientConfig{Endpoints: []string{arg.Etcd}})
	if err != nil {
		return err
	}
	p.onStop(func() { _ = etcd.Close() })
	nodes := make(map[string]string, arg.Count)
	for i := range arg.Count {
		id := NodeID(i)
		srv, err := node.New(node.Config{NodeID: id, Sessions: taking{online: arg.Users}})
		if err != nil {
			return err
		}
		l, err := listen(ctx)
		if err != nil {
			return err
		}
		gs := grpc.NewServer(node.ServerOptions()...)
		srv.Attach(gs)
		var serving sync.WaitGroup
		serving.Go(func() { _ = gs.Serve(l) })
		p.onStop(func() { gs.Stop(); serving.Wait(); srv.Close() })
		if err := srv.Register(etcd, l.Addr().String()); err != nil {
			return err
		}
		p.onStop(func() {
			ctx, cancel := context.WithTimeout(context.Background(), endTimeout/10)
			defer cancel()
			_ = srv.Deregister(ctx) // etcd may be gone already
		})
		nodes[id] = l.Addr().String()
	}
	handle(p, "nodes", func(context.Context, none) (map[string]string, error) { return nodes, nil })
	return nil
}

// taking is a gateway whose every user is connected and takes everything. It does
// nothing: transport/node counts the users.
type taking struct{ online int }

// Deliver implements node.Sessions.
func (taking) Deliver(string, *node.Message) node.Outcome { return node.Delivered }

// Broadcast implements node.Sessions.
func (s taking) Broadcast(*node.Message) (delivered, failed int) { return s.online, 0 }

// Online implements node.Sessions.
func (s taking) Online() int { return s.online }

var errNoNode = errors.New("no such node")
