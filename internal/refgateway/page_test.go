//go:build unix

package refgateway

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

// visitor is what a person does on the page: connects, and presses Enter in the room field. It reports over and over
// what there is to see, and whether the browser would have pressed a button for that Enter, which is Disconnect by then.
const visitor = `<script type="module">
const $ = id => document.getElementById(id);
let pressed = "";
const enter = () => {
  if (pressed || $("state").textContent !== "connected" || !$("rooms").textContent.includes("first")) return;
  $("room").value = "second";
  const goesOn = $("room").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true }));
  pressed = goesOn ? "Enter presses a button" : "Enter is taken";
};
const visit = async () => {
  enter();
  const body = [$("state").textContent, pressed, $("rooms").innerText, $("list").innerText].join("\n");
  await fetch("seen", { method: "POST", body });
  setTimeout(visit, 20);
};
$("user").value = "u";
$("room").value = "first";
$("go").click();
visit();
</script>`

// bearer is what a person does on the page of a node that asks for tokens: pastes what /next gives whenever the page
// wants another one, connects with the first, and refreshes with those that come while it is connected.
const bearer = `<script type="module">
const $ = id => document.getElementById(id);
let shown = "";
const visit = async () => {
  const next = await fetch("next").then(r => r.text());
  if (next && next !== shown && !$("bearer").hidden) {
    shown = next;
    $("token").value = next;
    $("token").dispatchEvent(new Event("input"));
    ($("go").textContent === "Disconnect" ? $("refresh") : $("go")).click();
  }
  const body = [$("state").textContent, $("go").textContent, $("user").value, $("tokenLabel").textContent, $("rooms").innerText, $("list").innerText,
    "stored " + (localStorage.length + sessionStorage.length + document.cookie.length), location.href, "end"].join("\n");
  await fetch("seen", { method: "POST", body });
  setTimeout(visit, 20);
};
$("room").value = "first";
visit();
</script>`

// visited serves the pages of a gateway with a script behind its own, and returns what the page shows and where it is. The
// page learns about the node when informed is closed, at once where it is nil.
func visited(t *testing.T, g *Gateway, script string, next *atomic.Pointer[string], informed <-chan struct{}) (shows func(parts ...string) string, address string) {
	t.Helper()
	var seen atomic.Pointer[string]
	pages := g.clientHandler()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/info":
			if informed != nil {
				select {
				case <-informed:
				case <-r.Context().Done():
				}
			}
		case "/seen":
			if b, err := io.ReadAll(r.Body); err == nil {
				seen.Store(new(string(b)))
			}
			return
		case "/next":
			if text := next.Load(); text != nil {
				_, _ = io.WriteString(w, *text)
			}
			return
		}
		pages.ServeHTTP(w, r)
		if r.URL.Path == "/" {
			_, _ = io.WriteString(w, script) // the browser has gone if it fails
		}
	}))
	t.Cleanup(web.Close)
	return func(parts ...string) string {
		t.Helper()
		text := ""
		defer func() {
			if t.Failed() {
				t.Logf("the page shows %q", text)
			}
		}()
		eventually(t, fmt.Sprintf("the page shows %q", parts), func() bool {
			p := seen.Load()
			if p == nil {
				return false
			}
			text = *p
			return !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(text, part) })
		})
		return text
	}, web.URL + "/"
}

// visit runs a page in a browser without a window until the test ends.
func visit(t *testing.T, address string) {
	t.Helper()
	var path string
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if p, err := exec.LookPath(name); err == nil {
			path = p
			break
		}
	}
	if path == "" {
		if os.Getenv("CI") == "true" {
			t.Fatal("there is no Chromium (Debian: package chromium)")
		}
		t.Skip("the page is not tried, because there is no Chromium (Debian: package chromium)")
	}
	home := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-breakpad",
		"--disable-dev-shm-usage", "--no-proxy-server", "--remote-debugging-port=0", "--user-data-dir="+home, address)
	cmd.Env = append(os.Environ(), "HOME="+home, "XDG_CONFIG_HOME="+home, "XDG_CACHE_HOME="+home)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said // of its helpers, too: Wait waits for all of them
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()                                      // its exit code says that it was told to stop
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // none of it is left, as a rule
		if t.Failed() {
			t.Logf("%s: %s", path, &said)
		}
	})
}

// TestPageJoinsWithEnterAndTellsBroadcasts runs the page in a browser, with a script behind its own that does what a
// person would.
func TestPageJoinsWithEnterAndTellsBroadcasts(t *testing.T) {
	c := newController(t)
	g, n := start(t, c, nil)
	shows, address := visited(t, g, visitor, nil, nil)
	visit(t, address)
	shows("connected\nEnter is taken\n", "first", "second")
	if !c.has("u", "first") || !c.has("u", "second") {
		t.Error("the page shows rooms that the Controller does not know of")
	}
	pushTo(t, n, "second", "to the room", "u")
	shows("room second", "to the room")
	pushTo(t, n, "", "to the user", "u")
	shows("to u\n", "to the user")
	if _, err := n.Broadcast(t.Context(), &pubsub.BroadcastRequest{Content: &pubsub.MessageContent{Data: []byte("to all"), Timestamp: 1}}); err != nil {
		t.Fatal(err)
	}
	shows("to everybody", "to all")
}

