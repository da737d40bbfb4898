package acceptance

import (
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	"go.etcd.io/etcd/server/v3/embed"

	"github.com/push-manager/push-manager/internal/freeport"
)

// etcdEnv makes the test binary an etcd process: data directory, client port, peer
// port.
const etcdEnv = "ACCEPTANCE_ETCD"

// serveEtcd runs etcd until it is asked to stop.
func serveEtcd(spec string) int {
	part := strings.Split(spec, ",")
	config := embed.NewConfig()
	config.Dir = part[0]
	config.LogLevel = "error"
	client, peer := url.URL{Scheme: "http", Host: "127.0.0.1:" + part[1]}, url.URL{Scheme: "http", Host: "127.0.0.1:" + part[2]}
	config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	config.ListenPeerUrls, config.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	config.InitialCluster = config.InitialClusterFromName(config.Name)
	e, err := embed.StartEtcd(config)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	<-stop
	e.Close()
	return 0
}

// startEtcd runs etcd as a process of its own and returns its endpoint.
func startEtcd(t *testing.T) string {
	t.Helper()
	p := freeport.Take(t, 2)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	start(t, self, []string{etcdEnv + "=" + t.TempDir() + "," + p[0] + "," + p[1]})
	eventually(t, "etcd", func() error {
		code, body, err := get("http://127.0.0.1:" + p[0] + "/health")
		if err == nil && code != 200 {
			err = fmt.Errorf("%d %s", code, body)
		}
		return err
	})
	return "127.0.0.1:" + p[0]
}
