package faultbench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

// balancerConfig is the file that operators are given.
const balancerConfig = "../../deploy/haproxy/haproxy.cfg"

// pauseBetween is how long a rollout waits when one process is ready again until it
// takes the next: longer than the balancer needs to notice.
const pauseBetween = time.Second

// balance starts HAProxy with the shipped configuration in front of three
// Push-Managers, and returns it as one to push to.
func (b *bench) balance(managers []*manager) *manager {
	b.t.Helper()
	binary, err := exec.LookPath("haproxy")
	if err != nil {
		b.t.Skip("there is no haproxy (Debian: package haproxy)")
	}
	file, err := filepath.Abs(balancerConfig)
	if err != nil {
		b.t.Fatal(err)
	}
	front := &manager{b: b, id: "haproxy", api: freeport.Addr(b.t)}
	env := []string{"PUSH_API_BIND=" + front.api}
	for i, m := range managers {
		_, port, err := net.SplitHostPort(strings.TrimPrefix(m.metrics, "http://"))
		if err != nil {
			b.t.Fatal(err)
		}
		env = append(env, fmt.Sprintf("PM_%d=%s", i+1, m.api), fmt.Sprintf("PM_%d_METRICS_PORT=%s", i+1, port))
	}
	front.process = run(b.t, "haproxy", exec.Command(binary, "-db", "-f", file), env)
	eventually(b.t, "haproxy accepts", func() error {
		c, err := net.DialTimeout("tcp", front.api, time.Second)
		if err == nil {
			_ = c.Close()
		}
		return err
	})
	return front
}

// client is a Biz-Server as it should be: it asks once more when it is told that
// nothing was sent, and only then.
type client struct {
	front *manager
	api   pubsub.PushManagerServiceClient

	calls, retries, bare, failed, unknown atomic.Int64
}

func (c *client) call(ctx context.Context, r request) {
	c.calls.Add(1)
	p := c.front.ask(ctx, c.api, r)
	if p.code() == codes.Unavailable && p.safe() {
		c.retries.Add(1)
		p = c.front.ask(ctx, c.api, r)
	}
	switch {
	case p.err != nil && !p.safe():
		c.bare.Add(1)
		c.front.b.t.Errorf("a call broke: %v\n%s", p, c.front.b.ledger.history(p))
	case p.err != nil || p.summary.GetFailed()+p.summary.GetOffline() > 0:
		c.failed.Add(1)
		c.front.b.t.Errorf("a call failed: %v\n%s", p, c.front.b.ledger.history(p))
	}
	c.unknown.Add(int64(p.summary.GetUnknown()))
}

// crowd are clients that call on and on.
type crowd struct {
	clients []*client
	stop    chan struct{}
	wg      sync.WaitGroup
}

func (b *bench) crowd(n int, front *manager, next func(*rand.Rand) request) *crowd {
	c := &crowd{stop: make(chan struct{})}
	for i := range n {
		one := &client{front: front, api: front.dial()}
		c.clients = append(c.clients, one)
		c.wg.Go(func() {
			r := rand.New(rand.NewPCG(b.seed, uint64(i)))
			for {
				select {
				case <-c.stop:
					return
				default:
					one.call(context.Background(), next(r))
					wait(pace)
				}
			}
		})
	}
	b.t.Cleanup(c.end)
	return c
}

func (c *crowd) end() {
	select {
	case <-c.stop:
	default:
		close(c.stop)
	}
	c.wg.Wait()
}

func (c *crowd) sum(of func(*client) *atomic.Int64) (n int64) {
	for _, one := range c.clients {
		n += of(one).Load()
	}
	return n
}

