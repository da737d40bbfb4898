package refgateway

import (
	"bufio"
	"bytes"
	"crypto/tls"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/gobwas/ws"

	"github.com/push-manager/push-manager/internal/exposition"
	"github.com/push-manager/push-manager/internal/health"
	"github.com/push-manager/push-manager/internal/position"
	"github.com/push-manager/push-manager/sdk/browser"
	"github.com/push-manager/push-manager/transport/node"
	"github.com/push-manager/push-manager/transport/node/membership"
)

var (
	errOrigin = errors.New("origin: not allowed here, see WS_ALLOWED_ORIGINS")
	errQuery  = errors.New("query: not encoded as in a URL")
)

//go:embed page.html
var page []byte

// clientHandler serves clients and browsers.
func (g *Gateway) clientHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ws", g.serveWebSocket)
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; script-src 'self' 'unsafe-inline'; connect-src 'self' ws: wss:; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Cache-Control", "no-cache")
		_, _ = w.Write(page) // The browser has gone if it fails.
	})
	mux.HandleFunc("GET /push-client.js", browser.Serve)
	mux.HandleFunc("GET /info", func(w http.ResponseWriter, r *http.Request) {
		pushctl := "pushctl"
		if peer, err := netip.ParseAddrPort(r.RemoteAddr); err == nil && peer.Addr().Unmap().IsLoopback() {
			pushctl = g.cfg.Pushctl // A line for this machine: elsewhere it does not run, and its paths are nobody's business.
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{
			"node_id": g.cfg.NodeID, "push_manager": g.cfg.PushManagerAddress, "api_tls": g.cfg.PushManagerTLS, "pushctl": pushctl, "tokens": g.cfg.Tokens != nil,
		})
	})
	g.healthHandlers(mux)
	return mux
}

// metricsHandler serves operators.
func (g *Gateway) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", exposition.ContentType)
		_ = exposition.Write(w, g.cfg.Metrics) // whoever asked has gone if it fails
	})
	g.healthHandlers(mux)
	return mux
}

func (g *Gateway) healthHandlers(mux *http.ServeMux) {
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", health.Readyz([]string{checkController, checkDiscovery}, g.NotReady, nil))
}

// serveWebSocket admits a client.
func (g *Gateway) serveWebSocket(w http.ResponseWriter, r *http.Request) {
	refuse := func(code int, reason string, err error) {
		g.count.refused[reason].Inc()
		http.Error(w, err.Error(), code)
	}
	c, token, err := g.clientOf(r)
	switch {
	case g.draining.Load():
		refuse(http.StatusServiceUnavailable, refusedDraining, membership.ErrGoing)
		return
	case !g.originAllowed(r):
		refuse(http.StatusForbidden, refusedOrigin, errOrigin)
		return
	case err != nil:
		refuse(http.StatusBadRequest, refusedBad, err)
		return
	case !strings.EqualFold(r.Header.Get("Upgrade"), "websocket"):
		w.Header().Set("Upgrade", "websocket")
		refuse(http.StatusUpgradeRequired, refusedBad, errors.New("this is a WebSocket address"))
		return
	}
	if !g.admit() {
		refuse(http.StatusServiceUnavailable, refusedFull, errors.New("too many connections, or node is going"))
		return
	}
	// The answer names pm.v1 alone, never what carries a token. A client that asks for others is served without.
	upgrader := ws.HTTPUpgrader{Timeout: 5 * time.Second, Protocol: func(name string) bool { return name == subprotocol }}
	if g.deflater != nil {
		upgrader.Negotiate = g.deflater.negotiate(&c.to)
	}
	netConn, rw, _, err := upgrader.Upgrade(r, w)
	if err != nil {
		g.count.refused[refusedBad].Inc()
		if netConn != nil { // It has been answered.
			_ = netConn.Close()
		}
		g.release()
		return
	}
	if secured, ok := netConn.(*tls.Conn); ok {
		netConn = tlsConn{secured}
	}
	c.net = netConn
	g.begin(c, unread(rw.Reader), token)
}

