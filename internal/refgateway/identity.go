package refgateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/gobwas/ws"

	"github.com/push-manager/push-manager/internal/auth/jwt"
	"github.com/push-manager/push-manager/transport/node"
)

// The subprotocol, and how one begins that carries a token. Browsers can set no other header.
const subprotocol, bearerProtocol = "pm.v1", "pm.bearer."

// firstMessageBytes bounds the message that has the token: the largest one, and what is around it.
const firstMessageBytes = jwt.MaxToken + 1<<10

// unverifiedShare of Config.MaxConnections is the most that may be unverified.
const unverifiedShare = 4

var (
	errTwoTokens    = errors.New("token: given more than once, of Authorization, Sec-WebSocket-Protocol and token")
	errTokenInQuery = errors.New("token: must not be in the address, which is logged on its way")
	errNoTokens     = errors.New("type: no tokens are asked for here")
	errTokenMissing = errors.New("token: required")
)

// identity is what a verified token says of a client. It is immutable but for generation; a
// refresh replaces it as a whole. The token itself is not kept.
type identity struct {
	expires    time.Time
	key        jwt.Key
	user, name string
	tenant     node.Tenant
	tenantless bool // there are no tenants
	everyRoom  bool
	rooms      []string // patterns: exact, or with a star for any rest at the end
	attributes node.Attributes

	generation uint64 // of the keys by which token is right; owned by the sweep
}

// owns tells whether the client may have or name an id at all: those that begin as a tenant's are
// that tenant's own.
func (id *identity) owns(plain string) bool { return id.tenantless || id.tenant.Allows(plain) }

// allows tells whether the client may be in a room. Without tokens it may be in all.
func (id *identity) allows(room string) bool {
	return id == nil || id.owns(room) && (id.everyRoom || slices.ContainsFunc(id.rooms, func(pattern string) bool {
		head, isPrefix := strings.CutSuffix(pattern, "*")
		return room == pattern || isPrefix && strings.HasPrefix(room, head)
	}))
}

// setAttributes makes those count that the client has given, and those of its token, which win. If they are too many together, neither is wrong
// by itself: the client is told, and the error is a denial.
func (c *conn) setAttributes(id *identity) error {
	all := c.given
	if id != nil {
		var err error
		if all, err = c.given.With(id.attributes); err != nil {
			c.tell(control("error", "message", err.Error()))
			c.bye(closeToken, false) // behind that
			return &denial{deniedClaim, closeToken}
		}
	}
	if all.Len() == 0 {
		c.attributes.Store(nil) // as most connections have it
		return nil
	}
	c.attributes.Store(&all)
	return nil
}

// tokenOf is the token of a handshake, "" where there is none.
func (g *Gateway) tokenOf(r *http.Request, query url.Values) (string, error) {
	var tokens []string
	for _, header := range r.Header.Values("Authorization") {
		if scheme, token, _ := strings.Cut(header, " "); strings.EqualFold(scheme, "bearer") {
			tokens = append(tokens, strings.TrimSpace(token))
		}
	}
	for _, header := range r.Header.Values("Sec-Websocket-Protocol") {
		for name := range strings.SplitSeq(header, ",") {
			if token, ok := strings.CutPrefix(strings.TrimSpace(name), bearerProtocol); ok {
				tokens = append(tokens, token)
			}
		}
	}
	if query.Has("token") && !g.cfg.TokenInQuery {
		return "", errTokenInQuery
	}
	switch tokens = append(tokens, query["token"]...); {
	case len(tokens) == 0:
		return "", nil
	case len(tokens) > 1:
		return "", errTwoTokens
	case tokens[0] == "":
		return "", errTokenMissing
	}
	return tokens[0], nil
}

// denial is why a client is not let in, or not any more. It ends its connection.
type denial struct {
	reason string // for operators; "" where the code says it
	code   uint16
}

func (d *denial) Error() string { return closeReason(d.code) }

// deny counts a denial and returns its close code, 0 for an error that is none.
func (g *Gateway) deny(c *conn, err error) (code uint16) {
	d, ok := errors.AsType[*denial](err)
	if !ok {
		return 0
	}
	if d.reason != "" {
		g.denied(d.reason).Inc()
		g.cfg.Logger.Debug("client denied", slog.String("reason", d.reason), slog.String("address", c.net.RemoteAddr().String()))
	}
	return d.code
}

// identify makes a client somebody, by the token of its handshake or of its first message. The
// error is a denial, or says that the client has gone.
func (g *Gateway) identify(c *conn, r *reader, token string) error {
	ctx, cancel := context.WithTimeout(context.Background(), g.cfg.TokenTimeout)
	defer cancel()
	if token == "" {
		// Not by a deadline for the read: that is for the answer to a close frame, which others may send.
		late := time.AfterFunc(g.cfg.TokenTimeout, func() {
			if c.bye(closeNoToken, true) {
				g.deny(c, &denial{deniedTimeout, closeNoToken})
			}
		})
		code, err := r.next(firstMessageBytes)
		late.Stop()
		switch {
		case err != nil:
			return err
		case code != 0:
			return &denial{"", code}
		}
		m, err := parse(r.message)
		if r.op != ws.OpText || err != nil || *m.Type != "connect" || m.Token == nil {
			return &denial{deniedMissing, closeToken}
		}
		token = *m.Token
	}
	id, err := g.verify(ctx, token)
	switch {
	case err != nil:
		return err
	case c.user != "" && c.user != id.user:
		return &denial{deniedOther, closeToken}
	case c.room != "" && !id.allows(c.room):
		return &denial{deniedRoom, closeForbidden}
	}
	c.user, c.tenant = id.user, id.tenant
	if id.name != "" {
		c.name = id.name
	}
	c.identity.Store(id)
	return nil
}

