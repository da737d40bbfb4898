package devstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/invoke"
	"github.com/push-manager/push-manager/internal/telemetry"
)

// readyTimeout is how long everything may take to find each other.
const readyTimeout = 30 * time.Second

// Command is push-manager dev. It tells people on out what runs where.
func Command(out io.Writer) cli.Command {
	return cli.Command{
		Name: "dev",
		Help: "Run everything on this machine: etcd, a Controller, Connect-Nodes and Push-Manager.",
		New:  func() cli.Settings { return &devConfig{out: out} },
	}
}

// devConfig is the configuration of push-manager dev.
type devConfig struct {
	out io.Writer

	nodes, basePort int
	dataDir, store  string
	hooksFile       string
	secure          bool
	drainTimeout    time.Duration
	log             telemetry.LogConfig
	tracing         telemetry.TracingConfig
}

// Bind implements cli.Settings.
func (c *devConfig) Bind(s *config.Set) {
	s.Int(&c.nodes, "nodes", 3, 1, maxNodes, "Number of Connect-Nodes.")
	s.Int(&c.basePort, "base_port", ContractPorts, ContractPorts, highestPort,
		"First of the ports in use, one after the other: etcd (2), Controller, push API, metrics, then two for each node (gRPC, WebSocket), and the push API over HTTP. 0: any free ones. -1: the usual ones.")
	s.Text(&c.dataDir, "data_dir", "", "Directory for etcd's data, messages that are stored, and the files of secure, which is kept. Empty: a temporary one, which is removed at the end.")
	s.Choice(&c.store, "store", "embedded", "Where messages wait for users who were not reached. embedded: in data_dir; off: nowhere.", "embedded", "off")
	s.Text(&c.hooksFile, "hooks_file", "", "YAML file of the URLs that the Connect-Nodes tell who connects, disconnects, joins and leaves (docs/hooks.md). Empty: nobody is told.")
	s.Bool(&c.secure, "secure", false, "TLS on every connection, certificates, a policy of callers, API keys, and tokens of clients. The files are made in the directory secure of data_dir. The lines that are printed use them.")
	s.Duration(&c.drainTimeout, "drain_timeout", 8*time.Second, time.Millisecond, "Longest time to stop everything in good order.")
	c.log.Level = "warn" // what runs where is told on standard output
	c.log.Bind(s)
	c.tracing.Bind(s)
}

// Validate implements cli.Settings.
func (c *devConfig) Validate(s *config.Set, lookupEnv func(string) (string, bool)) error {
	if last := c.basePort + portsOf(c.nodes) - 1; c.basePort > 0 && last > highestPort {
		return s.Errorf("base_port", "%d is too high: the last port of %d nodes would be %d, and there is none above %d", c.basePort, c.nodes, last, highestPort)
	}
	if info, err := os.Stat(c.dataDir); err == nil && !info.IsDir() {
		return s.Errorf("data_dir", "%s is no directory", c.dataDir)
	}
	return c.tracing.Validate(lookupEnv)
}

// LogConfig implements cli.Settings.
func (c *devConfig) LogConfig() telemetry.LogConfig { return c.log }

// Timeout implements cli.Settings.
func (c *devConfig) Timeout() time.Duration { return c.drainTimeout }

// Start implements cli.Settings.
func (c *devConfig) Start(ctx context.Context, logger *slog.Logger) (cli.Program, error) {
	s, err := Start(ctx, Config{Nodes: c.nodes, BasePort: c.basePort, DataDir: c.dataDir, Store: c.store, Secure: c.secure, HooksFile: c.hooksFile, Tracing: c.tracing, Logger: logger})
	if err != nil {
		if errors.Is(err, syscall.EADDRINUSE) {
			err = fmt.Errorf("%w (another set of ports: --base-port 0)", err)
		}
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := s.WaitReady(ctx); err != nil {
		stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.drainTimeout)
		defer cancel()
		return nil, errors.Join(err, s.Drain(stopCtx))
	}
	if err := s.describe(c.out); err != nil {
		stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.drainTimeout)
		defer cancel()
		return nil, errors.Join(err, s.Drain(stopCtx))
	}
	return s, nil
}

