package etcdtest

import (
	"context"
	"net"
	"testing"
	"time"
)

// Somebody holds an address for a moment after etcd has stopped, as a process does that starts
// just then.
func TestEtcdRestartsThoughItsAddressesAreHeld(t *testing.T) {
	s := Start(t)
	for what, addr := range map[string]string{"clients": s.client, "peers": s.peer, "the proxy": s.front} {
		s.Stop()
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(50*time.Millisecond, func() { _ = l.Close() })
		s.Restart()
		timer.Stop()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		if _, err := s.Client().Put(ctx, "held", what); err != nil {
			t.Errorf("the address for %s was held: %v", what, err)
		}
		cancel()
	}
}
