package pushctl

import (
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lxzan/gws"

	"github.com/push-manager/push-manager/internal/auth/jwt"
	"github.com/push-manager/push-manager/internal/etcdtest"
)

// moody is a Connect-Node that ends its connections in ways of its own.
type moody struct {
	gws.BuiltinEventHandler

	mu sync.Mutex
	// Guarded by mu.
	asked  []string // rooms, for each connection
	queued []func(w http.ResponseWriter, r *http.Request)
}

func (m *moody) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	next := m.queued[0]
	if len(m.queued) > 1 {
		m.queued = m.queued[1:]
	}
	m.mu.Unlock()
	next(w, r)
}

// closes takes a connection, waits for the further room, and ends it with a code.
func (m *moody) closes(code uint16) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, r *http.Request) {
		rooms := []string{r.URL.Query().Get("room_id")}
		ws, err := gws.NewUpgrader(&joins{moody: m, rooms: rooms, code: code}, nil).Upgrade(w, r)
		if err == nil {
			ws.ReadLoop()
		}
	}
}

func refuses(code int, text string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, text, code) }
}

type joins struct {
	gws.BuiltinEventHandler

	moody *moody
	rooms []string
	code  uint16
}

func (j *joins) OnMessage(ws *gws.Conn, message *gws.Message) {
	defer func() { _ = message.Close() }()
	var f frame
	if err := json.Unmarshal(message.Bytes(), &f); err != nil || f.Type != "join" {
		return
	}
	j.moody.mu.Lock()
	j.moody.asked = append(j.moody.asked, strings.Join(append(j.rooms, f.Room), " "))
	j.moody.mu.Unlock()
	if j.code == 0 {
		_ = ws.WriteMessage(gws.OpcodeText, []byte(`{"type":"text","room_id":"lobby","user_id":"alice","timestamp":1,"data":{"content":"at last"},"metadata":{}}`))
		return
	}
	_ = ws.WriteClose(j.code, []byte("so it is"))
}

// TestListenComesBack: a connection that was there and is lost is made anew, in the same
// rooms, until the node says what it will say again.
func TestListenComesBack(t *testing.T) {
	m := &moody{}
	web := httptest.NewServer(m)
	defer web.Close()
	args := []string{"listen", "--user=alice", "--room=lobby", "--room=second", "--url", "ws" + strings.TrimPrefix(web.URL, "http") + "/ws"}
	for name, tc := range map[string]struct {
		queued []func(http.ResponseWriter, *http.Request)
		more   []string
		code   int
		rooms  int // connections that asked for both
		errOut []string
	}{
		"until enough has come": {
			[]func(http.ResponseWriter, *http.Request){m.closes(1001), m.closes(4429), refuses(503, "node is going"), m.closes(1012), m.closes(0)},
			[]string{"--count=1"}, exitOK, 4,
			[]string{"closed the connection (1001 so it is); connecting again in ", "(4429 so it is)", "does not take it now, with 503: node is going", "(1012 so it is)"},
		},
		"until it is refused for good": {
			[]func(http.ResponseWriter, *http.Request){m.closes(1001), refuses(400, "room_id: must not be empty")},
			nil, exitError, 1, []string{"refuses the connection with 400: room_id: must not be empty"},
		},
		"until it is not wanted": {
			[]func(http.ResponseWriter, *http.Request){m.closes(4403)},
			nil, exitError, 1, []string{"pushctl: the Connect-Node closed the connection (4403 so it is)"},
		},
		"until a token is asked for, which it has not": {
			[]func(http.ResponseWriter, *http.Request){m.closes(4408)},
			nil, exitError, 1, []string{"(4408 so it is): it asks for a token (--token-file)"},
		},
		"not where there was none": {
			[]func(http.ResponseWriter, *http.Request){refuses(503, "full")},
			nil, exitError, 0, []string{"no connection: the Connect-Node does not take it now, with 503: full"},
		},
		"not where nothing is said": {
			[]func(http.ResponseWriter, *http.Request){func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }},
			nil, exitError, 0, []string{"with 503 (Service Unavailable)"},
		},
		"not where another page is": {
			[]func(http.ResponseWriter, *http.Request){refuses(200, "a page\nof two lines")},
			nil, exitError, 0, []string{"opens no WebSocket, but says 200: a page\n"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			m.mu.Lock()
			m.asked, m.queued = nil, tc.queued
			m.mu.Unlock()
			code, out, errOut := pushctl(t, "", append(args, tc.more...)...)
			if code != tc.code {
				t.Errorf("exit %d, %q", code, errOut)
			}
			for _, want := range tc.errOut {
				if !strings.Contains(errOut, want) {
					t.Errorf("%q lacks %q", errOut, want)
				}
			}
			if tc.code == exitOK && !strings.Contains(out, "at last") {
				t.Errorf("printed %q", out)
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			if len(m.asked) != tc.rooms {
				t.Errorf("asked for %q", m.asked)
			}
			for _, rooms := range m.asked {
				if rooms != "lobby second" {
					t.Errorf("asked for %q", rooms)
				}
			}
		})
	}
}

