package pushctl

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/alecthomas/kong"
	"go.yaml.in/yaml/v3"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/config"
)

type contextCmd struct {
	Add    contextAddCmd    `cmd:"" help:"Keep a context: what is not given has its default."`
	Select contextSelectCmd `cmd:"" help:"Use a context from now on."`
	Ls     contextLsCmd     `cmd:"" help:"List the contexts."`
	Rm     contextRmCmd     `cmd:"" help:"Remove a context. The files that it names stay."`
}

// deployment is what a context holds. It holds no secret: tokens and keys stay in files of their own. The keys of the file are
// those that flags name in their tag "context".
type deployment struct {
	Address   string `yaml:"address,omitempty" json:"address,omitempty" placeholder:"HOST:PORT" help:"Push-Manager's HOST:PORT, or any gRPC target."`
	TLS       bool   `yaml:"tls,omitempty" json:"tls,omitempty" name:"tls" help:"Speak TLS. Any of the next three does so, too."`
	CA        string `yaml:"ca,omitempty" json:"ca,omitempty" name:"ca" placeholder:"FILE" predictor:"file" help:"PEM file of the authorities that Push-Manager's certificate is checked with."`
	Cert      string `yaml:"cert,omitempty" json:"cert,omitempty" placeholder:"FILE" predictor:"file" help:"PEM file of a certificate to show."`
	Key       string `yaml:"key,omitempty" json:"key,omitempty" placeholder:"FILE" predictor:"file" help:"PEM file of its key."`
	TokenFile string `yaml:"token_file,omitempty" json:"token_file,omitempty" placeholder:"FILE" predictor:"file" help:"File with the API key or the token to show."`

	Metrics    string `yaml:"metrics,omitempty" json:"metrics,omitempty" placeholder:"HOST:PORT" help:"METRICS_PORT of each Push-Manager, separated by commas."`
	Controller string `yaml:"controller,omitempty" json:"controller,omitempty" placeholder:"HOST:PORT" help:"The Controller, for doctor."`

	EtcdEndpoints string `yaml:"etcd_endpoints,omitempty" json:"etcd_endpoints,omitempty" placeholder:"HOST:PORT" help:"etcd, separated by commas."`
	EtcdCA        string `yaml:"etcd_ca,omitempty" json:"etcd_ca,omitempty" name:"etcd-ca" placeholder:"FILE" predictor:"file" help:"PEM file of the authorities that etcd's certificate is checked with."`
	EtcdCert      string `yaml:"etcd_cert,omitempty" json:"etcd_cert,omitempty" placeholder:"FILE" predictor:"file" help:"PEM file of a certificate to show etcd."`
	EtcdKey       string `yaml:"etcd_key,omitempty" json:"etcd_key,omitempty" placeholder:"FILE" predictor:"file" help:"PEM file of its key."`

	ConnectNodeURL       string `yaml:"connect_node_url,omitempty" json:"connect_node_url,omitempty" name:"connect-node-url" placeholder:"URL" help:"WebSocket of a Connect-Node, for listen."`
	ConnectNodeCA        string `yaml:"connect_node_ca,omitempty" json:"connect_node_ca,omitempty" name:"connect-node-ca" placeholder:"FILE" predictor:"file" help:"PEM file of the authorities that its certificate is checked with."`
	ConnectNodeTokenFile string `yaml:"connect_node_token_file,omitempty" json:"connect_node_token_file,omitempty" placeholder:"FILE" predictor:"file" help:"File with the token of a WebSocket client."`
}

// files are the fields that name files, by their flags.
func (d *deployment) files() map[string]*string {
	return map[string]*string{
		"ca": &d.CA, "cert": &d.Cert, "key": &d.Key, "token-file": &d.TokenFile,
		"etcd-ca": &d.EtcdCA, "etcd-cert": &d.EtcdCert, "etcd-key": &d.EtcdKey,
		"connect-node-ca": &d.ConnectNodeCA, "connect-node-token-file": &d.ConnectNodeTokenFile,
	}
}

// maxContexts bounds the file.
const maxContexts = 256 << 10

// book is the file.
type book struct {
	Current  string                 `yaml:"current,omitempty"`
	Contexts map[string]*deployment `yaml:"contexts,omitempty"`
}

var contextName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

func checkContextName(name string) error {
	if !contextName.MatchString(name) {
		return &usageError{fmt.Sprintf("%q is no name of a context: letters, digits, '.', '_' and '-', up to 64", name)}
	}
	return nil
}

