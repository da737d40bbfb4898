// Package certcmd is the command push-manager certs: an authority of one's own, and the certificates of nodes,
// Push-Managers and callers, for development and small deployments.
package certcmd

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
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
	Node       nodeCmd       `cmd:"" help:"Make the certificate of a Connect-Node."`
	Manager    managerCmd    `cmd:"" help:"Make the certificate of a Push-Manager, for its push API and for its links to nodes."`
	Controller controllerCmd `cmd:"" help:"Make the certificate of a Controller."`
	Client     clientCmd     `cmd:"" help:"Make the certificate of a caller of the push API."`

	Dir         string `default:"certs" placeholder:"DIR" help:"Folder of all files. (default: certs)"`
	TrustDomain string `default:"dev" env:"TRUST_DOMAIN" placeholder:"NAME" help:"Trust domain of the names in certificates. (default: dev)"`
	Days        int    `default:"365" placeholder:"DAYS" help:"How long the certificate is valid. An authority: ten times as long. (default: 365)"`
	Overwrite   bool   `help:"Replace files that exist: a certificate is renewed with a new key."`
}

type caCmd struct{}

type nodeCmd struct {
	ID    string   `arg:"" help:"NODE_ID of the node."`
	Hosts []string `arg:"" optional:"" help:"Names and IP addresses of it, where clients check them."`
}

type managerCmd struct {
	ID    string   `arg:"" help:"MANAGER_ID of the instance."`
	Hosts []string `arg:"" optional:"" help:"Names and IP addresses that callers reach it at. (default: localhost 127.0.0.1 ::1)"`
}

type controllerCmd struct {
	ID    string   `arg:"" help:"Name of the Controller."`
	Hosts []string `arg:"" optional:"" help:"Names and IP addresses that it is reached at. (default: localhost 127.0.0.1 ::1)"`
}

type clientCmd struct {
	Name string `arg:"" help:"Name of the caller."`
}

// usageError is a mistake on the command line that kong cannot see.
type usageError struct{ error }

