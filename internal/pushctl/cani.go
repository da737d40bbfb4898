package pushctl

import (
	"context"
	"fmt"
	"strings"

	"github.com/push-manager/push-manager/internal/auth"
)

type canICmd struct {
	Method string `arg:"" help:"Method of the push API, such as PushToRoom."`
	ID     string `arg:"" optional:"" help:"The room or the user; none for BroadcastMessage and WatchReceipts."`
	As     string `required:"" placeholder:"NAME" help:"Name of the caller in the policy."`
	Policy string `placeholder:"FILE" env:"AUTH_POLICY_FILE" help:"The policy file."`
}

// canAnswer is the answer as JSON.
type canAnswer struct {
	Caller  string `json:"caller"`
	Method  string `json:"method"`
	ID      string `json:"id,omitempty"`
	Allowed bool   `json:"allowed"`
	Line    int    `json:"line,omitempty"`
	Pattern string `json:"pattern,omitempty"`
}

// Run tells what the policy says of one push: exit code 0 for yes, 1 for no.
func (c *canICmd) Run(_ context.Context, t *terminal) error {
	method, known := auth.MethodOf(c.Method)
	switch target := method.Target(); {
	case !known:
		return &usageError{fmt.Sprintf("%q is no method: %s", c.Method, strings.Join(auth.Methods(), ", "))}
	case target != "" && c.ID == "":
		return &usageError{fmt.Sprintf("%s needs the id of a %s", c.Method, target)}
	case target == "" && c.ID != "":
		return &usageError{c.Method + " takes no id"}
	case c.Policy == "":
		return &usageError{"--policy: missing (or AUTH_POLICY_FILE)"}
	}
	policy, err := auth.ReadPolicy(c.Policy)
	if err != nil {
		return err
	}
	caller := policy.Caller(c.As)
	if caller == nil {
		return fmt.Errorf("there is no caller %q in %s", c.As, c.Policy)
	}
	line, pattern, allowed := caller.Explain(method, c.ID)
	text := t.paint(green, "yes")
	switch {
	case !allowed:
		text = t.paint(red, "no")
	case pattern == "":
		text += fmt.Sprintf(" (%s:%d)", c.Policy, line)
	default:
		text += fmt.Sprintf(" (%s:%d, %q)", c.Policy, line, pattern)
	}
	err = t.answer(canAnswer{c.As, c.Method, c.ID, allowed, line, pattern}, text)
	if err == nil && !allowed {
		return &outcome{code: exitError}
	}
	return err
}
