// Package certcmd is the command push-manager certs: an authority of one's own, and the certificates of all
// programs and callers, for development and small deployments.
package certcmd

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/cmdline"
)

type grammar struct {
	CA         caCmd         `cmd:"" name:"ca" help:"Make an authority: ca.crt, which everybody trusts, and ca.key, which signs."`
	Controller controllerCmd `cmd:"" help:"Make the certificate of a Controller."`
	Node       nodeCmd       `cmd:"" help:"Make the certificate of a Connect-Node, for Push-Manager, and with hosts for clients, too."`
	Manager    managerCmd    `cmd:"" help:"Make the certificate of a Push-Manager, for its push API and for its links to nodes."`
	Client     clientCmd     `cmd:"" help:"Make the certificate of a caller of the push API, of a program that uses etcd, or, with hosts, of a balancer."`
	Etcd       etcdCmd       `cmd:"" help:"Make the certificate of a member of etcd. Give etcd an authority of its own (--dir): whoever it has signed may write there."`

	Dir         string `default:"certs" placeholder:"DIR" help:"Folder of all files. (default: certs)"`
	TrustDomain string `default:"dev" env:"TRUST_DOMAIN" placeholder:"NAME" help:"Trust domain of the names in certificates. (default: dev)"`
	Days        int    `default:"365" placeholder:"DAYS" help:"How long the certificate is valid. An authority: ten times as long. (default: 365)"`
	Overwrite   bool   `help:"Replace files that exist: a certificate is renewed with a new key."`
}

type caCmd struct{}

type controllerCmd struct {
	ID    string   `arg:"" help:"Name of the instance."`
	Hosts []string `arg:"" optional:"" help:"Names and IP addresses that nodes and Push-Managers reach it at. (default: localhost 127.0.0.1 ::1)"`
}

type nodeCmd struct {
	ID    string   `arg:"" help:"NODE_ID of the node."`
	Hosts []string `arg:"" optional:"" help:"Names and IP addresses of it, where clients check them."`
}

type managerCmd struct {
	ID    string   `arg:"" help:"MANAGER_ID of the instance."`
	Hosts []string `arg:"" optional:"" help:"Names and IP addresses that callers reach it at. (default: localhost 127.0.0.1 ::1)"`
}

type clientCmd struct {
	Name  string   `arg:"" help:"Name of the caller, or of the balancer."`
	Hosts []string `arg:"" optional:"" help:"Names and IP addresses that callers reach a balancer at, where TLS ends there."`
}

type etcdCmd struct {
	Name  string   `arg:"" help:"Name of the member."`
	Hosts []string `arg:"" optional:"" help:"Names and IP addresses that it is reached at. (default: localhost 127.0.0.1 ::1)"`
}

// usageError is a mistake on the command line that kong cannot see.
type usageError struct{ error }

// Command is push-manager certs.
func Command() cli.Command {
	return cli.Command{Name: "certs", Help: "Make certificates: an authority, and by it those of programs and callers.", Main: func(args []string) int {
		return run(args, os.Stdout, os.Stderr)
	}}
}

// run executes one command line and returns its exit code.
func run(args []string, out, errOut io.Writer) int {
	var g grammar
	fail := func(err error, code int) int {
		_, _ = fmt.Fprintf(errOut, "push-manager certs: %v\n", err)
		return code
	}
	parsed, helped, err := cmdline.Parse(&g, args, out, errOut, kong.Name("push-manager certs"),
		kong.Description("Makes certificates for development and small deployments."), kong.Bind(&g), kong.BindTo(out, (*io.Writer)(nil)))
	switch {
	case helped:
		return cli.ExitStopped
	case err != nil:
		return fail(fmt.Errorf("%w (push-manager certs --help shows how)", err), cli.ExitUsage)
	}
	if err := certs.CheckTrustDomain(g.TrustDomain); err != nil || g.TrustDomain == "" {
		return fail(fmt.Errorf("--trust-domain: %q is none such as prod.example", g.TrustDomain), cli.ExitUsage)
	}
	if g.Days < 1 || g.Days > 3650 {
		return fail(errors.New("--days: 1 to 3650"), cli.ExitUsage)
	}
	if err := parsed.Run(); errors.As(err, new(usageError)) {
		return fail(err, cli.ExitUsage)
	} else if err != nil {
		return fail(err, cli.ExitFailed)
	}
	return cli.ExitStopped
}

