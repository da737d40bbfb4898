package pushctl

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lxzan/gws"
)

func numbered(id, text string, ack int, more string) string {
	return fmt.Sprintf(`{"type":"text","room_id":"","user_id":"alice","timestamp":1,"data":{"content":%q},"metadata":{},"id":%q,"ack":%d%s}`, text, id, ack, more)
}

// TestListenAcknowledges what it has printed, each message once, over all its connections.
func TestListenAcknowledges(t *testing.T) {
	var mu sync.Mutex
	var acked []string
	heard := func(ws *gws.Conn, message string, last string) {
		if !strings.Contains(message, `"ack"`) {
			return
		}
		mu.Lock()
		acked = append(acked, message)
		mu.Unlock()
		if message == last {
			_ = ws.WriteClose(1001, nil)
		}
	}
	m := &moody{}
	m.queued = []func(http.ResponseWriter, *http.Request){
		m.asks(func(ws *gws.Conn, message string) {
			if message == "" {
				_ = ws.WriteString(numbered("m-1", "first", 1, ""))
				_ = ws.WriteString(numbered("m-1", "of another caller", 2, ""))
				_ = ws.WriteString(numbered("m-2", "second", 3, `,"replayed":true`))
				_ = ws.WriteString(numbered("m-2", "second", 3, `,"replayed":true`))
			}
			heard(ws, message, `{"type":"ack","ack":3}`)
		}),
		m.asks(func(ws *gws.Conn, message string) {
			if message == "" { // sixteen at once do not wait
				_ = ws.WriteString(numbered("m-2", "second", 1, `,"replayed":true`))
				for i := 2; i <= 16; i++ {
					_ = ws.WriteString(numbered(fmt.Sprint("n-", i), "more", i, ""))
				}
			}
			heard(ws, message, `{"type":"ack","ack":16}`)
		}),
		m.asks(func(ws *gws.Conn, message string) {
			if message == "" {
				_ = ws.WriteString(numbered("m-3", "the end", 1, ""))
			}
			heard(ws, message, "")
		}),
	}
	web := httptest.NewServer(m)
	defer web.Close()
	url := "ws" + strings.TrimPrefix(web.URL, "http") + "/ws"
	code, out, errOut := pushctl(t, "", "listen", "--user=alice", "--count=19", "--url", url)
	if code != exitOK {
		t.Errorf("exit %d, %q", code, errOut)
	}
	for text, times := range map[string]int{"first": 1, "of another caller": 1, "second  (replayed)": 1, "more": 15, "the end": 1, "(replayed)": 1} {
		if got := strings.Count(out, text); got != times {
			t.Errorf("%q %d times, want %d: %s", text, got, times, out)
		}
	}
	for begun := time.Now(); ; time.Sleep(time.Millisecond) { // until its last words are read
		mu.Lock()
		last := acked[len(acked)-1]
		mu.Unlock()
		if last == `{"type":"ack","ack":1}` {
			return
		}
		if time.Since(begun) > time.Minute {
			t.Fatalf("acknowledged last %s", last)
		}
	}
}

func TestListenWithoutAckIsAnOldClient(t *testing.T) {
	m := &moody{}
	m.queued = []func(http.ResponseWriter, *http.Request){m.asks(func(ws *gws.Conn, message string) {
		if strings.Contains(message, "ack") {
			t.Errorf("says %s", message)
		}
		if message == "" {
			_ = ws.WriteString(aPush)
			_ = ws.WriteString(aPush)
		}
	})}
	web := httptest.NewServer(m)
	defer web.Close()
	code, out, _ := pushctl(t, "", "listen", "--user=alice", "--no-ack", "--count=2", "--url", "ws"+strings.TrimPrefix(web.URL, "http")+"/ws")
	if code != exitOK || strings.Count(out, "at last") != 2 {
		t.Errorf("exit %d, %q", code, out)
	}
	if want := []string{" user_id=alice&user_name=alice"}; !slices.Equal(m.asked, want) {
		t.Errorf("asked %q, want %q", m.asked, want)
	}
}

