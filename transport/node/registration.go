package node

import (
	"context"
	"errors"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/transport/discovery"
)

var errRegistered = errors.New("already registered")

// Register begins to register the node in etcd, under the prefix and with the
// lease that Push-Manager expects, and keeps it registered through lost leases
// and restarts of etcd, which need not be there yet. addr is host:port as
// managers reach it. The caller closes etcd after Deregister.
//
// Call it once the grpc.Server listens: managers connect at once.
func (s *Server) Register(etcd *clientv3.Client, addr string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.registration != nil {
		return errRegistered
	}
	r, err := discovery.NewRegistration(discovery.RegistrationConfig{
		Client:        etcd,
		ID:            s.cfg.NodeID,
		Addr:          addr,
		Metadata:      map[string]string{"boot_id": s.bootID}, // A Controller ends what another boot has reported.
		Logger:        s.cfg.Logger,
		Metrics:       s.cfg.Metrics,
		MetricsPrefix: "connect_node",
	})
	if err != nil {
		return fmt.Errorf("register node %q: %w", s.cfg.NodeID, err)
	}
	if s.disconnector != nil { // before managers come: whoever is refused is so from the first connection on, where etcd answers
		s.refusing = discovery.WatchRefusals(etcd, maxRefusals, &s.refusals, s.cfg.Logger)
	}
	r.Start()
	s.registration = r
	return nil
}

// Registered tells whether the node stands in etcd, as far as we know.
func (s *Server) Registered() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.registration != nil && s.registration.Registered()
}

// Unregistered says in a line why the node does not stand in etcd, as far as it is known: that
// etcd cannot be reached, and for what reason, or that another process has its key.
func (s *Server) Unregistered() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.registration == nil {
		return ""
	}
	return s.registration.Why()
}

// Deregister takes the node out of etcd: the first step of leaving. When etcd
// cannot be told within ctx, the entry ends with its lease, 10 s later.
func (s *Server) Deregister(ctx context.Context) error {
	s.mu.Lock()
	r := s.registration
	refusing := s.refusing
	s.registration, s.refusing = nil, nil
	s.mu.Unlock()
	if refusing != nil {
		refusing.Close()
	}
	if r == nil {
		return nil
	}
	if err := r.Close(ctx); err != nil {
		return fmt.Errorf("deregister node %q: %w", s.cfg.NodeID, err)
	}
	return nil
}