// contextsPath is where the file is: in $XDG_CONFIG_HOME, or in ~/.config.
func contextsPath() (string, error) {
	dir := os.Getenv("XDG_CONFIG_HOME")
	if !filepath.IsAbs(dir) { // as its specification says
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("contexts: neither XDG_CONFIG_HOME nor HOME is set: %w", err)
		}
		dir = filepath.Join(home, ".config")
	}
	return filepath.Join(dir, "pushctl", "contexts.yaml"), nil
}

// readContexts reads the file. Where there is none, there are no contexts. What is wrong with it is a usageError that names the
// key: whoever may write the file decides where tokens go, so nothing in it is overlooked.
func readContexts() (path string, b *book, err error) {
	path, err = contextsPath()
	if err != nil {
		return "", nil, err
	}
	text, err := config.ReadFile(path, maxContexts)
	if errors.Is(err, fs.ErrNotExist) {
		return path, &book{}, nil
	}
	if err == nil {
		var info fs.FileInfo
		if info, err = os.Stat(path); err == nil {
			err = decides(path, info)
		}
	}
	if err != nil {
		return "", nil, &usageError{"contexts: " + clean(err.Error())}
	}
	b, err = parseContexts(text)
	if err != nil {
		return "", nil, &usageError{fmt.Sprintf("contexts: %s: %s", path, clean(err.Error()))}
	}
	return path, b, nil
}

// decides says why others than who runs this, and root, could write the file: it decides where tokens go.
func decides(path string, info fs.FileInfo) error {
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s: has mode %04o: others may write it, and so decide where tokens go (chmod 600)", path, info.Mode().Perm())
	}
	if owner, known := ownerOf(info); known && owner != 0 && owner != os.Geteuid() {
		return fmt.Errorf("%s: belongs to another user (id %d), who decides where tokens go", path, owner)
	}
	return nil
}

var unknownKey = regexp.MustCompile(`field (\S+) not found in type \S+`)

func parseContexts(text []byte) (*book, error) {
	b := &book{}
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	err := d.Decode(b)
	if errors.Is(err, io.EOF) {
		return b, nil // an empty file
	}
	if bad, is := errors.AsType[*yaml.TypeError](err); is && len(bad.Errors) > 0 {
		return nil, errors.New(unknownKey.ReplaceAllString(bad.Errors[0], "the key $1 is not known"))
	}
	if err != nil {
		return nil, err
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is more than one document")
	}
	for _, name := range slices.Sorted(maps.Keys(b.Contexts)) {
		d := b.Contexts[name]
		if err := checkContextName(name); err != nil {
			return nil, err
		}
		if d == nil {
			b.Contexts[name] = &deployment{}
			continue
		}
		files := d.files()
		for _, flag := range slices.Sorted(maps.Keys(files)) {
			if file := *files[flag]; file != "" && !filepath.IsAbs(file) {
				return nil, fmt.Errorf("context %s: %s: %q is no absolute path", name, strings.ReplaceAll(flag, "-", "_"), file)
			}
		}
	}
	if b.Current != "" && b.Contexts[b.Current] == nil {
		return nil, fmt.Errorf("current: there is no context %q", b.Current)
	}
	return b, nil
}

// write puts the file in the place of the one before, in one go.
func (b *book) write(path string) error {
	text, err := yaml.Marshal(b)
	if err == nil && len(text) > maxContexts {
		err = fmt.Errorf("larger than %s", config.FormatBytes(maxContexts))
	}
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o700)
	}
	if err == nil {
		err = replaceFile(path, text)
	}
	if err != nil {
		return fmt.Errorf("write the contexts: %w", err)
	}
	return nil
}

// replaceFile puts a file that its owner alone may read in the place of the one before: whoever reads it finds one or the other.
func replaceFile(path string, text []byte) error {
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*") // with mode 0600
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	if err = errors.Join(err, file.Sync(), file.Close()); err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		err = errors.Join(err, os.Remove(file.Name()))
	}
	return err
}

// contexts has the flags that the command line and the environment leave open filled in.
type contexts struct {
	read   bool
	name   string            // the context in use, "" for none
	values map[string]any    // its keys
	from   map[string]string // key to where its value comes from, for those that the command line does not give
}

