package observe

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lxzan/gws"
	"github.com/nats-io/nats-server/v2/server"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
)

// patience is how long anything may take on a machine that is busy.
const patience = 2 * time.Minute

// process is a program under test, over several lives. It is killed at the end of the test if it still runs.
type process struct {
	t    *testing.T
	name string
	path string
	args []string
	env  []string

	mu  sync.Mutex
	out bytes.Buffer // guarded by mu

	cmd  *exec.Cmd
	done chan struct{} // closed when this life has ended
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.out.Len() > 1<<20 {
		p.out.Reset()
	}
	return p.out.Write(b)
}

func (p *process) start() {
	p.t.Helper()
	p.cmd = exec.Command(p.path, p.args...)
	p.cmd.Dir = p.t.TempDir() // no config.yaml of ours
	p.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, p.env...)
	p.cmd.Stdout, p.cmd.Stderr = p, p
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // with the test, however it ends
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	done, cmd := make(chan struct{}), p.cmd
	p.done = done
	go func() {
		_ = cmd.Wait() // how it ended is told by what it printed
		close(done)
	}()
}

func (p *process) signal(s syscall.Signal) { _ = p.cmd.Process.Signal(s) }

func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.done
}

func (c *city) launch(name string, env []string, args ...string) *process {
	c.t.Helper()
	p := &process{t: c.t, name: name, path: c.binary, args: args, env: env}
	p.start()
	c.t.Cleanup(func() {
		p.kill()
		if c.t.Failed() {
			lines := strings.Split(strings.TrimSpace(p.out.String()), "\n")
			c.t.Logf("%s printed:\n%s", name, strings.Join(lines[max(0, len(lines)-15):], "\n"))
		}
	})
	return p
}

// lane is a TCP proxy in front of a node. It is slow, or cuts what passes, as it is told.
type lane struct {
	target string
	listen net.Listener
	delay  atomic.Int64 // of what goes to the node

	mu    sync.Mutex
	conns map[net.Conn]bool // guarded by mu
	ended bool              // guarded by mu
	group sync.WaitGroup
}

func newLane(t *testing.T, target string) *lane {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &lane{target: target, listen: l, conns: map[net.Conn]bool{}}
	p.group.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				_ = in.Close()
				continue
			}
			p.mu.Lock()
			if p.ended {
				_, _ = in.Close(), out.Close()
			}
			p.conns[in], p.conns[out] = true, true
			p.mu.Unlock()
			p.group.Go(func() { p.pass(out, in, true) })
			p.group.Go(func() { p.pass(in, out, false) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		p.mu.Lock()
		p.ended = true
		p.mu.Unlock()
		p.cut()
		p.group.Wait()
	})
	return p
}

// pass copies from one end to the other; each piece arrives delay after it came, however many are under way.
func (p *lane) pass(to, from net.Conn, slow bool) {
	type piece struct {
		b   []byte
		due time.Time
	}
	pieces := make(chan piece, 4096)
	p.group.Go(func() {
		for one := range pieces {
			time.Sleep(time.Until(one.due))
			if _, err := to.Write(one.b); err != nil {
				_ = from.Close()
			}
		}
		_ = to.Close()
	})
	defer close(pieces)
	for {
		b := make([]byte, 16<<10)
		n, err := from.Read(b)
		if err != nil {
			p.mu.Lock()
			delete(p.conns, from)
			p.mu.Unlock()
			return
		}
		due := time.Now()
		if slow {
			due = due.Add(time.Duration(p.delay.Load()))
		}
		pieces <- piece{b[:n], due}
	}
}

// cut breaks all connections.
func (p *lane) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.Close()
	}
}

// city is everything: etcd, NATS, a Controller, three Connect-Nodes with clients, Push-Managers, Prometheus.
type city struct {
	t      *testing.T
	dir    string
	binary string

	etcd       *etcdtest.Server
	controller *process
	lookups    string // the Controller's HOST:PORT
	nodes      []*process
	lanes      []*lane
	http       []string // of the nodes, for clients
	managers   map[string]*process
	api        map[string]string // by manager
	scraped    []string          // HOST:PORT of all that Prometheus scrapes
	prometheus string            // its URL

	natsPort int
	nats     *server.Server

	authority *certs.Authority
	key, keys string      // of the caller, and the file with it
	webhook   atomic.Bool // takes what comes
}

