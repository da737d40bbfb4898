// Pushbench measures Push-Manager end to end against rivals that run beside it. See
// package e2e for how.
//
//	pushbench bars [SUITE]      runs all suites that have bars; exits with 1 if one falls short
//	pushbench suites [SUITE]    runs suites and prints their tables
//	pushbench compare BASE [LOAD] holds Push-Manager against another build of it
//	pushbench clients           the whole way to WebSocket clients, 100 and 1,000 in a room
//	pushbench scale             a whole deployment as processes, and tens of thousands of clients
//	pushbench overload          floods Push-Manager; exits with 1 if it does not stand it
//	pushbench profile [LOAD]    CPU and allocation profiles of Push-Manager under load
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/push-manager/push-manager/benchmarks/e2e"
)

// options are for all commands.
type options struct {
	Rounds         int           `default:"40"    help:"Turns of each server."`
	Turn           time.Duration `default:"250ms" help:"Length of a turn."`
	Conns          int           `default:"4"     help:"Connections from the load generator to each server."`
	InFlight       int           `default:"128"   help:"Callers of a closed loop."`
	StreamInFlight int           `default:"1000"  help:"Unanswered pushes of each PushStream."`
	Binary         string        `help:"A push-manager to measure. Default: built from this module."  type:"existingfile"`
	Env            []string      `help:"Environment of Push-Manager, as NAME=VALUE."                  short:"e"`
	JSON           string        `help:"File that gets the results as JSON, one suite on a line."     type:"path"`
}

type barsCommand struct {
	Names []string `arg:"" help:"Only these suites." optional:""`
}

type suitesCommand struct {
	Names []string `arg:"" help:"Only these suites." optional:""`
}

type compareCommand struct {
	Base  string   `arg:"" help:"The other push-manager." type:"existingfile"`
	Names []string `arg:"" help:"Only these loads."       optional:""`
}

type clientsCommand struct {
	Base       string `help:"Another push-manager, with its Connect-Node and Controller, to hold it against." type:"existingfile"`
	Centrifugo string `help:"A Centrifugo 6 to hold it against."                                               type:"existingfile"`
}

type scaleCommand struct {
	Clients   int           `default:"50000" help:"WebSocket clients."`
	Nodes     int           `default:"20"    help:"Gateways, a process each."`
	Rooms     int           `default:"10000" help:"Rooms that the clients are in, one each."`
	Big       int           `default:"5000"  help:"Clients that are in one more room, all of them."`
	Each      time.Duration `default:"20s"   help:"How long there are pushes of each kind."`
	Pause     time.Duration `default:"20s"   help:"How long the clients are idle before their memory is read."`
	BigRate   float64       `default:"4"     help:"Pushes a second to the room of all those."`
	RoomRate  float64       `default:"500"   help:"Pushes a second to the other rooms, in turn."`
	UserRate  float64       `default:"1000"  help:"Pushes a second to users, in turn."`
	Everybody int           `default:"5"     help:"Pushes to everybody."`
}

type overloadCommand struct{}

type profileCommand struct {
	Dir      string        `default:".tmp/profile" help:"Where the profiles go."        type:"path"`
	Duration time.Duration `default:"6s"           help:"Length of each CPU profile."`
	Names    []string      `arg:""                 help:"Only these loads."             optional:""`
}

var errShort = errors.New("a bar falls short")

func main() {
	e2e.Role()
	var c struct {
		options `embed:""`

		Bars     barsCommand     `cmd:"" help:"Run all suites that have bars; exit with 1 if one falls short."`
		Suites   suitesCommand   `cmd:"" help:"Run suites and print their tables."`
		Compare  compareCommand  `cmd:"" help:"Hold Push-Manager against another build of it, in the same rounds."`
		Clients  clientsCommand  `cmd:"" help:"Measure the whole way to WebSocket clients: CPU of all servers, latency, memory."`
		Scale    scaleCommand    `cmd:"" help:"Start three Push-Managers, two Controllers on Redis, gateways and clients; push to all of them. Exit with 1 if a push is lost or comes twice."`
		Overload overloadCommand `cmd:"" help:"Offer 2 and 5 times what it can do; exit with 1 if it does not stand that."`
		Profile  profileCommand  `cmd:"" help:"Profile Push-Manager under load."`
	}
	command := kong.Parse(&c, kong.Name("pushbench"), kong.Description("Measures Push-Manager against rivals."), kong.UsageOnError())
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	command.BindTo(ctx, (*context.Context)(nil))
	command.Bind(&c.options)
	err := command.Run()
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "pushbench:", err)
		os.Exit(1)
	}
}

// say prints a line.
func say(line string) {
	_, _ = fmt.Fprintln(os.Stdout, line) // nobody reads it when this fails
}

