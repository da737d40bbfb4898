package node

import (
	"context"
	"errors"
	"net"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pubsub "github.com/push-manager/push-manager/proto"
)

// scriptedMembers note what is called.
type scriptedMembers struct {
	calls    []string
	err      error  // of Drain
	draining func() // what Drain does, if it is not nil
}

func (m *scriptedMembers) Start() { m.calls = append(m.calls, "start") }
func (m *scriptedMembers) Close() { m.calls = append(m.calls, "close") }
func (m *scriptedMembers) Drain(context.Context) error {
	m.calls = append(m.calls, "drain")
	if m.draining != nil {
		m.draining()
	}
	return m.err
}

func TestRunDrainsWhenItsContextEnds(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{NodeID: "node-1", Sessions: newGateway()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	members := &scriptedMembers{err: errors.New("the controller is away")}
	ended := make(chan error, 1)
	go func() {
		ended <- s.Run(ctx, RunConfig{Listener: lis, Members: members, LeaveTimeout: 2 * time.Second})
	}()

	cc, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cc.Close() }()
	b := &bench{server: s, client: pubsub.NewConnectNodeServiceClient(cc)}
	m := b.mustOpen(t)          // a manager that stays
	members.draining = func() { // managers still push to users of whom the Controller has not heard that they leave
		m.deliver(&pubsub.Delivery{UserIds: []string{"u"}, Content: &pubsub.MessageContent{}})
		if r, err := m.stream.Recv(); err != nil || r.GetDrain() || len(r.GetAcks()) != 1 || !slices.Equal(r.GetAcks()[0].GetDelivered(), []uint32{1}) {
			t.Errorf("before the Controller has heard of it: %v, %v", r, err)
		}
	}
	stop()
	err = <-ended
	if !errors.Is(err, members.err) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v; want what the members say, and that a manager was cut off", err)
	}
	if s.Streams() != 0 {
		t.Errorf("%d streams left", s.Streams())
	}
	if want := []string{"start", "drain", "close"}; !slices.Equal(members.calls, want) {
		t.Errorf("members: %v, want %v", members.calls, want)
	}
}

func TestRunEndsWhenItCannotServe(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = lis.Close()
	s, err := New(Config{NodeID: "node-1", Sessions: newGateway()})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context(), RunConfig{Listener: lis}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v, want %v", err, net.ErrClosed)
	}
}
