package node

import (
	"cmp"
	"context"
	"errors"
	"net"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

// Members tell the Controller who is connected: a membership.Reporter.
type Members interface {
	Start()
	Drain(ctx context.Context) error
	Close()
}

// RunConfig says how a node is run. Listener is required, everything else has a default.
type RunConfig struct {
	// Listener is where managers are served. Run closes it.
	Listener net.Listener
	// Address is host:port as managers reach the node. Default: that of Listener.
	Address string
	// Etcd is where the node registers. The caller closes it after Run. nil: the node does not
	// register.
	Etcd *clientv3.Client
	// Members are started, drained and closed together with the node. nil: the Controller learns in
	// another way who is connected.
	Members Members
	// Options of the grpc.Server go behind ServerOptions, such as grpc.Creds.
	Options []grpc.ServerOption
	// LeaveTimeout bounds how long the node takes to leave. Default 8 s.
	LeaveTimeout time.Duration
}

// Run serves managers and registers the node until ctx ends. Then the node leaves: it goes out of
// etcd, the Controller hears who leaves, managers finish, and whoever is left at LeaveTimeout is cut
// off, which is an error. The Controller has half of that time. Run is called once, and closes the Server.
func (s *Server) Run(ctx context.Context, cfg RunConfig) error {
	gs := grpc.NewServer(append(ServerOptions(), cfg.Options...)...)
	s.Attach(gs)
	if cfg.Members == nil {
		cfg.Members = noMembers{}
	}
	cfg.Members.Start()
	var served error
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := gs.Serve(cfg.Listener); !errors.Is(err, grpc.ErrServerStopped) {
			served = err
		}
	}()
	var registered error
	if cfg.Etcd != nil { // At last: from here on managers come.
		registered = s.Register(cfg.Etcd, cmp.Or(cfg.Address, cfg.Listener.Addr().String()))
	}
	if registered == nil {
		select {
		case <-ctx.Done():
		case <-ended:
		}
	}

	bound := cmp.Or(cfg.LeaveTimeout, 8*time.Second)
	leave, cancel := context.WithTimeout(context.WithoutCancel(ctx), bound)
	defer cancel()
	deregistered := s.Deregister(leave) // Nobody new is sent here.
	// The Controller is first: once it has answered managers know that nobody is here, and no push
	// fails at a node that has drained. Until then pushes are delivered.
	half, reported := context.WithTimeout(leave, bound/2)
	defer reported()
	left := cfg.Members.Drain(half)
	drained := s.Drain(leave)
	gs.Stop()
	<-ended
	s.Close()
	cfg.Members.Close()
	return errors.Join(registered, served, deregistered, left, drained)
}

type noMembers struct{}

func (noMembers) Start()                      {}
func (noMembers) Drain(context.Context) error { return nil }
func (noMembers) Close()                      {}
