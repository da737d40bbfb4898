package pushctl

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/lxzan/gws"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/invoke"
)

type listenCmd struct {
	User  string            `help:"User to be. Default: who the token is for; without one pushctl and a number."`
	Name  string            `help:"Name of the user. Default: the user."`
	Room  []string          `help:"Room to join, may be repeated."`
	URL   string            `name:"url" default:"ws://localhost:8080/ws" env:"CONNECT_NODE_URL" context:"connect_node_url" help:"WebSocket of a Connect-Node."`
	Attr  map[string]string `placeholder:"KEY=VALUE" mapsep:"none" help:"Attribute of the connection, such as platform=ios, at which pushes with --filter look. May be repeated."`
	Count int               `help:"Exit after so many pushes. 0: go on until Ctrl-C."`
	// On, so that a push with ACK_CLIENT, and one out of the store, is confirmed by what was printed.
	// A Connect-Node that does not know it ignores it.
	Ack bool `default:"true" negatable:"" help:"Acknowledge what was printed, where the push asks for it, and print no message id twice."`
	// Sent with --ack, too: what rooms have said meanwhile, and keep, comes after a loss of the connection.
	Resume  string `placeholder:"POSITION" help:"Begin with what the rooms have said since this position, which listen prints at its end, or a push to a room with --store."`
	Verbose bool   `short:"v" help:"Print each position in the logs of the rooms, too."`

	TokenFile string `placeholder:"FILE" context:"connect_node_token_file" predictor:"file" help:"File with the token to show. It is read again before the token expires, and whenever the Connect-Node refuses it. PUSHCTL_TOKEN holds one without a file."`
	CA        string `name:"ca" placeholder:"FILE" env:"CONNECT_NODE_CA" context:"connect_node_ca" predictor:"file" help:"With wss://: PEM file of the authorities that the Connect-Node's certificate is checked with. Default: those of the system."`
}

// The bounds of a connection.
const (
	handshakeTimeout = 5 * time.Second
	maxFrame         = 4 << 20
	maxPosition      = 4 << 10
	pingInterval     = 10 * time.Second
	silence          = 3 * pingInterval // a connection that gives no sign of life for so long is dead
)

// The pauses between attempts to connect again: twice as long each time, and each
// drawn from the upper half, so that those who were cut off together do not come back
// together. They begin anew after a connection that held for steady.
const (
	againFirst = 250 * time.Millisecond
	againMost  = 15 * time.Second
	steady     = 10 * time.Second
)

// Run prints pushes until it is interrupted. A connection that is lost comes back, in
// the same rooms; one that was never there is an error.
func (c *listenCmd) Run(ctx context.Context, t *terminal) error {
	token, err := c.token()
	if err != nil {
		return &usageError{fmt.Sprintf("--token-file: %v", err)}
	}
	address, err := c.address(token)
	if err != nil {
		return err
	}
	secured, err := c.tls()
	if err != nil {
		return &usageError{fmt.Sprintf("--ca: %v", err)}
	}
	if u, err := url.Parse(address); err == nil && token != "" && u.Scheme == "ws" && !config.Loopback(u.Hostname()) {
		_, _ = fmt.Fprintln(t.err, "the token goes to another machine in plain text, where others may read it: wss:// does not")
	}
	l := &listener{t: t, count: c.Count, verbose: c.Verbose, tls: secured, token: token, position: c.Resume}
	defer l.sayPosition()
	pause := againFirst
	for first := true; ; first = false {
		opened := time.Now()
		joined, err := c.connected(ctx, l, c.resuming(address, l.position))
		l.joined = l.joined || joined
		var final *finalError
		if refused := (*tokenError)(nil); errors.As(err, &refused) {
			next, readErr := c.token()
			if readErr != nil || next == l.token {
				return err
			}
			l.token = next
		}
		switch {
		case err == nil || ctx.Err() != nil:
			return nil // Whoever interrupts it has seen enough.
		case first && !joined:
			return c.explain(err)
		case errors.As(err, &final):
			return err
		}
		if joined && time.Since(opened) > steady {
			pause = againFirst
		}
		wait := pause/2 + rand.N(pause/2)
		_, _ = fmt.Fprintf(t.err, "%v; connecting again in %v\n", err, wait.Round(10*time.Millisecond))
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
		pause = min(2*pause, againMost)
	}
}

