package pushctl

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/buildinfo"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/plain"
	pubsub "github.com/push-manager/push-manager/proto"
)

type doctorCmd struct {
	apiFlags

	Metrics       string        `env:"PUSHCTL_METRICS" context:"metrics" placeholder:"HOST:PORT" help:"METRICS_PORT of each Push-Manager, separated by commas. Default for an address of this machine: localhost:9093."`
	Controller    string        `env:"CONTROLLER_ADDRESS" context:"controller" placeholder:"HOST:PORT" help:"The Controller. Default for an address of this machine: localhost:50051."`
	EtcdEndpoints string        `env:"ETCD_ENDPOINTS" context:"etcd_endpoints" placeholder:"HOST:PORT" help:"etcd, separated by commas. Default for an address of this machine: localhost:2379."`
	EtcdCA        string        `name:"etcd-ca" placeholder:"FILE" env:"ETCD_TLS_CA_FILE" context:"etcd_ca" predictor:"file" help:"PEM file of the authorities that etcd's certificate is checked with."`
	EtcdCert      string        `name:"etcd-cert" placeholder:"FILE" env:"ETCD_TLS_CERT_FILE" context:"etcd_cert" predictor:"file" help:"PEM file of a certificate to show etcd."`
	EtcdKey       string        `name:"etcd-key" placeholder:"FILE" env:"ETCD_TLS_KEY_FILE" context:"etcd_key" predictor:"file" help:"PEM file of its key."`
	Timeout       time.Duration `default:"5s" help:"Longest time for each check."`
}

// The verdicts of a check.
const (
	checkOK   = "ok"
	checkWarn = "warn"
	checkFail = "fail"
	checkSkip = "skip"
)

// finding is what a check has come to.
type finding struct {
	Check   string `json:"check"`
	Verdict string `json:"verdict"`
	Seen    string `json:"seen"`
	Do      string `json:"do,omitempty"`
	TookMS  int64  `json:"took_ms"`
}

// expiresSoon is when the end of a certificate is told before it comes.
const expiresSoon = 14 * 24 * time.Hour

// maxNodesTried bounds the nodes that are tried.
const maxNodesTried = 1000

// doctor goes through the checks, from here to the nodes. Owned by one goroutine.
type doctor struct {
	// Static.
	*doctorCmd
	t        *terminal
	contexts *contexts
	local    bool // Push-Manager is on this machine

	secret  string // the token, which nothing printed holds
	began   time.Time
	verdict map[string]int
	printed error

	secured bool // TLS is asked for
	nodes   map[string]*nodeFound
}

// nodeFound is what is known of a Connect-Node.
type nodeFound struct {
	address    string // as it is registered; "" if it is not
	registered bool
	known      bool // to the Push-Manager that answered
	link       string
	why        string
	dialed     error
}

// say prints what a check has come to.
func (d *doctor) say(verdict, check, seen, do string) {
	mask := func(text string) string {
		if d.secret != "" {
			text = strings.ReplaceAll(text, d.secret, "(the token)")
		}
		return plain.Line(text, 512)
	}
	f := finding{check, verdict, mask(seen), mask(do), time.Since(d.began).Milliseconds()}
	d.began = time.Now()
	d.verdict[verdict]++
	colour := map[string]string{checkOK: green, checkWarn: yellow, checkFail: red, checkSkip: grey}[verdict]
	line := d.t.paint(colour, fmt.Sprintf("%-4s", f.Verdict)) + fmt.Sprintf("  %-12s ", f.Check)
	if d.t.format == formatWide {
		line += fmt.Sprintf("%6d ms  ", f.TookMS)
	}
	line += f.Seen
	if f.Do != "" {
		line += "\n      " + strings.Repeat(" ", 13) + "-> " + f.Do
	}
	if err := d.t.answer(f, line); d.printed == nil {
		d.printed = err
	}
}

