package devstack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/push-manager/push-manager/internal/app/connectnode"
	"github.com/push-manager/push-manager/internal/app/controller"
	"github.com/push-manager/push-manager/internal/app/pushmanager"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/console"
	"github.com/push-manager/push-manager/internal/telemetry"
)

// ContractPorts as Config.BasePort stands for the ports of the contract.
const ContractPorts = -1

// maxNodes keeps the ports of a stack together.
const maxNodes = 100

// Config says what runs. The zero value runs three nodes on free ports with
// temporary data.
type Config struct {
	// Nodes is the number of Connect-Nodes. 0 means 3.
	Nodes int
	// BasePort is the first of the ports in use; 0 takes free ones, ContractPorts
	// those of the contract.
	BasePort int
	// DataDir is the directory of etcd's data, the messages that are stored, and the files of Secure. Empty: a temporary one.
	DataDir string
	// Secure has every connection over TLS, and callers and clients show who they are.
	Secure bool
	// Store is Push-Manager's: "off", or "embedded", which "" means.
	Store string
	// HooksFile is that of the Connect-Nodes. Empty: nobody is told of clients.
	HooksFile string
	// Tracing of all programs; Service and Instance are their own.
	Tracing telemetry.TracingConfig
	// Logger of everything. nil discards.
	Logger *slog.Logger
}

// Stack is everything, running.
type Stack struct {
	// Static after Start.
	log         *slog.Logger
	dir         string
	temporary   bool     // dir is removed at the end
	secure      *secured // nil: everything is plain
	etcd        *etcdServer
	controller  *controller.Controller
	nodes       []*connectnode.ConnectNode
	ids         []string
	pushManager *pushmanager.PushManager
	pages       atomic.Pointer[[]console.Page] // for the console, once the nodes run
	failed      chan error                     // from the first part that cannot go on
	draining    chan struct{}
	watching    sync.WaitGroup
}

// Node is where one Connect-Node listens.
type Node struct {
	ID, GRPC, HTTP string
	Secure         bool // it speaks TLS
}

// WebSocket is the address for clients, Page the one for browsers.
func (n Node) WebSocket() string { return "ws" + n.suffix() + "/ws" }

// Page is the address of the page.
func (n Node) Page() string { return "http" + n.suffix() + "/" }

func (n Node) suffix() string {
	if n.Secure {
		return "s://" + local(n.HTTP)
	}
	return "://" + local(n.HTTP)
}