// finalError is an end that would come again.
type finalError struct{ error }

// tokenError is an end that would come again with the same token.
type tokenError struct{ error }

// maxToken bounds the file of a token, which a Connect-Node takes up to 8 KiB of.
const maxToken = 16 << 10

// token reads the token to show, "" for none.
func (c *listenCmd) token() (string, error) {
	if c.TokenFile == "" {
		return strings.TrimSpace(os.Getenv("PUSHCTL_TOKEN")), nil
	}
	b, err := config.ReadFile(c.TokenFile, maxToken)
	if err != nil {
		return "", fmt.Errorf("read the token: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("%s holds no token", c.TokenFile)
	}
	return token, nil
}

// claims are what a client reads of its own token. The Connect-Node verifies it.
type claims struct {
	Subject string  `json:"sub"`
	Expires float64 `json:"exp"`
}

// claimsOf are zero for what is no JSON Web Token.
func claimsOf(token string) (c claims) {
	if parts := strings.Split(token, "."); len(parts) == 3 {
		if b, err := base64.RawURLEncoding.DecodeString(parts[1]); err == nil && json.Unmarshal(b, &c) != nil {
			return claims{}
		}
	}
	return c
}

// When a new token is looked for: within refreshBefore of the old one's end, or within half of its
// time where that is less, every refreshEvery until there is one.
const refreshBefore, refreshEvery = time.Minute, time.Second

// untilRefresh is how long to wait before a new token is looked for; ok is false where it is not
// known when the old one ends.
func untilRefresh(token string) (wait time.Duration, ok bool) {
	seconds := claimsOf(token).Expires
	if seconds <= 0 || seconds > 1<<40 {
		return 0, false
	}
	left := time.Until(time.UnixMilli(int64(seconds * 1000)))
	return max(left-min(refreshBefore, left/2), 0), true
}

// tls is how a Connect-Node's certificate is checked.
func (c *listenCmd) tls() (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12} // a proxy may have no more
	if c.CA == "" {
		return cfg, nil
	}
	b, err := config.ReadFile(c.CA, 1<<20)
	if err != nil {
		return nil, fmt.Errorf("read the authorities: %w", err)
	}
	if cfg.RootCAs = x509.NewCertPool(); !cfg.RootCAs.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s holds no certificate", c.CA)
	}
	return cfg, nil
}

// connected is one connection, from its handshake to its end. It tells whether there
// was one, and why it ended: nil when enough was seen.
func (c *listenCmd) connected(ctx context.Context, l *listener, address string) (joined bool, err error) {
	l.done, l.acks = make(chan error, 1), newAcks()
	header := http.Header{}
	if l.token != "" {
		header.Set("Authorization", "Bearer "+l.token)
	}
	conn, resp, err := gws.NewClient(l, &gws.ClientOption{
		Addr: address, RequestHeader: header, TlsConfig: l.tls, HandshakeTimeout: handshakeTimeout, ReadMaxPayloadSize: maxFrame,
		PermessageDeflate: gws.PermessageDeflate{},
	})
	if resp != nil && resp.Body != nil {
		defer func() { _ = resp.Body.Close() }()
	}
	if err != nil {
		return false, refusal(resp, err)
	}
	var readDone = make(chan struct{})
	go func() {
		defer close(readDone)
		defer func() {
			// What a node sends must not end this process, whatever it is.
			if e := recover(); e != nil {
				l.end(fmt.Errorf("the Connect-Node sent what cannot be read: %v", e))
			}
		}()
		conn.ReadLoop()
	}()
	defer func() {
		l.acks.flush(conn)
		_ = conn.WriteClose(1000, nil)
		_ = conn.NetConn().Close()
		<-readDone
	}()
	for _, room := range c.Room[min(1, len(c.Room)):] {
		join, err := json.Marshal(map[string]string{"type": "join", "room_id": room})
		if err != nil {
			return true, &finalError{fmt.Errorf("join %q: %w", room, err)}
		}
		if err := conn.WriteMessage(gws.OpcodeText, join); err != nil {
			return true, fmt.Errorf("join %q: %w", room, err)
		}
	}
	where := "no room"
	if len(c.Room) > 0 {
		where = "room " + strings.Join(c.Room, ", ")
	}
	_, _ = fmt.Fprintf(l.t.err, "listening as %q in %s at %s (Ctrl-C ends)\n", cmp.Or(c.User, clean(claimsOf(l.token).Subject)), where, c.URL)
	return true, l.wait(ctx, conn, c.token)
}