// Command is push-manager certs.
func Command() cli.Command {
	return cli.Command{Name: "certs", Help: "Make certificates: an authority, and of it nodes, Push-Managers, Controllers, callers.", Main: func(args []string) int {
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
	_, pair, err := certs.NewAuthority("Push-Manager "+g.TrustDomain, g.until(10))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(g.Dir, 0o700); err != nil {
		return err
	}
	return g.write(out, "ca", pair)
}

// Run makes the certificate of a node.
func (c *nodeCmd) Run(g *grammar, out io.Writer) error {
	name := "node-" + c.ID
	err := g.issue(out, name, certs.KindNode, c.ID, certs.Request{Hosts: c.Hosts, Server: true, Client: true})
	if err != nil {
		return err
	}
	return g.settings(out, "NODE_ID="+c.ID, "TRUST_DOMAIN="+g.TrustDomain,
		"NODE_TLS_CERT_FILE="+g.path(name+".crt"), "NODE_TLS_KEY_FILE="+g.path(name+".key"), "NODE_TLS_CLIENT_CA_FILE="+g.path("ca.crt"))
}

// Run makes the certificate of a Push-Manager.
func (c *managerCmd) Run(g *grammar, out io.Writer) error {
	name := "manager-" + c.ID
	err := g.issue(out, name, certs.KindManager, c.ID, certs.Request{Hosts: orHere(c.Hosts), Server: true, Client: true})
	if err != nil {
		return err
	}
	cert, key, ca := g.path(name+".crt"), g.path(name+".key"), g.path("ca.crt")
	return g.settings(out, "MANAGER_ID="+c.ID, "TRUST_DOMAIN="+g.TrustDomain,
		"TLS_CERT_FILE="+cert, "TLS_KEY_FILE="+key, "TLS_CLIENT_CA_FILE="+ca, "TLS_CLIENT_AUTH=require",
		"LINK_TLS_CA_FILE="+ca, "LINK_TLS_CERT_FILE="+cert, "LINK_TLS_KEY_FILE="+key)
}

// Run makes the certificate of a Controller.
func (c *controllerCmd) Run(g *grammar, out io.Writer) error {
	name := "controller-" + c.ID
	err := g.issue(out, name, "controller", c.ID, certs.Request{Hosts: orHere(c.Hosts), Server: true, Client: true})
	if err != nil {
		return err
	}
	err = g.settings(out, "TRUST_DOMAIN="+g.TrustDomain,
		"NODE_TLS_CERT_FILE="+g.path(name+".crt"), "NODE_TLS_KEY_FILE="+g.path(name+".key"), "NODE_TLS_CLIENT_CA_FILE="+g.path("ca.crt"))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "\nAt Push-Managers and Connect-Nodes, beside the files of their own certificate as CONTROLLER_TLS_CERT_FILE and CONTROLLER_TLS_KEY_FILE:\n  CONTROLLER_TLS_CA_FILE=%s\n", g.path("ca.crt"))
	return err
}

// orHere are the hosts of a server, this machine's where none are named.
func orHere(hosts []string) []string {
	if len(hosts) == 0 {
		return []string{"localhost", "127.0.0.1", "::1"}
	}
	return hosts
}

// Run makes the certificate of a caller.
func (c *clientCmd) Run(g *grammar, out io.Writer) error {
	name := "client-" + c.Name
	if err := g.issue(out, name, "client", c.Name, certs.Request{Client: true}); err != nil {
		return err
	}
	return g.settings(out, "PUSH_MANAGER_CA="+g.path("ca.crt"), "PUSH_MANAGER_CERT="+g.path(name+".crt"), "PUSH_MANAGER_KEY="+g.path(name+".key"))
}

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
	if id == "" || len(id) > 128 || strings.HasPrefix(id, ".") || strings.Trim(id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != "" {
		return usageError{fmt.Errorf("%q: an id in a certificate has letters, digits, and ._- between them", id)}
	}
	var ca certs.Pair
	for file, text := range map[string]*[]byte{"ca.crt": &ca.Cert, "ca.key": &ca.Key} {
		var err error
		if *text, err = os.ReadFile(g.path(file)); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w (push-manager certs ca makes it)", err)
		} else if err != nil {
			return err
		}
	}
	authority, err := certs.LoadAuthority(ca)
	if err != nil {
		return err
	}
	r.URI, r.NotAfter = "spiffe://"+g.TrustDomain+"/"+kind+"/"+id, g.until(1)
	pair, err := authority.Issue(r)
	if err != nil {
		return err
	}
	return g.write(out, name, pair)
}

// write writes a certificate and its key, each as a whole: programs may be reading them.
func (g *grammar) write(out io.Writer, name string, pair certs.Pair) error {
	for _, file := range []string{name + ".crt", name + ".key"} {
		if _, err := os.Lstat(g.path(file)); err == nil && !g.Overwrite {
			return fmt.Errorf("%s exists (--overwrite replaces it)", g.path(file))
		}
	}
	for _, file := range []struct {
		name string
		text []byte
	}{{name + ".key", pair.Key}, {name + ".crt", pair.Cert}} {
		fresh, err := os.CreateTemp(g.Dir, ".new-*") // for its owner alone: 0600
		if err != nil {
			return err
		}
		_, err = fresh.Write(file.text)
		if err = errors.Join(err, fresh.Close()); err == nil {
			err = os.Rename(fresh.Name(), g.path(file.name))
		}
		if err != nil {
			return errors.Join(err, os.Remove(fresh.Name()))
		}
		if _, err := fmt.Fprintln(out, "wrote", g.path(file.name)); err != nil {
			return err
		}
	}
	return nil
}

// settings prints the variables that use the files.
func (*grammar) settings(out io.Writer, lines ...string) error {
	_, err := fmt.Fprintf(out, "\nSet:\n  %s\n", strings.Join(lines, "\n  "))
	return err
}
