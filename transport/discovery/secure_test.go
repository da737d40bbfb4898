package discovery

import (
	"bytes"
	"context"
	"crypto/tls"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/etcdtest"
)

// An etcd that wants to know who asks: with names and passwords, and with certificates.

// logText is a log to look into.
type logText struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// member is a Watcher and a Registration over one client, as a program has them.
type member struct {
	watcher      *Watcher
	registration *Registration
	log          *logText
}

func startMember(t *testing.T, cfg ClientConfig) *member {
	t.Helper()
	client, err := NewClient(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() }) // an error here is only the client's own cancelled context
	m := &member{log: &logText{}}
	logger := slog.New(slog.NewTextHandler(m.log, nil))
	m.watcher, err = New(Config{Client: client, OnChange: func([]Node) {}, RequestTimeout: time.Second, ProbeInterval: time.Second, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	m.watcher.Start()
	t.Cleanup(m.watcher.Close)
	m.registration, err = NewRegistration(RegistrationConfig{Client: client, ID: "n", Addr: "127.0.0.1:1", RequestTimeout: time.Second, CheckInterval: time.Second, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	m.registration.Start()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = m.registration.Close(ctx) // etcd may be away
	})
	return m
}

// works waits until the member sees itself in etcd.
func (m *member) works(t *testing.T, when string) {
	t.Helper()
	await(t, when, func() bool {
		return m.registration.Registered() && m.watcher.Why() == "" && len(m.watcher.Nodes()) == 1
	}, m.state)
}

// fails waits until both parts name the cause.
func (m *member) fails(t *testing.T, cause string) {
	t.Helper()
	await(t, "the cause "+cause, func() bool {
		return strings.Contains(m.watcher.Why(), cause) && strings.Contains(m.registration.Why(), cause)
	}, m.state)
}

func (m *member) state() string {
	return "watcher: " + m.watcher.Why() + "\nregistration: " + m.registration.Why() + "\nlog:\n" + m.log.String()
}

func await(t *testing.T, what string, ok func() bool, state func() string) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 30 s\n%s", what, state())
		}
	}
}

func TestUserOfAnEtcdThatIsAwayWaitsForIt(t *testing.T) {
	etcd := etcdtest.Start(t)
	etcd.EnableAuth("pm", "secret", "/services/")
	etcd.Stop()
	began := time.Now()
	m := startMember(t, ClientConfig{Endpoints: []string{etcd.Endpoint()}, Username: "pm", Password: "secret"})
	if took := time.Since(began); took >= firstAnswer {
		t.Errorf("the client was made after %v, as long as the first login may take", took)
	}
	m.fails(t, "connection refused")
	etcd.Restart()
	m.works(t, "etcd is there")
	etcd.Restart() // tokens are in its memory only
	m.works(t, "etcd has forgotten all tokens")
}

func TestUserSurvivesTokensThatExpire(t *testing.T) {
	const ttl = 2 * time.Second
	etcd := etcdtest.Start(t, etcdtest.WithTokenTTL(ttl))
	etcd.EnableAuth("pm", "secret", "/services/")
	m := startMember(t, ClientConfig{Endpoints: []string{etcd.Endpoint()}, Username: "pm", Password: "secret"})
	m.works(t, "the first token")
	time.Sleep(ttl + time.Second) // the token of the watch is used by nobody
	client := m.watcher.cfg.Client
	if _, err := client.Put(t.Context(), ConnectNodePrefix+"other", `{"Op":0,"Addr":"127.0.0.1:2"}`); err != nil {
		t.Fatalf("write after the tokens' time: %v", err)
	}
	await(t, "a node that comes after the tokens' time", func() bool { return len(m.watcher.Nodes()) == 2 }, m.state)
	if !m.registration.Registered() {
		t.Error("the registration was lost")
	}
}