// refusal is why a handshake failed. What the node says of the request itself, it will
// say again.
func refusal(resp *http.Response, err error) error {
	switch {
	case resp == nil && strings.Contains(err.Error(), "malformed HTTP"): // with what came instead
		return errors.New("no connection: what answers there does not speak HTTP/1, as a gRPC port does not; a Connect-Node has its WebSocket at its HTTP port")
	case resp == nil || resp.StatusCode == http.StatusSwitchingProtocols:
		return fmt.Errorf("no connection: %w", err)
	}
	said := fmt.Sprintf("%d (%s)", resp.StatusCode, http.StatusText(resp.StatusCode))
	if resp.Body != nil {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 256)) // what there is of it
		line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
		if line = clean(strings.TrimSpace(line)); line != "" {
			said = fmt.Sprintf("%d: %s", resp.StatusCode, line)
		}
	}
	switch code := resp.StatusCode; {
	case code >= 500 || code == http.StatusRequestTimeout || code == http.StatusTooManyRequests:
		return fmt.Errorf("no connection: the Connect-Node does not take it now, with %s", said)
	case code >= 400:
		return &finalError{fmt.Errorf("the Connect-Node refuses the connection with %s", said)}
	}
	return fmt.Errorf("no connection: what answers there opens no WebSocket, but says %s", said)
}

// ended is why a connection ended, as the other side has put it. shown tells that we have shown a token.
func ended(err error, shown bool) error {
	var said *gws.CloseError
	if !errors.As(err, &said) {
		return fmt.Errorf("the connection was lost: %w", err)
	}
	lost := fmt.Errorf("the Connect-Node closed the connection (%s)", strings.TrimSpace(fmt.Sprintf("%d %s", said.Code, clean(string(said.Reason)))))
	switch {
	case said.Code == 4401:
		return &tokenError{lost}
	case said.Code == 4408 && !shown:
		return &finalError{fmt.Errorf("%w: it asks for a token (--token-file)", lost)}
	}
	// In the range of applications: 4408 and 4429 pass, a client that is not wanted stays so.
	if said.Code >= 4400 && said.Code < 4500 && said.Code != 4408 && said.Code != 4429 {
		return &finalError{lost}
	}
	return lost
}

// address builds the WebSocket's address. Without a token it fills in who is missing.
func (c *listenCmd) address(token string) (string, error) {
	u, err := url.Parse(c.URL)
	if err != nil || u.Scheme != "ws" && u.Scheme != "wss" || u.Host == "" {
		return "", &usageError{fmt.Sprintf("--url: %q is not like ws://HOST:PORT/ws", c.URL)}
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/ws"
	}
	if token == "" {
		c.User = cmp.Or(c.User, fmt.Sprintf("pushctl-%d", os.Getpid()))
	}
	q := u.Query()
	for field, value := range map[string]string{"user_id": c.User, "user_name": cmp.Or(c.Name, c.User)} {
		if value != "" {
			q.Set(field, value)
		}
	}
	if len(c.Room) > 0 {
		q.Set("room_id", c.Room[0])
	}
	if c.Ack {
		q.Set("ack", "1")
	}
	for key, value := range c.Attr {
		q.Set("attr."+key, value)
	}
	u.RawQuery = q.Encode()
	return u.String(), nil
}