// TestListenGoesOnFromItsPosition: over its connections, and from one session to the next; and tells a gap.
func TestListenGoesOnFromItsPosition(t *testing.T) {
	m := &moody{}
	at := func(token string) string { return fmt.Sprintf(`{"type":"resume","token":%q}`, token) }
	m.queued = []func(http.ResponseWriter, *http.Request){
		m.asks(func(ws *gws.Conn, message string) {
			if message == "" {
				_ = ws.WriteString(at("AQ-1"))
				_ = ws.WriteString(at("AQ&2=%"))
				_ = ws.WriteString(at(strings.Repeat("A", maxPosition+1)))
				_ = ws.WriteClose(1001, nil)
			}
		}),
		m.asks(func(ws *gws.Conn, message string) {
			if message == "" {
				_ = ws.WriteString(`{"type":"gap","room_id":"r\u001b[31m"}`)
				_ = ws.WriteString(numbered("m-1", "missed", 1, `,"replayed":true`))
				_ = ws.WriteString(at("AQ_3"))
				_ = ws.WriteString(numbered("m-2", "the end", 2, ""))
				_ = ws.WriteString(numbered("m-3", "one too many", 3, ""))
				_ = ws.WriteString(at("AQ_4"))
			}
		}),
	}
	web := httptest.NewServer(m)
	defer web.Close()
	url := "ws" + strings.TrimPrefix(web.URL, "http") + "/ws"
	code, out, errOut := pushctl(t, "", "listen", "--user=alice", "--resume=AQ0", "--count=2", "--url", url)
	if code != exitOK {
		t.Errorf("exit %d, %q", code, errOut)
	}
	for _, want := range []string{"gap: something that was said in r\\x1b[31m is missing", "missed  (replayed)", "the end"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in %q", want, out)
		}
	}
	if strings.Contains(out, "AQ") || strings.Contains(out, "one too many") || !strings.Contains(errOut, "position: AQ_3 (--resume goes on from there)\n") {
		t.Errorf("printed %q, and %q", out, errOut)
	}
	m.queued = m.queued[:1]
	if _, out, _ := pushctl(t, "", "listen", "--user=alice", "--count=2", "-v", "--url", url); strings.Count(out, "position AQ_3") != 1 {
		t.Errorf("printed %q", out)
	}
	// A session that was told no other position ends with the one that it began with; one that was refused, with none.
	m.queued = []func(http.ResponseWriter, *http.Request){
		m.asks(func(ws *gws.Conn, message string) {
			if message == "" {
				_ = ws.WriteString(numbered("m-4", "soon", 4, ""))
			}
		}),
		func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "resume: is not a position", http.StatusBadRequest)
		},
	}
	if _, _, errOut := pushctl(t, "", "listen", "--user=alice", "--count=1", "--resume=AQ0", "--url", url); !strings.Contains(errOut, "position: AQ0 (") {
		t.Errorf("printed %q", errOut)
	}
	if code, _, errOut := pushctl(t, "", "listen", "--user=alice", "--count=1", "--resume=x", "--url", url); code != exitError || strings.Contains(errOut, "position: x") {
		t.Errorf("exit %d, printed %q", code, errOut)
	}
	m.asked = m.asked[:3]
	query := " ack=1&user_id=alice&user_name=alice&resume="
	if want := []string{query + "AQ0", query + "AQ%262%3D%25", query}; !slices.Equal(m.asked, want) {
		t.Errorf("asked %q, want %q", m.asked, want)
	}
}

// TestHadForgetsTheOldest, and a push without an id is always new.
func TestHadForgetsTheOldest(t *testing.T) {
	var h had
	content := "x"
	push := func(id string) *frame { return &frame{ID: id, Data: &frameData{Content: &content}} }
	for range 2 {
		if h.before(push("")) || h.ring != nil {
			t.Error("a push without an id is remembered")
		}
	}
	for i := range hadMost + 1 {
		if h.before(push(fmt.Sprint(i))) {
			t.Errorf("%d is said to have come before", i)
		}
	}
	if !h.before(push("1")) || h.before(push("0")) || len(h.ring) != hadMost {
		t.Errorf("remembers not the last %d, in %d places", hadMost, len(h.ring))
	}
}
