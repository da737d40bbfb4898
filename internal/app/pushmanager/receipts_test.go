package pushmanager

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

func TestSettingsOfTheWebhook(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("0123456789abcdef\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	short := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(short, []byte("0123456789abcde\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ url, file, want string }{
		"none":                {"", "", ""},
		"https":               {"https://example.com/hooks?x=1", secret, ""},
		"loopback":            {"http://127.0.0.1:80/", secret, ""},
		"without a secret":    {"https://example.com", "", "RECEIPT_WEBHOOK_SECRET_FILE"},
		"without a URL":       {"", secret, "RECEIPT_WEBHOOK_URL"},
		"no file":             {"https://example.com", "/nowhere", "RECEIPT_WEBHOOK_SECRET_FILE"},
		"a short secret":      {"https://example.com", short, "RECEIPT_WEBHOOK_SECRET_FILE"},
		"plain":               {"http://example.com", secret, "ALLOW_INSECURE"},
		"another scheme":      {"ftp://example.com", secret, "RECEIPT_WEBHOOK_URL"},
		"no host":             {"https:///x", secret, "RECEIPT_WEBHOOK_URL"},
		"a user and password": {"https://u:hidden@example.com", secret, "RECEIPT_WEBHOOK_URL"},
		"no URL":              {"https://a b", secret, "RECEIPT_WEBHOOK_URL"},
	} {
		_, err := load(t, nil, map[string]string{"RECEIPT_WEBHOOK_URL": tc.url, "RECEIPT_WEBHOOK_SECRET_FILE": tc.file}, "")
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "hidden")):
			t.Errorf("%s: %v, want %s", name, err, tc.want)
		}
	}
	c, err := load(t, nil, map[string]string{"RECEIPT_WEBHOOK_URL": "http://example.com", "RECEIPT_WEBHOOK_SECRET_FILE": secret, "ALLOW_INSECURE": "true"}, "")
	if err != nil || len(c.insecure) != 1 {
		t.Errorf("%v, %v", c, err)
	}
}

// webhookReceiver notes the ids of the receipts that it gets, as caller:id.
type webhookReceiver struct {
	*httptest.Server

	mu  sync.Mutex
	ids []string
}

func newWebhookReceiver(t *testing.T) *webhookReceiver {
	t.Helper()
	r := new(webhookReceiver)
	r.Server = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, request *http.Request) {
		body, _ := io.ReadAll(request.Body)
		var b struct {
			Receipts []struct {
				Caller  string
				Receipt struct{ MessageID string }
			}
		}
		if err := json.Unmarshal(body, &b); err != nil || request.Header.Get("Push-Manager-Signature") == "" {
			t.Errorf("%s, %v: %v", body, request.Header, err)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, it := range b.Receipts {
			r.ids = append(r.ids, it.Receipt.MessageID)
		}
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *webhookReceiver) got() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.ids)
}

// acknowledgingNode is a node with alice, whose client acknowledges.
func acknowledgingNode(t *testing.T, etcd *etcdtest.Server) {
	t.Helper()
	users := node.NewLastingUsers[*inboxConn](pubsub.Feature_FEATURE_CLIENT_ACK)
	n, err := node.New(node.Config{NodeID: "n1", Sessions: users})
	if err != nil {
		t.Fatal(err)
	}
	gs := grpc.NewServer(node.ServerOptions()...)
	n.Attach(gs)
	if err := n.Register(etcd.Client(), serveGRPC(t, "127.0.0.1:0", gs)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = n.Deregister(ctx)
		n.Close()
	})
	c := &inboxConn{}
	c.inbox.Acks = true
	users.Add("alice", c)
}

// pushAsync pushes to alice, and wants it delivered.
func pushAsync(t *testing.T, m *PushManager, id string) {
	t.Helper()
	eventually(t, "the node is reachable", func() bool { return len(m.NotReady()) == 0 && m.Reachable() == 1 })
	reply, err := pubsub.NewPushManagerServiceClient(client(t, m.GRPCAddr())).PushToUser(t.Context(), &pubsub.PushToUserRequest{
		UserId: "alice", Content: hello(), Options: &pubsub.PushOptions{
			MessageId: id, Ack: pubsub.AckPolicy_ACK_CLIENT, Receipt: pubsub.ReceiptMode_RECEIPT_ASYNC, AckTimeoutMs: 20_000}})
	if err != nil || reply.GetSummary().GetMessageId() != id {
		t.Fatalf("push %s: %v, %v", id, reply, err)
	}
}

type watched = grpc.ServerStreamingClient[pubsub.WatchReceiptsResponse]