// resuming is the address for a client with this position. One with none yet is told positions from now on. An old client
// does not ask for them.
func (c *listenCmd) resuming(address, position string) string {
	if !c.Ack && position == "" {
		return address
	}
	joint := "?"
	if strings.Contains(address, "?") {
		joint = "&"
	}
	return address + joint + "resume=" + url.QueryEscape(position)
}

func (c *listenCmd) explain(err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) && op.Op == "dial" {
		return fmt.Errorf("no Connect-Node answers at %s; start everything on this machine with: %s dev", c.URL, invoke.As("push-manager"))
	}
	return fmt.Errorf("%s: %w", c.URL, err)
}

// listener prints what arrives. gws calls it from one goroutine, one for each connection,
// one connection after the other.
type listener struct {
	gws.BuiltinEventHandler

	// Static.
	t       *terminal
	count   int
	verbose bool
	tls     *tls.Config

	// Owned by Run.
	token  string // the latest one shown; "" where none is
	joined bool   // there was a connection

	// Static while there is a connection.
	done chan error // its end, once
	acks *acks

	// Owned by the reader, and by Run while there is none.
	seen     int
	had      had    // by all connections
	position string // the latest one told; "" for none
}

// wait waits for the end of a connection. In time before the token's end it shows the next one.
func (l *listener) wait(ctx context.Context, conn *gws.Conn, next func() (string, error)) error {
	ping := time.NewTicker(pingInterval)
	defer ping.Stop()
	ack := time.NewTimer(time.Hour)
	defer ack.Stop()
	ack.Stop()
	refresh := time.NewTimer(time.Hour)
	defer refresh.Stop()
	if wait, ok := untilRefresh(l.token); ok {
		refresh.Reset(wait)
	} else {
		refresh.Stop()
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-l.done:
			return err
		case <-refresh.C:
			refresh.Reset(refreshEvery)
			token, err := next()
			if err != nil || token == l.token { // there is none yet; the Connect-Node says when it is too late
				continue
			}
			message, err := json.Marshal(map[string]string{"type": "refresh", "token": token})
			if err != nil {
				return &finalError{fmt.Errorf("refresh: %w", err)}
			}
			_ = conn.WriteMessage(gws.OpcodeText, message) // as below
			l.token = token
			if wait, ok := untilRefresh(token); ok {
				refresh.Reset(wait)
			} else {
				refresh.Stop()
			}
		case <-l.acks.owed:
			ack.Reset(ackWithin)
		case <-ack.C:
			l.acks.flush(conn)
		case <-ping.C:
			// When it cannot be written the reader has noticed, too.
			_ = conn.WritePing(nil)
		}
	}
}

// sayPosition tells where another listen goes on: where this one began, if it was told no other position.
func (l *listener) sayPosition() {
	if l.joined && l.position != "" {
		_, _ = fmt.Fprintf(l.t.err, "position: %s (--resume goes on from there)\n", clean(l.position))
	}
}

func (l *listener) end(err error) {
	select {
	case l.done <- err:
	default: // it has ended before
	}
}

// OnOpen implements gws.Event.
func (l *listener) OnOpen(conn *gws.Conn) { _ = conn.SetReadDeadline(time.Now().Add(silence)) }

// OnPong implements gws.Event.
func (l *listener) OnPong(conn *gws.Conn, _ []byte) {
	_ = conn.SetReadDeadline(time.Now().Add(silence))
}

// OnPing implements gws.Event.
func (l *listener) OnPing(conn *gws.Conn, payload []byte) {
	_ = conn.SetReadDeadline(time.Now().Add(silence))
	_ = conn.WritePong(payload)
}

// OnClose implements gws.Event.
func (l *listener) OnClose(_ *gws.Conn, err error) {
	l.end(ended(err, l.token != ""))
}

