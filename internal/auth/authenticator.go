package auth

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/VictoriaMetrics/metrics"
	"github.com/maypok86/otter/v2"
	"golang.org/x/sync/singleflight"

	"github.com/push-manager/push-manager/internal/auth/apikey"
	"github.com/push-manager/push-manager/internal/auth/jwt"
	"github.com/push-manager/push-manager/internal/certs"
)

// Reason is why a caller was not let in, and a label of metrics. It is the error of Authenticate. Callers are not told.
type Reason string

// Reasons of refusals, beside those of the packages jwt and apikey.
const (
	NoCredential Reason = "no_credential" //nolint:gosec // a word: neither a token, nor a key, nor a certificate
	Malformed    Reason = "malformed"     // no header that can be understood, or more than one
	NoCaller     Reason = "policy"        // a good credential that the policy gives to nobody
	Expired      Reason = "expired"       // the certificate of the connection, too
)

func (r Reason) Error() string { return "not authenticated: " + string(r) }

// Temporary tells whether the same credential may be good if it comes again.
func (r Reason) Temporary() bool { return r == Reason(jwt.Unavailable) }

// Reasons are all there are.
func Reasons() []Reason {
	all := []Reason{NoCredential, NoCaller} // the others have the names of those of tokens
	for _, r := range jwt.Reasons() {
		all = append(all, Reason(r))
	}
	return all
}

// Kind is the sort of a credential.
type Kind string

// The sorts of credentials.
const (
	Certificate Kind = "certificate"
	Token       Kind = "token"
	Key         Kind = "key"
)

// Principal is a caller and how it is known. It is immutable.
type Principal struct {
	*Caller

	// Kind and Credential are what the caller was found by, for logs: the name in its certificate, the issuer and the id of
	// the key of its token, the id of its API key. Never a secret.
	Kind       Kind
	Credential string

	err        error     // why there is no Caller; Authenticate returns none of these
	until      time.Time // then the credential is judged again
	generation uint64    // of all that it was judged by
}

// Config of an Authenticator. Policies is required.
type Config struct {
	Policies *Policies
	Tokens   *jwt.Verifier // nil: none are taken
	Keys     *apikey.Store // nil: none are taken
	// CacheEntries is how many tokens and keys are known without being verified again. 0 means DefaultCacheEntries.
	CacheEntries int

	Metrics *metrics.Set // nil: a set of its own
}

// DefaultCacheEntries is enough for a caller on each of as many machines. An entry takes about 400 bytes.
const DefaultCacheEntries = 10_000

const (
	// maxHeader bounds a credential with its scheme.
	maxHeader = len("Bearer ") + 8<<10
	// keepBad is for how long a bad credential is not verified again, and badEntries how many of them are known.
	keepBad    = time.Second
	badEntries = 1024
	// verifyBound is the longest that a verification may take. It may wait a second for an issuer's keys, and in the line of
	// its connection.
	verifyBound = 2 * time.Second
)

// Authenticator tells who calls. Its methods may be called by any number of goroutines at a time.
//
// A credential that is known costs a comparison on its connection, or a SHA-256 on another one. It is known no longer than
// it is valid, and until the policy or any keys have changed. One that is not known is verified once, however many calls
// come with it, and a bad one is known for a second.
//
// Bad credentials are not counted. A connection may be one of a balancer that many callers share, and nobody is refused for
// what others of them do. Most bad credentials cost less than the call that they come with. A signature costs several times
// as much, so one of a connection is verified at a time: however many it brings, new tokens on other connections wait for
// one of them, and those on the same connection for at most as many as it may have calls.
type Authenticator struct {
	// Static.
	policies *Policies
	tokens   *jwt.Verifier
	keys     *apikey.Store
	verified *metrics.Counter

	known   *otter.Cache[[sha256.Size]byte, *Principal]
	bad     *otter.Cache[[sha256.Size]byte, *Principal]
	flights singleflight.Group
}