// Run tells what is wrong. Exit code 1 says that a check failed.
func (c *doctorCmd) Run(ctx context.Context, t *terminal, in *contexts) error {
	if c.Timeout <= 0 || c.Timeout > maxTimeout {
		return &usageError{fmt.Sprintf("--timeout: %v must be above zero and at most %v", c.Timeout, maxTimeout)}
	}
	d := &doctor{doctorCmd: c, t: t, contexts: in, began: time.Now(), verdict: map[string]int{}, nodes: map[string]*nodeFound{}}
	d.secured = c.TLS || c.CA != "" || c.Cert != "" || c.Key != ""
	host, port := splitTarget(c.Address)
	d.local = config.Loopback(host)
	if d.local {
		c.Metrics, c.Controller, c.EtcdEndpoints = cmp.Or(c.Metrics, "localhost:9093"), cmp.Or(c.Controller, "localhost:50051"), cmp.Or(c.EtcdEndpoints, "localhost:2379")
	}
	d.settings()
	if d.credentials() {
		if host == "" || d.network(ctx, host, port) {
			d.api(ctx, net.JoinHostPort(host, port))
		}
	}
	d.instances(ctx)
	d.etcd(ctx)
	d.controller(ctx)
	d.connectNodes(ctx)
	if d.printed != nil {
		return d.printed
	}
	if !t.structured() {
		_, _ = fmt.Fprintf(t.out, "\n%d ok, %d warn, %d fail, %d skip\n", d.verdict[checkOK], d.verdict[checkWarn], d.verdict[checkFail], d.verdict[checkSkip])
	}
	if d.verdict[checkFail] > 0 {
		return &outcome{code: exitError}
	}
	return nil
}

// splitTarget is the host and the port of an address, empty where gRPC finds them by itself.
func splitTarget(address string) (host, port string) {
	address = strings.TrimPrefix(strings.TrimPrefix(address, "dns:///"), "passthrough:///")
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", ""
	}
	return host, port
}

// settings tells what is asked for, and where that comes from.
func (d *doctor) settings() {
	var parts []string
	for _, s := range []struct{ key, value string }{
		{"address", d.Address}, {"ca", d.CA}, {"cert", d.Cert}, {"key", d.Key}, {"token_file", d.TokenFile},
		{"metrics", d.Metrics}, {"controller", d.Controller}, {"etcd_endpoints", d.EtcdEndpoints},
	} {
		if s.value != "" {
			parts = append(parts, fmt.Sprintf("%s=%s (%s)", s.key, s.value, cmp.Or(d.contexts.from[s.key], "command line")))
		}
	}
	name := "no context"
	if d.contexts.name != "" {
		name = "context " + d.contexts.name
	}
	d.say(checkOK, "settings", name+"; "+strings.Join(parts, ", "), "")
}

// credentials looks at the files and the token. Without them nothing more can be tried.
func (d *doctor) credentials() bool {
	files := certs.Files{Cert: d.Cert, Key: d.Key, CA: d.CA}
	if files != (certs.Files{}) {
		end, err := files.Expires()
		var bad *certs.FileError
		switch {
		case errors.As(err, &bad):
			d.say(checkFail, "files", fmt.Sprintf("--%s: %v", strings.TrimSuffix(bad.File, "_file"), bad.Err), "give PEM files that belong together")
			return false
		case err != nil:
			d.say(checkFail, "files", err.Error(), "give PEM files that belong together")
			return false
		case time.Until(end) < expiresSoon:
			d.say(checkWarn, "files", "what they hold ends "+until(end), "renew the certificate (push-manager certs)")
		default:
			d.say(checkOK, "files", "what they hold ends "+until(end), "")
		}
	}
	secret, err := d.Secret()
	if d.secret = secret; err != nil {
		d.say(checkFail, "token", err.Error(), "put one API key or token into the file")
		return false
	}
	switch c := claimsOf(secret); {
	case secret == "":
		d.say(checkSkip, "token", "none is shown", "")
	case strings.HasPrefix(secret, "pmk_"):
		d.say(checkOK, "token", "an API key", "")
	case c.Expires > 0 && time.Until(time.Unix(int64(c.Expires), 0)) <= 0:
		d.say(checkFail, "token", "a token that ended "+until(time.Unix(int64(c.Expires), 0)), "get a new one from its issuer")
		return false
	case c.Expires > 0:
		d.say(checkOK, "token", "a token that ends "+until(time.Unix(int64(c.Expires), 0)), "")
	default:
		d.say(checkWarn, "token", "neither an API key nor a JSON Web Token", "see which of them the policy of Push-Manager expects")
	}
	if d.TokenFile != "" {
		if info, err := os.Stat(d.TokenFile); err == nil && info.Mode().Perm()&0o077 != 0 {
			d.say(checkWarn, "token file", fmt.Sprintf("%s has mode %04o: others can read it", d.TokenFile, info.Mode().Perm()), "chmod 600 "+d.TokenFile)
		}
	}
	return true
}