func TestListenAtAGRPCPortSaysSo(t *testing.T) {
	address := serve(t, &server{})
	code, _, errOut := pushctl(t, "", "listen", "--user=alice", "--url", "ws://"+address+"/ws")
	if code != exitError || !strings.Contains(errOut, "ws://"+address+"/ws: no connection: what answers there does not speak HTTP/1, as a gRPC port does not") || strings.Contains(errOut, `\x00`) {
		t.Errorf("exit %d, %q", code, errOut)
	}
}

// TestWhatANodeSendsEndsNoProcess: a frame whose length has its top bit set.
func TestWhatANodeSendsEndsNoProcess(t *testing.T) {
	m := &moody{}
	web := httptest.NewServer(m)
	defer web.Close()
	hostile := func(w http.ResponseWriter, r *http.Request) {
		ws, err := gws.NewUpgrader(&gws.BuiltinEventHandler{}, nil).Upgrade(w, r)
		if err != nil {
			return
		}
		_, _ = ws.NetConn().Write([]byte{0x81, 0x7f, 0x80, 0, 0, 0, 0, 0, 0, 0})
		_, _ = io.Copy(io.Discard, ws.NetConn())
	}
	m.queued = []func(http.ResponseWriter, *http.Request){hostile, refuses(400, "enough")}
	_, _, errOut := pushctl(t, "", "listen", "--user=alice", "--url", "ws"+strings.TrimPrefix(web.URL, "http")+"/ws")
	if !strings.Contains(errOut, "connecting again") || !strings.Contains(errOut, "400: enough") {
		t.Errorf("%q", errOut)
	}
}

// TestFirstWordsAreForPeople compares what a gateway says first with what is printed of it.
func TestFirstWordsAreForPeople(t *testing.T) {
	for raw, want := range map[string]string{
		`{"type":"ready","user_id":"alice","node_id":"connect-node-1"}`: "ready at connect-node-1",
		`{"type":"joined","room_id":"lobby"}`:                           "joined lobby",
		`{"type":"left","room_id":"lobby"}`:                             "left lobby",
		`{"type":"other"}`:                                              `{"type":"other"}`,
	} {
		var f frame
		if err := json.Unmarshal([]byte(raw), &f); err != nil {
			t.Fatal(err)
		}
		if got := f.control(raw); got != want {
			t.Errorf("%s is printed as %q, want %q", raw, got, want)
		}
	}
}

// TestPushSaysWhomItWasFor compares what a gateway sends with what is printed after the time.
func TestPushSaysWhomItWasFor(t *testing.T) {
	for raw, want := range map[string]string{
		`{"type":"text","room_id":"","user_id":"alice","data":{"content":"Hello"}}`:                     "Hello",
		`{"type":"text","room_id":"lobby","user_id":"alice","data":{"content":"Hello"}}`:                "lobby  Hello",
		`{"type":"text","room_id":"","user_id":"alice","data":{"content":"Hello"},"broadcast":true}`:    "to everybody  Hello",
		`{"type":"system","room_id":"","user_id":"alice","data":{"content":"Hello"},"broadcast":true}`:  "to everybody  [system] Hello",
		`{"type":"text","room_id":"to","user_id":"alice","data":{"content":"Hello"},"broadcast":false}`: "to  Hello",
	} {
		var f frame
		if err := json.Unmarshal([]byte(raw), &f); err != nil {
			t.Fatal(err)
		}
		if _, got, _ := strings.Cut(f.push(&terminal{}), "  "); got != want {
			t.Errorf("%s is printed as %q, want %q", raw, got, want)
		}
	}
}

// asks takes a connection, notes how its client has shown a token, and hands it to then.
func (m *moody) asks(then func(ws *gws.Conn, message string)) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, r *http.Request) {
		m.note(r.Header.Get("Authorization") + " " + r.URL.RawQuery)
		ws, err := gws.NewUpgrader(&answers{then: then}, nil).Upgrade(w, r)
		if err == nil {
			then(ws, "")
			ws.ReadLoop()
		}
	}
}

