package web_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/shard"
	"github.com/push-manager/push-manager/transport/ingress"
	"github.com/push-manager/push-manager/transport/ingress/web"
)

// silent is a Controller that does not answer until its context ends, and no nodes.
type silent struct{}

func (silent) Room(ctx context.Context, _ string, _ func(user, node []byte)) (bool, uint64, error) {
	<-ctx.Done()
	return false, 0, route.ErrUnavailable
}

func (silent) Users(ctx context.Context, _ []string, _ [][]string) error {
	<-ctx.Done()
	return route.ErrUnavailable
}

func (silent) Link(int, string) engine.Link { return nil }
func (silent) Links(int) []engine.Link      { return nil }

// served is an ingress and its HTTP, with a Controller that is silent. drain ends both.
type served struct {
	address string
	set     *metrics.Set
	drain   func(context.Context) error
}

func serveSilent(t *testing.T, cfg ingress.Config) *served {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	s := &served{set: metrics.NewSet()}
	shards, err := shard.New(shard.Config{Count: 1})
	check(err)
	directory, err := route.New(route.Config{
		Source: silent{}, Shards: shards.Len(), TTL: time.Minute, LookupTimeout: 4 * time.Second,
		Shard: func(key string) int { return shards.For(key).Index() },
		Go:    func(home int, task func()) error { return shards.At(home).Go(task) },
	})
	check(err)
	e, err := engine.New(engine.Config{Shards: shards, Directory: directory, Network: silent{}})
	check(err)
	cfg.Engine, cfg.Metrics = e, s.set
	in, err := ingress.New(cfg)
	check(err)
	in.SetServing(true)
	out, err := web.New(web.Config{Ingress: in, Metrics: s.set})
	check(err)
	var listeners [2]net.Listener
	for i := range listeners {
		listeners[i], err = net.Listen("tcp", "127.0.0.1:0")
		check(err)
	}
	s.address = listeners[1].Addr().String()
	var serving sync.WaitGroup
	serving.Go(func() { _ = in.Serve(listeners[0]) })
	serving.Go(func() { _ = out.Serve(listeners[1]) })
	s.drain = func(ctx context.Context) error {
		defer serving.Wait()
		overHTTP := make(chan error, 1)
		go func() { overHTTP <- out.Drain(ctx) }()
		err := errors.Join(in.Drain(ctx), <-overHTTP)
		directory.Close()
		return errors.Join(err, shards.Close(ctx))
	}
	return s
}

// inFlight is how many pushes are.
func (s *served) inFlight() int {
	var b bytes.Buffer
	s.set.WritePrometheus(&b)
	for line := range strings.Lines(b.String()) {
		if value, ok := strings.CutPrefix(line, "push_manager_api_inflight "); ok {
			n, err := strconv.Atoi(strings.TrimSpace(value))
			if err == nil {
				return n
			}
		}
	}
	return -1
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(3 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 3 s: %s", what)
		}
	}
}

// TestAPushEndsWithItsClientAndNotWithTheTimeOfItsBody: the Controller does not answer, and would be waited for much longer.
func TestAPushEndsWithItsClientAndNotWithTheTimeOfItsBody(t *testing.T) {
	const bodyTime = 250 * time.Millisecond
	s := serveSilent(t, ingress.Config{BodyTimeout: bodyTime})
	for protocol, c := range clients {
		for what, body := range map[string]io.Reader{
			"small": strings.NewReader(`{"text":"a"}`), "large": strings.NewReader(`{"text":"` + strings.Repeat("a", 100_000) + `"}`),
			"of unknown length": io.MultiReader(strings.NewReader(`{"text":"a"}`)),
		} {
			ctx, cancel := context.WithCancel(t.Context())
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+s.address+"/v1/users/"+url.PathEscape(protocol+what)+"/messages", body)
			if err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() {
				resp, err := c.Do(req)
				if err == nil {
					_ = resp.Body.Close()
				}
				ended <- err
			}()
			eventually(t, protocol+", "+what+": the push is under way", func() bool { return s.inFlight() == 1 })
			time.Sleep(2 * bodyTime)
			if n := s.inFlight(); n != 1 {
				t.Errorf("%s, %s: %d pushes are under way after the time of the body", protocol, what, n)
			}
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("%s, %s: %v", protocol, what, err)
			}
			eventually(t, protocol+", "+what+": the push has ended", func() bool { return s.inFlight() == 0 })
		}
		c.CloseIdleConnections()
	}
	drained(t, s)
}

// TestAStreamWithoutARequestKeepsNoServer: a client of HTTP/1.1 that announces a request and sends none does not hold up a
// drain.
func TestAStreamWithoutARequestKeepsNoServer(t *testing.T) {
	s := serveSilent(t, ingress.Config{BodyTimeout: time.Second})
	var d net.Dialer
	c, err := d.DialContext(t.Context(), "tcp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := c.Write([]byte("POST /grpc.health.v1.Health/Watch HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc-web\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(c).ReadString('\n') // the server reads
	if err != nil || !strings.Contains(line, "100") {
		t.Fatalf("%q %v", line, err)
	}
	drained(t, s)
}

func drained(t *testing.T, s *served) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := s.drain(ctx); err != nil {
		t.Error(err)
	}
}
