package acceptance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver/dns"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

// nameServer is a DNS server whose one name has the addresses that the test says.
type nameServer struct {
	conn net.PacketConn

	asked atomic.Int64 // for addresses

	mu    sync.Mutex
	hosts [][4]byte
}

const nameOfAll = "push-manager.test."

func startNameServer(t *testing.T) *nameServer {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &nameServer{conn: conn}
	var serving sync.WaitGroup
	serving.Go(func() {
		buffer := make([]byte, 512)
		for {
			n, from, err := conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			if reply := s.answer(buffer[:n]); reply != nil {
				_, _ = conn.WriteTo(reply, from) // who gets none asks again
			}
		}
	})
	t.Cleanup(func() { _ = conn.Close(); serving.Wait() })
	return s
}

// answer has the addresses for a question of type A, and says of all others that there is nothing.
func (s *nameServer) answer(query []byte) []byte {
	var parser dnsmessage.Parser
	header, err := parser.Start(query)
	if err != nil {
		return nil
	}
	question, err := parser.Question()
	if err != nil {
		return nil
	}
	reply := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: header.ID, Response: true, Authoritative: true, RecursionDesired: header.RecursionDesired},
		Questions: []dnsmessage.Question{question},
	}
	if question.Type == dnsmessage.TypeA && question.Name.String() == nameOfAll {
		s.mu.Lock()
		s.asked.Add(1)
		for _, host := range s.hosts {
			reply.Answers = append(reply.Answers, dnsmessage.Resource{
				Header: dnsmessage.ResourceHeader{Name: question.Name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET},
				Body:   &dnsmessage.AResource{A: host},
			})
		}
		s.mu.Unlock()
	}
	raw, err := reply.Pack()
	if err != nil {
		return nil
	}
	return raw
}

// add makes the name lead to one more of 127.0.0.0/8.
func (s *nameServer) add(last byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hosts = append(s.hosts, [4]byte{127, 0, 0, last})
}

// TestCallersByDNSUseANewInstance: DNS has one more address while callers are busy. Their connections grow too old, so they ask
// DNS again, and the new instance gets calls and PushStreams. Nothing that was pushed meanwhile is lost, or comes twice. LONG=1:
// with connections of 5 s.
func TestCallersByDNSUseANewInstance(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("all of 127.0.0.0/8 is this machine on Linux only")
	}
	age := time.Second
	if os.Getenv("LONG") != "" {
		age = 5 * time.Second
	}
	dns.SetMinResolutionInterval(age / 5) // gRPC has 30 s, and nothing else here asks DNS
	etcd := etcdtest.Start(t)
	users := newClients("alice")
	serveStreaming(t, etcd.Client(), "n1", users)
	world := &oldController{rooms: map[string][]*pubsub.UserInfo{}, users: map[string]string{}}
	world.place("alice", "n1")
	controller := serveController(t, world)
	names := startNameServer(t)
	port := freeport.Take(t, 1)[0] // of all of them, as DNS has no ports
	launch := func(last byte) *manager {
		host := fmt.Sprintf("127.0.0.%d", last)
		m := startManagerAt(t, net.JoinHostPort(host, port), etcd.Endpoint(), controller, 1,
			"MANAGER_ID=pm-"+host, "LISTEN_ADDRESS="+host, "METRICS_ADDRESS=127.0.0.1", "API_CONNECTION_AGE="+age.String())
		names.add(last)
		return m
	}
	managers := []*manager{launch(1), launch(2)}
	conn, err := grpc.NewClient("dns://"+names.conn.LocalAddr().String()+"/"+nameOfAll+":"+port, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDisableServiceConfig(), grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	api := pubsub.NewPushManagerServiceClient(conn)

	stop := make(chan struct{})
	var sent, again, streams atomic.Int64
	var callers sync.WaitGroup
	for i := range 2 {
		callers.Go(func() {
			every(stop, 5*time.Millisecond, func(n int) {
				push := toAlice(fmt.Appendf(nil, "call %d %d", i, n))
				r, err := api.PushToUser(within(t, patience), push)
				if nothingSent(err) != "" {
					again.Add(1)
					r, err = api.PushToUser(within(t, patience), push)
				}
				if err != nil || !r.GetSuccess() {
					t.Errorf("a call: %v %v", r, err)
				}
				sent.Add(1)
			})
		})
		callers.Go(func() {
			p := &pusher{name: fmt.Sprint("stream ", i), open: map[uint64]*pubsub.PushToUserRequest{}}
			for ; !t.Failed(); streams.Add(1) {
				again.Add(int64(len(p.open)))
				done, err := p.run(within(t, patience), api, stop)
				if err != nil {
					t.Errorf("a PushStream: %v", err)
				}
				if done {
					break
				}
			}
			sent.Add(int64(p.next))
			if len(p.open) > 0 {
				t.Errorf("%d pushes of a PushStream have no answer", len(p.open))
			}
		})
	}
	served := func(m *manager) error {
		values, err := m.readMetrics()
		if err == nil && (values[`push_manager_api_requests_total{api="PushToUser",status="success"}`] < 10 || values["push_manager_api_streams"] < 1) {
			err = errors.New("it is not used, or has no PushStream")
		}
		return err
	}
	for _, m := range managers {
		eventually(t, "the first two are used", func() error { return served(m) })
	}
	third := launch(3)
	begun := time.Now()
	eventually(t, "the new one is used", func() error { return served(third) })
	t.Logf("connections of %v: used after %v", age, time.Since(begun).Round(time.Millisecond))
	eventually(t, "PushStreams end with their connections", func() error {
		if n := streams.Load(); n < 6 {
			return fmt.Errorf("%d have", n)
		}
		return nil
	})
	close(stop)
	callers.Wait()
	got := users.of("alice")
	count := map[string]int{}
	for _, data := range got {
		count[data]++
	}
	for _, data := range slices.Sorted(maps.Keys(count)) {
		if count[data] > 1 {
			t.Errorf("%q came %d times", data, count[data])
		}
	}
	if int64(len(count)) != sent.Load() {
		t.Errorf("%d different pushes came, of %d", len(count), sent.Load())
	}
	t.Logf("%d pushed and %d came; %d sent once more, on %d PushStreams; DNS was asked %d times", sent.Load(), len(got), again.Load(), streams.Load(), names.asked.Load())
}

