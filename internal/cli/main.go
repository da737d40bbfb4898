package cli

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/alecthomas/kong"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/stdlog"
	"github.com/push-manager/push-manager/internal/telemetry"
)

// Command is one program as a command line shows it.
type Command struct {
	Name string
	Help string
	// File tells that it reads a configuration file.
	File bool
	// New returns the program's configuration, unset.
	New func() Settings
}

// Settings are the configuration of a program.
type Settings interface {
	// Bind adds the keys.
	Bind(s *config.Set)
	// Settle checks what Load left; its errors name keys.
	Settle(s *config.Set, lookupEnv func(string) (string, bool)) error
	// LogConfig and Timeout are what Run needs of it.
	LogConfig() telemetry.LogConfig
	Timeout() time.Duration
	// Start starts the program.
	Start(ctx context.Context, logger *slog.Logger) (Program, error)
}

// CommandLine is one executable. Of several commands the first is the one that runs
// when none is named; a single one has no name to be called by, and its flags are
// those of the executable.
type CommandLine struct {
	Name, Description string
	Commands          []Command
}

// Main runs an executable and returns its exit code.
func Main(c CommandLine, args []string) (code int) {
	defer func() {
		if e := recover(); e != nil {
			status, ok := e.(kongExit)
			if !ok {
				panic(e)
			}
			code = int(status)
		}
	}()
	p, err := c.parse(args)
	if err != nil {
		return complain(c.Name, err)
	}
	if p.printConfig {
		if err := p.set.Write(os.Stdout, false); err != nil {
			return complain(c.Name, err)
		}
		return ExitStopped
	}
	logger, err := telemetry.NewLogger(os.Stderr, p.settings.LogConfig())
	if err != nil {
		return complain(c.Name, err)
	}
	stdlog.To(logger)
	garbage := 1
	if light, ok := p.settings.(interface{ GarbageShare() int }); ok {
		garbage = light.GarbageShare()
	}
	TuneMemoryShare(logger, garbage)
	return Run(logger, p.settings.Timeout(), func(ctx context.Context) (Program, error) {
		return p.settings.Start(ctx, logger)
	})
}

// kongExit leaves kong's --help, which knows no other way than to exit.
type kongExit int

// parsed is a command line with the configuration of its command.
type parsed struct {
	settings    Settings
	set         *config.Set
	printConfig bool
}

func (c CommandLine) parse(args []string) (*parsed, error) {
	settings := map[string]*parsed{}
	grammars := map[string]any{}
	options := []kong.Option{
		kong.Name(c.Name), kong.Description(c.Description),
		kong.Exit(func(code int) { panic(kongExit(code)) }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, NoExpandSubcommands: true}),
	}
	for i, cmd := range c.Commands {
		p := &parsed{settings: cmd.New(), set: config.New()}
		p.settings.Bind(p.set)
		settings[cmd.Name] = p
		grammars[cmd.Name] = p.set.Grammar(cmd.File)
		switch {
		case len(c.Commands) == 1:
			options = append(options, kong.Embed(grammars[cmd.Name]))
		case i == 0:
			options = append(options, config.Command(cmd.Name, cmd.Help, grammars[cmd.Name], `default:"withargs"`))
		default:
			options = append(options, config.Command(cmd.Name, cmd.Help, grammars[cmd.Name]))
		}
	}
	parser, err := kong.New(&struct {
		Version kong.VersionFlag `help:"Print the version and exit."`
	}{}, append(options, kong.Vars{"version": c.Name + " " + telemetry.Version()})...)
	if err != nil {
		return nil, fmt.Errorf("command line: %w", err)
	}
	ctx, err := parser.Parse(args)
	if err != nil {
		return nil, config.Usage(err)
	}
	name := c.Commands[0].Name
	if selected := ctx.Selected(); selected != nil {
		name = selected.Name
	}
	p := settings[name]
	o, printConfig := config.Flags(grammars[name])
	for _, cmd := range c.Commands {
		o.NoFile = o.NoFile || cmd.Name == name && !cmd.File
	}
	p.printConfig = printConfig
	if err := p.set.Load(o); err != nil {
		return nil, err
	}
	return p, p.settings.Settle(p.set, os.LookupEnv)
}

// Fill sets a program's configuration from its defaults and from values by the names
// of environment variables, and from nothing else.
func Fill(target Settings, values map[string]string) error {
	set := config.New()
	target.Bind(set)
	lookup := func(name string) (string, bool) {
		v, ok := values[name]
		return v, ok
	}
	if err := set.Load(config.Options{NoFile: true, LookupEnv: lookup}); err != nil {
		return err
	}
	return target.Settle(set, lookup)
}

// complain prints why nothing was started and returns the exit code.
func complain(name string, err error) int {
	_, _ = fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
	return exitCode(err)
}