// until is a moment, and how far away it is.
func until(at time.Time) string {
	left := time.Until(at)
	day := at.UTC().Format("2006-01-02 15:04 MST")
	switch {
	case left < 0:
		return fmt.Sprintf("%v ago (%s)", (-left).Round(time.Second), day)
	case left > 48*time.Hour:
		return fmt.Sprintf("in %d days (%s)", int(left.Hours()/24), day)
	}
	return fmt.Sprintf("in %v (%s)", left.Round(time.Second), day)
}

// network tries names, connections and TLS. It tells whether there is something to talk to.
func (d *doctor) network(ctx context.Context, host, port string) bool {
	lookUp, cancel := context.WithTimeout(ctx, d.Timeout)
	addresses, err := net.DefaultResolver.LookupHost(lookUp, host)
	cancel()
	if err != nil {
		d.say(checkFail, "dns", err.Error(), "see that the name in --address is right and known here")
		return false
	}
	d.say(checkOK, "dns", host+" is "+strings.Join(addresses, ", "), "")

	var reached string
	var failed []string
	var last error
	for _, address := range addresses[:min(len(addresses), 16)] {
		dial, cancel := context.WithTimeout(ctx, d.Timeout)
		conn, err := new(net.Dialer).DialContext(dial, "tcp", net.JoinHostPort(address, port))
		cancel()
		if err != nil {
			last = err
			failed = append(failed, address)
			continue
		}
		_ = conn.Close() // it was tried
		reached = cmp.Or(reached, net.JoinHostPort(address, port))
	}
	switch {
	case reached == "":
		d.say(checkFail, "tcp", last.Error(), "see that Push-Manager runs there, that its LISTEN_ADDRESS is not 127.0.0.1 if you are elsewhere, and that no firewall is between")
		return false
	case len(failed) > 0 && !(d.local && len(addresses) == 2): // localhost is two addresses, and one of them is enough
		d.say(checkWarn, "tcp", fmt.Sprintf("%s answers, %s not: %v", reached, strings.Join(failed, ", "), last), "calls go to all addresses of the name: take out those where nothing listens")
	default:
		d.say(checkOK, "tcp", reached+" takes connections", "")
	}
	if !d.secured {
		return true
	}
	return d.handshake(ctx, host, reached)
}