// Run makes an authority.
func (*caCmd) Run(g *grammar, out io.Writer) error {
	return g.write(out, "ca", func() error { return g.folder().WriteAuthority("Push-Manager "+g.TrustDomain, g.until(10)) })
}

// Run makes the certificate of a Controller.
func (c *controllerCmd) Run(g *grammar, out io.Writer) error {
	name := "controller-" + c.ID
	if err := g.issue(out, name, certs.KindController, c.ID, certs.Request{Hosts: hosts(c.Hosts), Server: true, Client: true}); err != nil {
		return err
	}
	return g.settings(out, "Set for the Controller", "TRUST_DOMAIN="+g.TrustDomain,
		"NODE_TLS_CERT_FILE="+g.path(name+".crt"), "NODE_TLS_KEY_FILE="+g.path(name+".key"), "NODE_TLS_CLIENT_CA_FILE="+g.path("ca.crt"))
}

// Run makes the certificate of a node.
func (c *nodeCmd) Run(g *grammar, out io.Writer) error {
	name := "node-" + c.ID
	err := g.issue(out, name, certs.KindNode, c.ID, certs.Request{Hosts: c.Hosts, Server: true, Client: true})
	if err != nil {
		return err
	}
	cert, key := g.path(name+".crt"), g.path(name+".key")
	lines := append([]string{
		"NODE_ID=" + c.ID, "TRUST_DOMAIN=" + g.TrustDomain,
		"NODE_TLS_CERT_FILE=" + cert, "NODE_TLS_KEY_FILE=" + key, "NODE_TLS_CLIENT_CA_FILE=" + g.path("ca.crt"),
	}, g.controllerTLS(name)...)
	if len(c.Hosts) > 0 {
		lines = append(lines, "TLS_CERT_FILE="+cert, "TLS_KEY_FILE="+key)
	}
	return g.settings(out, "Set for the node", lines...)
}

// Run makes the certificate of a Push-Manager.
func (c *managerCmd) Run(g *grammar, out io.Writer) error {
	name := "manager-" + c.ID
	err := g.issue(out, name, certs.KindManager, c.ID, certs.Request{Hosts: hosts(c.Hosts), Server: true, Client: true})
	if err != nil {
		return err
	}
	cert, key, ca := g.path(name+".crt"), g.path(name+".key"), g.path("ca.crt")
	return g.settings(out, "Set for Push-Manager", append([]string{
		"MANAGER_ID=" + c.ID, "TRUST_DOMAIN=" + g.TrustDomain,
		"TLS_CERT_FILE=" + cert, "TLS_KEY_FILE=" + key, "TLS_CLIENT_CA_FILE=" + ca, "AUTH_MODE=required", // whoever the authority has signed is not yet a caller
		"LINK_TLS_CA_FILE=" + ca, "LINK_TLS_CERT_FILE=" + cert, "LINK_TLS_KEY_FILE=" + key,
	}, g.controllerTLS(name)...)...)
}

// Run makes the certificate of a caller, or of a program that uses etcd. That of a balancer is for both of its sides.
func (c *clientCmd) Run(g *grammar, out io.Writer) error {
	name := "client-" + c.Name
	if err := g.issue(out, name, certs.KindClient, c.Name, certs.Request{Hosts: c.Hosts, Server: len(c.Hosts) > 0, Client: true}); err != nil {
		return err
	}
	cert, key, ca := g.path(name+".crt"), g.path(name+".key"), g.path("ca.crt")
	if len(c.Hosts) > 0 {
		return g.settings(out, "Set for HAProxy", "PUSH_API_CERT="+cert, "PM_CA="+ca, "PM_CLIENT_CERT="+cert)
	}
	if err := g.settings(out, "Set for pushctl", "PUSH_MANAGER_CA="+ca, "PUSH_MANAGER_CERT="+cert, "PUSH_MANAGER_KEY="+key); err != nil {
		return err
	}
	return g.settings(out, "Or for a program, where this is the authority of etcd", "ETCD_TLS_CA_FILE="+ca, "ETCD_TLS_CERT_FILE="+cert, "ETCD_TLS_KEY_FILE="+key)
}