// resolve implements kong.ResolverFunc.
func (c *contexts) resolve(ctx *kong.Context, _ *kong.Path, flag *kong.Flag) (any, error) {
	key := flag.Tag.Get("context")
	if key == "" {
		return nil, nil //nolint:nilnil // kong's way to say that there is no value
	}
	if err := c.load(ctx); err != nil {
		return nil, err
	}
	for _, env := range flag.Envs {
		if _, set := os.LookupEnv(env); set {
			c.from[key] = env
			return nil, nil //nolint:nilnil // kong has read the environment
		}
	}
	// A secret in the environment comes before the file of a context, too.
	for _, env := range map[string][]string{"token_file": {"PUSHCTL_API_KEY", "PUSHCTL_TOKEN"}, "connect_node_token_file": {"PUSHCTL_TOKEN"}}[key] {
		if os.Getenv(env) != "" {
			c.from[key] = env
			return nil, nil //nolint:nilnil // whoever connects reads it
		}
	}
	if value, ok := c.values[key]; ok {
		c.from[key] = "context " + c.name
		return value, nil
	}
	c.from[key] = "default"
	return nil, nil //nolint:nilnil // and has the default
}

// checkTokens refuses to show the token of a context to another address than the context's: a mistyped one would get it. It may go to
// this machine, where a tunnel begins, and to whoever has a certificate of the context's own authority: other instances.
func (c *contexts) checkTokens(ctx *kong.Context) error {
	given := map[string]string{}
	for _, flag := range ctx.Flags() {
		if key := flag.Tag.Get("context"); key != "" {
			given[key] = fmt.Sprint(ctx.FlagValue(flag))
		}
	}
	source := "context " + c.name
	for prefix, flag := range map[string]string{"": "address", "connect_node_": "url"} { // no command takes both
		key := prefix + flag
		address, takes := given[key]
		own := fmt.Sprint(cmp.Or(c.values[key], any("the default")))
		if !takes || c.from[prefix+"token_file"] != source || address == own || c.from[key] == "default" || c.from[prefix+"ca"] == source || stays(address) {
			continue
		}
		return &usageError{fmt.Sprintf("--token-file: missing: the token of %s is for %s, and would go to %s (--%s)", source, clean(own), clean(address), flag)}
	}
	return nil
}

// stays tells whether an address, a list or a URL names this machine alone.
func stays(address string) bool {
	if u, err := url.Parse(address); err == nil && u.Hostname() != "" {
		return config.Loopback(u.Hostname())
	}
	return !slices.ContainsFunc(strings.Split(strings.TrimPrefix(address, "dns:///"), ","), func(one string) bool {
		host, _, err := net.SplitHostPort(strings.TrimSpace(one))
		return err != nil || !config.Loopback(host)
	})
}

// load finds the context in use, once.
func (c *contexts) load(ctx *kong.Context) error {
	if c.read {
		return nil
	}
	c.read, c.from = true, map[string]string{}
	for _, flag := range ctx.Model.Flags {
		if flag.Name == "context" {
			c.name, _ = ctx.FlagValue(flag).(string)
		}
	}
	path, b, err := readContexts()
	if err != nil {
		if c.name == "" && !errors.As(err, new(*usageError)) {
			return nil // there is no place for contexts, and none is asked for
		}
		return err
	}
	if c.name = cmp.Or(c.name, b.Current); c.name == "" {
		return nil
	}
	d, err := b.find(c.name, path)
	if err != nil {
		return err
	}
	text, err := yaml.Marshal(d)
	if err == nil {
		err = yaml.Unmarshal(text, &c.values)
	}
	return err
}

func (b *book) find(name, path string) (*deployment, error) {
	if d := b.Contexts[name]; d != nil {
		return d, nil
	}
	if len(b.Contexts) == 0 {
		return nil, &usageError{fmt.Sprintf("there is no context %q: %s holds none (pushctl context add)", name, path)}
	}
	return nil, &usageError{fmt.Sprintf("there is no context %q; there are %s", name, strings.Join(slices.Sorted(maps.Keys(b.Contexts)), ", "))}
}

type contextAddCmd struct {
	Name string `arg:"" help:"Name of the context."`
	deployment

	Replace bool `help:"Take the place of a context of this name."`
	Select  bool `help:"Use it from now on. The first context is used anyway."`
}