// handshake tells whose certificate is shown, and whether ours is taken.
func (d *doctor) handshake(ctx context.Context, host, address string) bool {
	source, err := certs.Open(certs.Config{Files: certs.Files{Cert: d.Cert, Key: d.Key, CA: d.CA}, Role: "client"})
	if err != nil {
		d.say(checkFail, "tls", err.Error(), "give PEM files that belong together")
		return false
	}
	defer source.Close()
	cfg := source.ClientConfig(certs.Side{MinVersion: tls.VersionTLS12, ServerName: host})
	cfg.NextProtos = []string{"h2"}
	ctx, cancel := context.WithTimeout(ctx, d.Timeout)
	defer cancel()
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		d.say(checkFail, "tls", err.Error(), "")
		return false
	}
	defer func() { _ = raw.Close() }() // it was tried
	conn := tls.Client(raw, cfg)
	err = conn.HandshakeContext(ctx)
	if err == nil {
		// With TLS 1.3 a server says what it thinks of our certificate after the handshake.
		_ = conn.SetReadDeadline(time.Now().Add(min(d.Timeout, 500*time.Millisecond)))
		if _, readErr := conn.Read(make([]byte, 1)); readErr != nil && strings.Contains(readErr.Error(), "tls:") {
			err = readErr
		}
	}
	chain := conn.ConnectionState().PeerCertificates
	if bad := (*tls.CertificateVerificationError)(nil); errors.As(err, &bad) && len(chain) == 0 {
		chain = bad.UnverifiedCertificates
	}
	shown := ""
	if len(chain) > 0 {
		names := certs.Names(chain[0])
		for _, ip := range chain[0].IPAddresses {
			names = append(names, ip.String())
		}
		shown = fmt.Sprintf("; the certificate is for %s, by %q, and ends %s", strings.Join(names, ", "), chain[0].Issuer.String(), until(chain[0].NotAfter))
	}
	var unknown x509.UnknownAuthorityError
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	var noTLS tls.RecordHeaderError
	switch {
	case err == nil:
	case errors.As(err, &unknown):
		d.say(checkFail, "tls", "the certificate is of an authority that is not known here"+shown, "give the authority's file with --ca")
	case errors.As(err, &name):
		d.say(checkFail, "tls", "the certificate is for another name than "+host+shown, "use one of its names in --address, or issue it for this one")
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		d.say(checkFail, "tls", "the certificate is not valid now"+shown, "renew it, and see that the clocks are right")
	case errors.As(err, &noTLS), strings.Contains(err.Error(), "first record does not look like a TLS handshake"):
		d.say(checkFail, "tls", "what answers there does not speak TLS", "leave out --tls, --ca, --cert and --key, or take another port")
	case strings.Contains(err.Error(), "certificate required"), strings.Contains(err.Error(), "bad certificate"), strings.Contains(err.Error(), "unknown certificate authority"):
		d.say(checkFail, "tls", "the server does not take our certificate: "+err.Error()+shown, "give one of an authority that the server knows, with --cert and --key")
	default:
		d.say(checkFail, "tls", err.Error()+shown, "")
	}
	if err != nil {
		return false
	}
	state := conn.ConnectionState()
	verdict, do := checkOK, ""
	if time.Until(chain[0].NotAfter) < expiresSoon {
		verdict, do = checkWarn, "renew the server's certificate"
	}
	d.say(verdict, "tls", tls.VersionName(state.Version)+shown, do)
	return true
}

