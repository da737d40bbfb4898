package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
)

// show prints the account of a push.
func (t *terminal) show(what string, r reply) error {
	if t.json {
		text, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(r)
		if err != nil {
			return fmt.Errorf("print the reply: %w", err)
		}
		// protojson varies its spaces on purpose: a line stays a line.
		_, err = fmt.Fprintf(t.out, "%s\n", text)
		return err
	}
	s := r.GetSummary()
	var b strings.Builder
	b.WriteString(what + ": ")
	switch {
	case r.GetSuccess():
		b.WriteString(t.paint(green, fmt.Sprintf("delivered to %d of %d", s.GetDelivered(), s.GetTargets())))
	case s.GetDelivered() > 0:
		b.WriteString(t.paint(yellow, fmt.Sprintf("delivered to %d of %d", s.GetDelivered(), s.GetTargets())))
	default:
		b.WriteString(t.paint(red, "not delivered"))
	}
	if rest := counts(s.GetOffline(), s.GetFailed(), s.GetUnknown()); rest != "" {
		b.WriteString(" (" + rest + ")")
	}
	if m := r.GetMessage(); m != "" && !r.GetSuccess() {
		b.WriteString(": " + clean(m))
	}
	b.WriteString("\n")
	for _, f := range s.GetNodeFailures() {
		b.WriteString("  " + clean(f.GetNodeId()) + ": " + t.paint(red, clean(f.GetReason())))
		if f.GetUsers() > 0 {
			b.WriteString(" (" + plural(f.GetUsers(), "user") + ")")
		}
		b.WriteString("\n")
	}
	_, err := fmt.Fprint(t.out, b.String())
	return err
}

func counts(offline, failed, unknown int32) string {
	var parts []string
	for _, c := range []struct {
		n    int32
		text string
	}{{offline, "offline"}, {failed, "failed"}, {unknown, "unknown: may have arrived"}} {
		if c.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", c.n, c.text))
		}
	}
	return strings.Join(parts, ", ")
}

func plural(n int32, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// explain turns the error of a call into a line for people.
func (t *terminal) explain(err error, address string) error {
	s := status.Convert(err)
	for _, detail := range s.Details() {
		// With it, the server says that nothing was sent.
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return fmt.Errorf("%s, nothing was sent: %s [%s]", words(s.Code()), clean(s.Message()), clean(info.GetReason()))
		}
	}
	if s.Code() == codes.Unavailable && neverConnected(err, s.Message()) {
		return fmt.Errorf("nobody answers at %s; start everything on this machine with: push-manager dev", address)
	}
	if s.Code() == codes.Canceled {
		return errors.New("interrupted: the push may have been delivered")
	}
	return fmt.Errorf("%s, the push may have been delivered: %s", words(s.Code()), clean(s.Message()))
}

// neverConnected tells a refused connection from one that broke.
func neverConnected(err error, message string) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || strings.Contains(message, "while dialing") ||
		strings.Contains(message, "name resolver error") || strings.Contains(message, "produced zero addresses")
}

func words(c codes.Code) string {
	switch c {
	case codes.InvalidArgument:
		return "invalid"
	case codes.Unavailable:
		return "unavailable"
	case codes.DeadlineExceeded:
		return "out of time"
	case codes.ResourceExhausted:
		return "overloaded"
	default:
		return strings.ToLower(c.String())
	}
}

// clean makes a text from elsewhere safe to print: its control characters would
// be commands to the terminal.
func clean(text string) string {
	quoted := strconv.Quote(text)
	quoted = quoted[1 : len(quoted)-1]
	return strings.NewReplacer(`\"`, `"`, `\\`, `\`).Replace(quoted)
}
