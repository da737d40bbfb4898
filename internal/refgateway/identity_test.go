package refgateway

import (
	"bytes"
	"container/list"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/gobwas/ws"
	golang "github.com/golang-jwt/jwt/v5"

	"github.com/push-manager/push-manager/internal/auth/jwt"
	"github.com/push-manager/push-manager/transport/node"
	"github.com/push-manager/push-manager/transport/node/membership"
)

// idp is who signs the tokens of a test: with keys of a set that it can change.
type idp struct {
	t    testing.TB
	file string

	*jwt.Verifier

	mu   sync.Mutex
	keys map[string]ed25519.PrivateKey // Guarded by mu.
}

// newIDP has the keys k1 and k2.
func newIDP(t testing.TB) *idp {
	t.Helper()
	p := &idp{t: t, file: filepath.Join(t.TempDir(), "jwks.json"), keys: map[string]ed25519.PrivateKey{}}
	for i, kid := range []string{"k1", "k2"} {
		p.keys[kid] = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{byte(i)}, ed25519.SeedSize))
	}
	p.publish("k1", "k2")
	var err error
	p.Verifier, err = jwt.New(jwt.Config{
		Issuers: []jwt.Issuer{{Issuer: "idp", Audience: "gateway", JWKSFile: p.file}}, ReloadInterval: 20 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Verifier.Close) // behind the gateway, which is started later
	return p
}

// publish writes the set, in one go.
func (p *idp) publish(kids ...string) {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	var set jose.JSONWebKeySet
	for _, kid := range kids {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: p.keys[kid].Public(), KeyID: kid, Use: "sig"})
	}
	text, err := json.Marshal(set)
	if err == nil {
		if err = os.WriteFile(p.file+".new", text, 0o600); err == nil {
			err = os.Rename(p.file+".new", p.file)
		}
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// token is one for the user, good for an hour, with these claims in place of its own. A nil one is left out.
func (p *idp) token(user string, change map[string]any) string {
	p.t.Helper()
	claims := golang.MapClaims{"iss": "idp", "aud": "gateway", "sub": user, "exp": time.Now().Add(time.Hour).Unix()}
	kid := "k1"
	for name, value := range change {
		switch {
		case name == "kid":
			kid = value.(string)
		case value == nil:
			delete(claims, name)
		default:
			claims[name] = value
		}
	}
	token := golang.NewWithClaims(golang.SigningMethodEdDSA, claims)
	token.Header["kid"] = kid
	p.mu.Lock()
	key, ok := p.keys[kid]
	p.mu.Unlock()
	if !ok {
		key = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{99}, ed25519.SeedSize))
	}
	text, err := token.SignedString(key)
	if err != nil {
		p.t.Fatal(err)
	}
	return text
}

func say(message map[string]string) string {
	b, _ := json.Marshal(message) // of strings: it is no error
	return string(b)
}

func showing(token string) string { return say(map[string]string{"type": "connect", "token": token}) }

// startWithTokens runs a gateway whose clients need tokens.
func startWithTokens(t testing.TB, c *controller, change func(*Config)) (*Gateway, *idp) {
	t.Helper()
	p := newIDP(t)
	g, _ := start(t, c, func(cfg *Config) {
		cfg.Tokens = p.Verifier
		if change != nil {
			change(cfg)
		}
	})
	return g, p
}

// dial opens a connection, which need not be confirmed.
func dial(t testing.TB, g *Gateway, query string, headers http.Header) (*device, *http.Response) {
	t.Helper()
	d, resp, err := dialQuery(g, query, headers)
	if err != nil {
		t.Fatal(err)
	}
	d.t = t
	var wg sync.WaitGroup
	wg.Go(d.ws.ReadLoop)
	t.Cleanup(func() {
		_ = d.ws.NetConn().Close()
		wg.Wait()
	})
	return d, resp
}

// admitted is a client that has shown its token in its first message.
func admitted(t testing.TB, g *Gateway, query, token string) *device {
	t.Helper()
	d, _ := dial(t, g, query, nil)
	d.say(showing(token))
	if strings.Contains(query, "room_id=") {
		d.want(fmt.Sprintf(`{"type":"joined","room_id":%q}`, strings.TrimPrefix(query, "room_id=")))
	} else {
		d.want(`{"type":"ready","user_id":"alice","node_id":"node-1"}`)
	}
	return d
}

// wantDenied demands that so many clients were denied for the reason.
func wantDenied(t testing.TB, g *Gateway, reason string, n uint64) {
	t.Helper()
	eventually(t, "counted as "+reason, func() bool { return g.denied(reason).Get() == n })
}