// api asks Push-Manager itself: whether it is ready, whether it takes the token, and what it sees of the others.
func (d *doctor) api(ctx context.Context, address string) {
	conn, _, done, err := d.connect()
	if err != nil {
		d.say(checkFail, "api", err.Error(), "")
		return
	}
	defer done()
	call := func(do func(context.Context) error) error {
		ctx, cancel := context.WithTimeout(ctx, d.Timeout)
		defer cancel()
		return do(ctx)
	}
	var health *healthpb.HealthCheckResponse
	err = call(func(ctx context.Context) (err error) {
		health, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: pubsub.PushManagerService_ServiceDesc.ServiceName})
		return err
	})
	s := status.Convert(err)
	switch {
	case err == nil && health.GetStatus() == healthpb.HealthCheckResponse_SERVING:
		d.say(checkOK, "health", "Push-Manager says that it can deliver", "")
	case err == nil:
		d.say(checkFail, "health", "Push-Manager is there, and says that it cannot deliver", "the checks below say why; /readyz of its METRICS_PORT has the reasons (--metrics)")
	case s.Code() == codes.Unimplemented, s.Code() == codes.NotFound:
		d.say(checkFail, "health", "what answers is no Push-Manager: "+s.Message(), "take its GRPC_PORT (50053)")
		return
	case s.Code() == codes.Unauthenticated:
		// Push-Manager answers this to everybody: something in front of it does not.
		d.say(checkWarn, "health", "something in front of Push-Manager asks who we are: "+s.Message(), "")
	default:
		seen, do := "it takes connections, and answers no call: "+s.Message(), "see that this is Push-Manager's GRPC_PORT (50053)"
		if !d.secured && speaksTLS(ctx, address, d.Timeout) {
			seen, do = "the port speaks TLS, and we did not", "give --tls, or the authority's file with --ca"
		}
		d.say(checkFail, "health", seen, do)
		return
	}

	// Explain sends nothing. Of a broadcast it names every node.
	api := pubsub.NewPushManagerServiceClient(conn)
	content := &pubsub.MessageContent{Data: []byte("doctor")}
	explain := func(r *pubsub.ExplainRequest) (x *pubsub.ExplainResponse, err error) {
		err = call(func(ctx context.Context) (err error) {
			x, err = api.Explain(ctx, r)
			return err
		})
		return x, err
	}
	x, err := explain(&pubsub.ExplainRequest{Push: &pubsub.ExplainRequest_Broadcast{Broadcast: &pubsub.BroadcastMessageRequest{Content: content}}})
	s = status.Convert(err)
	switch {
	case err == nil && x.GetCaller().GetName() == "":
		d.say(checkOK, "caller", "Push-Manager does not ask who calls", "")
	case err == nil:
		d.say(checkOK, "caller", fmt.Sprintf("Push-Manager takes us for %q", x.GetCaller().GetName()), "")
	case s.Code() == codes.Unauthenticated:
		d.say(checkFail, "caller", "Push-Manager does not know us: "+s.Message(), "give a key or a token it knows with --token-file, or a certificate with --cert and --key (docs/access.md)")
		return
	case s.Code() == codes.PermissionDenied:
		d.say(checkWarn, "caller", "Push-Manager knows us, and does not let us ask about a broadcast, so it does not say what it sees of the nodes", "allow Explain by its name, and BroadcastMessage, in the policy (docs/access.md)")
		return
	case s.Code() == codes.Unimplemented:
		d.say(checkWarn, "caller", "this Push-Manager is too old to say what it sees of the nodes", "update it")
		return
	default:
		d.say(checkWarn, "caller", fmt.Sprintf("Push-Manager does not say what it sees of the nodes: %s: %s", words(s.Code()), s.Message()), "")
		return
	}
	for _, delivery := range x.GetDeliveries() {
		n := d.node(delivery.GetNodeId())
		n.known = true
		// The worst of its links.
		if n.link == "" || delivery.GetVerdict() != "queued" {
			n.link, n.why = cmp.Or(delivery.GetLinkState(), "not registered"), ""
			if delivery.GetVerdict() != "queued" {
				n.why = delivery.GetVerdict()
			}
		}
	}
	x, err = explain(&pubsub.ExplainRequest{Refresh: true, Push: &pubsub.ExplainRequest_ToUser{ToUser: &pubsub.PushToUserRequest{UserId: "pushctl-doctor", Content: content}}})
	switch s := status.Convert(err); {
	case err != nil && s.Code() == codes.PermissionDenied:
		d.say(checkSkip, "routes", "the policy does not let us ask about a user, so it is not known whether the Controller answers Push-Manager", "")
	case err != nil:
		d.say(checkFail, "routes", fmt.Sprintf("Push-Manager does not say where a user is: %s: %s", words(s.Code()), s.Message()), "")
	case x.GetRoute().GetError() != "":
		d.say(checkFail, "routes", "Push-Manager cannot ask the Controller: "+x.GetRoute().GetError(), "see that the Controller runs, and CONTROLLER_ADDRESS and controller.tls of Push-Manager")
	default:
		d.say(checkOK, "routes", "the Controller answers Push-Manager", "")
	}
}

