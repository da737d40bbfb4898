package config

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
)

// CommandLine is what the flags of a command line say.
type CommandLine struct {
	Options

	Help, Version, PrintConfig bool
}

// Parse reads flags: one for each key, --config-file and --config for short (with a file), --print-config,
// --help and --version. Flags carry text only: bounds are checked by Load, which treats
// all sources alike.
func (s *Set) Parse(args []string, file bool) (CommandLine, error) {
	c := CommandLine{Options: Options{Flags: map[string]string{}, NoFile: !file}}
	fs := flag.NewFlagSet("", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.BoolVar(&c.PrintConfig, "print-config", false, "")
	fs.BoolVar(&c.Version, "version", false, "")
	if file {
		fs.StringVar(&c.File, "config-file", "", "")
		fs.StringVar(&c.File, "config", "", "")
	}
	for _, k := range s.keys {
		name := k.Flag()
		set := func(text string) error { //nolint:unparam // package flag wants an error
			c.Flags[name] = text
			return nil
		}
		switch {
		case name == "":
		case k.isSwitch:
			fs.BoolFunc(name, "", set)
			fs.BoolFunc("no-"+name, "", func(string) error { return set("false") })
		default:
			fs.Func(name, "", set)
		}
	}
	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		c.Help = true
		return c, nil
	case err == nil && fs.NArg() > 0:
		return c, usageError("unexpected argument " + fs.Arg(0))
	case err == nil:
		return c, nil
	}
	if name, ok := strings.CutPrefix(err.Error(), "flag provided but not defined: -"); ok {
		return c, usageError("unknown flag --" + name + s.flagHint(name, fs))
	}
	if name, ok := strings.CutPrefix(err.Error(), "flag needs an argument: -"); ok {
		return c, usageError("--" + name + ": needs a value")
	}
	return c, Usage(err)
}

// flagHint tells what was probably meant by a flag that is not there.
func (s *Set) flagHint(name string, fs *flag.FlagSet) string {
	for _, k := range s.keys {
		if k.secret && flagOf(k.name) == name {
			return fmt.Sprintf(": a secret is no flag, use %s or %s_FILE", k.Variable(), k.Variable())
		}
	}
	var names []string
	fs.VisitAll(func(f *flag.Flag) { names = append(names, "--"+f.Name) })
	return hint("--"+name, slices.Values(names))
}

// WriteHelp writes what Parse reads, in the order of the file.
func (s *Set) WriteHelp(w io.Writer, file bool) error {
	var b strings.Builder
	line := func(flag, help string) { fmt.Fprintf(&b, "  %s\n        %s\n", flag, help) }
	b.WriteString("Flags:\n")
	line("-h, --help", "Show this.")
	line("--version", "Print the version and exit.")
	line("--print-config", "Print the settings in force, as YAML with their sources, and exit.")
	if file {
		line("--config-file="+DefaultFile, "YAML file with these settings; --config for short. ($CONFIG_FILE)")
	}
	section := ""
	for _, k := range s.ordered() {
		head, _, found := strings.Cut(k.name, ".")
		if found && head != section {
			section = head
			b.WriteString("\n" + section + ":\n")
		}
		help := k.help + " ($" + k.envs[0] + ")"
		switch {
		case k.secret:
			line("$"+k.envs[0], k.help)
		case k.isSwitch:
			line("--[no-]"+k.Flag(), help)
		case k.sections != nil:
			line("--"+k.Flag()+"=YAML", help+k.sections.help())
		case k.def == "":
			line("--"+k.Flag()+"=TEXT", help)
		default:
			line("--"+k.Flag()+"="+k.def, help)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}
