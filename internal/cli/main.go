package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/push-manager/push-manager/internal/buildinfo"
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
	// Check, where it is set, is called in place of a start, with settings that are valid.
	Check func(ctx context.Context, settings Settings, r *Report)
	// Main, where it is set, runs the command in place of all that, with the arguments after its name, and returns the exit code.
	Main func(args []string) int
	// Missing says why this build has no such program. Empty: it has.
	Missing string
}

// Settings are the configuration of a program.
type Settings interface {
	// Bind adds the keys.
	Bind(s *config.Set)
	// Validate checks what Load left, and fills in what follows from it; its errors
	// name keys.
	Validate(s *config.Set, lookupEnv func(string) (string, bool)) error
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
func Main(c CommandLine, args []string) int {
	fail := func(err error) int {
		_, _ = fmt.Fprintf(os.Stderr, "%s: %v\n", c.Name, err)
		if errors.Is(err, config.ErrUsage) {
			return ExitUsage
		}
		return ExitFailed
	}
	printed := func(err error) int {
		if err != nil {
			return fail(err)
		}
		return ExitStopped
	}
	if len(args) > 0 && args[0] == "version" {
		switch {
		case len(args) == 1:
			return printed(buildinfo.Write(os.Stdout, c.Name, false))
		case len(args) == 2 && args[1] == "--json":
			return printed(buildinfo.Write(os.Stdout, c.Name, true))
		}
		return fail(config.Usage(errors.New("version takes --json, and nothing else")))
	}
	cmd, name, description := c.Commands[0], c.Name, c.Description
	if len(c.Commands) > 1 {
		if len(args) > 0 && slices.Contains([]string{"-h", "-help", "--help"}, args[0]) {
			return printed(c.help(os.Stdout))
		}
		if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
			i := slices.IndexFunc(c.Commands, func(cmd Command) bool { return cmd.Name == args[0] })
			if i < 0 {
				return fail(config.Usage(errors.New("unexpected argument " + args[0])))
			}
			cmd, args = c.Commands[i], args[1:]
		}
		name, description = c.Name+" "+cmd.Name, cmd.Help
	}
	if cmd.Missing != "" {
		return fail(config.Usage(errors.New(cmd.Name + ": " + cmd.Missing)))
	}

	if cmd.Main != nil {
		return cmd.Main(args)
	}
	settings, set := cmd.New(), config.New()
	settings.Bind(set)
	flags, err := set.Parse(args, cmd.File)
	switch {
	case err != nil:
		return fail(err)
	case flags.Help:
		_, _ = fmt.Fprintf(os.Stdout, "Usage: %s [flags]\n\n%s\n\n", name, description)
		return printed(set.WriteHelp(os.Stdout, cmd.File))
	case flags.Version:
		return printed(buildinfo.Write(os.Stdout, c.Name, false))
	}
	if cmd.Check != nil && !flags.PrintConfig {
		return runCheck(cmd, settings, set, flags.Options)
	}
	if err := set.Load(flags.Options); err != nil {
		return fail(err)
	}
	if err := settings.Validate(set, os.LookupEnv); err != nil {
		return fail(err)
	}
	if flags.PrintConfig {
		return printed(set.Write(os.Stdout, false))
	}

	level := new(slog.LevelVar)
	logger, err := telemetry.NewLogger(os.Stderr, settings.LogConfig(), level)
	if err != nil {
		return fail(err)
	}
	stdlog.To(logger)
	garbage := 1
	if light, ok := settings.(interface{ GarbageShare() int }); ok {
		garbage = light.GarbageShare()
	}
	TuneMemoryShare(logger, garbage)
	again := func() { readLevel(cmd, flags.Options, level, logger) }
	return Run(logger, settings.Timeout(), again, func(ctx context.Context) (Program, error) {
		return settings.Start(ctx, logger)
	})
}

// readLevel reads the settings again and takes over the level of the log, and nothing else: parts read their files
// themselves. Settings that cannot be read leave the level as it is.
func readLevel(cmd Command, o config.Options, level *slog.LevelVar, logger *slog.Logger) {
	settings, set := cmd.New(), config.New()
	settings.Bind(set)
	if err := set.Load(o); err != nil {
		logger.Error("the settings cannot be read again: the log level stays", "error", err)
		return
	}
	next, err := telemetry.ParseLevel(settings.LogConfig().Level)
	if err != nil {
		logger.Error("the log level stays", "error", err)
		return
	}
	if was := level.Level(); was != next {
		level.Set(min(was, next)) // so that the log tells of it, too
		logger.Info("log level changed", "from", was, "to", next)
		level.Set(next)
	}
}

// help lists the commands.
func (c CommandLine) help(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: %s <command> [flags]\n\n%s\n\nCommands:\n", c.Name, c.Description)
	for _, cmd := range c.Commands {
		fmt.Fprintf(&b, "  %-14s %s\n", cmd.Name, cmd.Help)
	}
	fmt.Fprintf(&b, "  %-14s %s\n", "version", "Print the version and exit; with --json all that is known of the build.")
	fmt.Fprintf(&b, "\nFlags:\n  -h, --help     Show this.\n  --version      Print the version and exit.\n\nRun \"%s <command> --help\" for more information on a command.\n", c.Name)
	_, err := io.WriteString(w, b.String())
	return err
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
	return target.Validate(set, lookup)
}