// speaksTLS tells whether a port answers a TLS handshake in any way.
func speaksTLS(ctx context.Context, address string, timeout time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	host, _ := splitTarget(address)
	conn, err := (&tls.Dialer{Config: &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host, NextProtos: []string{"h2"}}}).DialContext(ctx, "tcp", address)
	if err == nil {
		_ = conn.Close() // it was tried
		return true
	}
	var verify *tls.CertificateVerificationError
	var alert tls.AlertError
	return errors.As(err, &verify) || errors.As(err, &alert)
}

// instances asks each Push-Manager what it is and whether it is ready.
func (d *doctor) instances(ctx context.Context) {
	if d.Metrics == "" {
		d.say(checkSkip, "readiness", "no METRICS_PORT is given", "--metrics HOST:PORT of each Push-Manager shows why one is not ready")
		return
	}
	targets, err := metricsTargets(d.Metrics)
	if err != nil {
		d.say(checkFail, "readiness", err.Error(), "")
		return
	}
	s := newScraper(targets)
	defer s.close()
	for _, target := range targets {
		ctx, cancel := context.WithTimeout(ctx, d.Timeout)
		code, body, err := s.get(ctx, "http://"+target+"/readyz", maxHealth)
		families, metricsErr := s.one(ctx, target)
		cancel()
		version := ""
		for v := range (&sample{families: families}).by("push_manager_build_info", "version") {
			version = v
		}
		reasons := strings.ReplaceAll(strings.TrimSpace(body), "\n", "; ")
		switch {
		case err != nil:
			d.say(checkFail, "readiness", target+" does not answer: "+err.Error(), "see METRICS_PORT and METRICS_ADDRESS of Push-Manager (--metrics)")
			continue
		case code != http.StatusOK && code != http.StatusServiceUnavailable:
			d.say(checkFail, "readiness", fmt.Sprintf("%s answers /readyz with %d", target, code), "take METRICS_PORT of Push-Manager (--metrics)")
			continue
		case code != http.StatusOK:
			d.say(checkFail, "readiness", target+" is not ready: "+reasons, "docs/reliability.md says what each reason means")
		default:
			d.say(checkOK, "readiness", target+" is ready: "+reasons, "")
		}
		switch own := buildinfo.Version(); {
		case metricsErr != nil:
			d.say(checkWarn, "version", target+": "+metricsErr.Error(), "")
		case version == "":
			d.say(checkWarn, "version", target+" exports no push_manager_build_info", "take METRICS_PORT of Push-Manager, not that of another program")
		case version != own:
			d.say(checkOK, "version", fmt.Sprintf("%s has %s; this is pushctl %s", target, version, own), "")
		default:
			d.say(checkOK, "version", target+" has "+version+", as pushctl", "")
		}
	}
}

func (d *doctor) node(id string) *nodeFound {
	if d.nodes[id] == nil {
		d.nodes[id] = &nodeFound{}
	}
	return d.nodes[id]
}

// etcd lists what is registered.
func (d *doctor) etcd(ctx context.Context) {
	if d.EtcdEndpoints == "" {
		d.say(checkSkip, "etcd", "no etcd is given", "--etcd-endpoints shows what is registered")
		return
	}
	ctx, cancel := context.WithTimeout(ctx, d.Timeout)
	defer cancel()
	entries, err := registered(ctx, d.EtcdEndpoints, certs.Files{Cert: d.EtcdCert, Key: d.EtcdKey, CA: d.EtcdCA}, "--etcd-")
	if err != nil {
		d.say(checkFail, "etcd", err.Error(), "see that etcd runs; known nodes keep working without it")
		return
	}
	count := map[string]int{}
	for _, e := range entries {
		if count[e.Kind]++; e.Kind == connectNode {
			n := d.node(e.ID)
			n.registered, n.address = true, e.Address
		}
	}
	seen := fmt.Sprintf("%s registered, and %s", plural(int32(count[connectNode]), connectNode), plural(int32(count[pushManager]), pushManager))
	switch {
	case count[connectNode] == 0:
		d.say(checkFail, "etcd", seen, "see that Connect-Nodes run, and that their ETCD_ENDPOINTS are these")
	case count[pushManager] == 0:
		d.say(checkWarn, "etcd", seen, "see ETCD_ENDPOINTS of Push-Manager: these are perhaps others")
	default:
		d.say(checkOK, "etcd", seen, "")
	}
}