// TestPageAcknowledgesWhatItShows: each message once, over its connections, and marks what comes again.
func TestPageAcknowledgesWhatItShows(t *testing.T) {
	g, n := start(t, newController(t), nil)
	shows, address := visited(t, g, visitor, nil, nil)
	visit(t, address)
	shows("connected\nEnter is taken\n", "first", "second")
	m := manage(t, n, "pm", pubsub.Feature_FEATURE_REPLAY)
	seq := m.deliver(asking("m-1", "to be acknowledged", "u"))
	m.wantReceipt(seq, receipt{acked: 1})
	shows("to be acknowledged")
	for _, c := range g.users.Of("u") {
		c.bye(closeGoingAway, false)
	}
	asked := m.catchup(2)
	m.deliver(stored(asked.GetGate(), 1, "m-1", "to be acknowledged", "u"), stored(asked.GetGate(), 2, "m-2", "while away", "u"))
	m.wantTaken(asked.GetGate(), 2)
	m.send(&pubsub.DeliverRequest{ReplayEnds: []*pubsub.ReplayEnd{{Gate: asked.GetGate(), Seq: 2}}})
	const twice = "to u\n"
	shows("while away", "replayed")
	m.wantReceipt(m.deliver(asking("m-3", "the end", "u")), receipt{acked: 1})
	text := shows("the end")
	if strings.Count(text, "to be acknowledged") != 1 || strings.Count(text, "replayed") != 1 || strings.Count(text, twice) != 3 {
		t.Errorf("the page shows %q", text)
	}
}

// reloader is a visitor who comes again as the same user whenever the page is loaded.
const reloader = `<script type="module">
const $ = id => document.getElementById(id);
$("user").value = "u";
$("room").value = "first";
$("go").click();
const visit = async () => {
  await fetch("seen", { method: "POST", body: [$("state").textContent, $("list").innerText].join("\n") });
  if (await fetch("next").then(r => r.text()) === "reload" && !sessionStorage.getItem("reloaded")) {
    sessionStorage.setItem("reloaded", "yes");
    location.reload();
    return;
  }
  setTimeout(visit, 20);
};
visit();
</script>`

// TestPageKeepsItsPosition over a loss and over a reload, and shows a gap.
func TestPageKeepsItsPosition(t *testing.T) {
	g, _ := start(t, newController(t), nil)
	var next atomic.Pointer[string]
	shows, address := visited(t, g, reloader, &next, nil)
	visit(t, address)
	shows("connected\n")
	came := func(want string) *conn {
		t.Helper()
		var of *conn
		eventually(t, fmt.Sprintf("the page comes with position %q", want), func() bool {
			conns := g.users.Of("u")
			if len(conns) == 1 && conns[0].resumes && conns[0].position == want {
				of = conns[0]
			}
			return of != nil
		})
		return of
	}
	of := came("")
	of.Resume(at(1))
	of.Resume(at(2))
	of.Gap("first")
	shows("gap", "room first", "is missing")
	of.bye(closeGoingAway, false)
	came(at(2))
	next.Store(new("reload"))
	eventually(t, "the page has connected anew", func() bool { return g.count.opened.Get() == 3 })
	came(at(2))
}

// TestPageShowsItsToken: it connects with the one that was pasted, refreshes, and tells in words why it was closed. The
// token is in the page's memory alone.
func TestPageShowsItsToken(t *testing.T) {
	c := newController(t)
	g, p := startWithTokens(t, c, func(cfg *Config) { cfg.PingInterval = 80 * time.Millisecond })
	var next atomic.Pointer[string]
	paste := func(token string) { next.Store(&token) }
	shows, address := visited(t, g, bearer, &next, nil)
	visit(t, address)

	shows("not connected\nConnect\n")
	paste("x.y.z")
	shows("token missing, wrong or expired: paste another one\nConnect\n")
	paste(p.token("älice", map[string]any{"rooms": []string{"first"}}))
	shows("connected\nDisconnect\nälice\nToken, good until ", "first", "stored 0\n"+address+"\nend")
	if !c.has("älice", "first") {
		t.Error("the Controller does not know who the token names")
	}
	paste(p.token("älice", map[string]any{"kid": "k2"}))
	shows("connected\nDisconnect\n", "The new token counts.")
	p.publish("k1")
	shows("token missing, wrong or expired: paste another one\nConnect\nälice\n")
	paste(p.token("bob", map[string]any{"rooms": []string{"other"}}))
	shows("the token does not allow this room\nConnect\nbob\n", "stored 0\n"+address+"\nend")
}

// TestTokenOfALinkDoesNotStayInTheAddress, also while the page knows nothing of the node yet.
func TestTokenOfALinkDoesNotStayInTheAddress(t *testing.T) {
	g, p := startWithTokens(t, newController(t), nil)
	informed := make(chan struct{})
	shows, address := visited(t, g, bearer, new(atomic.Pointer[string]), informed)
	visit(t, address+"#token="+p.token("alice", nil))
	shows("not connected\n", "stored 0\n"+address+"\nend")
	close(informed)
	shows("connected\nDisconnect\nalice\n", "stored 0\n"+address+"\nend")
}