// TestSecuredEtcdIsUsedForLongWithTheLeastRights: TLS on both sides, a user for each program with the rights that
// docs/security.md names, tokens that end every few seconds. SOAK_DURATION says how long it takes.
func TestSecuredEtcdIsUsedForLongWithTheLeastRights(t *testing.T) {
	took := 8 * time.Second
	if text := os.Getenv("SOAK_DURATION"); text != "" {
		var err error
		if took, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	const ttl = 5 * time.Second
	ca := etcdtest.NewCA(t)
	cert, key := ca.Issue("127.0.0.1")
	clientCert, clientKey := ca.Issue("client")
	etcd := etcdtest.Start(t, etcdtest.WithTLS(cert, key, ca.File), etcdtest.WithTokenTTL(ttl))
	creds := trust(t, ca.File, clientCert, clientKey)
	client := func(user string) *clientv3.Client {
		c, err := NewClient(ClientConfig{Endpoints: []string{etcd.Endpoint()}, Username: user, Password: user, Credentials: creds})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() }) // an error here is only the client's own cancelled context
		return c
	}
	anybody, err := NewClient(ClientConfig{Endpoints: []string{etcd.Endpoint()}, Credentials: creds})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = anybody.Close() }()
	etcd.EnableAuthFor(anybody,
		etcdtest.User{Name: "manager", Password: "manager", Read: ConnectNodePrefix, Write: PushManagerPrefix},
		etcdtest.User{Name: "node", Password: "node", Write: ConnectNodePrefix},
		etcdtest.User{Name: "controller", Password: "controller", Read: ConnectNodePrefix})

	log := &logText{}
	logger := slog.New(slog.NewTextHandler(log, nil))
	register := func(c *clientv3.Client, prefix, id string) *Registration {
		r, err := NewRegistration(RegistrationConfig{Client: c, Prefix: prefix, ID: id, Addr: "127.0.0.1:1", Logger: logger})
		if err != nil {
			t.Fatal(err)
		}
		r.Start()
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			_ = r.Close(ctx)
		})
		return r
	}
	var gaps atomic.Int64 // lists of nodes without the one that is always there
	watch := func(c *clientv3.Client) *Watcher {
		w, err := New(Config{Client: c, Logger: logger, ProbeInterval: time.Second, ResyncInterval: time.Hour, OnChange: func(nodes []Node) {
			if len(nodes) > 0 && nodes[0].ID != "always" {
				gaps.Add(1)
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		w.Start()
		t.Cleanup(w.Close)
		return w
	}
	node := client("node")
	manager := client("manager")
	registrations := []*Registration{register(node, ConnectNodePrefix, "always"), register(manager, PushManagerPrefix, "pm")}
	watchers := []*Watcher{watch(manager), watch(client("controller"))}
	state := func() string { return log.String() }
	await(t, "everybody is in", func() bool {
		return registrations[0].Registered() && registrations[1].Registered() && len(watchers[0].Nodes()) == 1 && len(watchers[1].Nodes()) == 1
	}, state)
	granted := []int64{registrations[0].lease.Load(), registrations[1].lease.Load()}
	for end := time.Now().Add(took); time.Now().Before(end); {
		time.Sleep(min(time.Until(end), ttl+time.Second)) // all tokens of then are over
		if _, err := node.Put(t.Context(), ConnectNodePrefix+"comes", `{"Op":0,"Addr":"127.0.0.1:2"}`); err != nil {
			t.Fatal(err)
		}
		await(t, "a node that comes is seen", func() bool { return len(watchers[0].Nodes()) == 2 && len(watchers[1].Nodes()) == 2 }, state)
		if _, err := node.Delete(t.Context(), ConnectNodePrefix+"comes"); err != nil {
			t.Fatal(err)
		}
		await(t, "a node that goes is seen", func() bool { return len(watchers[0].Nodes()) == 1 && len(watchers[1].Nodes()) == 1 }, state)
	}
	for i, r := range registrations {
		if !r.Registered() || r.lease.Load() != granted[i] {
			t.Errorf("registration %d: %v, lease %d, was %d", i, r.Registered(), r.lease.Load(), granted[i])
		}
	}
	if gaps.Load() > 0 {
		t.Errorf("%d lists without a node that was always there", gaps.Load())
	}
	for _, c := range []*clientv3.Client{manager, node} {
		if _, err := c.Put(t.Context(), "/elsewhere", ""); err == nil {
			t.Error("the rights are wider than they need be")
		}
	}
	if _, err := manager.Put(t.Context(), ConnectNodePrefix+"x", ""); err == nil {
		t.Error("Push-Manager may register nodes")
	}
}

func TestWrongPasswordIsNamedAndTriedAgain(t *testing.T) {
	etcd := etcdtest.Start(t)
	etcd.EnableAuth("pm", "other", "/services/")
	m := startMember(t, ClientConfig{Endpoints: []string{etcd.Endpoint()}, Username: "pm", Password: "secret"})
	const cause = "authentication failed, invalid user ID or password"
	m.fails(t, cause)
	time.Sleep(3 * time.Second) // some more attempts
	if n := strings.Count(m.log.String(), "WARN"); n > 2 {
		t.Errorf("the cause is logged %d times by two parts, once by each is right:\n%s", n, m.log)
	}
	root, err := NewClient(ClientConfig{Endpoints: []string{etcd.Endpoint()}, Username: "root", Password: "root"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = root.Close() }() // an error here is only the client's own cancelled context
	if _, err := root.UserChangePassword(t.Context(), "pm", "secret"); err != nil {
		t.Fatal(err)
	}
	m.works(t, "the password is right")
}

func TestUserWithoutTheRightIsNamed(t *testing.T) {
	etcd := etcdtest.Start(t)
	etcd.EnableAuth("pm", "secret", "/elsewhere/")
	m := startMember(t, ClientConfig{Endpoints: []string{etcd.Endpoint()}, Username: "pm", Password: "secret"})
	m.fails(t, "permission denied")
}

func TestUserIsFineWhereEtcdAsksNobody(t *testing.T) {
	etcd := etcdtest.Start(t)
	startMember(t, ClientConfig{Endpoints: []string{etcd.Endpoint()}, Username: "pm", Password: "secret"}).works(t, "no authentication")
}

// trust are credentials with the authorities of a file, and with a certificate of ours where there is one.
func trust(t *testing.T, caFile, certFile, keyFile string) credentials.TransportCredentials {
	t.Helper()
	source, err := certs.Open(certs.Config{Files: certs.Files{CA: caFile, Cert: certFile, Key: keyFile}, Role: "etcd"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(source.Close)
	return source.Client(certs.Side{MinVersion: tls.VersionTLS12})
}

func TestWhatIsWrongWithTLSIsNamed(t *testing.T) {
	ca, other := etcdtest.NewCA(t), etcdtest.NewCA(t)
	cert, key := ca.Issue("127.0.0.1")
	elsewhereCert, elsewhereKey := ca.Issue("etcd.example")
	clientCert, clientKey := ca.Issue("client")
	strangerCert, strangerKey := other.Issue("client")

	open := etcdtest.Start(t)
	secure := etcdtest.Start(t, etcdtest.WithTLS(cert, key, ""))
	mutual := etcdtest.Start(t, etcdtest.WithTLS(cert, key, ca.File))
	elsewhere := etcdtest.Start(t, etcdtest.WithTLS(elsewhereCert, elsewhereKey, ""))

	for name, tc := range map[string]struct {
		etcd *etcdtest.Server
		tls  credentials.TransportCredentials
		want string // "": it works
	}{
		"right CA":                   {secure, trust(t, ca.File, "", ""), ""},
		"right client certificate":   {mutual, trust(t, ca.File, clientCert, clientKey), ""},
		"wrong CA":                   {secure, trust(t, other.File, "", ""), "certificate signed by unknown authority"},
		"plain text to TLS":          {secure, nil, "server preface"},
		"TLS to plain text":          {open, trust(t, ca.File, "", ""), "authentication handshake failed"},
		"no client certificate":      {mutual, trust(t, ca.File, "", ""), "certificate required"},
		"foreign client certificate": {mutual, trust(t, ca.File, strangerCert, strangerKey), "tls: "},
		"wrong server name":          {elsewhere, trust(t, ca.File, "", ""), "127.0.0.1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := startMember(t, ClientConfig{Endpoints: []string{tc.etcd.Endpoint()}, Credentials: tc.tls})
			if tc.want == "" {
				m.works(t, name)
				return
			}
			m.fails(t, tc.want)
			time.Sleep(3 * time.Second) // some more attempts
			t.Log(m.state())
			// A server that wants a certificate is heard in several ways, by who is faster.
			logged := map[string]bool{}
			for line := range strings.Lines(m.log.String()) {
				_, what, _ := strings.Cut(line, "level=")
				if logged[what] {
					t.Errorf("logged twice: %s", what)
				}
				if logged[what] = true; len(logged) > 2*maxCauses {
					t.Fatalf("no end of it:\n%s", m.log)
				}
			}
		})
	}
}

func TestSettingsThatEtcdsClientWouldTakeWithoutAWord(t *testing.T) {
	for name, tc := range map[string]struct {
		cfg  ClientConfig
		want string
	}{
		"no port":             {ClientConfig{Endpoints: []string{"etcd"}}, `"etcd" is not host:port`},
		"no port in URL":      {ClientConfig{Endpoints: []string{"https://etcd"}}, `"https://etcd" is not host:port`},
		"port out of range":   {ClientConfig{Endpoints: []string{"etcd:70000"}}, "1..65535"},
		"a space":             {ClientConfig{Endpoints: []string{"et cd:2379"}}, "is not host:port"},
		"another scheme":      {ClientConfig{Endpoints: []string{"ftp://etcd:2379"}}, "neither http nor https"},
		"a path":              {ClientConfig{Endpoints: []string{"http://etcd:2379/v3"}}, "no URL of an etcd"},
		"plain text with TLS": {ClientConfig{Endpoints: []string{"http://etcd:2379"}, Credentials: insecure.NewCredentials()}, "plain text"},
		"both":                {ClientConfig{Endpoints: []string{"a:1", "https://b:1"}}, "plain text"},
		"user alone":          {ClientConfig{Endpoints: []string{"a:1"}, Username: "u"}, "Password"},
		"password alone":      {ClientConfig{Endpoints: []string{"a:1"}, Password: "p"}, "Username"},
		"URLs":                {ClientConfig{Endpoints: []string{"http://a:1", "b:2", "http://[::1]:3/"}}, ""},
		"names with TLS":      {ClientConfig{Endpoints: []string{"a:1", "https://b:1"}, Credentials: insecure.NewCredentials()}, ""},
	} {
		err := tc.cfg.Validate()
		if tc.want == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %s", name, err, tc.want)
		}
	}
}

func TestCausesAreTheSameWordsForTheSameReason(t *testing.T) {
	var log logText
	o := absence{log: slog.New(slog.NewTextHandler(&log, nil)), message: "away"}
	say := func(text string) {
		o.goesOn(&causedError{err: context.DeadlineExceeded, cause: cause(status.Error(codes.Unavailable, text))})
	}
	const refused = `latest balancer error: last connection error: connection error: desc = "transport: Error while dialing: dial tcp 127.0.0.1:1: connect: connection refused"`
	say(refused)
	say(refused)
	if want := "Error while dialing: dial tcp 127.0.0.1:1: connect: connection refused"; o.Why() != want {
		t.Errorf("the cause is %q, want %q", o.Why(), want)
	}
	for _, port := range []string{"1001", "1002"} {
		say(`connection error: desc = "error reading server preface: read tcp 127.0.0.1:` + port + `->127.0.0.1:1: connection reset by peer"`)
	}
	if n := strings.Count(log.String(), "WARN"); n != 2 {
		t.Errorf("%d lines for two causes:\n%s", n, &log)
	}
	o.ends()
	say(refused)
	if n := strings.Count(log.String(), "WARN"); n != 2 {
		t.Errorf("an etcd that comes and goes is logged %d times:\n%s", n, &log)
	}
	o.ends()
	o.forget()
	say(refused)
	if n := strings.Count(log.String(), "WARN"); n != 3 {
		t.Errorf("a new outage is logged %d times in all, want 3:\n%s", n, &log)
	}
	for i := range 100 {
		say("cause " + strings.Repeat("x", i))
	}
	if n := strings.Count(log.String(), "WARN"); n > 3+maxCauses {
		t.Errorf("%d lines, causes are bounded by %d", n, maxCauses)
	}
}