// Run makes the certificate of a member of etcd.
func (c *etcdCmd) Run(g *grammar, out io.Writer) error {
	name := "etcd-" + c.Name
	if err := g.issue(out, name, "etcd", c.Name, certs.Request{Hosts: hosts(c.Hosts), Server: true, Client: true}); err != nil {
		return err
	}
	cert, key, ca := g.path(name+".crt"), g.path(name+".key"), g.path("ca.crt")
	// Without URLs etcd speaks plain text in spite of its certificate.
	return g.settings(out, "Set for etcd", "ETCD_LISTEN_CLIENT_URLS=https://0.0.0.0:2379",
		"ETCD_ADVERTISE_CLIENT_URLS=https://"+net.JoinHostPort(hosts(c.Hosts)[0], "2379"), "ETCD_CERT_FILE="+cert, "ETCD_KEY_FILE="+key, "ETCD_TRUSTED_CA_FILE="+ca, "ETCD_CLIENT_CERT_AUTH=true",
		"ETCD_PEER_CERT_FILE="+cert, "ETCD_PEER_KEY_FILE="+key, "ETCD_PEER_TRUSTED_CA_FILE="+ca, "ETCD_PEER_CLIENT_CERT_AUTH=true")
}

// hosts are those given, or this machine.
func hosts(given []string) []string {
	if len(given) > 0 {
		return given
	}
	return []string{"localhost", "127.0.0.1", "::1"}
}

func (g *grammar) folder() certs.Folder { return certs.Folder{Path: g.Dir, TrustDomain: g.TrustDomain} }

func (g *grammar) until(times int) time.Time { return time.Now().AddDate(0, 0, g.Days*times) }

func (g *grammar) path(name string) string {
	path := filepath.Join(g.Dir, name)
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}

// issue makes a certificate for spiffe://<trust domain>/<kind>/<id> and writes it.
func (g *grammar) issue(out io.Writer, name, kind, id string, r certs.Request) error {
	if err := certs.CheckID(id); err != nil {
		return usageError{err}
	}
	r.NotAfter = g.until(1)
	return g.write(out, name, func() error {
		err := g.folder().WriteCertificate(name, kind, id, r)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w (push-manager certs ca makes it)", err)
		}
		return err
	})
}

// write has a certificate and its key written, and says so.
func (g *grammar) write(out io.Writer, name string, write func() error) error {
	files := []string{g.path(name + ".crt"), g.path(name + ".key")}
	for _, file := range files {
		if _, err := os.Lstat(file); err == nil && !g.Overwrite {
			return fmt.Errorf("%s exists (--overwrite replaces it)", file)
		}
	}
	if err := write(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(out, "wrote %s\nwrote %s\n", files[0], files[1])
	return err
}

// settings prints the variables that use the files, and who needs them.
func (*grammar) settings(out io.Writer, who string, lines ...string) error {
	_, err := fmt.Fprintf(out, "\n%s:\n  %s\n", who, strings.Join(lines, "\n  "))
	return err
}

// controllerTLS are the variables of a program that asks the Controller.
func (g *grammar) controllerTLS(name string) []string {
	return []string{"CONTROLLER_TLS_CA_FILE=" + g.path("ca.crt"), "CONTROLLER_TLS_CERT_FILE=" + g.path(name+".crt"), "CONTROLLER_TLS_KEY_FILE=" + g.path(name+".key")}
}