// P11: N16 and P1 as a deployment meets them. Every process is restarted, one after the
// other, behind a balancer.
func TestRollingRestartOfEverythingFailsNoCall(t *testing.T) {
	slow(t)
	if _, err := exec.LookPath("haproxy"); err != nil {
		t.Skip("there is no haproxy (Debian: package haproxy)")
	}
	s := aloneInStreet(t)
	const count = 5
	ids, users := names("n", count), names("u", 5*count)
	nodes := make([]*child, count)
	begin := func(i int) {
		nodes[i] = newChildWith(t, s.ledger, ids[i], "127.0.0.1:0", s.etcd.Endpoint(), s.world.at(ids[i]))
		s.children = append(s.children, nodes[i])
	}
	for i := range nodes {
		s.world.place(ids[i], users[5*i:5*i+5]...)
		begin(i)
	}
	s.world.join("all", users...)
	managers := make([]*manager, 3)
	for i := range managers {
		managers[i] = s.launch(fmt.Sprint("pm-", i+1))
		managers[i].reaches(count)
	}
	front := s.balance(managers)
	front.PushManagerServiceClient = front.dial()
	front.good(room("all"))

	callers := s.crowd(16, front, func(r *rand.Rand) request { return some(r, users, "all") })
	var slowest time.Duration
	for i, m := range managers {
		wait(pauseBetween)
		slowest = max(slowest, s.restartManager(m))
		m.reaches(count)
		t.Logf("%s is replaced", managers[i].id)
	}
	for i := range nodes {
		wait(pauseBetween)
		s.ledger.note("%s is replaced", ids[i])
		mine, next := s.world.at(ids[i]), nodes[(i+1)%count]
		next.connect(mine...) // its users connect again elsewhere
		s.world.place(next.id, mine...)
		nodes[i].signal(sigterm)
		<-nodes[i].done
		begin(i)
		for _, m := range managers {
			m.reaches(count)
		}
	}
	wait(pauseBetween)
	callers.end()
	calls := callers.sum(func(c *client) *atomic.Int64 { return &c.calls })
	failed := callers.sum(func(c *client) *atomic.Int64 { return &c.failed }) + callers.sum(func(c *client) *atomic.Int64 { return &c.bare })
	unknown := callers.sum(func(c *client) *atomic.Int64 { return &c.unknown })
	t.Logf("%d Push-Managers and %d nodes restarted: %d calls, %d failed, %d unknown, %d retried; the slowest Push-Manager took %v to stop",
		len(managers), count, calls, failed, unknown, callers.sum(func(c *client) *atomic.Int64 { return &c.retries }), slowest.Round(time.Millisecond))
	if failed > 0 || unknown > 0 {
		t.Errorf("%d of %d calls failed, %d targets are unknown", failed, calls, unknown)
	}
	if calls < 1000 {
		t.Errorf("%d calls prove nothing", calls)
	}
}

// restartManager stops a Push-Manager as an operator does and starts it again, and
// returns how long it took to stop.
func (b *bench) restartManager(m *manager) time.Duration {
	b.t.Helper()
	b.ledger.note("%s is asked to stop", m.id)
	begin := time.Now()
	m.signal(syscall.SIGTERM)
	<-m.done
	took := time.Since(begin)
	if code := m.cmd.ProcessState.ExitCode(); code != 0 || took > 10*time.Second {
		b.t.Errorf("%s: exit code %d after %v", m.id, code, took)
	}
	b.ledger.note("%s has stopped", m.id)
	m.boot()
	m.ready()
	b.ledger.note("%s is ready", m.id)
	return took
}

// TestShippedBalancerConfigIsValid lets HAProxy itself read it.
func TestShippedBalancerConfigIsValid(t *testing.T) {
	t.Parallel()
	binary, err := exec.LookPath("haproxy")
	if err != nil {
		t.Skip("there is no haproxy (Debian: package haproxy)")
	}
	check := exec.Command(binary, "-c", "-q", "-f", balancerConfig)
	check.Env = []string{"PATH=" + os.Getenv("PATH")}
	if out, err := check.CombinedOutput(); err != nil || strings.Contains(string(out), "WARNING") {
		t.Errorf("%v\n%s", err, out)
	}
}