// every does something at most so often, until stop.
func every(stop <-chan struct{}, pause time.Duration, do func(n int)) {
	pace := time.NewTicker(pause)
	defer pace.Stop()
	for n := 0; ; n++ {
		select {
		case <-stop:
			return
		case <-pace.C:
			do(n)
		}
	}
}

// pusher pushes on one PushStream after the other, and sends again on the next one what has no answer.
type pusher struct {
	name string
	next uint64
	open map[uint64]*pubsub.PushToUserRequest // sent, and not answered
}

// run pushes without waiting for answers, until stop or the end of the stream. An end with the word that what has no answer was
// not sent is no error.
func (p *pusher) run(ctx context.Context, api pubsub.PushManagerServiceClient, stop <-chan struct{}) (done bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := api.PushStream(ctx)
	if err != nil {
		return false, err
	}
	var mu sync.Mutex // guards open
	var sender sync.WaitGroup
	ended := make(chan struct{})
	send := func(id uint64) error {
		mu.Lock()
		push := p.open[id]
		mu.Unlock()
		return stream.Send(&pubsub.PushStreamRequest{Id: id, Push: &pubsub.PushStreamRequest_ToUser{ToUser: push}})
	}
	sender.Go(func() {
		mu.Lock()
		late := slices.Sorted(maps.Keys(p.open))
		mu.Unlock()
		for _, id := range late {
			if send(id) != nil {
				return // Recv tells why
			}
		}
		pace := time.NewTicker(time.Millisecond)
		defer pace.Stop()
		for {
			select {
			case <-stop:
				_ = stream.CloseSend()
				return
			case <-ended:
				return
			case <-pace.C:
			}
			mu.Lock()
			id := p.next
			p.next++
			p.open[id] = toAlice(fmt.Appendf(nil, "%s %d", p.name, id))
			mu.Unlock()
			if send(id) != nil {
				return
			}
		}
	})
	for {
		var reply *pubsub.PushStreamResponse
		if reply, err = stream.Recv(); err != nil {
			break
		}
		if !reply.GetToUser().GetSuccess() {
			err = fmt.Errorf("push %d: %v", reply.GetId(), reply)
			cancel()
			break
		}
		mu.Lock()
		if p.open[reply.GetId()] == nil {
			err = fmt.Errorf("push %d is answered twice", reply.GetId())
		}
		delete(p.open, reply.GetId())
		mu.Unlock()
		if err != nil {
			break
		}
	}
	close(ended)
	sender.Wait()
	switch {
	case errors.Is(err, io.EOF):
		return true, nil
	case nothingSent(err) == "DRAINING":
		return false, nil
	}
	return false, err
}
