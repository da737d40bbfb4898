package acceptance

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lxzan/gws"
)

// tab is a page in a browser without a window.
type tab struct {
	gws.BuiltinEventHandler

	t       *testing.T
	home    string // of the browser
	conn    *gws.Conn
	replies chan []byte
	next    int
}

// OnMessage implements gws.Event.
func (b *tab) OnMessage(_ *gws.Conn, m *gws.Message) {
	b.replies <- append([]byte(nil), m.Bytes()...)
	_ = m.Close()
}

// browse opens a link in Chromium, which is told to believe the certificate in a file, if one is named, and no other one.
func browse(t *testing.T, link, certFile string) *tab {
	t.Helper()
	var path string
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if p, err := exec.LookPath(name); err == nil {
			path = p
			break
		}
	}
	if path == "" {
		missing(t, "there is no Chromium (Debian: package chromium)")
	}
	believed := ""
	if certFile != "" {
		text, err := os.ReadFile(certFile)
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(text)
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
		believed = base64.StdEncoding.EncodeToString(sum[:])
	}

	home := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-breakpad",
		"--disable-dev-shm-usage", "--no-proxy-server", "--remote-debugging-port=0", "--user-data-dir="+home,
		"--ignore-certificate-errors-spki-list="+believed, link)
	cmd.Env = append(os.Environ(), "HOME="+home, "XDG_CONFIG_HOME="+home, "XDG_CACHE_HOME="+home)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	var said output
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
			t.Logf("%s: %s", path, said.String())
		}
	})

	b := &tab{t: t, home: home}
	address, _, _ := strings.Cut(link, "#") // a page may take the rest out
	b.attach(address)
	return b
}

// attach takes the tab whose address begins with a text.
func (b *tab) attach(begin string) {
	t := b.t
	t.Helper()
	var target string
	eventually(t, "the browser has the page", func() error {
		file, err := os.ReadFile(filepath.Join(b.home, "DevToolsActivePort"))
		if err != nil {
			return err
		}
		port, _, _ := strings.Cut(string(file), "\n")
		_, body, err := get("http://127.0.0.1:" + port + "/json/list")
		if err != nil {
			return err
		}
		var list []struct {
			Type                 string
			URL                  string `json:"url"`
			WebSocketDebuggerURL string `json:"webSocketDebuggerUrl"`
		}
		if err := json.Unmarshal([]byte(body), &list); err != nil {
			return err
		}
		for _, one := range list {
			if one.Type == "page" && strings.HasPrefix(one.URL, begin) {
				target = one.WebSocketDebuggerURL
				return nil
			}
		}
		return fmt.Errorf("pages: %s", body)
	})
	b.replies = make(chan []byte, 16)
	var err error
	if b.conn, _, err = gws.NewClient(b, &gws.ClientOption{Addr: target}); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.conn.ReadLoop()
	}()
	t.Cleanup(func() {
		_ = b.conn.NetConn().Close()
		<-done
	})
}

// other is another tab of the browser, which has opened it.
func (b *tab) other(begin string) *tab {
	b.t.Helper()
	o := &tab{t: b.t, home: b.home}
	o.attach(begin)
	return o
}

// eval is the text of an expression in the page, or of what it promises, "" while it cannot be told. $ finds an element by its id.
func (b *tab) eval(expression string) string {
	b.t.Helper()
	var result struct{ Result struct{ Value any } }
	b.call(&result, "Runtime.evaluate", map[string]any{"expression": "globalThis.$ ??= id => document.getElementById(id); " + expression, "returnByValue": true, "awaitPromise": true, "userGesture": true})
	text, _ := result.Result.Value.(string)
	return text
}

// call calls a method of the browser's DevTools protocol.
func (b *tab) call(result any, method string, params map[string]any) {
	b.t.Helper()
	b.next++
	request, err := json.Marshal(map[string]any{"id": b.next, "method": method, "params": params})
	if err != nil {
		b.t.Fatal(err)
	}
	if err := b.conn.WriteMessage(gws.OpcodeText, request); err != nil {
		b.t.Fatal(err)
	}
	late := time.NewTimer(patience)
	defer late.Stop()
	for {
		select {
		case raw := <-b.replies:
			var reply struct {
				ID     int
				Result json.RawMessage
			}
			if err := json.Unmarshal(raw, &reply); err != nil {
				b.t.Fatal(err)
			}
			if reply.ID != b.next {
				continue // an event
			}
			if result != nil && len(reply.Result) > 0 { // it is an error otherwise, as while a page is loaded
				if err := json.Unmarshal(reply.Result, result); err != nil {
					b.t.Fatal(err)
				}
			}
			return
		case <-late.C:
			b.t.Fatal("the browser does not answer")
		}
	}
}

// shows waits until an expression has all parts.
func (b *tab) shows(expression string, parts ...string) {
	b.t.Helper()
	eventually(b.t, "the page", func() error {
		text := b.eval(expression)
		for _, part := range parts {
			if !strings.Contains(text, part) {
				return fmt.Errorf("%q is not in %q", part, text)
			}
		}
		return nil
	})
}