func (m *moody) note(what string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked = append(m.asked, what)
}

type answers struct {
	gws.BuiltinEventHandler

	then func(ws *gws.Conn, message string)
}

func (a *answers) OnMessage(ws *gws.Conn, message *gws.Message) {
	text := string(message.Bytes())
	_ = message.Close()
	a.then(ws, text)
}

// tokenOf is a token that nobody verifies.
func tokenOf(t *testing.T, sub string, left time.Duration) string {
	t.Helper()
	token, err := jwt.Mint(make([]byte, 32), map[string]any{"sub": sub, "exp": float64(time.Now().Add(left).UnixMilli()) / 1000})
	if err != nil {
		t.Fatal(err)
	}
	return token
}

const aPush = `{"type":"text","room_id":"","user_id":"alice","timestamp":1,"data":{"content":"at last"},"metadata":{}}`

// TestListenShowsItsToken: the one of the file as it is now, and never in the address. One that is refused is not shown again.
func TestListenShowsItsToken(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
			t.Error(err)
		}
	}
	m := &moody{}
	web := httptest.NewServer(m)
	defer web.Close()
	url := "ws" + strings.TrimPrefix(web.URL, "http") + "/ws"
	first, second := tokenOf(t, "alice", time.Hour), tokenOf(t, "alice", 2*time.Hour)
	push := m.asks(func(ws *gws.Conn, _ string) { _ = ws.WriteString(aPush) })
	refuse := m.asks(func(ws *gws.Conn, _ string) { _ = ws.WriteClose(4401, []byte("expired")) })
	for name, tc := range map[string]struct {
		queued []func(http.ResponseWriter, *http.Request)
		args   []string
		env    string
		code   int
		asked  []string
		errOut string
	}{
		"file":                     {[]func(http.ResponseWriter, *http.Request){push}, []string{"--token-file", file}, "", exitOK, []string{"Bearer " + first + " ack=1&resume="}, `listening as "alice"`},
		"variable":                 {[]func(http.ResponseWriter, *http.Request){push}, nil, first, exitOK, []string{"Bearer " + first + " ack=1&resume="}, `listening as "alice"`},
		"user, too":                {[]func(http.ResponseWriter, *http.Request){push}, []string{"--token-file", file, "--user=alice"}, "", exitOK, []string{"Bearer " + first + " ack=1&user_id=alice&user_name=alice&resume="}, ""},
		"refused":                  {[]func(http.ResponseWriter, *http.Request){refuse}, []string{"--token-file", file}, "", exitError, []string{"Bearer " + first + " ack=1&resume="}, "4401 expired"},
		"refused, from a variable": {[]func(http.ResponseWriter, *http.Request){refuse}, nil, first, exitError, []string{"Bearer " + first + " ack=1&resume="}, "4401 expired"},
		"another one by then": {
			[]func(http.ResponseWriter, *http.Request){m.asks(func(ws *gws.Conn, _ string) {
				write(second)
				_ = ws.WriteClose(4401, []byte("expired"))
			}), push}, []string{"--token-file", file}, "", exitOK, []string{"Bearer " + first + " ack=1&resume=", "Bearer " + second + " ack=1&resume="}, "connecting again",
		},
	} {
		t.Run(name, func(t *testing.T) {
			write(first)
			t.Setenv("PUSHCTL_TOKEN", tc.env)
			m.mu.Lock()
			m.asked, m.queued = nil, tc.queued
			m.mu.Unlock()
			code, out, errOut := pushctl(t, "", append([]string{"listen", "--count=1", "--url", url}, tc.args...)...)
			if code != tc.code || !strings.Contains(errOut, tc.errOut) {
				t.Errorf("exit %d, %q", code, errOut)
			}
			if strings.Contains(out+errOut, first) || strings.Contains(out+errOut, second) {
				t.Error("the token is printed")
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			if !slices.Equal(m.asked, tc.asked) {
				t.Errorf("asked %q\nwant  %q", m.asked, tc.asked)
			}
		})
	}
	write("not a token")
	for args, want := range map[string]string{file: "holds no token", "/nowhere": "no such file", t.TempDir(): "regular file"} {
		if code, _, errOut := pushctl(t, "", "listen", "--url", url, "--token-file", args); code != exitUsage || !strings.Contains(errOut, want) {
			t.Errorf("%s: exit %d, %q", args, code, errOut)
		}
	}
	if code, _, errOut := pushctl(t, "", "listen", "--url", url, "--token="+first); code != exitUsage || !strings.Contains(errOut, "unknown flag --token") {
		t.Errorf("a token as a flag: exit %d, %q", code, errOut)
	}
}

