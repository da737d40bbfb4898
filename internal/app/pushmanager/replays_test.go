package pushmanager

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// inboxConn is a connection of a client that acknowledges what it gets.
type inboxConn struct {
	mu    sync.Mutex
	inbox node.Inbox[string]
	got   []string
}

func (c *inboxConn) Deliver(m *node.Message) node.Outcome { return c.DeliverLasting(m, nil) }

func (c *inboxConn) DeliverLasting(m *node.Message, wait *node.Confirmation) node.Outcome {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if out, settled := c.inbox.Check(m, wait, len(m.Data), now); settled {
		return out
	}
	e, queue, out := c.inbox.Take(m, wait, string(m.Data), len(m.Data), now)
	if queue && c.inbox.Write(&e, now) {
		c.got = append(c.got, e.Frame)
		go c.ack(e.Ack)
	}
	return out
}

func (c *inboxConn) ack(n uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = c.inbox.Ack(n)
}

func (c *inboxConn) Opened() {}

func (c *inboxConn) texts() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.got, ", ")
}

// What is stored reaches a client of a node that asks for it, and is gone when the client has it. The calls for what is
// stored are served.
func TestStoredMessagesAreSentToNodesThatAsk(t *testing.T) {
	etcd := etcdtest.Start(t)
	env := withStore(t, etcd.Endpoint(), "pm-1")
	env["CONTROLLER_ADDRESS"] = serveGRPC(t, "127.0.0.1:0", controllerServer())
	m := startPushManager(t, env)
	defer drain(t, m, 8*time.Second)
	payload := func(text string) string {
		b, err := (&pubsub.MessageContent{Data: []byte(text)}).MarshalVT()
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for _, text := range []string{"one", "two"} {
		if r := spoolOne(t, m, "alice", payload(text)); r.Err != nil {
			t.Fatal(r.Err)
		}
	}

	users := node.NewLastingUsers[*inboxConn](pubsub.Feature_FEATURE_CLIENT_ACK, pubsub.Feature_FEATURE_REPLAY)
	n, err := node.New(node.Config{NodeID: "n1", Sessions: users})
	if err != nil {
		t.Fatal(err)
	}
	gs := grpc.NewServer(node.ServerOptions()...)
	n.Attach(gs)
	if err := n.Register(etcd.Client(), serveGRPC(t, "127.0.0.1:0", gs)); err != nil {
		t.Fatal(err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = n.Deregister(ctx)
		n.Close()
	}()
	c := &inboxConn{}
	c.inbox.Acks = true
	gate := n.Gate("alice", c, 8)
	c.inbox.Gate = gate
	users.Add("alice", c)
	gate.Ready()
	defer gate.Leave()
	eventually(t, "both messages have come", func() bool { return c.texts() == "one, two" })
	eventually(t, "they are trimmed", func() bool {
		some, err := m.store.Any(t.Context(), []string{"alice"})
		return err == nil && !some[0]
	})

	api := pubsub.NewPushManagerServiceClient(client(t, m.GRPCAddr()))
	if r := spoolOne(t, m, "bob", payload("three")); r.Err != nil {
		t.Fatal(r.Err)
	}
	eventually(t, "the node is reachable", func() bool { return len(m.NotReady()) == 0 })
	if _, err := api.Replay(t.Context(), &pubsub.ReplayRequest{UserId: "bob", NodeId: "n1"}); err == nil || !strings.Contains(err.Error(), "not there") || strings.Count(err.Error(), "taken") != 1 {
		t.Errorf("replay for a user who is not there: %v", err)
	}
	users.Add("bob", &inboxConn{})
	if r, err := api.Replay(t.Context(), &pubsub.ReplayRequest{UserId: "bob", NodeId: "n1"}); err != nil || r.GetMessages() != 1 {
		t.Errorf("replay: %v, %v", r, err)
	}
	if r := spoolOne(t, m, "carol", payload("four")); r.Err != nil {
		t.Fatal(r.Err)
	}
	if r, err := api.ForgetUser(t.Context(), &pubsub.ForgetUserRequest{UserId: "carol"}); err != nil || r.GetMessages() != 1 {
		t.Errorf("forget: %v, %v", r, err)
	}
	_, metrics := get(t, "http://"+m.HTTPAddr()+"/metrics")
	for _, want := range []string{"push_manager_replay_messages_total 3\n", "push_manager_replay_open "} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no metric %s", want)
		}
	}
}

func TestSettingsOfReplays(t *testing.T) {
	c, err := load(t, nil, map[string]string{"REPLAY_CONCURRENCY": "3", "REPLAY_PAGE": "7"}, "")
	if err != nil || c.Replays.Concurrency != 3 || c.Replays.Page != 7 {
		t.Errorf("%+v, %v", c.Replays, err)
	}
}