func (o *options) start(ctx context.Context) (*e2e.Bench, error) {
	return e2e.Start(ctx, e2e.Options{
		Rounds: o.Rounds, Turn: o.Turn, Conns: o.Conns, InFlight: o.InFlight, StreamInFlight: o.StreamInFlight,
		Binary: o.Binary, Env: o.Env, Progress: os.Stderr,
	})
}

// Run implements a command of kong.
func (c *barsCommand) Run(ctx context.Context, o *options) error {
	results, err := o.suites(ctx, c.Names, true)
	fine := true
	for _, r := range results {
		for _, bar := range r.Bars {
			say(bar.String())
			fine = fine && !bar.Short()
		}
	}
	if err == nil && !fine {
		return errShort
	}
	return err
}

// Run implements a command of kong.
func (c *suitesCommand) Run(ctx context.Context, o *options) error {
	results, err := o.suites(ctx, c.Names, false)
	if err != nil {
		return err
	}
	for _, r := range results {
		for _, bar := range r.Bars {
			say(bar.String())
		}
	}
	return nil
}

// results is where results go as JSON.
func (o *options) results() (io.WriteCloser, error) {
	if o.JSON == "" {
		return os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	}
	return os.Create(o.JSON)
}

// suites runs suites one after the other and prints their tables. One that fails does
// not keep the others from running.
func (o *options) suites(ctx context.Context, names []string, bars bool) (results []*e2e.Result, err error) {
	out, err := o.results()
	if err != nil {
		return nil, err
	}
	defer func() { _ = out.Close() }()
	b, err := o.start(ctx)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	var failures []error
	for _, s := range e2e.Suites() {
		if len(names) > 0 && !slices.Contains(names, s.Name) || len(names) == 0 && bars && !s.Bars {
			continue
		}
		r, err := s.Run(ctx, b)
		if err != nil {
			failures = append(failures, fmt.Errorf("suite %s: %w", s.Name, err))
			continue
		}
		results = append(results, r)
		if err := errors.Join(r.Write(os.Stdout), r.WriteJSON(out)); err != nil {
			return nil, err
		}
	}
	for _, err := range failures {
		say("short  " + err.Error())
	}
	return results, errors.Join(failures...)
}

// Run implements a command of kong.
func (c *compareCommand) Run(ctx context.Context, o *options) error {
	b, err := o.start(ctx)
	if err != nil {
		return err
	}
	defer b.Close()
	results, err := b.Compare(ctx, c.Base, c.Names)
	for _, r := range results {
		err = errors.Join(err, r.Write(os.Stdout))
	}
	return err
}

// Run implements a command of kong.
func (c *clientsCommand) Run(ctx context.Context, o *options) error {
	out, err := o.results()
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }()
	b, err := o.start(ctx)
	if err != nil {
		return err
	}
	defer b.Close()
	results, err := b.Clients(ctx, c.Base, c.Centrifugo)
	for _, r := range results {
		err = errors.Join(err, r.Write(os.Stdout), r.WriteJSON(out))
	}
	return err
}

// Run implements a command of kong.
func (c *scaleCommand) Run(ctx context.Context, o *options) error {
	out, err := o.results()
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }()
	b, err := o.start(ctx)
	if err != nil {
		return err
	}
	defer b.Close()
	results, err := b.Scale(ctx, e2e.Scaling{
		Clients: c.Clients, Nodes: c.Nodes, Rooms: c.Rooms, Big: c.Big, Each: c.Each, Pause: c.Pause,
		BigRate: c.BigRate, RoomRate: c.RoomRate, UserRate: c.UserRate, Everybody: c.Everybody,
	}, os.Stdout)
	for _, r := range results {
		err = errors.Join(err, r.WriteLong(os.Stdout), r.WriteJSON(out))
		for _, bar := range r.Bars {
			say(bar.String())
		}
	}
	return err
}

// Run implements a command of kong.
func (c *overloadCommand) Run(ctx context.Context, o *options) error {
	b, err := o.start(ctx)
	if err != nil {
		return err
	}
	defer b.Close()
	all, err := b.Overload(ctx)
	if err != nil {
		return err
	}
	if err := e2e.WriteOverloads(os.Stdout, all); err != nil {
		return err
	}
	fine := true
	for _, one := range all {
		for _, bar := range one.Bars() {
			say(bar.String())
			fine = fine && !bar.Short()
		}
	}
	if !fine {
		return errShort
	}
	return nil
}

// Run implements a command of kong.
func (c *profileCommand) Run(ctx context.Context, o *options) error {
	b, err := o.start(ctx)
	if err != nil {
		return err
	}
	defer b.Close()
	files, err := b.Profiles(ctx, c.Dir, c.Duration, c.Names)
	for _, f := range files {
		say("go tool pprof -top " + f)
	}
	return err
}
