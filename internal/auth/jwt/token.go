package jwt

import (
	"encoding/json"
	"fmt"
	"math"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// MaxToken is the size of the largest token, in bytes. Others have 8 KiB for all headers of a request.
const MaxToken = 8 << 10

const (
	maxLifetime = 24 * time.Hour   // a token that lives longer is as good as a password
	leeway      = 30 * time.Second // between our clock and the issuer's
)

// Reason is why a token was refused. It is the error that Verify returns, and a label of metrics.
type Reason string

// Reasons of refusals.
const (
	Malformed   Reason = "malformed"     // no token: too long, not three parts, no JSON, or claims of a wrong type
	Algorithm   Reason = "algorithm"     // not one that the issuer's tokens may use, or an extension (crit) that must be understood
	IssuerWrong Reason = "issuer"        // not configured
	UnknownKey  Reason = "unknown_key"   // the issuer has no such key
	Signature   Reason = "signature"     // not made with this key
	Audience    Reason = "audience"      // for somebody else
	Expired     Reason = "expired"       // exp lies behind
	NotYet      Reason = "not_yet_valid" // nbf or iat lies ahead
	Lifetime    Reason = "lifetime"      // no exp, or one more than 24 h away
	Subject     Reason = "subject"       // the claim that names the caller is missing or no id
	Unavailable Reason = "unavailable"   // the issuer's keys have never come yet, or the caller's context ended first
)

// Reasons are all reasons, for metrics that have one counter for each.
func Reasons() []Reason {
	return []Reason{Malformed, Algorithm, IssuerWrong, UnknownKey, Signature, Audience, Expired, NotYet, Lifetime, Subject, Unavailable}
}

func (r Reason) Error() string { return "token refused: " + string(r) }

// Token is a token that has been verified. It is immutable.
type Token struct {
	Issuer  string
	KeyID   string // that of the key in its set; "" with a secret
	Subject string // the claim that names the caller, as an id: 1 to 256 bytes of UTF-8 without control characters
	Expires time.Time

	key    any // as in keySet
	id     keyID
	claims claims
}

// Key is what it was signed with.
func (t *Token) Key() Key { return Key{issuer: t.Issuer, id: t.id, key: t.key} }

// Claim reads a further claim as encoding/json does, and tells whether the token has it. The names of claims are exact.
// Its error holds nothing of the token.
func (t *Token) Claim(name string, into any) (ok bool, err error) {
	raw, ok := t.claims[name]
	if !ok {
		return false, nil
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return true, fmt.Errorf("claim %s is no %T", name, into)
	}
	return true, nil
}

// claims are the claims of a token by their exact names. They satisfy what golang-jwt validates.
type claims map[string]json.RawMessage

func (c claims) text(name string) string {
	var text string
	if json.Unmarshal(c[name], &text) != nil {
		return ""
	}
	return text
}

// date is a NumericDate, nil where there is none. Dates that no calendar has are refused before they are converted, which
// is undefined for them.
func (c claims) date(name string) (*jwt.NumericDate, error) {
	raw, ok := c[name]
	if !ok {
		return nil, nil // as golang-jwt wants it
	}
	var seconds *float64
	if err := json.Unmarshal(raw, &seconds); err != nil || seconds == nil || *seconds < 0 || *seconds > 1<<40 {
		return nil, jwt.ErrInvalidType
	}
	whole, part := math.Modf(*seconds)
	return &jwt.NumericDate{Time: time.Unix(int64(whole), int64(part*1e9))}, nil
}

func (c claims) GetExpirationTime() (*jwt.NumericDate, error) { return c.date("exp") }
func (c claims) GetIssuedAt() (*jwt.NumericDate, error)       { return c.date("iat") }
func (c claims) GetNotBefore() (*jwt.NumericDate, error)      { return c.date("nbf") }
func (c claims) GetIssuer() (string, error)                   { return c.text("iss"), nil }
func (c claims) GetSubject() (string, error)                  { return c.text("sub"), nil }

// GetAudience reads a text or a list of texts.
func (c claims) GetAudience() (jwt.ClaimStrings, error) {
	var list []string
	if text := c.text("aud"); text != "" {
		return jwt.ClaimStrings{text}, nil
	}
	if raw, ok := c["aud"]; ok && json.Unmarshal(raw, &list) != nil {
		return nil, jwt.ErrInvalidType
	}
	return list, nil
}
