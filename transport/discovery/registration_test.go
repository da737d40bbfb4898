package discovery

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"go.etcd.io/etcd/client/v3/naming/resolver"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/push-manager/push-manager/internal/etcdtest"
)

func register(t *testing.T, client *clientv3.Client, id, addr string) *Registration {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	r, err := Register(ctx, RegistrationConfig{
		Client: client, ID: id, Addr: addr, TTL: 10 * time.Second, CheckInterval: 100 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeRegistration(t, r) })
	return r
}

func closeRegistration(t *testing.T, r *Registration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := r.Close(ctx); err != nil {
		t.Errorf("close: %v", err)
	}
}

// valueOf is the key's value, empty when there is no key.
func valueOf(client *clientv3.Client, key string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	got, err := client.Get(ctx, key)
	if err != nil || len(got.Kvs) == 0 {
		return ""
	}
	return string(got.Kvs[0].Value)
}

func TestRegistrationIsSeenAndGoesAtOnce(t *testing.T) {
	client := etcdtest.Start(t).Client()
	w := watch(t, client, nil)
	r := register(t, client, "n1", "127.0.0.1:7")
	w.has(t, "n1")
	if !r.Registered() {
		t.Fatal("not registered")
	}
	closeRegistration(t, r)
	if got := valueOf(client, r.Key()); got != "" {
		t.Fatalf("the key stays: %s", got)
	}
	w.has(t)
}

func TestRegistrationOutlivesItsLease(t *testing.T) {
	client := etcdtest.Start(t).Client()
	r := register(t, client, "n1", "127.0.0.1:7")
	first := r.lease.Load()
	if _, err := client.Revoke(t.Context(), clientv3.LeaseID(first)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "registered under another lease", func() bool {
		return r.lease.Load() != first && r.Registered() && valueOf(client, r.Key()) == r.value
	})
}

func TestRegistrationIsWrittenAgainWhenDeleted(t *testing.T) {
	client := etcdtest.Start(t).Client()
	r := register(t, client, "n1", "127.0.0.1:7")
	del(t, client, r.Key())
	eventually(t, "the key is back", func() bool { return valueOf(client, r.Key()) == r.value })
}

func TestRegistrationSurvivesRestartAndWipe(t *testing.T) {
	server := etcdtest.Start(t)
	client := server.Client()
	r := register(t, client, "n1", "127.0.0.1:7")
	server.Restart()
	eventually(t, "the key after a restart", func() bool { return r.Registered() && valueOf(client, r.Key()) == r.value })
	server.Wipe()
	eventually(t, "the key after a wipe", func() bool { return r.Registered() && valueOf(client, r.Key()) == r.value })
}

func TestRegistrationWaitsForEtcd(t *testing.T) {
	server := etcdtest.Reserve(t)
	client := server.Client()
	r, err := NewRegistration(RegistrationConfig{Client: client, ID: "n1", Addr: "h:1", Prefix: PushManagerPrefix})
	if err != nil {
		t.Fatal(err)
	}
	r.Start()
	if r.Registered() {
		t.Fatal("registered without etcd")
	}
	server.Restart()
	<-r.Ready()
	if got := valueOf(client, "/services/push-manager/n1"); got == "" {
		t.Fatal("no key")
	}
	closeRegistration(t, r)
}

func TestRegisterGivesUpWithItsContext(t *testing.T) {
	client := etcdtest.NewClient(t, "127.0.0.1:1")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Register(ctx, RegistrationConfig{Client: client, ID: "n1", Addr: "h:1"}); err == nil {
		t.Fatal("registered without etcd")
	}
}

func TestLaterRegistrationHasTheID(t *testing.T) {
	t.Parallel() // it waits for the keep-alive
	client := etcdtest.Start(t).Client()
	older := register(t, client, "n1", "127.0.0.1:1")
	newer := register(t, client, "n1", "127.0.0.1:2")
	eventually(t, "the older one yields", func() bool { return !older.Registered() })
	first := older.lease.Load()
	if _, err := client.Revoke(t.Context(), clientv3.LeaseID(first)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the older one has a new lease", func() bool { return older.lease.Load() != first })
	if got := valueOf(client, newer.Key()); got != newer.value || older.Registered() {
		t.Fatalf("the older one took the key back: %s", got)
	}
	closeRegistration(t, newer)
	eventually(t, "the older one has the free key", func() bool { return older.Registered() })
}

func TestEtcdsOwnNamingReadsARegistration(t *testing.T) {
	client := etcdtest.Start(t).Client()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(srv, health.NewServer())
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(lis) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	register(t, client, "pm", lis.Addr().String())

	manager, err := endpoints.NewManager(client, strings.TrimSuffix(ConnectNodePrefix, "/"))
	if err != nil {
		t.Fatal(err)
	}
	list, err := manager.List(t.Context())
	if err != nil || list[ConnectNodePrefix+"pm"].Addr != lis.Addr().String() {
		t.Fatalf("listed %v, %v", list, err)
	}

	builder, err := resolver.NewBuilder(client)
	if err != nil {
		t.Fatal(err)
	}
	// Four slashes: the resolver drops one, and our keys begin with one.
	conn, err := grpc.NewClient("etcd:////services/connect-node", grpc.WithResolvers(builder), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}

	// And the other way round.
	w := watch(t, client, nil)
	w.has(t, "pm")
	err = manager.AddEndpoint(ctx, ConnectNodePrefix+"theirs", endpoints.Endpoint{Addr: "10.0.0.1:1", Metadata: map[string]string{"node_id": "other"}})
	if err != nil {
		t.Fatal(err)
	}
	w.has(t, "other", "pm")
}

func TestRegistrationConfigNamesWhatIsWrong(t *testing.T) {
	_, err := NewRegistration(RegistrationConfig{ID: "a\x00", Addr: "http://x", TTL: time.Second})
	for _, want := range []string{"Client", "ID", "Addr", "TTL"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
}