// Run keeps a context. The files it names must be there.
func (c *contextAddCmd) Run(t *terminal) error {
	if err := checkContextName(c.Name); err != nil {
		return err
	}
	for _, target := range []struct{ flag, value string }{{"address", c.Address}, {"controller", c.Controller}} {
		if target.value != "" && app.CheckTarget(target.value) != nil {
			return &usageError{fmt.Sprintf("--%s: %q is not HOST:PORT", target.flag, target.value)}
		}
	}
	if _, err := metricsTargets(c.Metrics); c.Metrics != "" && err != nil {
		return err
	}
	for flag, file := range c.files() {
		if *file == "" {
			continue
		}
		absolute, err := filepath.Abs(*file)
		if err == nil {
			_, err = os.Stat(absolute)
		}
		if err != nil {
			return &usageError{fmt.Sprintf("--%s: %v", flag, err)}
		}
		*file = absolute
	}
	path, b, err := readContexts()
	if err != nil {
		return err
	}
	if b.Contexts[c.Name] != nil && !c.Replace {
		return &usageError{fmt.Sprintf("there is a context %q already (--replace)", c.Name)}
	}
	if b.Contexts == nil {
		b.Contexts = map[string]*deployment{}
	}
	b.Contexts[c.Name] = &c.deployment
	if c.Select || len(b.Contexts) == 1 {
		b.Current = c.Name
	}
	if err := b.write(path); err != nil {
		return err
	}
	return t.answer(contextLine{Name: c.Name, Current: b.Current == c.Name, deployment: c.deployment}, fmt.Sprintf("context %s is kept in %s%s", c.Name, path, map[bool]string{true: ", and in use"}[b.Current == c.Name]))
}

type contextSelectCmd struct {
	Name string `arg:"" optional:"" predictor:"context" help:"Name of the context."`
	None bool   `help:"Use no context from now on."`
}

// Run selects a context.
func (c *contextSelectCmd) Run(t *terminal) error {
	if (c.Name == "") != c.None {
		return &usageError{"give the name of a context, or --none"}
	}
	path, b, err := readContexts()
	if err != nil {
		return err
	}
	text := "no context is in use"
	if !c.None {
		if _, err := b.find(c.Name, path); err != nil {
			return err
		}
		text = "context " + c.Name + " is in use"
	}
	b.Current = c.Name
	if err := b.write(path); err != nil {
		return err
	}
	return t.answer(struct {
		Current string `json:"current"`
	}{c.Name}, text)
}

type contextRmCmd struct {
	Name string `arg:"" predictor:"context" help:"Name of the context."`
}

// Run removes a context.
func (c *contextRmCmd) Run(t *terminal) error {
	path, b, err := readContexts()
	if err != nil {
		return err
	}
	if _, err := b.find(c.Name, path); err != nil {
		return err
	}
	delete(b.Contexts, c.Name)
	text := "context " + c.Name + " is removed"
	if b.Current == c.Name {
		b.Current = ""
		text += "; no context is in use"
	}
	if err := b.write(path); err != nil {
		return err
	}
	return t.answer(struct {
		Removed string `json:"removed"`
		Current string `json:"current"`
	}{c.Name, b.Current}, text)
}

type contextLsCmd struct{}

// contextLine is a context as an answer.
type contextLine struct {
	Name    string `json:"name"`
	Current bool   `json:"current"`
	deployment
}

// Run lists the contexts.
func (*contextLsCmd) Run(t *terminal) error {
	path, b, err := readContexts()
	if err != nil {
		return err
	}
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	head := "  NAME\tADDRESS\tTLS\tTOKEN FILE"
	if t.format == formatWide {
		head += "\tCA\tCERT\tMETRICS\tETCD\tCONTROLLER\tCONNECT-NODE"
	}
	_, _ = fmt.Fprintln(w, head) // into memory, like the others
	for _, name := range slices.Sorted(maps.Keys(b.Contexts)) {
		d := b.Contexts[name]
		if t.structured() {
			if err := t.answer(contextLine{name, name == b.Current, *d}, ""); err != nil {
				return err
			}
			continue
		}
		mark := " "
		if name == b.Current {
			mark = "*"
		}
		secured := "no"
		if d.TLS || d.CA != "" || d.Cert != "" {
			secured = "yes"
		}
		line := []string{mark + " " + name, cmp.Or(d.Address, "-"), secured, cmp.Or(d.TokenFile, "-")}
		if t.format == formatWide {
			for _, value := range []string{d.CA, d.Cert, d.Metrics, d.EtcdEndpoints, d.Controller, d.ConnectNodeURL} {
				line = append(line, cmp.Or(value, "-"))
			}
		}
		for i := range line {
			line[i] = clean(line[i])
		}
		_, _ = fmt.Fprintln(w, strings.Join(line, "\t"))
	}
	_ = w.Flush()
	switch {
	case t.structured():
		return nil
	case len(b.Contexts) == 0:
		_, err = fmt.Fprintf(t.out, "there is no context in %s (pushctl context add)\n", path)
	default:
		_, err = io.WriteString(t.out, text.String())
	}
	return err
}