// Start starts everything; WaitReady tells when it has found each other.
func Start(ctx context.Context, cfg Config) (_ *Stack, err error) {
	if cfg.Nodes == 0 {
		cfg.Nodes = 3
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Nodes < 1 || cfg.Nodes > maxNodes {
		return nil, fmt.Errorf("%d nodes: must be from 1 to %d", cfg.Nodes, maxNodes)
	}
	s := &Stack{log: cfg.Logger, failed: make(chan error, 1), draining: make(chan struct{})}
	defer func() {
		if err != nil {
			stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			err = errors.Join(err, s.Drain(stopCtx))
		}
	}()
	if s.dir = cfg.DataDir; s.dir == "" {
		if s.dir, err = os.MkdirTemp("", "push-manager-dev-"); err != nil {
			return nil, fmt.Errorf("directory for etcd: %w", err)
		}
		s.temporary = true
	}
	var etcdFiles *certs.Files
	if cfg.Secure {
		if s.secure, err = openSecured(filepath.Join(s.dir, "secure"), cfg.Nodes, time.Now()); err != nil {
			return nil, err
		}
		etcdFiles = new(s.secure.etcd.Files(etcdServerName))
	}
	p := layout(cfg.BasePort, cfg.Nodes)
	if s.etcd, err = startEtcd(ctx, s.dir, s.temporary, etcdFiles, p.etcd, p.etcdPeer); err != nil {
		return nil, err
	}
	if err := s.startController(ctx, p.controller, cfg.Tracing); err != nil {
		return nil, fmt.Errorf("controller: %w", err)
	}
	if err := s.startPushManager(ctx, p, cmp.Or(cfg.Store, "embedded"), cfg.Tracing); err != nil {
		return nil, fmt.Errorf("push-manager: %w", err)
	}
	for i := range cfg.Nodes {
		if err := s.startNode(ctx, i, p, &cfg); err != nil {
			return nil, fmt.Errorf("%s: %w", nodeID(i), err)
		}
	}
	if err := s.linkPages(); err != nil {
		return nil, err
	}
	s.watching.Go(func() {
		select {
		case err := <-s.pushManager.Failed():
			s.failed <- err
		case err := <-s.etcd.failed:
			s.failed <- err
		case <-s.draining:
		}
	})
	return s, nil
}

func (s *Stack) startController(ctx context.Context, port int, tracing telemetry.TracingConfig) error {
	var c controller.Config
	err := cli.Fill(&c, s.secure.controller(map[string]string{
		"GRPC_PORT": strconv.Itoa(port), "METRICS_PORT": "0", "ETCD_ENDPOINTS": s.etcd.endpoint,
	}))
	if err != nil {
		return err
	}
	c.Tracing = tracing
	s.controller, err = controller.Start(ctx, c, s.log.With("program", "controller"))
	return err
}

func (s *Stack) startPushManager(ctx context.Context, p ports, store string, tracing telemetry.TracingConfig) error {
	var c pushmanager.Config
	err := cli.Fill(&c, s.secure.pushManager(map[string]string{
		"GRPC_PORT": strconv.Itoa(p.pushManager), "HTTP_PORT": strconv.Itoa(p.http), "METRICS_PORT": strconv.Itoa(p.metrics),
		"ETCD_ENDPOINTS": s.etcd.endpoint, "CONTROLLER_ADDRESS": s.controller.GRPCAddr(),
		"STORE": store, "STORE_DIR": filepath.Join(s.dir, "store"),
		"DRAIN_NOTICE": "0s", // there is no balancer
	}))
	if err != nil {
		return err
	}
	if p.http == 0 {
		c.HTTPPort = pushmanager.FreePort
	}
	tracing.Service, tracing.Instance = c.Tracing.Service, c.Tracing.Instance
	c.Tracing = tracing
	c.Pages = func() []console.Page {
		if list := s.pages.Load(); list != nil {
			return *list
		}
		return nil
	}
	s.pushManager, err = pushmanager.Start(ctx, c, s.log.With("program", "push-manager"))
	return err
}

// linkPages has the console link to the pages of nodes, on each of which one is another user of the room lobby.
func (s *Stack) linkPages() error {
	var list []console.Page
	for i, user := range []string{"alice", "bob"} {
		at := s.Nodes()[i%len(s.nodes)].Page()
		if s.secure == nil {
			list = append(list, console.Page{User: user, URL: at + "?user_id=" + user + "&room_id=lobby&connect=1"})
			continue
		}
		token, err := s.secure.token(user, time.Now())
		if err != nil {
			return err
		}
		list = append(list, console.Page{User: user, URL: at + "?room_id=lobby#token=" + token})
	}
	s.pages.Store(&list)
	return nil
}

func (s *Stack) startNode(ctx context.Context, i int, p ports, cfg *Config) error {
	id := nodeID(i)
	grpcPort, httpPort := p.node(i)
	var c connectnode.Config
	err := cli.Fill(&c, s.secure.node(id, map[string]string{
		"NODE_ID": id, "GRPC_PORT": strconv.Itoa(grpcPort), "HTTP_PORT": strconv.Itoa(httpPort), "METRICS_PORT": "0",
		"ETCD_ENDPOINTS": s.etcd.endpoint, "CONTROLLER_ADDRESS": s.controller.GRPCAddr(), "PUSH_MANAGER_ADDRESS": s.pushManager.GRPCAddr(),
		"HOOKS_FILE": cfg.HooksFile, "HOOKS_DIR": filepath.Join(s.dir, "hooks", id),
	}))
	if err != nil {
		return err
	}
	c.Tracing = cfg.Tracing
	n, err := connectnode.Start(ctx, c, s.log.With("program", id))
	if err != nil {
		return err
	}
	s.nodes, s.ids = append(s.nodes, n), append(s.ids, id)
	return nil
}

// WaitReady waits until a push can reach every node.
func (s *Stack) WaitReady(ctx context.Context) error {
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for {
		reason := s.notReady()
		if reason == "" {
			return nil
		}
		select {
		case <-look.C:
		case err := <-s.failed:
			return err
		case <-ctx.Done():
			return fmt.Errorf("not ready: %s: %w", reason, context.Cause(ctx))
		}
	}
}

func (s *Stack) notReady() string {
	if reasons := s.pushManager.NotReady(); len(reasons) > 0 {
		return "push-manager: " + reasons[0]
	}
	for i, n := range s.nodes {
		if reasons := n.NotReady(); len(reasons) > 0 {
			return s.ids[i] + ": " + reasons[0]
		}
	}
	if n := s.pushManager.Reachable(); n < len(s.nodes) {
		return fmt.Sprintf("push-manager reaches %d of %d nodes", n, len(s.nodes))
	}
	return ""
}

// Drain stops everything, in reverse. It may be called on a Stack that has not
// started completely.
func (s *Stack) Drain(ctx context.Context) error {
	close(s.draining)
	s.watching.Wait()
	var errs []error
	if s.pushManager != nil {
		errs = append(errs, s.pushManager.Drain(ctx))
	}
	nodes := make([]error, len(s.nodes))
	var wg sync.WaitGroup
	for i, n := range s.nodes {
		wg.Go(func() { nodes[i] = n.Drain(ctx) })
	}
	wg.Wait()
	errs = append(errs, nodes...)
	if s.controller != nil {
		errs = append(errs, s.controller.Drain(ctx))
	}
	if s.etcd != nil {
		s.etcd.close(ctx)
	}
	if s.temporary {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}

// Reload has certificates, policies and keys read again soon.
func (s *Stack) Reload() {
	s.controller.Reload()
	s.pushManager.Reload()
	for _, n := range s.nodes {
		n.Reload()
	}
}

// Failed gets an error when Push-Manager or etcd cannot go on.
func (s *Stack) Failed() <-chan error { return s.failed }

// Address is where the push API listens.
func (s *Stack) Address() string { return s.pushManager.GRPCAddr() }

// HTTPAddress is where the push API listens for HTTP.
func (s *Stack) HTTPAddress() string { return s.pushManager.WebAddr() }

// Console is the address of the console's page for test pushes.
func (s *Stack) Console() string {
	scheme := "http://"
	if s.secure != nil {
		scheme = "https://"
	}
	return scheme + local(s.HTTPAddress()) + "/console/#push"
}

// ControllerAddress is where the Controller listens.
func (s *Stack) ControllerAddress() string { return s.controller.GRPCAddr() }

// EtcdEndpoint is where etcd listens.
func (s *Stack) EtcdEndpoint() string { return s.etcd.endpoint }

// Nodes are the Connect-Nodes.
func (s *Stack) Nodes() []Node {
	nodes := make([]Node, len(s.nodes))
	for i, n := range s.nodes {
		nodes[i] = Node{ID: s.ids[i], GRPC: n.GRPCAddr().String(), HTTP: n.HTTPAddr().String(), Secure: s.secure != nil}
	}
	return nodes
}

// nodeID is the id of the node of a number, 0 being the first.
func nodeID(i int) string { return "connect-node-" + strconv.Itoa(i+1) }

// ports are where everything listens.
type ports struct {
	etcd, etcdPeer, controller, pushManager, metrics, http int

	base int
}

// The ports of the contract.
const (
	etcdPort        = 2379
	controllerPort  = 50051
	firstNodePort   = 50052
	pushManagerPort = 50053
	nextNodePort    = 50055
	webSocketPort   = 8080
	metricsPort     = 9093
	httpPort        = 8053
)

func layout(base, nodes int) ports {
	switch base {
	case ContractPorts:
		return ports{etcdPort, etcdPort + 1, controllerPort, pushManagerPort, metricsPort, httpPort, base}
	case 0:
		return ports{}
	}
	return ports{base, base + 1, base + 2, base + 3, base + 4, base + portsOf(nodes) - 1, base}
}

// highestPort is that of TCP.
const highestPort = 65535

// portsOf is how many ports a stack with a base of its own has.
func portsOf(nodes int) int { return 6 + 2*nodes }

// node is where the node of a number listens, 0 being the first.
func (p ports) node(i int) (grpcPort, httpPort int) {
	switch {
	case p.base == ContractPorts && i == 0:
		return firstNodePort, webSocketPort
	case p.base == ContractPorts:
		return nextNodePort + i - 1, webSocketPort + i
	case p.base == 0:
		return 0, 0
	}
	return p.base + 5 + 2*i, p.base + 6 + 2*i
}
