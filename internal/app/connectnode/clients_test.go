package connectnode

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/gobwas/ws/wsutil"

	"github.com/push-manager/push-manager/internal/auth/jwt"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/etcdtest"
)

const issuers = `[{issuer: idp, audience: gateway, hs_secret_file: %s}]`

func secretFile(t *testing.T, secret string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte(strings.Repeat(secret, 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSettingsOfClientsTokens(t *testing.T) {
	good := map[string]string{"CLIENT_AUTH_MODE": "jwt", "CLIENT_AUTH_JWT": fmt.Sprintf(issuers, secretFile(t, "s"))}
	for name, tc := range map[string]struct {
		change map[string]string
		want   string // in the error; empty: none
	}{
		"good":                      {nil, ""},
		"no issuers":                {map[string]string{"CLIENT_AUTH_JWT": ""}, "CLIENT_AUTH_JWT: missing"},
		"issuers and nobody asked":  {map[string]string{"CLIENT_AUTH_MODE": "none"}, "CLIENT_AUTH_MODE: is none, while client_auth.jwt is set"},
		"no audience":               {map[string]string{"CLIENT_AUTH_JWT": strings.ReplaceAll(good["CLIENT_AUTH_JWT"], "audience: gateway, ", "")}, "audience: missing"},
		"another mode":              {map[string]string{"CLIENT_AUTH_MODE": "yes"}, "CLIENT_AUTH_MODE"},
		"origins by their old name": {map[string]string{"ALLOWED_ORIGINS": "no origin"}, "ALLOWED_ORIGINS"},
	} {
		env := maps.Clone(good)
		maps.Copy(env, tc.change)
		err := cli.Fill(&Config{}, env)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(tc.want)) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
	// Others may reach the node once both of its ports have TLS and know who comes.
	ca := etcdtest.NewCA(t)
	cert, key := ca.Issue("localhost")
	open := maps.Clone(good)
	maps.Copy(open, map[string]string{
		"LISTEN_ADDRESS": "0.0.0.0", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key,
		"TRUST_DOMAIN": "test", "NODE_TLS_CERT_FILE": cert, "NODE_TLS_KEY_FILE": key, "NODE_TLS_CLIENT_CA_FILE": ca.File,
	})
	if err := cli.Fill(&Config{}, open); err != nil {
		t.Error(err)
	}
	for section, named := range map[string]string{"CLIENT_AUTH_": "CLIENT_AUTH_MODE=jwt", "TLS_": "TLS_CERT_FILE", "NODE_TLS_": "NODE_TLS_CLIENT_CA_FILE"} {
		env := maps.Clone(open)
		maps.DeleteFunc(env, func(key, _ string) bool { return strings.HasPrefix(key, section) })
		if err := cli.Fill(&Config{}, env); err == nil || !strings.Contains(err.Error(), named) || !strings.Contains(err.Error(), "ALLOW_INSECURE") {
			t.Errorf("without %s: %v", section, err)
		}
	}

	var c Config
	env := maps.Clone(good)
	maps.Copy(env, map[string]string{"WS_TOKEN_IN_QUERY": "true", "CLIENT_AUTH_UNVERIFIED": "7", "WS_ALLOWED_ORIGINS": "https://a.example"})
	if err := cli.Fill(&c, env); err != nil {
		t.Fatal(err)
	}
	if g := c.Gateway; !g.TokenInQuery || g.Unverified != 7 || len(g.AllowedOrigins) != 1 {
		t.Errorf("token_in_query %v, unverified %d, origins %q", g.TokenInQuery, g.Unverified, g.AllowedOrigins)
	}
}

// TestClientsNeedATokenWhereSettingsSaySo runs the program: its settings reach the gateway, and a reload reaches the keys.
func TestClientsNeedATokenWhereSettingsSaySo(t *testing.T) {
	path := secretFile(t, "s")
	var c Config
	err := cli.Fill(&c, map[string]string{
		"CLIENT_AUTH_MODE": "jwt", "CLIENT_AUTH_JWT": fmt.Sprintf(issuers, path), "TLS_RELOAD_INTERVAL": "24h", "GRPC_PORT": "0", "HTTP_PORT": "0", "METRICS_PORT": "0",
		"CONTROLLER_ADDRESS": "127.0.0.1:1", "ETCD_ENDPOINTS": "127.0.0.1:1",
	})
	if err != nil {
		t.Fatal(err)
	}
	n, err := c.Start(t.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.Drain(t.Context()) }) // the Controller that is told does not exist
	node := n.(*ConnectNode)
	token := func(secret string) string {
		text, err := jwt.Mint([]byte(strings.Repeat(secret, 32)), map[string]any{"iss": "idp", "aud": "gateway", "sub": "alice", "exp": time.Now().Add(time.Hour).Unix()})
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	good := dialWith(t, node, token("s"))
	if got := good.next(t); got != `{"type":"pong"}` {
		t.Errorf("a good token: %s", got)
	}
	if got := dialWith(t, node, token("x")).next(t); got != "close 4401" {
		t.Errorf("a token that another secret has signed: %s", got)
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("n", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	node.Reload()
	for {
		if got := good.next(t); got == "close 4401" {
			break
		} else if got != "ping" {
			t.Fatalf("with a secret that is withdrawn: %s", got)
		}
	}
	if got := dialWith(t, node, token("n")).next(t); got != `{"type":"pong"}` {
		t.Errorf("the new secret's token: %s", got)
	}
}

type socket struct {
	net.Conn

	br *bufio.Reader
}

// dialWith shows a token and pings.
func dialWith(t *testing.T, n *ConnectNode, token string) socket {
	t.Helper()
	conn, br, _, err := ws.Dial(t.Context(), "ws://"+n.HTTPAddr().String()+"/ws")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if br == nil {
		br = bufio.NewReader(conn)
	}
	first, err := json.Marshal(map[string]string{"type": "connect", "token": token})
	if err != nil {
		t.Fatal(err)
	}
	for _, message := range [][]byte{first, []byte(`{"type":"ping"}`)} {
		if err := wsutil.WriteClientText(conn, message); err != nil {
			t.Fatal(err)
		}
	}
	_ = conn.SetReadDeadline(time.Now().Add(time.Minute))
	return socket{conn, br}
}

// next is the next message, or the close code.
func (s socket) next(t *testing.T) string {
	t.Helper()
	h, err := ws.ReadHeader(s.br)
	if err != nil {
		t.Fatal(err)
	}
	payload := make([]byte, h.Length)
	if _, err := io.ReadFull(s.br, payload); err != nil {
		t.Fatal(err)
	}
	switch h.OpCode { //nolint:exhaustive // What is no control frame is a message.
	case ws.OpClose:
		return fmt.Sprint("close ", int(payload[0])<<8|int(payload[1]))
	case ws.OpPing:
		return "ping"
	}
	return string(payload)
}
