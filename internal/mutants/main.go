// Command mutants checks the tests: it breaks a copy of the working tree in one way
// after the other, each a mistake that this code could well have, and runs the test that
// is to notice.
//
//	mutants [-only NAME]
//
// Run it from the root of the repository, which stays as it is. It prints a table and
// exits with 1 if a breakage survives, does not compile, or changes text that the code
// does not have exactly once, and if one of the tests fails on the code as it is.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// testTimeout is what a test may take before it counts as one that hangs, which is a way
// to notice. killAfter is for one that does not even do that.
const (
	testTimeout = time.Minute
	killAfter   = testTimeout + 30*time.Second
)

func main() {
	only := flag.String("only", "", "run the `breakage` of this name alone")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Stdout, *only)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out io.Writer, only string) error {
	chosen := slices.DeleteFunc(breakages(), func(b breakage) bool { return only != "" && b.name != only })
	if len(chosen) == 0 {
		return fmt.Errorf("there is no breakage %q", only)
	}
	dir, err := os.MkdirTemp("", "push-manager-mutants-")
	if err != nil {
		return fmt.Errorf("make room for the copy: %w", err)
	}
	defer os.RemoveAll(dir) //nolint:errcheck // what is left of it harms nobody
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("open the copy: %w", err)
	}
	defer root.Close() //nolint:errcheck // nothing is to be written any more
	if err := copyTree(ctx, root); err != nil {
		return err
	}
	tree := tree{root}
	for _, b := range chosen {
		if v := tree.try(ctx, b); v.err != nil || v.caught {
			return fmt.Errorf("the code as it is: %s of %s: %s", b.test, b.dir, v)
		}
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "breakage\tcaught by\tseconds") // Flush tells
	var bad []error
	for _, b := range chosen {
		begin := time.Now()
		v := tree.tryBroken(ctx, b)
		if v.err != nil || !v.caught {
			bad = append(bad, fmt.Errorf("%s: %s", b.name, v))
		}
		_, _ = fmt.Fprintf(table, "%s\t%s\t%.1f\n", b.name, v, time.Since(begin).Seconds())
	}
	if err := table.Flush(); err != nil {
		return fmt.Errorf("print the table: %w", err)
	}
	return errors.Join(bad...)
}

// copyTree copies what git knows or would take, as it stands in the working tree.
func copyTree(ctx context.Context, to *os.Root) error {
	list, err := exec.CommandContext(ctx, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").Output()
	if err != nil {
		return fmt.Errorf("list the working tree: %w", err)
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(list), "\x00"), "\x00") {
		text, err := os.ReadFile(name)
		if errors.Is(err, os.ErrNotExist) {
			continue // deleted, and git has not been told
		}
		if err == nil {
			err = to.MkdirAll(filepath.Dir(name), 0o700)
		}
		if err == nil {
			err = to.WriteFile(name, text, 0o600)
		}
		if err != nil {
			return fmt.Errorf("copy the working tree: %w", err)
		}
	}
	return nil
}

// tree is the copy.
type tree struct{ *os.Root }

// binary is the name of the test program in it, which no package has.
const binary = "mutant.test"

// verdict is what became of a test.
type verdict struct {
	caught bool
	by     string // what failed
	err    error  // nothing can be said
}

func (v verdict) String() string {
	switch {
	case v.err != nil:
		return "ERROR: " + v.err.Error()
	case v.caught:
		return v.by
	default:
		return "SURVIVED"
	}
}

// tryBroken breaks the code, tries the test and mends the code.
func (t tree) tryBroken(ctx context.Context, b breakage) verdict {
	whole, err := t.ReadFile(b.file)
	if err != nil {
		return verdict{err: err}
	}
	broken, err := b.apply(string(whole))
	if err != nil {
		return verdict{err: err}
	}
	if err := t.WriteFile(b.file, []byte(broken), 0o600); err != nil {
		return verdict{err: err}
	}
	v := t.try(ctx, b)
	return verdict{v.caught, v.by, errors.Join(v.err, t.WriteFile(b.file, whole, 0o600))}
}

// try compiles the tests of a package and runs the one of a breakage.
func (t tree) try(ctx context.Context, b breakage) verdict {
	//nolint:gosec // the list of breakages says what is run, and nobody else
	compile := exec.CommandContext(ctx, "go", "test", "-c", "-vet=off", "-trimpath", "-o", binary, "./"+b.dir)
	compile.Dir = t.Name()
	if printed, err := compile.CombinedOutput(); err != nil {
		return verdict{err: fmt.Errorf("compile: %w\n%s", err, printed)}
	}
	ctx, cancel := context.WithTimeout(ctx, killAfter)
	defer cancel()
	//nolint:gosec // as above
	test := exec.CommandContext(ctx, filepath.Join(t.Name(), binary), "-test.v", "-test.run=^"+b.test+"$", "-test.timeout="+testTimeout.String())
	test.Dir = filepath.Join(t.Name(), b.dir)
	printed, err := test.CombinedOutput()
	return judge(b.test, printed, err)
}

var (
	failed  = regexp.MustCompile(`(?m)^--- FAIL: (\S+)`)
	timeout = regexp.MustCompile(`(?m)^panic: test timed out`)
	crashed = regexp.MustCompile(`(?m)^(panic|fatal error): `)
	leaked  = regexp.MustCompile(`(?m)^goleak: Errors`)
)

// judge reads what a test has printed and how its process has ended.
func judge(test string, printed []byte, err error) verdict {
	ran := bytes.Contains(printed, []byte("=== RUN   "+test))
	exit := new(exec.ExitError)
	switch {
	case !ran:
		return verdict{err: errors.Join(fmt.Errorf("the test did not run\n%s", printed), err)}
	case err == nil:
		return verdict{}
	case !errors.As(err, &exit):
		return verdict{err: err}
	case timeout.Match(printed):
		return verdict{caught: true, by: test + " (hangs)"}
	case failed.Match(printed):
		return verdict{caught: true, by: string(failed.FindSubmatch(printed)[1])}
	case crashed.Match(printed):
		return verdict{caught: true, by: test + " (crashes)"}
	case leaked.Match(printed):
		return verdict{caught: true, by: test + " (leaks goroutines)"}
	default:
		return verdict{err: fmt.Errorf("the test ended strangely: %w\n%s", err, printed)}
	}
}
