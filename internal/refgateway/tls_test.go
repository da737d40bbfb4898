package refgateway

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lxzan/gws"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/etcdtest"
)

// overTLS gives a gateway a certificate for its clients.
func overTLS(t *testing.T) func(*Config) {
	t.Helper()
	cert, key := etcdtest.NewCA(t).Issue("127.0.0.1")
	source, err := certs.Open(certs.Config{Files: certs.Files{Cert: cert, Key: key}, Role: "clients"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(source.Close)
	return func(c *Config) {
		c.ClientTLS = source.ServerConfig(certs.Side{MinVersion: tls.VersionTLS13}, "http/1.1")
	}
}

var anyServer = &tls.Config{InsecureSkipVerify: true} // who it is is tested in internal/certs

// connectTLS is connect over TLS.
func connectTLS(t *testing.T, g *Gateway, user string) *device {
	t.Helper()
	d := &device{t: t, frames: make(chan string, 10000), closed: make(chan error, 1)}
	var err error
	if d.ws, _, err = gws.NewClient(d, &gws.ClientOption{Addr: "wss://" + g.HTTPAddr().String() + "/ws?user_id=" + user, TlsConfig: anyServer}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(d.ws.ReadLoop)
	t.Cleanup(func() {
		_ = d.ws.NetConn().Close()
		wg.Wait()
	})
	d.want(fmt.Sprintf(`{"type":"ready","user_id":%q,"node_id":"node-1"}`, user))
	return d
}

// deafTLS is deaf over TLS.
func deafTLS(t *testing.T, g *Gateway, user string) {
	t.Helper()
	raw, err := net.Dial("tcp", g.HTTPAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = raw.Close() })
	_ = raw.(*net.TCPConn).SetReadBuffer(4 << 10)
	_ = raw.SetDeadline(time.Now().Add(patience))
	conn := tls.Client(raw, anyServer)
	fmt.Fprintf(conn, "GET /ws?user_id=%s HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", user)
	if resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 16), nil); err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(resp, err)
	}
	eventually(t, "the deaf client is known", func() bool { return len(g.users.Of(user)) == 1 })
}

func TestClientsOverTLS(t *testing.T) {
	secured := overTLS(t)
	c := newController(t)
	g, n := start(t, c, func(cfg *Config) {
		secured(cfg)
		cfg.QueueFrames, cfg.SocketBuffer = 16, 4<<10
	})
	if _, resp, err := dialQuery(g, "user_id=plain", nil); err == nil {
		t.Errorf("a client without TLS is served: %v", resp)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: anyServer, DisableKeepAlives: true, ForceAttemptHTTP2: true}}
	resp, err := client.Get("https://" + g.HTTPAddr().String() + "/")
	if err != nil || resp.StatusCode != http.StatusOK || resp.ProtoMajor != 1 {
		t.Fatalf("page: %v, %v", resp, err)
	}
	_ = resp.Body.Close()

	// One who does not read is cut off, and is in nobody's way.
	well := connectTLS(t, g, "well")
	deafTLS(t, g, "slow")
	text := strings.Repeat("x", 8<<10)
	for i := 0; g.users.Connections() > 1; i++ {
		if i == 10000 {
			t.Fatal("a client that reads nothing is not cut off")
		}
		pushTo(t, n, "", text, "slow", "well")
		well.want(textFrame("", "well", text))
	}
	if got := g.count.slow.Get(); got != 1 {
		t.Errorf("%d slow clients are counted", got)
	}

	// The others hear when the node goes; one who does not read is left behind at once.
	deafTLS(t, g, "stuck")
	for range 8 {
		pushTo(t, n, "", strings.Repeat("x", 64<<10), "stuck")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	_ = g.Drain(ctx) // as TestDrainIsBoundedWithStuckPeers
	well.wantClose(1001)
	began := time.Now()
	g.Close()
	if took := time.Since(began); took > 4*time.Second { // a goodbye of TLS waits for five, a write for ten
		t.Errorf("the end took %v", took)
	}
}

func TestDeadClientsOverTLSAreCutOffWithoutAGoodbye(t *testing.T) {
	secured := overTLS(t)
	g, _ := start(t, newController(t), func(c *Config) {
		secured(c)
		c.PingInterval, c.IdleTimeout = 200*time.Millisecond, 4*time.Second
	})
	well := connectTLS(t, g, "well") // Answers pings.
	deafTLS(t, g, "dead")
	eventually(t, "the dead client is cut off", func() bool { return g.count.dead.Get() == 1 })
	eventually(t, "it is forgotten", func() bool { return len(g.users.Of("dead")) == 0 })
	well.wantNothing()
}
