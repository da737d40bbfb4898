package pushctl

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/client"
	"github.com/push-manager/push-manager/internal/invoke"
	pubsub "github.com/push-manager/push-manager/proto"
)

// show prints the account of a push.
func (t *terminal) show(what string, r reply) error {
	result, err := client.ResultOf(r)
	if err != nil {
		return &outcome{exitUnknown, "the answer is no account of the push, which may have been delivered: " + clean(err.Error())}
	}
	code := exitOf(result.Outcome())
	if err := t.answer(r, t.account(what, r, code)); err != nil {
		return err
	}
	if code != exitOK {
		return &outcome{code: code}
	}
	return nil
}

// account is what became of a push, for people.
func (t *terminal) account(what string, r reply, code int) string {
	s := r.GetSummary()
	verdict, colour := fmt.Sprintf("delivered to %d of %d", s.GetDelivered(), s.GetTargets()), yellow
	switch {
	case code == exitOK && s.GetDelivered() > 0:
		colour = green
	case s.GetDelivered() == 0 && (s.GetStored() > 0 || s.GetPosition() != "") && r.GetSuccess():
		verdict = "stored"
	case code == exitOK:
		verdict = "nobody to deliver to"
	case s.GetDelivered() > 0:
	case code == exitUnknown:
		verdict = "unknown whether delivered"
	case r.GetSuccess():
		verdict, colour = "delivered to nobody", red
	default:
		verdict, colour = "not delivered", red
	}
	var b strings.Builder
	b.WriteString(what + ": " + t.paint(colour, verdict))
	if rest := counts(s); rest != "" {
		b.WriteString(" (" + rest + ")")
	}
	// The message of the server may begin with the same words.
	m := r.GetMessage()
	if why := strings.TrimPrefix(m, verdict+": "); why != "" && why != verdict && !r.GetSuccess() {
		b.WriteString(": " + clean(why))
	} else if _, note, ok := strings.Cut(m, "; "); ok && s.GetStored() == 0 && note != verdict {
		b.WriteString("; " + clean(note)) // a success, too, may stand on an old route
	}
	if id := s.GetMessageId(); id != "" {
		b.WriteString(t.paint(grey, ", id "+clean(id)))
	}
	if position := s.GetPosition(); position != "" {
		b.WriteString(t.paint(grey, ", position "+clean(position)))
	}
	b.WriteString("\n")
	for _, f := range s.GetNodeFailures() {
		b.WriteString("  " + clean(f.GetNodeId()) + ": " + t.paint(red, clean(f.GetReason())))
		if f.GetUsers() > 0 {
			b.WriteString(" (" + plural(f.GetUsers(), "user") + ")")
		}
		b.WriteString("\n")
	}
	b.WriteString(traceText(s.GetTrace()))
	if t.format == formatWide {
		fmt.Fprintf(&b, "  targets %d: delivered %d, offline %d, failed %d, unknown %d\n", s.GetTargets(), s.GetDelivered(), s.GetOffline(), s.GetFailed(), s.GetUnknown())
		fmt.Fprintf(&b, "  stored %d, unsure %d, acked %d, duplicates %d, filtered %d\n", s.GetStored(), s.GetUnsure(), s.GetAcked(), s.GetDuplicates(), s.GetFiltered())
	}
	return b.String()
}

func counts(s *pubsub.DeliverySummary) string {
	var parts []string
	for _, c := range []struct {
		n    int32
		text string
	}{
		{s.GetAcked(), "acknowledged by clients"},
		{s.GetDuplicates(), "had it before"},
		{s.GetOffline(), "offline"},
		{s.GetFiltered(), "connected and left out by the filter"},
		{s.GetStored(), "stored"},
		{s.GetUnsure(), "may have it already"},
		{s.GetFailed(), "failed"},
		{s.GetUnknown(), "unknown: may have arrived"},
	} {
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

// explain turns the error of a call into a line for people, and says whether
// anything can have been delivered: not where the server says so, not where the call
// never left this process, and not where the server does not have the method.
func explain(err error, address string, timeout time.Duration, sent bool) error {
	s := status.Convert(err)
	for _, detail := range s.Details() {
		// With it, the server says that nothing was sent.
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return fmt.Errorf("%s, nothing was sent: %s [%s]", words(s.Code()), clean(s.Message()), clean(info.GetReason()))
		}
	}
	switch {
	case s.Code() == codes.Unimplemented:
		return fmt.Errorf("what answers at %s is no Push-Manager, nothing was sent: %s", clean(address), clean(s.Message()))
	case sent && s.Code() == codes.Canceled:
		return &outcome{exitUnknown, "interrupted: the push may have been delivered"}
	case sent:
		return &outcome{exitUnknown, fmt.Sprintf("%s, the push may have been delivered: %s", words(s.Code()), clean(s.Message()))}
	case s.Code() == codes.Canceled:
		return errors.New("interrupted: nothing was sent")
	}
	return unreachable(s, address, timeout)
}

// unreachable says why a call never left. What it was is told apart by gRPC's words,
// that nothing was sent is not.
func unreachable(s *status.Status, address string, timeout time.Duration) error {
	has := func(words ...string) bool {
		return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(s.Message(), w) })
	}
	why := clean(s.Message())
	address = clean(address)
	switch {
	case has("no such host", "produced zero addresses", "name resolver error"):
		return fmt.Errorf("no address is known for %s, nothing was sent: %s", address, why)
	case has("connection refused", "actively refused"):
		return fmt.Errorf("nobody answers at %s, nothing was sent; start everything on this machine with: %s dev", address, invoke.As("push-manager"))
	case has("looked like an HTTP/1.1 header", "looked like a TLS", "server preface", "EOF", "connection reset"):
		return fmt.Errorf("what answers at %s does not speak gRPC without TLS, nothing was sent: %s", address, why)
	case s.Code() == codes.DeadlineExceeded:
		return fmt.Errorf("out of time, nothing was sent: there was no connection to %s within %v (--timeout)", address, timeout)
	}
	return fmt.Errorf("nobody answers at %s, nothing was sent: %s", address, why)
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
	case codes.PermissionDenied:
		return "not allowed"
	case codes.AlreadyExists:
		return "already used"
	case codes.FailedPrecondition:
		return "not possible"
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