func (c *city) file(name string) string { return filepath.Join(c.dir, name) }

// write replaces a file as a whole.
func (c *city) write(name, text string) {
	c.t.Helper()
	if err := os.WriteFile(c.file(name+".new"), []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Rename(c.file(name+".new"), c.file(name)); err != nil {
		c.t.Fatal(err)
	}
}

// certify gives Push-Manager a certificate that is good for so long.
func (c *city) certify(life time.Duration) {
	c.t.Helper()
	pair, err := c.authority.Issue(certs.Request{Hosts: []string{"localhost", "127.0.0.1"}, Server: true, NotAfter: time.Now().Add(life)})
	if err != nil {
		c.t.Fatal(err)
	}
	c.write("api.key", string(pair.Key))
	c.write("api.crt", string(pair.Cert))
}

func (c *city) openStore() {
	c.t.Helper()
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: c.natsPort, JetStream: true, StoreDir: c.file("nats"), NoSigs: true, NoLog: true, JetStreamMaxStore: 1 << 30})
	if err != nil {
		c.t.Fatal(err)
	}
	s.Start()
	if !s.ReadyForConnections(patience) {
		c.t.Fatal("NATS does not start")
	}
	c.nats = s
}

func (c *city) closeStore() {
	c.nats.Shutdown()
	c.nats.WaitForShutdown()
}

const issuer = "https://idp.example"

// keySet is the key set of an issuer.
func keySet(t *testing.T) string {
	t.Helper()
	public, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf(`{"keys":[{"kty":"OKP","crv":"Ed25519","alg":"EdDSA","use":"sig","kid":"k1","x":%q}]}`, base64.RawURLEncoding.EncodeToString(public))
}

