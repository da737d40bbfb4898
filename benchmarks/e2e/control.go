package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"
)

// roleKey is the environment variable that makes this program one of the parts.
const roleKey = "PUSH_MANAGER_BENCH_ROLE"

// maxLine bounds a line of the control channel; histograms are the largest.
const maxLine = 16 << 20

// request and response are the lines of the control channel, one response for each
// request, in order.
type request struct {
	Op  string          `json:"op"`
	Arg json.RawMessage `json:"arg,omitempty"`
}

type response struct {
	Error string          `json:"error,omitempty"`
	Reply json.RawMessage `json:"reply,omitempty"`
}

// part is one role's process: what it answers, and how it ends.
type part struct {
	ops   map[string]func(context.Context, json.RawMessage) (any, error)
	stops []func()
}

func newPart() *part {
	return &part{ops: map[string]func(context.Context, json.RawMessage) (any, error){}}
}

// onStop adds what is done at the end, the last one first.
func (p *part) onStop(stop func()) { p.stops = append(p.stops, stop) }

// handle makes the part answer op.
func handle[A, R any](p *part, op string, f func(context.Context, A) (R, error)) {
	p.ops[op] = func(ctx context.Context, raw json.RawMessage) (any, error) {
		var arg A
		if len(raw) > 0 {
			if err := json.Unmarshal(raw, &arg); err != nil {
				return nil, fmt.Errorf("%s: %w", op, err)
			}
		}
		return f(ctx, arg)
	}
}

// Role runs the part that the environment names and never returns, or returns at
// once in a process that has none. It comes first in main and TestMain.
func Role() {
	name := os.Getenv(roleKey)
	if name == "" {
		return
	}
	signal.Ignore(syscall.SIGINT) // the one who started us decides when we end
	if err := runRole(name); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func runRole(name string) error {
	roles := map[string]func(context.Context, *part) error{
		"etcd":       etcdRole,
		"controller": controllerRole,
		"nodes":      nodesRole,
		"echo":       echoRole,
		"floor":      floorRole,
		"naive":      naiveRole,
		"load":       loadRole,
		"audience":   audienceRole,
		"crowd":      crowdRole,
		"asking":     askingRole,
	}
	start, ok := roles[name]
	if !ok {
		return errors.New("no such role")
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	p := newPart()
	defer func() {
		for _, stop := range slices.Backward(p.stops) {
			stop()
		}
	}()
	if err := start(ctx, p); err != nil {
		return err
	}
	return p.serve(ctx, os.Stdin, os.Stdout)
}

// serve answers requests until the other side closes.
func (p *part) serve(ctx context.Context, in io.Reader, out io.Writer) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 0, 64<<10), maxLine)
	enc := json.NewEncoder(out)
	for lines.Scan() {
		if err := enc.Encode(p.answer(ctx, lines.Bytes())); err != nil {
			return fmt.Errorf("answer: %w", err)
		}
	}
	return lines.Err()
}

func (p *part) answer(ctx context.Context, line []byte) response {
	var req request
	if err := json.Unmarshal(line, &req); err != nil {
		return response{Error: err.Error()}
	}
	f, ok := p.ops[req.Op]
	if !ok {
		return response{Error: "no such operation: " + req.Op}
	}
	reply, err := f(ctx, req.Arg)
	if err != nil {
		return response{Error: err.Error()}
	}
	raw, err := json.Marshal(reply)
	if err != nil {
		return response{Error: err.Error()}
	}
	return response{Reply: raw}
}