// describe tells what runs where, and how to see a push arrive.
func (s *Stack) describe(out io.Writer) error {
	var b strings.Builder
	line := func(name, address, more string) { fmt.Fprintf(&b, "  %-16s %-18s %s\n", name, address, more) }
	with := ""
	if s.secure != nil {
		with = ", with TLS on every connection but those to metrics"
	}
	fmt.Fprintf(&b, "\nEverything runs on this machine%s:\n\n", with)
	line("Push-Manager", local(s.Address()), "gRPC; metrics and health at http://"+local(s.pushManager.HTTPAddr()))
	line("", local(s.HTTPAddress()), "HTTP: Connect, gRPC-Web and JSON; console at "+strings.TrimSuffix(s.Console(), "#push"))
	line("Controller", local(s.ControllerAddress()), "gRPC")
	for _, n := range s.Nodes() {
		line(n.ID, local(n.GRPC), "gRPC; page and WebSocket at "+strings.TrimSuffix(n.Page(), "/"))
	}
	data := s.dir
	if s.temporary {
		data += ", removed at the end"
	}
	line("etcd", local(s.EtcdEndpoint()), "data in "+data)

	// Flags that are the default of pushctl are left out.
	listen, push := " --room lobby", ""
	if url := s.Nodes()[0].WebSocket(); url != "ws://localhost:8080/ws" {
		listen += " --url " + url
	}
	address := local(s.Address())
	if address != "localhost:50053" {
		push = " --address " + address
	}
	var err error
	if pushctl := invoke.As("pushctl"); s.secure == nil {
		fmt.Fprintf(&b, `
Ready. Open this in a browser: it opens users in tabs of their own, and pushes to them by a click.

  %s

Or copy these, each into a terminal of its own:

  %s listen --user alice%s
  %s room lobby "Hello"%s
  %[2]s user alice "Hello, Alice"%[5]s
  curl -d '{"text": "Hello from curl"}' %[6]s/v1/rooms/lobby/messages
`, s.Console(), pushctl, listen, pushctl, push, local(s.HTTPAddress()))
	} else {
		err = s.describeSecured(&b, pushctl, listen, push, address)
	}
	b.WriteString("\nCtrl-C stops everything.\n")
	if err == nil {
		_, err = io.WriteString(out, b.String())
	}
	return err
}

// describeSecured tells how callers and clients show who they are.
func (s *Stack) describeSecured(b *strings.Builder, pushctl, listen, push, address string) error {
	dir, err := filepath.Abs(s.secure.Path)
	if err != nil {
		return err
	}
	token, err := s.secure.token("bob", time.Now())
	if err != nil {
		return err
	}
	file := func(name string) string { return "$PM/" + name }
	if strings.ContainsFunc(dir, unicode.IsSpace) {
		file = func(name string) string { return `"$PM/` + name + `"` }
	}
	ca, cert, key := file("ca.crt"), file(callerName+".crt"), file(callerName+".key")
	caller := fmt.Sprintf("%s --ca %s --cert %s --key %s", push, ca, cert, key)
	const hello = `-d '{"room_id": "lobby", "content": {"data": "SGVsbG8="}}'`
	method := address + " pubsub.PushManagerService/PushToRoom"
	for _, part := range []struct{ title, line string }{
		{"Ready. All files are in one directory. Begin with this in every terminal", "PM=" + invoke.Quote(dir)},
		{"Be alice, with a token, and see what is pushed", fmt.Sprintf("%s listen%s --ca %s --token-file %s", pushctl, listen, ca, file("alice.token"))},
		{"Push, with a certificate", fmt.Sprintf("%[1]s room lobby \"Hello\"%[2]s\n  %[1]s user alice \"Hello, Alice\"%[2]s\n"+
			"  grpcurl -cacert %[3]s -cert %[4]s -key %[5]s \\\n    %[6]s \\\n    %[7]s", pushctl, caller, ca, cert, key, hello, method)},
		{"Push, with an API key in place of it", fmt.Sprintf("%[1]s room lobby \"Hello\"%[2]s --ca %[3]s --token-file %[4]s\n"+
			"  PM_KEY=$(cat %[4]s) grpcurl -cacert %[3]s -expand-headers -H 'authorization: Bearer ${PM_KEY}' \\\n    %[5]s \\\n    %[6]s",
			pushctl, push, ca, file(keyFile), hello, method)},
		{"Make a token for somebody else", fmt.Sprintf(`%s token carol --secret-file %s --issuer %s --audience %s`,
			pushctl, file(secretFile), clientIssuer, clientAudience)},
		{"See the console, and sign in with the API key in " + file(keyFile), s.Console()},
		{"Be bob in a browser. It warns of an authority that it does not know: choose Advanced and go on, or\nhave it trust " + file("ca.crt") +
			", which is good for this machine alone", s.Nodes()[0].Page() + "#token=" + token},
	} {
		fmt.Fprintf(b, "\n%s:\n\n  %s\n", part.title, part.line)
	}
	fmt.Fprintf(b, "\nTokens are good for 24 hours. %s says who may push what; a change counts within 10 s.\n", file(policyFile))
	return nil
}

// local writes a loopback address as people do.
func local(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil || host != "127.0.0.1" {
		return address
	}
	return net.JoinHostPort("localhost", port)
}
