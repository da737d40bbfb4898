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
	conn    *gws.Conn
	replies chan []byte
	next    int
}

// OnMessage implements gws.Event.
func (b *tab) OnMessage(_ *gws.Conn, m *gws.Message) {
	b.replies <- append([]byte(nil), m.Bytes()...)
	_ = m.Close()
}

// browse opens a link in Chromium, which is told to believe the certificate in a file and no other one; "" for none.
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
	args := []string{"--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-breakpad",
		"--disable-dev-shm-usage", "--no-proxy-server", "--remote-debugging-port=0"}
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
		args = append(args, "--ignore-certificate-errors-spki-list="+base64.StdEncoding.EncodeToString(sum[:]))
	}

	home := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, path, append(args, "--user-data-dir="+home, link)...)
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

	var target string
	eventually(t, "the browser has the page", func() error {
		file, err := os.ReadFile(filepath.Join(home, "DevToolsActivePort"))
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
			if one.Type == "page" && strings.HasPrefix(one.URL, "http") {
				target = one.WebSocketDebuggerURL
				return nil
			}
		}
		return fmt.Errorf("pages: %s", body)
	})
	b := &tab{t: t, replies: make(chan []byte, 16)}
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
	return b
}

// eval is the text of an expression in the page, "" while it cannot be told. $ finds an element by its id.
func (b *tab) eval(expression string) string {
	b.t.Helper()
	b.next++
	request, err := json.Marshal(map[string]any{
		"id": b.next, "method": "Runtime.evaluate", "params": map[string]any{"expression": "($ => " + expression + ")(id => document.getElementById(id))", "returnByValue": true},
	})
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
				Result struct{ Result struct{ Value any } }
			}
			if err := json.Unmarshal(raw, &reply); err != nil {
				b.t.Fatal(err)
			}
			if reply.ID == b.next {
				text, _ := reply.Result.Result.Value.(string)
				return text
			}
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
