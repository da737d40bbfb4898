package jwt

import (
	"context"
	"errors"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/golang-jwt/jwt/v5"

	"github.com/push-manager/push-manager/internal/ids"
)

// Verifier verifies tokens. Its methods may be called by any number of goroutines at a time.
type Verifier struct {
	// Static after New.
	issuers map[string]*source
	parser  *jwt.Parser
	cpu     chan struct{} // as many tokens as signatures may be verified at a time
	cancel  context.CancelFunc
	end     sync.WaitGroup

	generation atomic.Uint64
}

// New reads the files, which must be right, and begins to fetch the URLs. It does not wait for those: until its keys are
// there, an issuer's tokens are refused. Close must be called.
func New(cfg Config) (*Verifier, error) {
	if cfg.ReloadInterval == 0 {
		cfg.ReloadInterval = DefaultReloadInterval
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.NewSet()
	}
	list, err := cfg.sources()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	v := &Verifier{
		issuers: map[string]*source{},
		parser:  jwt.NewParser(jwt.WithStrictDecoding()),
		cpu:     make(chan struct{}, runtime.GOMAXPROCS(0)),
		cancel:  cancel,
	}
	for _, s := range list {
		s.start(ctx, &cfg, v)
		v.issuers[s.Issuer.Issuer] = s
	}
	return v, nil
}

// Generation is raised whenever the keys of an issuer have changed. A verdict holds while the generation is the one that
// was read before Verify was called, and not beyond Token.Expires.
func (v *Verifier) Generation() uint64 { return v.generation.Load() }

// Reload has all files read and all URLs fetched soon. It does not wait.
func (v *Verifier) Reload() {
	for _, s := range v.issuers {
		s.wake(s.reload)
	}
}

// Close ends the reading and waits for it. Tokens can still be verified, with the keys of that moment. It is called once.
func (v *Verifier) Close() {
	v.cancel()
	v.end.Wait()
}

// Line is for tokens that come from one place, such as a connection: one of their signatures is verified at a time. However
// many it brings, the tokens of others wait for one of them.
type Line chan struct{}

// NewLine makes a line in which nobody waits.
func NewLine() Line { return make(Line, 1) }

// Verify tells who signed a token and what it claims. Its error is a Reason. It takes at most GOMAXPROCS signatures at a
// time; others wait for their turn, or until ctx ends. A token whose key is unknown may wait for its issuer for 1 s.
func (v *Verifier) Verify(ctx context.Context, raw string) (*Token, error) {
	return v.VerifyInLine(ctx, nil, raw)
}

// VerifyInLine is Verify for one of a line. A token does not wait in it for its issuer. nil is no line.
func (v *Verifier) VerifyInLine(ctx context.Context, line Line, raw string) (*Token, error) {
	if len(raw) > MaxToken || !isCompact(raw) {
		return nil, Malformed
	}
	var c claims
	parsed, _, err := v.parser.ParseUnverified(raw, &c)
	switch {
	case errors.Is(err, jwt.ErrTokenUnverifiable):
		return nil, Algorithm
	case err != nil || !isTyp(parsed.Header["typ"]):
		return nil, Malformed
	}
	if _, extended := parsed.Header["crit"]; extended {
		return nil, Algorithm
	}
	s := v.issuers[c.text("iss")]
	if s == nil {
		return nil, IssuerWrong
	}
	kid, isText := parsed.Header["kid"].(string)
	if _, there := parsed.Header["kid"]; there && !isText || len(kid) > maxKeyID {
		return nil, Malformed
	}
	id := keyID{kid: kid, algorithm: parsed.Method.Alg()}
	if !s.takes(id.algorithm) {
		return nil, Algorithm
	}
	key, known := s.key(ctx, id)
	if !known {
		return nil, UnknownKey
	}
	if _, secret := key.([]byte); secret {
		id.kid = "" // it was not looked at
	}

	if line != nil {
		select {
		case line <- struct{}{}:
			defer func() { <-line }()
		case <-ctx.Done():
			return nil, Unavailable
		}
	}
	select {
	case v.cpu <- struct{}{}:
	case <-ctx.Done():
		return nil, Unavailable
	}
	err = parsed.Method.Verify(raw[:strings.LastIndexByte(raw, '.')], parsed.Signature, key)
	<-v.cpu
	if err != nil {
		return nil, Signature
	}

	if audience, err := c.GetAudience(); err != nil {
		return nil, Malformed
	} else if !slices.Contains(audience, s.Audience) {
		return nil, Audience
	}
	if err := s.validator.Validate(c); err != nil {
		for _, is := range []struct {
			err    error
			reason Reason
		}{
			{jwt.ErrInvalidType, Malformed}, {jwt.ErrTokenRequiredClaimMissing, Lifetime},
			{jwt.ErrTokenExpired, Expired}, {jwt.ErrTokenNotValidYet, NotYet}, {jwt.ErrTokenUsedBeforeIssued, NotYet},
		} {
			if errors.Is(err, is.err) {
				return nil, is.reason
			}
		}
		return nil, Malformed
	}
	expires, err := c.date("exp")
	if err != nil || expires == nil || time.Until(expires.Time) > maxLifetime+leeway {
		return nil, Lifetime
	}
	token := &Token{Issuer: s.Issuer.Issuer, KeyID: id.kid, Subject: c.text(s.CallerClaim), Expires: expires.Time, key: key, id: id, claims: c}
	if ids.Check(token.Subject, ids.MaxBytes) != nil {
		return nil, Subject
	}
	return token, nil
}

// isCompact tells whether a text is three parts in the letters of base64url. Package base64 skips line breaks, so that one
// token would have many texts.
func isCompact(raw string) bool {
	dots := 0
	for i := range len(raw) {
		switch c := raw[i]; {
		case c == '.':
			dots++
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
		default:
			return false
		}
	}
	return dots == 2
}

// isTyp tells whether the header typ is that of an access token. Many issuers leave it out, Kubernetes among them. What
// has another one is for something else (RFC 8725, 3.11).
func isTyp(typ any) bool {
	if typ == nil {
		return true
	}
	text, _ := typ.(string)
	text = strings.ToLower(text)
	text = strings.TrimPrefix(text, "application/")
	return text == "jwt" || text == "at+jwt"
}