// New makes an Authenticator. It has no goroutines.
func New(cfg Config) (*Authenticator, error) {
	if cfg.CacheEntries == 0 {
		cfg.CacheEntries = DefaultCacheEntries
	}
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.NewSet()
	}
	a := &Authenticator{
		policies: cfg.Policies, tokens: cfg.Tokens, keys: cfg.Keys,
		verified: cfg.Metrics.GetOrCreateCounter("push_manager_auth_verifications_total"),
	}
	for _, c := range []struct {
		table **otter.Cache[[sha256.Size]byte, *Principal]
		size  int
	}{{&a.known, cfg.CacheEntries}, {&a.bad, badEntries}} {
		var err error
		if *c.table, err = otter.New(&otter.Options[[sha256.Size]byte, *Principal]{MaximumSize: c.size}); err != nil {
			return nil, fmt.Errorf("make the table of credentials: %w", err)
		}
	}
	cfg.Metrics.GetOrCreateGauge("push_manager_auth_cache_entries", func() float64 { return float64(a.known.EstimatedSize()) })
	return a, nil
}

// generation changes whenever a verdict may be another one than before.
func (a *Authenticator) generation() uint64 {
	sum := a.policies.Generation() // each only grows: so does the sum
	if a.tokens != nil {
		sum += a.tokens.Generation()
	}
	if a.keys != nil {
		sum += a.keys.Generation()
	}
	return sum
}

// Valid tells whether a caller that was known before still is, as far as can be said without its credential.
func (a *Authenticator) Valid(p *Principal, now time.Time) bool {
	return p != nil && p.generation == a.generation() && now.Before(p.until)
}

// Session is what is known of one connection.
type Session struct {
	// Static.
	leaf  *x509.Certificate // nil: none was shown
	names []string          // in it
	line  jwt.Line          // of its tokens

	byCertificate atomic.Pointer[Principal]
	last          atomic.Pointer[sighting]
}

// sighting is the credential of a call, and whose it was.
type sighting struct {
	header    string
	principal *Principal
}

// NewSession begins with a connection. state is nil for one without TLS.
func NewSession(state *tls.ConnectionState) *Session {
	s := &Session{line: jwt.NewLine()}
	if state != nil && len(state.VerifiedChains) > 0 {
		s.leaf = state.VerifiedChains[0][0]
		s.names = certs.Names(s.leaf)
	}
	return s
}

// Authenticate tells who makes a call with these authorization headers on a connection. Its error is a Reason.
//
// A token or a key names the caller, whatever certificate the connection has: that one has only let the connection in.
func (a *Authenticator) Authenticate(s *Session, authorization []string, now time.Time) (*Principal, error) {
	switch {
	case len(authorization) == 0:
		return a.ofCertificate(s, now)
	case len(authorization) > 1 || len(authorization[0]) > maxHeader:
		return nil, Malformed
	}
	header := authorization[0]
	last := s.last.Load()
	if last != nil && same(last.header, header) && a.Valid(last.principal, now) {
		return last.principal, nil
	}
	p := a.lookup(s, header, now)
	if p.err != nil {
		return nil, p.err
	}
	// One that is still good stays, where several callers share a connection: the others are known by their hash. It is
	// replaced when it is the same one, and has moved.
	if last == nil || last.principal == p || !a.Valid(last.principal, now) {
		s.last.Store(&sighting{header, p})
	}
	return p, nil
}

// same tells whether two texts are one in memory. HPACK hands out one text for a header that comes again. A comparison byte by
// byte would tell, by its time, how much of somebody else's secret is right.
func same(a, b string) bool {
	return len(a) == len(b) && unsafe.StringData(a) == unsafe.StringData(b) //nolint:gosec // nothing is read
}