func watchReceipts(t *testing.T, m *PushManager, after string) watched {
	t.Helper()
	st, err := pubsub.NewPushManagerServiceClient(client(t, m.GRPCAddr())).WatchReceipts(t.Context(), &pubsub.WatchReceiptsRequest{After: after})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func wantReceipt(t *testing.T, st watched, id string) (position string) {
	t.Helper()
	r, err := st.Recv()
	if err != nil || r.GetReceipt().GetMessageId() != id || r.GetReceipt().GetSummary().GetAcked() != 1 {
		t.Fatalf("got %v, %v, want the receipt of %s", r, err, id)
	}
	return r.GetPosition()
}

// metric is the value of one series.
func metric(t *testing.T, m *PushManager, series string) string {
	t.Helper()
	_, text := get(t, "http://"+m.HTTPAddr()+"/metrics")
	for line := range strings.Lines(text) {
		if value, is := strings.CutPrefix(line, series+" "); is {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// TestReceiptsOfAllInstancesAreServedByEachAndSentByOne over a store elsewhere.
func TestReceiptsOfAllInstancesAreServedByEachAndSentByOne(t *testing.T) {
	srv, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true, JetStream: true, StoreDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() {
		srv.Shutdown()
		srv.WaitForShutdown()
	})
	if !srv.ReadyForConnections(20 * time.Second) {
		t.Fatal("the NATS server does not start")
	}
	etcd, receiver := etcdtest.Start(t), newWebhookReceiver(t)
	acknowledgingNode(t, etcd)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("0123456789abcdef"), 0o600); err != nil {
		t.Fatal(err)
	}
	controller := serveGRPC(t, "127.0.0.1:0", controllerServer())
	instances := make(map[string]*PushManager)
	for _, id := range []string{"pm-1", "pm-2"} {
		instances[id] = startPushManager(t, map[string]string{
			"ETCD_ENDPOINTS": etcd.Endpoint(), "MANAGER_ID": id, "CONTROLLER_ADDRESS": controller,
			"STORE": srv.ClientURL(), "STORE_REPLICAS": "1", "STORE_PARTITIONS": "1",
			"RECEIPT_WEBHOOK_URL": receiver.URL, "RECEIPT_WEBHOOK_SECRET_FILE": secret,
		})
		m := instances[id]
		eventually(t, "the store is there", func() bool { return metric(t, m, "push_manager_store_up") == "1" })
	}
	one, two := instances["pm-1"], instances["pm-2"]
	sender := func() (sends string) {
		for id, m := range instances {
			if metric(t, m, "push_manager_receipt_webhook_active") == "1" {
				sends += id
			}
		}
		return sends
	}
	eventually(t, "one of them sends", func() bool { return sender() != "" })
	time.Sleep(500 * time.Millisecond) // its position is kept from when it began

	at := watchReceipts(t, two, "")
	eventually(t, "it is watched", func() bool { return metric(t, two, "push_manager_receipt_watchers") == "1" })
	time.Sleep(100 * time.Millisecond)
	pushAsync(t, one, "m-1")
	position := wantReceipt(t, at, "m-1")
	pushAsync(t, two, "m-2")
	wantReceipt(t, at, "m-2")
	wantReceipt(t, watchReceipts(t, one, position), "m-2")

	_, err = watchReceipts(t, one, "abc-1").Recv()
	if status.Code(err) != codes.OutOfRange || !strings.Contains(err.Error(), "elsewhere") {
		t.Errorf("a position of an instance without a store: %v", err)
	}
	eventually(t, "both are sent", func() bool { return fmt.Sprint(receiver.got()) == "[m-1 m-2]" })

	first := sender()
	if len(first) != len("pm-1") {
		t.Fatalf("%q send", first)
	}
	drain(t, instances[first], 20*time.Second)
	delete(instances, first)
	for id, m := range instances {
		defer drain(t, m, 20*time.Second)
		pushAsync(t, m, "m-3")
		eventually(t, id+" goes on", func() bool { return fmt.Sprint(receiver.got()) == "[m-1 m-2 m-3]" })
		for series, want := range map[string]string{
			"push_manager_receipts_lost_total": "0", "push_manager_receipt_webhook_receipts_total": "1", "push_manager_receipt_webhook_lost_total": "0", "push_manager_receipts_queue_entries": "0",
		} {
			if got := metric(t, m, series); got != want {
				t.Errorf("%s is %q, want %s", series, got, want)
			}
		}
	}
}

// TestWithoutAStoreAnInstanceSendsItsOwnReceipts, and what is left at its end.
func TestWithoutAStoreAnInstanceSendsItsOwnReceipts(t *testing.T) {
	etcd, receiver := etcdtest.Start(t), newWebhookReceiver(t)
	acknowledgingNode(t, etcd)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("0123456789abcdef"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := startPushManager(t, map[string]string{
		"ETCD_ENDPOINTS": etcd.Endpoint(), "MANAGER_ID": "pm-1", "CONTROLLER_ADDRESS": serveGRPC(t, "127.0.0.1:0", controllerServer()),
		"RECEIPT_WEBHOOK_URL": receiver.URL, "RECEIPT_WEBHOOK_SECRET_FILE": secret,
	})
	pushAsync(t, m, "m-1")
	eventually(t, "it is sent", func() bool { return fmt.Sprint(receiver.got()) == "[m-1]" })
	pushAsync(t, m, "m-2")
	drain(t, m, 20*time.Second)
	if got := fmt.Sprint(receiver.got()); got != "[m-1 m-2]" {
		t.Errorf("got %s", got)
	}
}
