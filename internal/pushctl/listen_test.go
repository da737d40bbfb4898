package pushctl

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/lxzan/gws"
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