func (a *Authenticator) ofCertificate(s *Session, now time.Time) (*Principal, error) {
	if s.leaf == nil {
		return nil, NoCredential
	}
	p := s.byCertificate.Load()
	if !a.Valid(p, now) {
		p = &Principal{Kind: Certificate, generation: a.generation(), until: s.leaf.NotAfter}
		p.Caller, p.Credential = a.policies.Current().OfNames(s.names)
		switch {
		case !now.Before(p.until):
			p.err = Expired
		case p.Caller == nil:
			p.err = NoCaller
		}
		s.byCertificate.Store(p)
	}
	if p.err != nil {
		return nil, p.err
	}
	return p, nil
}

// lookup finds the verdict on a credential, or has it verified.
func (a *Authenticator) lookup(s *Session, header string, now time.Time) *Principal {
	sum := sha256.Sum256(unsafe.Slice(unsafe.StringData(header), len(header))) //nolint:gosec // It is only read; a copy would cost memory for each call.
	if p, ok := a.known.GetIfPresent(sum); ok && a.Valid(p, now) {
		return p
	}
	if p, ok := a.bad.GetIfPresent(sum); ok && a.Valid(p, now) {
		return p
	}
	v, _, _ := a.flights.Do(string(sum[:]), func() (any, error) {
		if p, ok := a.known.GetIfPresent(sum); ok && a.Valid(p, now) {
			return p, nil // another call was faster
		}
		p := a.verify(s, header, time.Now())
		switch {
		case p.err == nil:
			a.known.Set(sum, p)
		case !errors.Is(p.err, Reason(jwt.Unavailable)): // one for which there was no time is no bad one
			a.bad.Set(sum, p)
		}
		return p, nil
	})
	return v.(*Principal)
}

// verify judges a credential.
func (a *Authenticator) verify(s *Session, header string, now time.Time) *Principal {
	a.verified.Inc()
	p := &Principal{generation: a.generation()}
	scheme, credential, _ := strings.Cut(header, " ")
	switch {
	case !strings.EqualFold(scheme, "Bearer"):
		p.err = Malformed
	case strings.HasPrefix(credential, apikey.Prefix):
		p.err = a.ofKey(p, credential)
	default:
		p.err = a.ofToken(s, p, credential)
	}
	switch {
	case p.err != nil:
		p.until = now.Add(keepBad)
	case p.until.IsZero():
		p.until = now.Add(100 * 365 * 24 * time.Hour)
	case !now.Before(p.until): // a token that has ended is good for as long as clocks may differ
		p.until = now.Add(keepBad)
	}
	return p
}

func (a *Authenticator) ofKey(p *Principal, raw string) error {
	if a.keys == nil {
		return Reason(apikey.Unknown)
	}
	key, err := a.keys.Verify(raw)
	if err != nil {
		return reasonOf(err)
	}
	p.Kind, p.Credential, p.until = Key, key.ID, key.NotAfter
	if p.Caller = a.policies.Current().OfKey(key.ID); p.Caller == nil {
		return NoCaller
	}
	return nil
}

func (a *Authenticator) ofToken(s *Session, p *Principal, raw string) error {
	if a.tokens == nil {
		return Reason(jwt.IssuerWrong)
	}
	ctx, cancel := context.WithTimeout(context.Background(), verifyBound) // not that of a call: others may wait for it, too
	defer cancel()
	token, err := a.tokens.VerifyInLine(ctx, s.line, raw)
	if err != nil {
		return reasonOf(err)
	}
	p.Kind, p.Credential, p.until = Token, token.Issuer+" "+token.KeyID, token.Expires
	if p.Caller = a.policies.Current().OfToken(token.Issuer, token.Subject); p.Caller == nil {
		return NoCaller
	}
	return nil
}

// reasonOf makes one kind of reasons of two.
func reasonOf(err error) Reason {
	var ofToken jwt.Reason
	var ofKey apikey.Reason
	switch {
	case errors.As(err, &ofToken):
		return Reason(ofToken)
	case errors.As(err, &ofKey):
		return Reason(ofKey)
	default:
		return Malformed
	}
}