func TestEachWayInWithAToken(t *testing.T) {
	c := newController(t)
	g, p := startWithTokens(t, c, func(cfg *Config) { cfg.TokenInQuery = true })
	token := p.token("alice", map[string]any{"name": "Alice A."})
	for name, tc := range map[string]struct {
		query    string
		headers  http.Header
		first    string
		subproto string
	}{
		"first message":              {query: "room_id=r", first: showing(token)},
		"first message, with pm.v1":  {query: "room_id=r", first: showing(token), headers: http.Header{"Sec-WebSocket-Protocol": {"pm.v1"}}, subproto: "pm.v1"},
		"first message, own user_id": {query: "room_id=r&user_id=alice", first: showing(token)},
		"subprotocol":                {query: "room_id=r", headers: http.Header{"Sec-WebSocket-Protocol": {"pm.v1, pm.bearer." + token}}, subproto: "pm.v1"},
		"subprotocol, other order":   {query: "room_id=r", headers: http.Header{"Sec-WebSocket-Protocol": {"pm.bearer." + token + ",other,pm.v1"}}, subproto: "pm.v1"},
		"header":                     {query: "room_id=r", headers: http.Header{"Authorization": {"Bearer " + token}}},
		"header, lower case":         {query: "room_id=r", headers: http.Header{"Authorization": {"bearer " + token}}},
		"query":                      {query: "room_id=r&token=" + token},
		"another scheme beside it":   {query: "room_id=r", headers: http.Header{"Authorization": {"Basic eDp5"}}, first: showing(token)},
	} {
		d, resp := dial(t, g, tc.query, tc.headers)
		if got := resp.Header.Get("Sec-WebSocket-Protocol"); got != tc.subproto {
			t.Errorf("%s: subprotocol %q, want %q", name, got, tc.subproto)
		}
		if tc.first != "" {
			d.say(tc.first)
		}
		d.want(`{"type":"joined","room_id":"r"}`)
		c.mu.Lock()
		if got := c.members["alice r node-1"]; got != "Alice A." {
			t.Errorf("%s: the Controller knows alice as %q", name, got)
		}
		c.mu.Unlock()
		_ = d.ws.NetConn().Close()
		eventually(t, "gone", func() bool { return g.users.Connections() == 0 })
	}
}