// OnMessage implements gws.Event.
func (l *listener) OnMessage(conn *gws.Conn, message *gws.Message) {
	defer func() { _ = message.Close() }()
	if l.enough() {
		return // It is neither printed nor confirmed: it comes again.
	}
	_ = conn.SetReadDeadline(time.Now().Add(silence))
	raw := message.Bytes()
	var f frame
	isPush := json.Unmarshal(raw, &f) == nil && f.Data != nil
	if isPush && l.had.before(&f) {
		l.acks.handled(conn, f.Ack)
		return
	}
	if f.Type == "resume" && len(f.Token) <= maxPosition {
		l.position = f.Token
		if !l.verbose {
			return
		}
	}
	var line string
	told := any(json.RawMessage(raw))
	switch {
	case isPush:
		line = f.push(l.t)
	default:
		line = l.t.paint(grey, f.control(string(raw)))
	}
	if !json.Valid(raw) {
		told = string(raw)
	}
	if err := l.t.answer(told, line); err != nil {
		l.end(&finalError{fmt.Errorf("print: %w", err)})
		return
	}
	if !isPush {
		return
	}
	l.acks.handled(conn, f.Ack)
	if l.seen++; l.enough() {
		l.end(nil)
	}
}

func (l *listener) enough() bool { return l.count > 0 && l.seen >= l.count }

// frame is what the reference Connect-Node sends to clients: a push when it has
// data, otherwise an answer to what the client asked for.
type frame struct {
	Type      string            `json:"type"`
	Room      string            `json:"room_id"`
	Broadcast bool              `json:"broadcast"`
	User      string            `json:"user_id"`
	Timestamp int64             `json:"timestamp"`
	Data      *frameData        `json:"data"`
	Metadata  map[string]string `json:"metadata"`
	Message   string            `json:"message"`
	Token     string            `json:"token"`
	Node      string            `json:"node_id"`
	Expires   int64             `json:"expires"`
	ID        string            `json:"id"`
	Ack       uint64            `json:"ack"` // to be acknowledged with; 0: not to be
	Replayed  bool              `json:"replayed"`
}

type frameData struct {
	Content *string `json:"content"`
	Base64  string  `json:"content_base64"`
}

// push is a push as one line.
func (f *frame) push(t *terminal) string {
	var b strings.Builder
	b.WriteString(t.paint(grey, time.Unix(f.Timestamp, 0).Format(time.TimeOnly)) + "  ")
	switch {
	case f.Broadcast:
		b.WriteString(t.paint(yellow, "to everybody") + "  ")
	case f.Room != "":
		b.WriteString(t.paint(yellow, clean(f.Room)) + "  ")
	}
	if f.Type != "text" {
		b.WriteString("[" + clean(f.Type) + "] ")
	}
	b.WriteString(f.text())
	if f.Replayed {
		b.WriteString("  " + t.paint(yellow, "(replayed)"))
	}
	for _, k := range slices.Sorted(maps.Keys(f.Metadata)) {
		b.WriteString("  " + t.paint(grey, clean(k)+"="+clean(f.Metadata[k])))
	}
	return b.String()
}

// control is an answer as one line, as it came when it is not known.
func (f *frame) control(raw string) string {
	switch f.Type {
	case "joined", "left":
		return f.Type + " " + clean(f.Room)
	case "ready":
		return "ready at " + clean(f.Node)
	case "refreshed":
		return "token refreshed, good until " + time.Unix(f.Expires, 0).Format(time.TimeOnly)
	case "resume":
		return "position " + clean(f.Token)
	case "gap":
		return "gap: something that was said in " + clean(f.Room) + " is missing, and is not kept any more"
	case "error":
		return "error: " + clean(f.Message)
	}
	return clean(raw)
}

func (f *frame) text() string {
	if f.Data.Content != nil {
		return clean(*f.Data.Content)
	}
	raw, err := base64.StdEncoding.DecodeString(f.Data.Base64)
	if err != nil {
		return "(data that is not base64)"
	}
	return fmt.Sprintf("(%d bytes of data) %x", len(raw), raw[:min(len(raw), 32)])
}