// apiKey makes a key of a caller, and returns it.
func (c *city) apiKey(name string) string {
	c.t.Helper()
	var stderr bytes.Buffer
	cmd := exec.Command(c.binary, "keys", "new", "--name", name, "--file", c.file("keys.yaml"))
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		c.t.Fatalf("keys new: %v\n%s", err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

// of is an id of the tenant as everybody else sees it. All clients are the tenant's.
func of(id string) string { return tenant + "/" + id }

// visit connects a user to a node, and leaves soon.
func (c *city) visit(user string) {
	conn, _, err := gws.NewClient(&reader{}, &gws.ClientOption{Addr: fmt.Sprintf("ws://%s/ws?user_id=%s", c.http[0], of(user))})
	if err != nil {
		return
	}
	timer := time.AfterFunc(3*time.Second, func() { _ = conn.NetConn().Close() })
	defer timer.Stop()
	conn.ReadLoop()
}

// joinRoom has somebody on each node join a room, and returns once the Controller knows.
func (c *city) joinRoom(room string) {
	for i, at := range c.http {
		joined := make(chan struct{})
		conn, _, err := gws.NewClient(&reader{joined: joined}, &gws.ClientOption{Addr: fmt.Sprintf("ws://%s/ws?user_id=%s&room_id=%s", at, of("t"+strconv.Itoa(i)), of(room))})
		if err != nil {
			c.t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			conn.ReadLoop()
		}()
		c.t.Cleanup(func() {
			_ = conn.NetConn().Close()
			<-done
		})
		select {
		case <-joined:
		case <-time.After(patience): //nolint:forbidigo // a test
			c.t.Fatal("nobody joins")
		}
	}
}

// people connect to the nodes in turn; person i is in room i modulo rooms.
func (c *city) people(n, rooms int) {
	for i := range n {
		var conn *gws.Conn
		address := fmt.Sprintf("ws://%s/ws?user_id=%s&room_id=%s&ack=1", c.http[i%len(c.http)], of("u"+strconv.Itoa(i)), of("r"+strconv.Itoa(i%rooms)))
		c.until("u"+strconv.Itoa(i)+" connects", func() error {
			var err error
			conn, _, err = gws.NewClient(&reader{}, &gws.ClientOption{Addr: address})
			return err
		})
		done := make(chan struct{})
		go func() {
			defer close(done)
			conn.ReadLoop()
		}()
		c.t.Cleanup(func() {
			_ = conn.NetConn().Close()
			<-done
		})
	}
}

// reader is a client that reads and says nothing.
type reader struct {
	gws.BuiltinEventHandler

	joined chan struct{} // closed when it is in its room; nil: nobody waits
	once   sync.Once
}

func (r *reader) OnMessage(_ *gws.Conn, m *gws.Message) {
	if r.joined != nil && strings.Contains(m.Data.String(), "joined") {
		r.once.Do(func() { close(r.joined) })
	}
	_ = m.Close()
}

func (c *city) until(what string, ok func() error) {
	c.t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	c.t.Fatalf("%s: %v", what, err)
}

// answers waits until a program answers at its metrics port.
func (c *city) answers(metrics, path string) {
	c.t.Helper()
	c.until(metrics+path, func() error {
		r, err := http.Get("http://" + metrics + path)
		if err != nil {
			return err
		}
		defer r.Body.Close()
		text, err := io.ReadAll(r.Body)
		if r.StatusCode != http.StatusOK {
			return fmt.Errorf("%s", text)
		}
		return err
	})
}

// shorten makes a sixtieth of the durations in a rule file.
func shorten(rules string) string {
	sixtieth := func(text string, least, most time.Duration) string {
		n, _ := strconv.Atoi(text[:len(text)-1])
		unit := map[byte]time.Duration{'s': time.Second, 'm': time.Minute, 'h': time.Hour, 'd': 24 * time.Hour}[text[len(text)-1]]
		return strconv.Itoa(int(min(max(time.Duration(n)*unit/60, least), most).Seconds())) + "s"
	}
	rules = regexp.MustCompile(`\[\d+[smhd]\]`).ReplaceAllStringFunc(rules, func(w string) string {
		return "[" + sixtieth(w[1:len(w)-1], 15*time.Second, time.Minute) + "]"
	})
	rules = regexp.MustCompile(`(?m)^( +for: )(\d+[smhd])$`).ReplaceAllStringFunc(rules, func(line string) string {
		at := strings.LastIndex(line, " ") + 1
		return line[:at] + sixtieth(line[at:], time.Second, 20*time.Second)
	})
	// An age in seconds is a duration, too.
	return strings.ReplaceAll(rules, "push_manager_jwks_age_seconds > 3600", "push_manager_jwks_age_seconds > 60")
}

// watch starts Prometheus with the rules.
func (c *city) watch() {
	c.t.Helper()
	for _, name := range []string{"alerts.yml", "slo.yml"} {
		text, err := os.ReadFile("../../deploy/prometheus/" + name)
		if err != nil {
			c.t.Fatal(err)
		}
		c.write(name, shorten(string(text)))
	}
	c.write("prometheus.yml", fmt.Sprintf(`global: {scrape_interval: 3s, scrape_timeout: 3s, evaluation_interval: 1s}
rule_files: [alerts.yml, slo.yml]
scrape_configs:
  - job_name: push-manager
    static_configs: [{targets: [%s]}]
`, strings.Join(c.scraped, ", ")))
	address := freeport.Addr(c.t)
	p := &process{t: c.t, name: "prometheus", path: "prometheus", args: []string{
		"--config.file=" + c.file("prometheus.yml"), "--storage.tsdb.path=" + c.file("tsdb"), "--web.listen-address=" + address,
	}}
	p.start()
	c.t.Cleanup(func() {
		p.kill()
		if c.t.Failed() && c.t.Context().Err() == nil {
			c.t.Logf("prometheus printed:\n%s", p.out.String())
		}
	})
	c.prometheus = "http://" + address
	c.until("prometheus is ready", func() error {
		r, err := http.Get(c.prometheus + "/-/ready")
		if err != nil {
			return err
		}
		defer r.Body.Close()
		if r.StatusCode != http.StatusOK {
			return fmt.Errorf("status %d", r.StatusCode)
		}
		return nil
	})
}

// query asks Prometheus; the answer goes into data.
func (c *city) query(path string, values url.Values, data any) error {
	ctx, cancel := context.WithTimeout(c.t.Context(), 20*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.prometheus+path+"?"+values.Encode(), nil)
	if err != nil {
		return err
	}
	r, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	var answer struct {
		Status, Error string
		Data          json.RawMessage
	}
	if err := json.NewDecoder(r.Body).Decode(&answer); err != nil {
		return err
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s", answer.Error)
	}
	return json.Unmarshal(answer.Data, data)
}