// TestTokensThatCannotComeLikeThat: of two tokens nobody knows which one counts, and one in an address is in the logs
// of others. No answer and no log of ours repeats it.
func TestTokensThatCannotComeLikeThat(t *testing.T) {
	var log bytes.Buffer
	for name, tc := range map[string]struct {
		inQuery bool
		query   string
		headers http.Header
		want    string
	}{
		"header twice":           {headers: http.Header{"Authorization": {"Bearer TOKEN", "Bearer TOKEN"}}, want: "token: given more than once"},
		"header and subprotocol": {headers: http.Header{"Authorization": {"Bearer TOKEN"}, "Sec-Websocket-Protocol": {"pm.v1, pm.bearer.TOKEN"}}, want: "token: given more than once"},
		"two subprotocols":       {headers: http.Header{"Sec-Websocket-Protocol": {"pm.bearer.TOKEN, pm.bearer.TOKEN"}}, want: "token: given more than once"},
		"query twice":            {inQuery: true, query: "token=TOKEN&token=TOKEN", want: "token: given more than once"},
		"query and header":       {inQuery: true, query: "token=TOKEN", headers: http.Header{"Authorization": {"Bearer TOKEN"}}, want: "token: given more than once"},
		"query":                  {query: "token=TOKEN", want: "token: must not be in the address"},
		"empty header":           {headers: http.Header{"Authorization": {"Bearer "}}, want: "token: required"},
		"empty subprotocol":      {headers: http.Header{"Sec-Websocket-Protocol": {"pm.bearer."}}, want: "token: required"},
	} {
		g, p := startWithTokens(t, newController(t), func(cfg *Config) {
			cfg.TokenInQuery = tc.inQuery
			cfg.Logger = slog.New(slog.NewTextHandler(&lockedWriter{w: &log}, &slog.HandlerOptions{Level: slog.LevelDebug}))
		})
		token := p.token("alice", nil)
		headers := http.Header{"Upgrade": {"websocket"}, "Connection": {"Upgrade"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="}}
		for key, values := range tc.headers {
			for _, value := range values {
				headers.Add(key, strings.ReplaceAll(value, "TOKEN", token))
			}
		}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+g.HTTPAddr().String()+"/ws?"+strings.ReplaceAll(tc.query, "TOKEN", token), nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header = headers
		transport := &http.Transport{}
		resp, err := transport.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		transport.CloseIdleConnections()
		if resp.StatusCode != http.StatusBadRequest || !strings.HasPrefix(string(body), tc.want) || strings.Contains(string(body), token) {
			t.Errorf("%s: %d %s, want 400 and %q", name, resp.StatusCode, body, tc.want)
		}
		g.Close()
		if strings.Contains(log.String(), token[len(token)-20:]) {
			t.Errorf("%s: the token is in the log:\n%s", name, log.String())
		}
	}
}

// lockedWriter is a writer for loggers of many goroutines.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer // Guarded by mu.
}

func (w *lockedWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.w.Write(b)
}

// TestDeniedClientsGetACloseCodeAndNothingElse: no trace of them is left, and all bad tokens look alike.
func TestDeniedClientsGetACloseCodeAndNothingElse(t *testing.T) {
	c := newController(t)
	var log bytes.Buffer
	g, p := startWithTokens(t, c, func(cfg *Config) {
		cfg.TokenInQuery = true
		cfg.Logger = slog.New(slog.NewTextHandler(&lockedWriter{w: &log}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	good := p.token("alice", nil)
	with := func(change map[string]any) string { return showing(p.token("alice", change)) }
	for name, tc := range map[string]struct {
		query string
		first string // a text message, unless it begins with a byte of a header
		code  uint16
		why   string
	}{
		"a join first":            {"", `{"type":"join","room_id":"r"}`, 4401, "missing"},
		"a refresh first":         {"", say(map[string]string{"type": "refresh", "token": good}), 4401, "missing"},
		"not JSON":                {"", `token`, 4401, "missing"},
		"a list":                  {"", `["connect"]`, 4401, "missing"},
		"no token":                {"", `{"type":"connect"}`, 4401, "missing"},
		"null":                    {"", `{"type":"connect","token":null}`, 4401, "missing"},
		"a number":                {"", `{"type":"connect","token":1}`, 4401, "missing"},
		"binary":                  {"", masked(0x82, showing(good)), 4401, "missing"},
		"empty":                   {"", showing(""), 4401, "malformed"},
		"no dots":                 {"", showing(strings.Repeat("x", 8<<10)), 4401, "malformed"},
		"100,000 dots":            {"", strings.Repeat(".", 100_000), 1009, ""},
		"one byte too many":       {"", strings.Repeat(" ", firstMessageBytes+1), 1009, ""},
		"the last byte":           {"", strings.Repeat(" ", firstMessageBytes), 4401, "missing"},
		"expired":                 {"", with(map[string]any{"exp": time.Now().Add(-time.Minute).Unix()}), 4401, "expired"},
		"over, and within leeway": {"", with(map[string]any{"exp": time.Now().Add(-27 * time.Second).Unix()}), 4401, "expired"},
		"no end":                  {"", with(map[string]any{"exp": nil}), 4401, "lifetime"},
		"other audience":          {"", with(map[string]any{"aud": "push-manager"}), 4401, "audience"},
		"other issuer":            {"", with(map[string]any{"iss": "other"}), 4401, "issuer"},
		"unknown key":             {"", with(map[string]any{"kid": "k3"}), 4401, "unknown_key"},
		"changed":                 {"", showing(good[:len(good)-10] + "AAAAAAAAAA"), 4401, "signature"},
		"not signed":              {"", showing("eyJhbGciOiJub25lIn0." + strings.Split(good, ".")[1] + "."), 4401, "algorithm"},
		"nobody":                  {"", with(map[string]any{"sub": nil}), 4401, "subject"},
		"sub too long":            {"", with(map[string]any{"sub": strings.Repeat("x", 257)}), 4401, "subject"},
		"another user_id":         {"user_id=bob", showing(good), 4401, "other_user"},
		"user_id in upper case":   {"user_id=Alice", showing(good), 4401, "other_user"},
		"a tenant with a slash":   {"", with(map[string]any{"tenant": "a/b"}), 4401, "claim"},
		"an empty tenant":         {"", with(map[string]any{"tenant": ""}), 4401, "claim"},
		"a tenant of 32 bytes":    {"", with(map[string]any{"tenant": strings.Repeat("a", 32)}), 4401, "claim"},
		"a name that is a number": {"", with(map[string]any{"name": 1}), 4401, "claim"},
		"a name with a newline":   {"", with(map[string]any{"name": "a\nb"}), 4401, "claim"},
		"rooms that are a text":   {"", with(map[string]any{"rooms": "*"}), 4401, "claim"},
		"rooms that are null":     {"", with(map[string]any{"rooms": json.RawMessage("null")}), 4401, "claim"},
		"a star in the middle":    {"", with(map[string]any{"rooms": []string{"a*b"}}), 4401, "claim"},
		"an empty pattern":        {"", with(map[string]any{"rooms": []string{""}}), 4401, "claim"},
		"a forbidden room":        {"room_id=other", with(map[string]any{"rooms": []string{"r"}}), 4403, "room"},
		"no room allowed":         {"room_id=r", with(map[string]any{"rooms": []string{}}), 4403, "room"},
		"query":                   {"token=x.y.z", "", 4401, "malformed"},
	} {
		before := g.denied(tc.why).Get()
		frames := tc.first
		if frames != "" && frames[0] < 0x80 {
			frames = long(0x81, frames)
		}
		s := shake(t, g, tc.query, "", frames)
		var said string
		code, n := uint16(0), 0
		for {
			op, payload, err := s.frame()
			if err != nil {
				break
			}
			if op == ws.OpClose && len(payload) >= 2 {
				code, said = uint16(payload[0])<<8|uint16(payload[1]), string(payload[2:])
				break
			}
			n++
		}
		if code != tc.code || n != 0 || code == closeToken && said != "token is missing, wrong or expired" {
			t.Errorf("%s: %d frames, then %d %q, want %d", name, n, code, said, tc.code)
		}
		if tc.why != "" {
			wantDenied(t, g, tc.why, before+1)
		}
		_ = s.Close()
	}
	eventually(t, "all have gone", func() bool { return g.unverified.len() == 0 })
	c.mu.Lock()
	defer c.mu.Unlock()
	if g.users.Connections() != 0 || len(c.log) != 0 {
		t.Errorf("%d connections, and the Controller heard %q", g.users.Connections(), c.log)
	}
	if strings.Contains(log.String(), strings.Split(good, ".")[1][:20]) || !strings.Contains(log.String(), "signature") {
		t.Errorf("the log has a token, or no reasons:\n%s", log.String())
	}
}

// long is a frame of a client of any length, whose mask is 0.
func long(first byte, payload string) string {
	if len(payload) < 1<<16 {
		return masked(first, payload)
	}
	n := len(payload)
	return string([]byte{first, 0xff, 0, 0, 0, 0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n), 0, 0, 0, 0}) + payload
}

// TestNobodyGetsNothing: before its token a client is in no list, and its pings have no answers. What it sends behind
// the token is read in order.
func TestNobodyGetsNothing(t *testing.T) {
	c := newController(t)
	g, p := startWithTokens(t, c, nil)
	s := shake(t, g, "user_id=alice&room_id=r", "", masked(0x89, "before"))
	eventually(t, "it waits", func() bool { return g.unverified.len() == 1 })
	if got := (sessions{g.users}).Deliver("alice", &node.Message{Data: []byte("secret")}); got != node.NotHere {
		t.Errorf("a push to nobody: %v", got)
	}
	if delivered, _ := (sessions{g.users}).Broadcast(&node.Message{Data: []byte("secret")}); delivered != 0 || g.users.Online() != 0 {
		t.Errorf("a broadcast reached %d of %d", delivered, g.users.Online())
	}
	if _, err := io.WriteString(s, masked(0x81, showing(p.token("alice", nil)))+masked(0x89, "behind")+masked(0x81, `{"type":"join","room_id":"r2"}`)); err != nil {
		t.Fatal(err)
	}
	var got []string
	for len(got) < 3 {
		op, payload, err := s.frame()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprint(op, " ", string(payload)))
	}
	text := strings.Join(got, "\n")
	for _, want := range []string{"10 behind", `{"type":"joined","room_id":"r"}`, `{"type":"joined","room_id":"r2"}`} {
		if !strings.Contains(text, want) {
			t.Errorf("%q lacks %q", text, want)
		}
	}
	if strings.Contains(text, "before") || strings.Contains(text, "secret") {
		t.Errorf("nobody got %q", text)
	}
	if g.unverified.len() != 0 {
		t.Error("it waits for its token still")
	}
}

func TestRefresh(t *testing.T) {
	g, p := startWithTokens(t, newController(t), nil)
	refresh := func(token string) string { return say(map[string]string{"type": "refresh", "token": token}) }
	first := p.token("alice", map[string]any{"tenant": "shop", "rooms": []string{"r*"}})
	for name, tc := range map[string]struct {
		token string
		code  uint16
		why   string
	}{
		"another user":     {p.token("bob", map[string]any{"tenant": "shop"}), 4401, "other_user"},
		"another tenant":   {p.token("alice", map[string]any{"tenant": "ship"}), 4401, "other_user"},
		"no tenant":        {p.token("alice", nil), 4401, "other_user"},
		"expired":          {p.token("alice", map[string]any{"tenant": "shop", "exp": time.Now().Add(-time.Minute).Unix()}), 4401, "expired"},
		"wrong":            {"x.y.z", 4401, "malformed"},
		"without its room": {p.token("alice", map[string]any{"tenant": "shop", "rooms": []string{"s"}}), 4403, "room"},
	} {
		d := admitted(t, g, "room_id=r", first)
		before := g.denied(tc.why).Get()
		d.say(refresh(tc.token))
		d.wantClose(tc.code)
		wantDenied(t, g, tc.why, before+1)
		eventually(t, name+": gone", func() bool { return g.users.Connections() == 0 })
	}

	d := admitted(t, g, "room_id=r", first)
	exp := time.Now().Add(2 * time.Hour).Unix()
	d.say(refresh(p.token("alice", map[string]any{"tenant": "shop", "rooms": []string{"r", "new"}, "exp": exp, "kid": "k2"})))
	d.want(fmt.Sprintf(`{"type":"refreshed","expires":%d}`, exp))
	d.say(`{"type":"join","room_id":"new"}`)
	d.want(`{"type":"joined","room_id":"new"}`)
	d.say(`{"type":"refresh"}`) // a mistake in the message says nothing of the token
	d.wantError("token")
	d.say(`{"type":"refresh","token":{}}`)
	d.wantError("token")
	d.say(showing(first))
	d.wantError("type")
	d.say(`{"type":"join","room_id":"r2"}`) // the first token allowed it
	d.wantClose(closeForbidden)
}

func TestTokensAreNotLookedAtWithoutMode(t *testing.T) {
	g, _ := start(t, newController(t), nil)
	d, resp := dial(t, g, "user_id=alice&token=x", http.Header{"Authorization": {"Bearer x"}, "Sec-WebSocket-Protocol": {"pm.v1, pm.bearer.y"}})
	if got := resp.Header.Get("Sec-WebSocket-Protocol"); got != "pm.v1" {
		t.Errorf("subprotocol %q", got)
	}
	d.want(`{"type":"ready","user_id":"alice","node_id":"node-1"}`)
	d.say(`{"type":"refresh","token":"x"}`)
	d.wantError("type")
	d.say(`{"type":"connect","token":"x"}`)
	d.wantError("type")
	d.say(`{"type":"join","room_id":"any"}`)
	d.want(`{"type":"joined","room_id":"any"}`)
}

// TestConnectionEndsWithItsToken: unless it is refreshed, the client is closed when the time to do so is over.
func TestConnectionEndsWithItsToken(t *testing.T) {
	g, p := startWithTokens(t, newController(t), func(cfg *Config) {
		cfg.PingInterval, cfg.TokenGrace = 80*time.Millisecond, 500*time.Millisecond
	})
	soon := map[string]any{"exp": float64(time.Now().Add(time.Second).UnixMilli()) / 1000}
	token := p.token("alice", soon)
	ends, stays := admitted(t, g, "", token), admitted(t, g, "", token)
	stays.say(say(map[string]string{"type": "refresh", "token": p.token("alice", nil)}))
	if got := stays.next(); !strings.Contains(got, "refreshed") {
		t.Fatal(got)
	}
	ends.wantClose(closeToken)
	if left := time.Until(time.UnixMilli(int64(soon["exp"].(float64) * 1000))); left > -cfg(g).TokenGrace {
		t.Errorf("closed %v after its end, which is within %v", -left, cfg(g).TokenGrace)
	}
	wantDenied(t, g, "expired", 1)
	stays.wantNothing()
}

func cfg(g *Gateway) *Config { return &g.cfg }

// TestConnectionEndsWithTheKeyOfItsToken: a key is withdrawn because others have it.
func TestConnectionEndsWithTheKeyOfItsToken(t *testing.T) {
	g, p := startWithTokens(t, newController(t), func(cfg *Config) { cfg.PingInterval = 80 * time.Millisecond })
	ends, stays := admitted(t, g, "", p.token("alice", nil)), admitted(t, g, "", p.token("alice", map[string]any{"kid": "k2"}))
	generation := p.Generation()
	p.publish("k2", "k1") // another order, and the same keys
	eventually(t, "read", func() bool { return p.Generation() != generation })
	ends.wantNothing()
	p.publish("k2")
	ends.wantClose(closeToken)
	wantDenied(t, g, "withdrawn", 1)
	stays.wantNothing()
	d, _ := dial(t, g, "", nil)
	d.say(showing(p.token("alice", nil)))
	d.wantClose(closeToken)
}

func TestRoomsAreComparedByteByByte(t *testing.T) {
	id := &identity{rooms: []string{"lobby", "order-*", "ä*", "a"}}
	for room, want := range map[string]bool{
		"lobby": true, "Lobby": false, "lobby ": false, "lobb": false, "lobbyx": false, "order-": true, "order-1": true, "order-*": true,
		"Order-1": false, "order": false, "\u043erder-1": false, "order\u20111": false, "\u00e4x": true, "a\u0308x": false,
		"a": true, "a/b": false, "shop/lobby": false, "*": false, strings.Repeat("o", 256): false,
	} {
		if got := id.allows(room); got != want {
			t.Errorf("%q: %v", room, got)
		}
	}
	for _, tc := range []struct {
		id   *identity
		want bool
	}{{nil, true}, {&identity{everyRoom: true}, true}, {&identity{}, false}, {&identity{rooms: []string{"*"}}, true}} {
		if tc.id.allows("any") != tc.want {
			t.Errorf("%+v", tc.id)
		}
	}
}

// silentSockets is how many there are at once: 5,000 with SILENT_SOCKETS=5000, which takes as many files twice.
func silentSockets(t *testing.T) int {
	t.Helper()
	if text := os.Getenv("SILENT_SOCKETS"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return 300
}

// TestSilentSocketsAreBounded: those of one address cost each other their places, and keep nobody out.
func TestSilentSocketsAreBounded(t *testing.T) {
	n := silentSockets(t)
	g, p := startWithTokens(t, newController(t), func(cfg *Config) { cfg.Unverified, cfg.TokenTimeout = n/3, time.Hour })
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	before := heap()
	socks := make([]*rawClient, n)
	for i := range socks {
		socks[i] = shake(t, g, "", "", "")
		if got := g.unverified.len(); got > n/3 {
			t.Fatalf("%d have shown no token, the bound is %d", got, n/3)
		}
	}
	used := int64(heap()) - int64(before)
	t.Logf("%d silent sockets, %d of them kept: %d KiB, both ends", n, g.unverified.len(), used>>10)
	if used > int64(n)*(64<<10) {
		t.Errorf("%d silent sockets hold %d KiB each", n, used/int64(n)>>10)
	}
	admitted(t, g, "", p.token("alice", nil)).wantNothing() // it has the place of the oldest for a moment
	wantDenied(t, g, deniedEvicted, uint64(n-n/3+1))
	for i, s := range socks {
		if i <= n-n/3 { // and not the others, who could still show theirs
			if code, frames := s.untilClose(t); code != 0 || frames != 0 {
				t.Errorf("silent socket %d: %d frames, then close code %d", i, frames, code)
			}
		}
		_ = s.Close()
	}
	eventually(t, "all have gone", func() bool { return g.unverified.len() == 0 && g.users.Connections() == 1 })
	eventually(t, "their places are free", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.admitted == 1
	})
}

// TestSilentSocketsAreClosedInTime: each after its own time, however many there are.
func TestSilentSocketsAreClosedInTime(t *testing.T) {
	n := silentSockets(t)
	g, _ := startWithTokens(t, newController(t), func(cfg *Config) {
		cfg.Unverified = n
		if n < 1000 {
			cfg.TokenTimeout = time.Second
		}
	})
	socks := make([]*rawClient, n)
	for i := range socks {
		socks[i] = shake(t, g, "", "", "")
	}
	for i, s := range socks {
		if code, frames := s.untilClose(t); code != closeNoToken || frames != 0 {
			t.Errorf("silent socket %d: %d frames, then close code %d", i, frames, code)
		}
		_ = s.Close()
	}
	wantDenied(t, g, deniedTimeout, uint64(n))
	eventually(t, "all have gone", func() bool { return g.unverified.len() == 0 })
}

// TestUnverifiedAreBoundedTogether: from many addresses no more than a quarter of all places.
func TestUnverifiedAreBoundedTogether(t *testing.T) {
	u := unverified{most: 4, mostOfNetwork: 2, networks: map[string]*list.List{}}
	at := func(ip string) *conn { return &conn{net: addressed{ip: net.ParseIP(ip)}} }
	a1, a2, a3 := at("10.0.0.1"), at("10.0.0.1"), at("10.0.0.1")
	b1, b2, c1 := at("2001:db8::1"), at("2001:db8::ffff:2"), at("2001:db8:0:1::1")
	for i, step := range []struct{ add, evicted *conn }{{a1, nil}, {a2, nil}, {a3, a1}, {b1, nil}, {b2, nil}, {c1, a2}, {at("2001:db8::3"), b1}} {
		if got := u.add(step.add); got != step.evicted {
			t.Errorf("step %d: %p lost its place, want %p", i, got, step.evicted)
		}
	}
	if u.remove(a1) || !u.remove(a3) || u.len() != 3 {
		t.Errorf("%d are left", u.len())
	}
	u.each(func(c *conn) { u.remove(c) })
	if len(u.networks) != 0 || u.len() != 0 {
		t.Errorf("left: %v", u.networks)
	}
}

// addressed is a connection that knows where it comes from.
type addressed struct {
	net.Conn

	ip net.IP
}

func (a addressed) RemoteAddr() net.Addr { return &net.TCPAddr{IP: a.ip, Port: 1} }

// TestHostileFramesBeforeTheToken are answered as those behind it.
func TestHostileFramesBeforeTheToken(t *testing.T) {
	g, p := startWithTokens(t, newController(t), nil)
	well := admitted(t, g, "", p.token("alice", nil))
	for _, test := range hostile {
		c := shake(t, g, "", "", test.bytes)
		if code, _ := c.untilClose(t); code != test.code {
			t.Errorf("%s: close code %d, want %d", test.name, code, test.code)
		}
		_ = c.Close()
	}
	well.wantNothing()
	eventually(t, "they are forgotten", func() bool { return g.users.Connections() == 1 && g.unverified.len() == 0 })
	if n := g.count.panics.Get(); n != 0 {
		t.Errorf("%d panics", n)
	}
}

// TestCompressionIsNeverAgreedTo: there is nothing that a bomb could be unpacked by.
func TestCompressionIsNeverAgreedTo(t *testing.T) {
	g, p := startWithTokens(t, newController(t), nil)
	for _, first := range []string{"", masked(0x81, showing(p.token("alice", nil)))} {
		c := shake(t, g, "", "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\nSec-WebSocket-Protocol: pm.v1\r\n", first+masked(0xc1, strings.Repeat("\x00", 100)))
		if code, _ := c.untilClose(t); code != closeProtocol {
			t.Errorf("close code %d", code)
		}
	}
}

// TestPagesOfStrangersAreRefused: also with a good token, and null also where all are allowed.
func TestPagesOfStrangersAreRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		allowed []string
		origin  string
		ok      bool
	}{
		"stranger":     {nil, "https://evil.example", false},
		"null":         {nil, "null", false},
		"null and all": {[]string{"*"}, "null", false},
		"all":          {[]string{"*"}, "https://evil.example", true},
		"listed":       {[]string{"https://app.example"}, "https://app.example", true},
		"not listed":   {[]string{"https://app.example"}, "https://app.example.evil.example", false},
	} {
		g, p := startWithTokens(t, newController(t), func(cfg *Config) { cfg.AllowedOrigins = tc.allowed })
		_, resp, err := dialQuery(g, "", http.Header{"Origin": {tc.origin}, "Authorization": {"Bearer " + p.token("alice", nil)}, "Cookie": {"token=" + p.token("alice", nil)}})
		if (err == nil) != tc.ok || !tc.ok && (resp == nil || resp.StatusCode != http.StatusForbidden) {
			t.Errorf("%s: %v, %v", name, resp, err)
		}
		g.Close()
	}
}

// TestNodeThatLeavesTellsTheUnverified, and does not wait for their token.
func TestNodeThatLeavesTellsTheUnverified(t *testing.T) {
	g, _ := startWithTokens(t, newController(t), func(cfg *Config) { cfg.TokenTimeout = time.Hour })
	d, _ := dial(t, g, "", nil)
	eventually(t, "it waits", func() bool { return g.unverified.len() == 1 })
	if err := g.Drain(t.Context()); err != nil {
		t.Error(err)
	}
	d.wantClose(closeGoingAway)

	g, _ = startWithTokens(t, newController(t), func(cfg *Config) { cfg.TokenTimeout = time.Hour })
	dial(t, g, "", nil)
	eventually(t, "it waits", func() bool { return g.unverified.len() == 1 })
	g.Close() // does not return before it has gone
}

// TestUnverifiedThatDoesNotAnswerHoldsNobodyUp: neither a node that leaves nor, later, its own place.
func TestUnverifiedThatDoesNotAnswerHoldsNobodyUp(t *testing.T) {
	for name, tokenTimeout := range map[string]time.Duration{"told to go": time.Hour, "told to go, and late": 50 * time.Millisecond, "late": time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			g, _ := startWithTokens(t, newController(t), func(cfg *Config) { cfg.TokenTimeout, cfg.CloseTimeout = tokenTimeout, 100*time.Millisecond })
			socket, err := net.Dial("tcp", g.HTTPAddr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer socket.Close()
			if _, err := io.WriteString(socket, "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
				"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			eventually(t, "it is there", func() bool { return g.count.opened.Get() == 1 })
			if name == "late" {
				eventually(t, "it has gone", func() bool { return g.unverified.len() == 0 })
				wantDenied(t, g, deniedTimeout, 1)
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if err := g.Drain(ctx); err != nil {
				t.Error(err)
			}
		})
	}
}

// FuzzUnverifiedSocket: as FuzzSocket, with clients that need a token. t in the input stands for a good one.
func FuzzUnverifiedSocket(f *testing.F) {
	p := newIDP(f)
	g, err := New(Config{
		NodeID: "n", GRPCAddress: "127.0.0.1:0", HTTPAddress: "127.0.0.1:0", Members: membership.Config{Controller: "127.0.0.1:1"}, MessageRate: 1 << 20, Tokens: p.Verifier,
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(g.Close)
	if err := g.Start(); err != nil {
		f.Fatal(err)
	}
	token := p.token("u", nil)
	good := masked(0x81, showing(token))
	for _, test := range hostile {
		f.Add(false, []byte(test.bytes))
		f.Add(true, []byte(test.bytes))
	}
	f.Add(false, []byte(good+masked(0x81, `{"type":"join","room_id":"r"}`)))
	f.Add(false, []byte(masked(0x81, `{"type":"connect","token":"a.b.c"}`)))
	f.Add(false, []byte(masked(0x81, `{"type":"connect","token":"eyJhbGciOiJub25lIn0.e30."}`)))
	f.Add(false, []byte(masked(0x01, `{"type":"connect",`)+masked(0x89, "")+masked(0x80, `"token":1}`)))
	f.Add(true, []byte(masked(0x81, say(map[string]string{"type": "refresh", "token": token}))+masked(0x81, `{"type":"refresh","token":"..."}`)))
	f.Fuzz(func(t *testing.T, shown bool, b []byte) {
		if shown {
			b = append([]byte(good), b...)
		}
		talk(t, g, "", "", b)
	})
}

// TestTenantsDoNotMeet: the same ids in two tenants are other users and other rooms, and nobody is in a tenant but by its
// token.
func TestTenantsDoNotMeet(t *testing.T) {
	c := newController(t)
	p := newIDP(t)
	g, nodeAPI := start(t, c, func(cfg *Config) { cfg.Tokens = p.Verifier })
	of := func(tenant string) *device {
		claims := map[string]any{"rooms": []string{"r"}}
		if tenant != "" {
			claims["tenant"] = tenant
		}
		return admitted(t, g, "room_id=r", p.token("alice", claims))
	}
	shop, ship, none := of("shop"), of("ship"), of("")
	for _, member := range []string{"shop/alice shop/r", "ship/alice ship/r", "alice r"} {
		user, room, _ := strings.Cut(member, " ")
		if !c.has(user, room) {
			t.Errorf("the Controller does not know %s", member)
		}
	}
	if r := pushTo(t, nodeAPI, "shop/r", "sale", "shop/alice"); r.GetDeliveredCount() != 1 {
		t.Error(r)
	}
	shop.want(textFrame("r", "alice", "sale"))
	if r := pushTo(t, nodeAPI, "", "for one", "ship/alice"); r.GetDeliveredCount() != 1 {
		t.Error(r)
	}
	ship.want(textFrame("", "alice", "for one"))
	m := &node.Message{Data: []byte("all of it"), Timestamp: 1}
	if delivered, failed := (sessions{g.users}).BroadcastScope("shop/", m); delivered != 1 || failed != 0 {
		t.Errorf("a broadcast to a tenant: %d, %d failed", delivered, failed)
	}
	shop.want(broadcastFrame("alice", "all of it"))
	// A route that is out of date may name users of others first.
	if r := pushTo(t, nodeAPI, "shop/r", "again", "alice", "ship/alice", "shop/alice"); r.GetDeliveredCount() != 1 {
		t.Error(r)
	}
	shop.want(textFrame("r", "alice", "again"))
	shop.say(`{"type":"refresh","token":"` + p.token("alice", map[string]any{"tenant": "shop", "rooms": []string{"r", "r2"}}) + `"}`)
	if got := shop.next(); !strings.Contains(got, "refreshed") {
		t.Errorf("a refresh in the tenant's own room: %s", got)
	}
	for _, d := range []*device{shop, ship, none} {
		d.wantNothing()
	}

	for name, tc := range map[string]struct {
		query, token string
		code         uint16
	}{
		"another's user":         {"", p.token("shop/alice", nil), 4401},
		"another's room":         {"room_id=shop/r", p.token("alice", nil), 4403},
		"another's room, listed": {"room_id=shop/r", p.token("alice", map[string]any{"rooms": []string{"*", "shop/r"}}), 4403},
	} {
		d, _ := dial(t, g, tc.query, nil)
		d.say(showing(tc.token))
		t.Log(name)
		d.wantClose(tc.code)
	}
	none.say(`{"type":"join","room_id":"shop/r"}`)
	none.wantClose(closeForbidden)
	// A tenant's own ids may have slashes.
	own := admitted(t, g, "room_id=ship/r", p.token("alice", map[string]any{"tenant": "shop"}))
	pushTo(t, nodeAPI, "ship/r", "theirs", "ship/alice", "shop/alice")
	own.wantNothing()

	g2, p2 := startWithTokens(t, newController(t), func(cfg *Config) { cfg.NoTenants = true })
	admitted(t, g2, "room_id=game/7", p2.token("alice", nil)).wantNothing()
}