// unread is what the client has sent behind its handshake already: 4 KiB at most.
func unread(br *bufio.Reader) []byte {
	b, _ := br.Peek(br.Buffered()) // No error: it is there.
	return bytes.Clone(b)
}

// clientOf reads who wants to connect, and the token where one came and tokens count. The error
// names the field, and no value.
func (g *Gateway) clientOf(r *http.Request) (c *conn, token string, err error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, "", errQuery
	}
	for _, field := range []string{"user_id", "user_name", "room_id", "ack", "resume"} {
		if len(query[field]) > 1 {
			return nil, "", fmt.Errorf("%s: given %d times", field, len(query[field]))
		}
	}
	c = &conn{g: g, user: query.Get("user_id"), name: query.Get("user_name"), room: query.Get("room_id")}
	switch query.Get("ack") {
	case "", "0":
	case "1":
		c.to.acks, c.to.ids = true, true
	default:
		return nil, "", errors.New("ack: must be 1, or left out")
	}
	if query.Has("resume") {
		c.resumes, c.to.ids = true, true
		if c.position = query.Get("resume"); c.position != "" {
			if _, err := position.Parse(c.position); err != nil {
				return nil, "", fmt.Errorf("resume: %w", err)
			}
		}
	}
	if c.given, err = attributesOf(query); err != nil {
		return nil, "", err
	}
	if g.cfg.Tokens != nil {
		if token, err = g.tokenOf(r, query); err != nil {
			return nil, "", err
		}
	}
	if g.cfg.Tokens == nil || query.Has("user_id") {
		if err := checkID("user_id", c.user); err != nil {
			return nil, "", err
		}
	}
	if c.name != "" {
		if err := checkID("user_name", c.name); err != nil {
			return nil, "", err
		}
	}
	if query.Has("room_id") {
		if err := checkRoom(c.room); err != nil {
			return nil, "", err
		}
	}
	return c, token, nil
}

// attributesOf are those of a query: attr.KEY=VALUE for each.
func attributesOf(query url.Values) (node.Attributes, error) {
	var given map[string]string
	for field, values := range query {
		key, is := strings.CutPrefix(field, "attr.")
		switch {
		case !is:
			continue
		case len(values) > 1:
			return node.Attributes{}, fmt.Errorf("attr: key %.64q: given %d times", key, len(values))
		case given == nil:
			given = make(map[string]string)
		}
		given[key] = values[0]
	}
	return node.NewAttributes(given) //nolint:wrapcheck // It names the one that is refused.
}

// originAllowed guards against pages of strangers that use a visitor's network: a
// browser says where a page came from, other clients say nothing. A page that comes from
// the host it connects to is allowed, unless that is a name and the connection comes over
// loopback: a stranger's name can be made to point there, and what listens on loopback
// relies on nobody else getting there.
func (g *Gateway) originAllowed(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if origin == "null" { // a sandboxed frame, or a file: anybody's, also where all are allowed
		return false
	}
	if origin == "" || slices.Contains(g.cfg.AllowedOrigins, origin) || slices.Contains(g.cfg.AllowedOrigins, "*") {
		return true
	}
	u, err := url.Parse(origin)
	if err != nil || u.Host == "" {
		return false
	}
	if u.Hostname() == "localhost" {
		return true
	}
	sameHost := strings.EqualFold(u.Host, r.Host)
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil {
		return ip.IsLoopback() || sameHost
	}
	local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return sameHost && ok && !local.IP.IsLoopback()
}

