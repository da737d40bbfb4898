package jetstream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/transport/store"
	"github.com/push-manager/push-manager/transport/store/storetest"
)

// listening are options of a server on loopback.
func listening(t *testing.T, dir string) *server.Options {
	t.Helper()
	cfg := Config{Dir: dir}.withDefaults()
	opts := serverOptions(&cfg)
	opts.DontListen, opts.Host, opts.Port = false, "127.0.0.1", server.RANDOM_PORT
	return opts
}

// run runs a server until the test ends.
func run(t *testing.T, opts *server.Options) *server.Server {
	t.Helper()
	srv, err := startServer(t.Context(), opts, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopServer(srv) })
	return srv
}

// cluster is three servers.
type cluster struct {
	urls    []string
	servers []*server.Server
}

func startCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{}
	var routes []*url.URL
	for range 3 {
		routes = append(routes, &url.URL{Scheme: "nats", Host: freeport.Addr(t)})
	}
	for i := range 3 {
		opts := listening(t, t.TempDir())
		opts.ServerName, opts.Routes = "s"+strconv.Itoa(i), routes
		opts.Cluster = server.ClusterOpts{Name: "c", Host: "127.0.0.1", Port: mustPort(t, routes[i])}
		srv, err := server.NewServer(opts)
		if err != nil {
			t.Fatal(err)
		}
		srv.Start()
		t.Cleanup(func() { stopServer(srv) })
		c.servers = append(c.servers, srv)
	}
	for _, srv := range c.servers {
		if !srv.ReadyForConnections(20 * time.Second) {
			t.Fatal("a server does not start")
		}
		c.urls = append(c.urls, srv.ClientURL())
	}
	return c
}

func mustPort(t *testing.T, u *url.URL) int {
	t.Helper()
	port, err := strconv.Atoi(u.Port())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// clusterData is what a cluster keeps.
type clusterData struct {
	*cluster

	partitions int
}

func (clusterData) Files() string { return "" }

func (d clusterData) Open(t *testing.T, limits storetest.Limits) store.Store {
	t.Helper()
	s, err := Open(t.Context(), Config{URLs: d.urls, Partitions: d.partitions, MaxPerUser: limits.MaxPerUser, MaxBytes: limits.MaxBytes, MaxReceipts: limits.MaxReceipts})
	if err != nil {
		t.Fatal(err)
	}
	waitReady(t, s)
	return s
}

// waitReady waits until the streams are there: a cluster that has just started has no leaders.
func waitReady(t *testing.T, s *Store) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err := s.readyLogs(); err == nil { // they come last
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the streams are not there")
		}
	}
}

// empty removes the streams.
func (d clusterData) empty(t *testing.T) storetest.Data {
	t.Helper()
	s, err := Open(t.Context(), Config{URLs: d.urls, Partitions: d.partitions})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close(context.Background()) }()
	waitReady(t, s)
	for p := range d.partitions {
		for _, name := range []string{streamName(p), logName(p)} {
			if err := s.js.DeleteStream(t.Context(), name); err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
				t.Fatal(err)
			}
		}
	}
	if err := s.js.DeleteStream(t.Context(), receiptStream); err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Fatal(err)
	}
	return d
}

// TestClusterKeepsTheContract is slow: all that is stored goes through three servers.
func TestClusterKeepsTheContract(t *testing.T) {
	if os.Getenv("LONG") == "" {
		t.Skip("slow: make store-long runs it")
	}
	data := clusterData{startCluster(t), 2}
	storetest.Run(t, data.empty)
}

func TestClusterStoresWhileAnyOneServerIsGone(t *testing.T) {
	if testing.Short() {
		t.Skip("slow")
	}
	c := startCluster(t)
	s := clusterData{c, 1}.Open(t, storetest.Limits{}).(*Store)
	t.Cleanup(func() { _ = s.Close(context.Background()) })
	if s.Durability() != store.OfOneOfSeveral {
		t.Errorf("durability %d", s.Durability())
	}
	var want []string
	add := func() {
		t.Helper()
		payload := fmt.Sprintf("message %d", len(want))
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			err := s.Append(ctx, []store.Entry{message("u", payload)})[0]
			cancel()
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
		want = append(want, payload)
	}
	for i, srv := range c.servers[:2] {
		add()
		stopServer(srv)
		if i == 0 {
			add() // two of three are enough
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := s.Append(ctx, []store.Entry{message("u", "one of three")})[0]; err == nil {
		t.Error("one server of three stored something")
	}
}

func TestServersElsewhereMayAskForTLSAndAPassword(t *testing.T) {
	opts := listening(t, t.TempDir())
	opts.Username, opts.Password = "u", "right"
	srv := run(t, opts)
	cfg := Config{URLs: []string{srv.ClientURL()}, Replicas: 1, Username: "u", Password: "right"}
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.ready(); err != nil {
		t.Error(err)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	cfg.Password = "wrong"
	if s, err = Open(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ready(); err == nil {
		t.Error("opened with a wrong password")
	}
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestOneServerKeepsNoReplicas(t *testing.T) {
	srv := run(t, listening(t, t.TempDir()))
	if _, err := Open(t.Context(), Config{URLs: []string{srv.ClientURL()}}); !errors.Is(err, ErrReplicas) || strings.Contains(err.Error(), "\n") {
		t.Errorf("%v", err)
	}
}
