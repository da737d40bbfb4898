package acceptance

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/push-manager/push-manager/internal/freeport"
)

// TestWhatIsPushedWhileListenIsStoppedComesWhenItStarts does the four lines of the README and of
// docs/lasting.md, over a store that outlives its process.
func TestWhatIsPushedWhileListenIsStoppedComesWhenItStarts(t *testing.T) {
	pushctl, base, data := binary(t, "pushctl"), freeport.Row(t, 16), t.TempDir()
	var api, gateway string
	dev := func() *process {
		p := start(t, binary(t, "push-manager"), nil, "dev", "--base-port", strconv.Itoa(base), "--data-dir", data)
		eventually(t, "dev says that it is ready", func() error {
			if !strings.Contains(p.out.String(), "Ready.") {
				return fmt.Errorf("printed:\n%s", p.out.String())
			}
			return nil
		})
		api = printedAddress(t, p.out.String(), `Push-Manager +`)
		gateway = printedAddress(t, p.out.String(), `connect-node-1 .*WebSocket at http://`)
		return p
	}
	listen := func(until string) *process {
		l := start(t, pushctl, nil, "listen", "--user", "alice", "--url", "ws://"+gateway+"/ws")
		eventually(t, "listen prints "+until, func() error {
			if !strings.Contains(l.out.String(), until) {
				return fmt.Errorf("printed:\n%s", l.out.String())
			}
			return nil
		})
		return l
	}
	push := func(text string, code int, args ...string) string {
		p := start(t, pushctl, nil, append([]string{"user", "alice", text, "--address", api}, args...)...)
		if got := p.exit(patience); got != code {
			t.Errorf("exit code %d, not %d", got, code)
		}
		return p.out.String()
	}
	stop := func(p *process, s syscall.Signal) {
		p.signal(s)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		select {
		case <-p.done:
		case <-ctx.Done():
			t.Fatalf("%s does not end", p.name)
		}
	}

	first := dev()
	l := listen("alice")
	if out := push("online", 0); !strings.Contains(out, "delivered") {
		t.Errorf("printed %q", out)
	}
	stop(l, syscall.SIGINT)
	for _, text := range []string{"Your order ships", "It arrives at noon"} {
		if out := push(text, 0, "--store"); !strings.Contains(out, `user "alice": stored`) {
			t.Errorf("printed %q", out)
		}
	}
	stop(first, syscall.SIGKILL) // what is stored survives the process
	dev()
	l = listen("It arrives at noon")
	printed := l.out.String()
	if strings.Count(printed, "Your order ships") != 1 || strings.Count(printed, "It arrives at noon") != 1 ||
		strings.Index(printed, "Your order ships") > strings.Index(printed, "It arrives at noon") {
		t.Errorf("printed:\n%s", printed)
	}
	stop(l, syscall.SIGINT)
}