// controller tries whether the Controller can be reached from here.
func (d *doctor) controller(ctx context.Context) {
	host, port := splitTarget(d.Controller)
	switch {
	case d.Controller == "":
		d.say(checkSkip, "controller", "no Controller is given", "--controller HOST:PORT tries whether it can be reached from here")
		return
	case host == "":
		d.say(checkSkip, "controller", d.Controller+" is not HOST:PORT", "")
		return
	}
	if err := dial(ctx, net.JoinHostPort(host, port), d.Timeout); err != nil {
		verdict, do := checkFail, "see that the Controller runs"
		if !d.local {
			verdict, do = checkWarn, "it is Push-Manager that must reach it (CONTROLLER_ADDRESS): see routes above"
		}
		d.say(verdict, "controller", err.Error(), do)
		return
	}
	d.say(checkOK, "controller", d.Controller+" takes connections", "")
}

func dial(ctx context.Context, address string, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return conn.Close()
}

// connectNodes puts together what etcd, Push-Manager and we see of each node.
func (d *doctor) connectNodes(ctx context.Context) {
	ids := slices.Sorted(maps.Keys(d.nodes))
	asked := slices.ContainsFunc(ids, func(id string) bool { return d.nodes[id].known }) // Push-Manager has said what it sees
	if len(ids) > maxNodesTried {
		d.say(checkSkip, "node", fmt.Sprintf("%d of %d are tried", maxNodesTried, len(ids)), "")
		ids = ids[:maxNodesTried]
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, 64)
	for _, id := range ids {
		if n := d.nodes[id]; n.registered {
			wg.Go(func() {
				slots <- struct{}{}
				n.dialed = dial(ctx, n.address, min(d.Timeout, 2*time.Second))
				<-slots
			})
		}
	}
	wg.Wait()
	for _, id := range ids {
		n := d.nodes[id]
		here := ""
		switch {
		case n.dialed != nil:
			here = "; from here: " + n.dialed.Error()
		case n.registered:
			here = "; " + n.address + " takes connections from here"
		}
		switch {
		case asked && !n.known:
			d.say(checkFail, "node", id+" is registered, and Push-Manager does not know it"+here, "see that ETCD_ENDPOINTS of Push-Manager are the same, and its log for a value that is malformed")
		case n.known && n.why != "":
			d.say(checkFail, "node", fmt.Sprintf("%s: the link is %s: %s%s", id, n.link, n.why, here), "see that the node runs, and that ADVERTISE_ADDRESS of it can be reached from Push-Manager")
		case n.known && !n.registered && d.EtcdEndpoints != "":
			d.say(checkWarn, "node", fmt.Sprintf("%s: the link is %s, and it is not registered in this etcd", id, n.link), "see ETCD_ENDPOINTS of the node: Push-Manager keeps a node whose links live")
		case n.known:
			d.say(checkOK, "node", fmt.Sprintf("%s: the link is %s%s", id, n.link, here), "")
		case n.dialed != nil:
			d.say(checkWarn, "node", id+" cannot be reached from here: "+n.dialed.Error(), "it is Push-Manager that must reach it: see ADVERTISE_ADDRESS of the node")
		default:
			d.say(checkOK, "node", id+" at "+n.address+" takes connections from here; what Push-Manager sees of it is not known", "")
		}
	}
}