// TestListenRefreshesBeforeTheEnd: with what is in the file by then, on the same connection.
func TestListenRefreshesBeforeTheEnd(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	first, second := tokenOf(t, "alice", time.Second), tokenOf(t, "alice", time.Hour)
	if err := os.WriteFile(file, []byte(first), 0o600); err != nil {
		t.Fatal(err)
	}
	m := &moody{}
	m.queued = []func(http.ResponseWriter, *http.Request){m.asks(func(ws *gws.Conn, message string) {
		if message == "" {
			if err := os.WriteFile(file, []byte(second), 0o600); err != nil {
				t.Error(err)
			}
			return
		}
		var r struct{ Type, Token string }
		if err := json.Unmarshal([]byte(message), &r); err != nil || r.Type != "refresh" || r.Token != second {
			t.Errorf("%v: %s", err, message)
		}
		_ = ws.WriteString(`{"type":"refreshed","expires":1767225600}`)
		_ = ws.WriteString(aPush)
	})}
	web := httptest.NewServer(m)
	defer web.Close()
	code, out, errOut := pushctl(t, "", "listen", "--count=1", "--url", "ws"+strings.TrimPrefix(web.URL, "http")+"/ws", "--token-file", file)
	if code != exitOK || !strings.Contains(out, "token refreshed, good until ") || !strings.Contains(out, "at last") {
		t.Errorf("exit %d, %q, %q", code, out, errOut)
	}
	if len(m.asked) != 1 {
		t.Errorf("%d connections", len(m.asked))
	}
}

func TestWhenATokenIsRefreshed(t *testing.T) {
	for left, want := range map[time.Duration]time.Duration{
		time.Hour: 59 * time.Minute, 2 * time.Minute: time.Minute, time.Minute: 30 * time.Second, 10 * time.Second: 5 * time.Second, -time.Second: 0,
	} {
		if got, ok := untilRefresh(tokenOf(t, "alice", left)); !ok || got > want || got < want-5*time.Second {
			t.Errorf("%v before its end: in %v, want %v", left, got, want)
		}
	}
	for _, token := range []string{"", "opaque", "a.b.c", "a." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"x"}`)) + ".c", "a." + base64.RawURLEncoding.EncodeToString([]byte(`{"exp":1e300}`)) + ".c"} {
		if got, ok := untilRefresh(token); ok {
			t.Errorf("%q: in %v", token, got)
		}
	}
}

func TestListenOverTLS(t *testing.T) {
	ca, other := etcdtest.NewCA(t), etcdtest.NewCA(t)
	certFile, keyFile := ca.Issue("localhost", "127.0.0.1")
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	m := &moody{}
	m.queued = []func(http.ResponseWriter, *http.Request){m.asks(func(ws *gws.Conn, _ string) { _ = ws.WriteString(aPush) })}
	web := httptest.NewUnstartedServer(m)
	web.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	web.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	web.StartTLS()
	defer web.Close()
	url := "wss" + strings.TrimPrefix(web.URL, "https") + "/ws"
	for name, tc := range map[string]struct {
		args []string
		code int
		text string
	}{
		"its authority":     {[]string{"--ca", ca.File}, exitOK, ""},
		"another authority": {[]string{"--ca", other.File}, exitError, "unknown authority"},
		"the system's":      {nil, exitError, "unknown authority"},
		"no file":           {[]string{"--ca", "/nowhere"}, exitUsage, "--ca: "},
		"no certificate":    {[]string{"--ca", keyFile}, exitUsage, "--ca: "},
	} {
		code, _, errOut := pushctl(t, "", append([]string{"listen", "--user=alice", "--count=1", "--url", url}, tc.args...)...)
		if code != tc.code || !strings.Contains(errOut, tc.text) {
			t.Errorf("%s: exit %d, %q", name, code, errOut)
		}
	}
}

// TestListenTellsAnEndWithoutWords by its code alone.
func TestListenTellsAnEndWithoutWords(t *testing.T) {
	for reason, want := range map[string]string{"": "(4410)", "banned": "(4410 banned)"} {
		if err := ended(&gws.CloseError{Code: 4410, Reason: []byte(reason)}, false); !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%q, want %s at its end", err, want)
		}
	}
}