// refresh takes a new token. One that is refused ends the connection, although the one before may
// still count: who shows it is not who it was.
func (c *conn) refresh(token *string) error {
	switch {
	case c.g.cfg.Tokens == nil:
		return errNoTokens
	case token == nil:
		return errTokenMissing
	}
	ctx, cancel := context.WithTimeout(context.Background(), c.g.cfg.TokenTimeout)
	defer cancel()
	id, err := c.g.verify(ctx, *token)
	switch {
	case err != nil:
		return err
	case id.user != c.user || id.tenant != c.tenant:
		return &denial{deniedOther, closeToken}
	case slices.ContainsFunc(c.member.Rooms(), func(room string) bool { return !id.allows(room) }):
		return &denial{deniedRoom, closeForbidden}
	}
	if err := c.setAttributes(id); err != nil {
		return err
	}
	c.identity.Store(id)
	if r, refused := c.g.node.Refused(c.tenant.ID(c.user), c.device()); refused { // the token may name another device
		if c.kick(r.Code, r.Reason) {
			c.g.denied(deniedRefused).Inc()
		}
		return &denial{"", r.Code}
	}
	c.tell(&frame{op: ws.OpText, head: fmt.Appendf(nil, `{"type":"refreshed","expires":%d}`, id.expires.Unix())})
	return nil
}

// checkIdentity closes a connection whose token is over, or was signed with a key that its issuer
// has withdrawn.
func (g *Gateway) checkIdentity(c *conn, now time.Time) {
	id := c.identity.Load()
	if id == nil {
		return
	}
	reason := ""
	if generation := g.cfg.Tokens.Generation(); id.generation != generation {
		if id.generation = generation; !g.cfg.Tokens.Has(id.key) {
			reason = deniedWithdrawn
		}
	}
	if g.over(id, now) {
		reason = string(jwt.Expired)
	}
	if reason != "" && c.bye(closeToken, true) {
		g.deny(c, &denial{reason, closeToken})
	}
}

// over tells whether a token has expired, and the time to refresh it, too.
func (g *Gateway) over(id *identity, now time.Time) bool {
	return now.After(id.expires.Add(g.cfg.TokenGrace))
}

// verify verifies a token and reads its claims. The error is a denial.
func (g *Gateway) verify(ctx context.Context, raw string) (*identity, error) {
	id := &identity{tenantless: g.cfg.NoTenants, generation: g.cfg.Tokens.Generation()} // before, so that no change is missed
	token, err := g.cfg.Tokens.Verify(ctx, raw)
	if err != nil {
		reason, _ := errors.AsType[jwt.Reason](err)
		return nil, &denial{string(reason), closeToken}
	}
	id.user, id.expires, id.key = token.Subject, token.Expires, token.Key()
	hasTenant, tenantErr := token.Claim("tenant", &id.tenant)
	hasName, nameErr := token.Claim("name", &id.name)
	hasRooms, roomsErr := token.Claim("rooms", &id.rooms)
	var attrs map[string]string
	_, attrsErr := token.Claim("attrs", &attrs)
	if attrsErr == nil {
		id.attributes, attrsErr = node.NewAttributes(attrs)
	}
	id.everyRoom = !hasRooms
	switch {
	case g.over(id, time.Now()):
		return nil, &denial{string(jwt.Expired), closeToken}
	case !id.owns(id.user):
		return nil, &denial{string(jwt.Subject), closeToken}
	case tenantErr != nil || hasTenant && (id.tenant == "" || id.tenant.Check() != nil || id.tenantless),
		nameErr != nil || hasName && checkID("name", id.name) != nil,
		attrsErr != nil,
		roomsErr != nil || hasRooms && id.rooms == nil, // null: who writes that does not mean all
		slices.ContainsFunc(id.rooms, badPattern):
		return nil, &denial{deniedClaim, closeToken}
	}
	return id, nil
}

// badPattern tells whether a pattern of rooms cannot be meant.
func badPattern(pattern string) bool {
	return checkID("rooms", pattern) != nil || strings.Contains(pattern[:len(pattern)-1], "*")
}

// The reasons for denying a client beside those of jwt.Reason.
const (
	deniedMissing   = "missing"
	deniedTimeout   = "timeout"
	deniedEvicted   = "evicted"
	deniedClaim     = "claim"
	deniedOther     = "other_user"
	deniedRoom      = "room"
	deniedWithdrawn = "withdrawn"
	deniedRefused   = "refused" // by a service, for a time
)