// begin starts a connection that has been admitted, with what it has sent already and the token
// that came with its handshake.
func (g *Gateway) begin(c *conn, sent []byte, token string) {
	socket := c.net
	if secured, ok := socket.(tlsConn); ok {
		socket = secured.NetConn()
	}
	if tcp, ok := socket.(*net.TCPConn); ok {
		if raw, err := tcp.SyscallConn(); err == nil && socket == c.net {
			c.raw = raw
		}
		if g.cfg.SocketBuffer > 0 {
			_ = tcp.SetWriteBuffer(g.cfg.SocketBuffer) // The kernel's choice is good, too.
		}
	}
	var from io.Reader = c.net
	if len(sent) > 0 {
		from = io.MultiReader(bytes.NewReader(sent), c.net)
	}
	r := newReader(c, from)
	c.id, c.at = g.lastID.Add(1), time.Now().Unix()
	g.count.opened.Inc()
	if g.cfg.Tokens != nil {
		if evicted := g.unverified.add(c); evicted != nil {
			evicted.shut()
			g.deny(evicted, &denial{reason: deniedEvicted})
		}
	}
	// The handler's goroutine must end: it holds the request's memory.
	g.clients.Go(func() {
		defer g.release()
		defer g.caught("reader", func() {})
		defer g.end(c)
		if code := g.serve(c, r, token); code != 0 {
			c.bye(code, true)
			var err error
			for err == nil { // until the client has closed, or its time is over
				_, err = r.br.Discard(readBytes)
			}
		}
	})
	// Whoever closes the clients may have passed before this one was listed.
	g.endIfGoing(c)
}

// endIfGoing ends a connection that the gateway's end has not found in its lists.
func (g *Gateway) endIfGoing(c *conn) {
	g.mu.Lock()
	closed := g.closed
	g.mu.Unlock()
	switch {
	case closed:
		c.shut()
	case g.draining.Load():
		c.bye(closeGoingAway, false)
	}
}

// serve is a connection from its token to its end. It returns the close code that the client is
// to get, 0 when it is not there to get one.
func (g *Gateway) serve(c *conn, r *reader, token string) (code uint16) {
	defer g.caught("reader", func() { code = closeOurFault })
	if g.cfg.Tokens != nil {
		if err := g.identify(c, r, token); err != nil {
			return g.deny(c, err)
		}
	}
	if err := c.setAttributes(c.identity.Load()); err != nil {
		return g.deny(c, err)
	}
	if code := g.refused(c); code != 0 {
		return code
	}
	c.to.user = appendString(nil, c.user)
	c.member = g.members.TenantMember(string(c.tenant), c.user, c.name, c)
	g.hear(c)
	if err := c.beginLasting(); err != nil {
		g.cfg.Logger.Error("position not taken", slog.Any("error", err)) // clientOf has read it
		return closeOurFault
	}
	g.users.Add(c.tenant.ID(c.user), c)
	g.unverified.remove(c)
	g.endIfGoing(c)
	if code := g.refused(c); code != 0 { // whoever was refused meanwhile has not been found among the users
		return code
	}
	c.begun()
	g.enterRooms(c)
	return r.loop()
}

// tlsConn is a connection over TLS that closes without a word. A tls.Conn says goodbye first, and waits up to five seconds for a
// client that reads nothing.
type tlsConn struct{ *tls.Conn }

func (c tlsConn) Close() error { return c.NetConn().Close() }

func (g *Gateway) enterRooms(c *conn) {
	defer g.caught("reader", func() { c.bye(closeOurFault, true) })
	err := c.member.Join("")
	if err == nil && c.room != "" {
		err = c.join(c.room)
	}
	if err != nil {
		c.tell(control("error", "message", err.Error()))
	}
}

// end is called once, by the connection's reader.
func (g *Gateway) end(c *conn) {
	c.shut()
	g.unverified.remove(c)
	if c.member == nil {
		return
	}
	c.gate.Leave()
	c.cursor.Close()
	g.users.Remove(c.tenant.ID(c.user), c)
	c.member.Close()
	c.over()
}

func newHTTPServer(h http.Handler, logger *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       60 * time.Second,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
}
