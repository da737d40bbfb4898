package refgateway

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/hooks"
)

// hooked starts a gateway whose events go to a receiver, which hangs for as long as hang is open.
func hooked(t *testing.T, hang chan struct{}) (g *Gateway, events func() []string) {
	t.Helper()
	var mu sync.Mutex
	var list []string
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, q *http.Request) {
		select {
		case <-hang:
		case <-q.Context().Done():
			return
		}
		var b struct {
			Events []struct {
				Event      string
				User       string `json:"user_id"`
				Room       string `json:"room_id"`
				Device     string `json:"device_id"`
				Connection string `json:"connection_id"`
				Code       int
			}
		}
		if err := json.NewDecoder(q.Body).Decode(&b); err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, e := range b.Events {
			line := strings.TrimSpace(e.Connection + " " + e.Event + " " + e.User + " " + e.Device + e.Room)
			if e.Code != 0 {
				line += fmt.Sprint(" ", e.Code)
			}
			list = append(list, line)
		}
	}))
	t.Cleanup(srv.Close)
	dir := t.TempDir()
	file, secret := filepath.Join(dir, "hooks"), filepath.Join(dir, "secret")
	for name, text := range map[string]string{
		secret: "0123456789abcdef",
		file:   fmt.Sprintf("version: 1\nhooks: [{name: a, url: %q, secret_file: %q, events: [connect, disconnect, join, leave]}]", srv.URL, secret),
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h, err := hooks.Open(hooks.Config{File: file, Dir: dir, Node: "node-1"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
	g, _ = start(t, newController(t), func(c *Config) { c.Hooks = h })
	return g, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(list)
	}
}

// TestHooksAreToldWhatHappensToEachConnectionInOrder and clients notice nothing of a receiver that hangs.
func TestHooksAreToldWhatHappensToEachConnectionInOrder(t *testing.T) {
	hang := make(chan struct{})
	g, events := hooked(t, hang)
	d := arrive(t, g, "user_id=a&attr.device_id=phone&room_id=r")
	d.want(`{"type":"joined","room_id":"r"}`)
	d.say(`{"type":"join","room_id":"s"}`)
	d.want(`{"type":"joined","room_id":"s"}`)
	d.say(`{"type":"leave","room_id":"r"}`)
	d.want(`{"type":"left","room_id":"r"}`)
	b := connect(t, g, "b", "")
	if c := g.users.Of("b"); len(c) != 1 || !c[0].kick(4001, "words") {
		t.Error("b is not here")
	}
	b.wantEnd(4001, "words")
	_ = d.ws.NetConn().Close() // without a word
	eventually(t, "all are gone", func() bool { return g.users.Connections() == 0 })
	if got := events(); len(got) > 0 {
		t.Fatalf("the receiver hangs, and has %v", got)
	}
	close(hang)
	want := []string{
		"1 connect a phone", "1 join a phoner", "1 join a phones", "1 leave a phoner", "2 connect b", "2 disconnect b 4001", "1 leave a phones", "1 disconnect a phone 1006",
	}
	eventually(t, "all events have come", func() bool { return len(events()) >= len(want) })
	time.Sleep(50 * time.Millisecond) // nothing else comes
	got := events()
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	for _, id := range []string{"1", "2"} { // in order for each connection
		var kinds []string
		for _, e := range events() {
			if f := strings.Fields(e); f[0] == id {
				kinds = append(kinds, f[1])
			}
		}
		if order := map[string]string{"1": "connect join join leave leave disconnect", "2": "connect disconnect"}[id]; strings.Join(kinds, " ") != order {
			t.Errorf("connection %s: %v, want %s", id, kinds, order)
		}
	}
}
