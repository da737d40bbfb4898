package devstack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/program"
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
	// DataDir is etcd's directory. Empty: a temporary one.
	DataDir string
	// Adjust changes Push-Manager's configuration before it starts. nil: nothing.
	Adjust func(*program.PushManagerConfig)
	// AdjustNode does the same for each Connect-Node.
	AdjustNode func(*program.ConnectNodeConfig)
	// Logger of everything. nil discards.
	Logger *slog.Logger
}

// Stack is everything, running.
type Stack struct {
	// Static after Start.
	log         *slog.Logger
	etcd        *etcdServer
	controller  *program.Controller
	nodes       []*program.ConnectNode
	ids         []string
	pushManager *program.PushManager
}

// Node is where one Connect-Node listens.
type Node struct {
	ID, GRPC, HTTP, Metrics string
}

// WebSocket is the address for clients.
func (n Node) WebSocket() string { return "ws://" + n.HTTP + "/ws" }

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
	s := &Stack{log: cfg.Logger}
	defer func() {
		if err != nil {
			stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			err = errors.Join(err, s.Drain(stopCtx))
		}
	}()
	p := layout(cfg.BasePort)
	if s.etcd, err = startEtcd(ctx, cfg.DataDir, p.etcd, p.etcdPeer); err != nil {
		return nil, err
	}
	if err := s.startController(ctx, p.controller); err != nil {
		return nil, fmt.Errorf("controller: %w", err)
	}
	if err := s.startPushManager(ctx, p, cfg.Adjust); err != nil {
		return nil, fmt.Errorf("push-manager: %w", err)
	}
	for i := range cfg.Nodes {
		if err := s.startNode(i, p, cfg.AdjustNode); err != nil {
			return nil, fmt.Errorf("connect-node-%d: %w", i+1, err)
		}
	}
	return s, nil
}

// settings fills a program's configuration from its defaults and values, and from
// nothing else: the environment of dev is not that of its parts.
func settings(target program.Settings, values map[string]string) error {
	set := config.New()
	target.Bind(set)
	lookup := func(name string) (string, bool) {
		v, ok := values[name]
		return v, ok
	}
	if err := set.Load(config.Options{NoFile: true, LookupEnv: lookup}); err != nil {
		return err
	}
	return target.Settle(set, lookup)
}

func (s *Stack) startController(ctx context.Context, port int) error {
	var c program.ControllerConfig
	err := settings(&c, map[string]string{
		"GRPC_PORT": strconv.Itoa(port), "METRICS_PORT": "0", "ETCD_ENDPOINTS": s.etcd.endpoint,
	})
	if err != nil {
		return err
	}
	s.controller, err = program.StartController(ctx, c, s.log.With("program", "controller"))
	return err
}

func (s *Stack) startPushManager(ctx context.Context, p ports, adjust func(*program.PushManagerConfig)) error {
	var c program.PushManagerConfig
	err := settings(&c, map[string]string{
		"GRPC_PORT": strconv.Itoa(p.pushManager), "METRICS_PORT": strconv.Itoa(p.metrics),
		"ETCD_ENDPOINTS": s.etcd.endpoint, "CONTROLLER_ADDRESS": s.controller.GRPCAddr(),
	})
	if err != nil {
		return err
	}
	if adjust != nil {
		adjust(&c)
	}
	s.pushManager, err = program.StartPushManager(ctx, c, s.log.With("program", "push-manager"))
	return err
}

func (s *Stack) startNode(i int, p ports, adjust func(*program.ConnectNodeConfig)) error {
	id := "connect-node-" + strconv.Itoa(i+1)
	grpcPort, httpPort := p.node(i)
	var c program.ConnectNodeConfig
	err := settings(&c, map[string]string{
		"NODE_ID": id, "GRPC_PORT": strconv.Itoa(grpcPort), "HTTP_PORT": strconv.Itoa(httpPort), "METRICS_PORT": "0",
		"ETCD_ENDPOINTS": s.etcd.endpoint, "CONTROLLER_ADDRESS": s.controller.GRPCAddr(), "PUSH_MANAGER_ADDRESS": s.pushManager.GRPCAddr(),
	})
	if err != nil {
		return err
	}
	if adjust != nil {
		adjust(&c)
	}
	n, err := program.StartConnectNode(c, s.log.With("program", id))
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
		if err := n.Ready(); err != nil {
			return s.ids[i] + ": " + err.Error()
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
		errs = append(errs, s.etcd.stop(ctx))
	}
	return errors.Join(errs...)
}

// Failed gets an error when Push-Manager cannot go on.
func (s *Stack) Failed() <-chan error { return s.pushManager.Failed() }

// PushManager is the Push-Manager in it.
func (s *Stack) PushManager() *program.PushManager { return s.pushManager }

// Address is where the push API listens.
func (s *Stack) Address() string { return s.pushManager.GRPCAddr() }

// ControllerAddress is where the Controller listens.
func (s *Stack) ControllerAddress() string { return s.controller.GRPCAddr() }

// EtcdEndpoint is where etcd listens.
func (s *Stack) EtcdEndpoint() string { return s.etcd.endpoint }

// Nodes are the Connect-Nodes.
func (s *Stack) Nodes() []Node {
	nodes := make([]Node, len(s.nodes))
	for i, n := range s.nodes {
		nodes[i] = Node{ID: s.ids[i], GRPC: n.GRPCAddr().String(), HTTP: n.HTTPAddr().String()}
		if a := n.MetricsAddr(); a != nil {
			nodes[i].Metrics = a.String()
		}
	}
	return nodes
}

// StopNode takes one node out of service, as its SIGTERM would.
func (s *Stack) StopNode(ctx context.Context, id string) error {
	for i, n := range s.nodes {
		if s.ids[i] != id {
			continue
		}
		s.nodes = append(s.nodes[:i:i], s.nodes[i+1:]...)
		s.ids = append(s.ids[:i:i], s.ids[i+1:]...)
		return n.Drain(ctx)
	}
	return fmt.Errorf("no node %q", id)
}

// ports are where everything listens.
type ports struct {
	etcd, etcdPeer, controller, pushManager, metrics int

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
)

func layout(base int) ports {
	switch base {
	case ContractPorts:
		return ports{etcdPort, etcdPort + 1, controllerPort, pushManagerPort, metricsPort, base}
	case 0:
		return ports{}
	}
	return ports{base, base + 1, base + 2, base + 3, base + 4, base}
}

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
