package faultbench

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/push-manager/push-manager/internal/freeport"
)

// storeEnv makes the test binary a NATS server with JetStream, as those are that keep messages
// in production: its name, its directory, its port, and in a cluster the port for the others,
// the address at which they reach it, and where it reaches them.
const storeEnv = "FAULTBENCH_STORE"

// serveStore runs until it is killed or asked to stop.
func serveStore(spec string) int {
	part := strings.Split(spec, ",")
	port, err := strconv.Atoi(part[2])
	if err != nil {
		return complain(err)
	}
	options := &server.Options{
		ServerName: part[0], Host: "127.0.0.1", Port: port, JetStream: true, StoreDir: part[1],
		NoSigs: true, NoLog: true, JetStreamMaxStore: 64 << 30, // streams reserve STORE_MAX_BYTES
	}
	if len(part) > 3 {
		if options.Cluster.Port, err = strconv.Atoi(part[3]); err != nil {
			return complain(err)
		}
		options.Cluster.Name, options.Cluster.Host, options.Cluster.Advertise = "faultbench", "127.0.0.1", part[4]
		for peer := range strings.FieldsSeq(part[5]) {
			options.Routes = append(options.Routes, &url.URL{Scheme: "nats", Host: peer})
		}
	}
	s, err := server.NewServer(options)
	if err != nil {
		return complain(err)
	}
	s.Start()
	if !s.ReadyForConnections(30 * time.Second) {
		return complain(errors.New("the store does not start"))
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	<-stop
	s.Shutdown()
	s.WaitForShutdown()
	return 0
}

// storeServer is one server over several lives of its process. What it has written is still
// there after each.
type storeServer struct {
	*process

	t    testing.TB
	name string
	port string
	spec string
}

func (s *storeServer) address() string { return "127.0.0.1:" + s.port }

// boot starts the process, for the first time or again, and waits until it takes connections.
func (s *storeServer) boot() {
	s.t.Helper()
	self, err := os.Executable()
	if err != nil {
		s.t.Fatal(err)
	}
	s.process = run(s.t, "store "+s.name, exec.Command(self), []string{storeEnv + "=" + s.spec})
	eventually(s.t, s.name+" accepts", func() error {
		c, err := net.DialTimeout("tcp", s.address(), time.Second)
		if err == nil {
			_ = c.Close()
		}
		return err
	})
}

// startStore runs a store of one server.
func startStore(t testing.TB) *storeServer {
	t.Helper()
	s := &storeServer{t: t, name: "store-1", port: freeport.Take(t, 1)[0]}
	s.spec = strings.Join([]string{s.name, t.TempDir(), s.port}, ",")
	s.boot()
	return s
}

// startStores runs a cluster of three, of which the last hears of everything later by lag.
func startStores(t testing.TB, lag time.Duration) []*storeServer {
	t.Helper()
	p := freeport.Take(t, 6)
	dir := t.TempDir()
	peer := func(i int) string { return "127.0.0.1:" + p[3+i] }
	slowly := func(target string) string {
		x := newProxy(t, target)
		x.set(requests, toxic{delay: lag})
		x.set(replies, toxic{delay: lag})
		return x.addr()
	}
	// Whoever dials: what leads to the last and away from it goes through a proxy.
	last := slowly(peer(2))
	routes := []string{last, peer(0) + " " + last, slowly(peer(0)) + " " + slowly(peer(1))}
	advertise := []string{peer(0), peer(1), last}
	var all []*storeServer
	for i := range 3 {
		s := &storeServer{t: t, name: fmt.Sprint("store-", i+1), port: p[i]}
		s.spec = strings.Join([]string{s.name, filepath.Join(dir, s.name), p[i], p[3+i], advertise[i], routes[i]}, ",")
		all = append(all, s)
	}
	for _, s := range all {
		s.boot()
	}
	return all
}

// storeAt are the settings of a Push-Manager that keeps messages in these servers.
func storeAt(servers ...*storeServer) []string {
	var at []string
	for _, s := range servers {
		at = append(at, s.address())
	}
	return []string{"STORE=nats://" + strings.Join(at, ","), fmt.Sprint("STORE_REPLICAS=", len(servers))}
}
