package jwt

import (
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/config"
)

// DefaultReloadInterval is how often files are read.
const DefaultReloadInterval = 10 * time.Second

// maxIssuers bounds the list: each issuer has a goroutine and keys in memory.
const maxIssuers = 64

// defaultAlgorithms are those of an issuer that names none.
func defaultAlgorithms() []string { return []string{"EdDSA", "ES256", "RS256"} }

// Issuer is who signs tokens. Exactly one of JWKSFile, JWKSURL and HSSecretFile is set.
type Issuer struct {
	Issuer   string // the claim iss, byte by byte
	Audience string // must be in the claim aud

	JWKSFile     string // a JWK set (RFC 7517)
	JWKSURL      string // where one is served: https, or http on a loopback address
	HSSecretFile string // the secret of HS256, HS384 and HS512: 32 bytes at least, blanks around them aside

	// Algorithms that its tokens may use: EdDSA, ES*, RS*, PS* with a key set, HS* with a secret. Empty: EdDSA, ES256
	// and RS256 with a key set, HS256 with a secret.
	Algorithms []string
	// CallerClaim is the claim that names who calls. Empty: sub.
	CallerClaim string
}

// Config of a Verifier. Issuers is required.
type Config struct {
	Issuers []Issuer
	// ReloadInterval is how often files are read. 0 means DefaultReloadInterval. URLs have an interval of their own.
	ReloadInterval time.Duration

	Logger  *slog.Logger // nil: nothing is logged
	Metrics *metrics.Set // nil: a set of its own

	dial dialer // nil: the network's
}

// Bind adds the list of issuers as a key of a program. Check must follow Load.
func (c *Config) Bind(s *config.Set, key string) {
	config.Sections(s, &c.Issuers, key, maxIssuers, "Issuers whose JSON Web Tokens are accepted.", func(i *Issuer, s *config.Set) {
		s.Text(&i.Issuer, "issuer", "", "Exact value of the claim iss.")
		s.Text(&i.Audience, "audience", "", "Value that the claim aud must have, or have among others. Required.")
		s.Text(&i.JWKSFile, "jwks_file", "", "JWK set with its public keys. It is read again while it changes.")
		s.Text(&i.JWKSURL, "jwks_url", "", "Where the set is served: https, or http on a loopback address. Redirects are not followed.")
		s.Text(&i.HSSecretFile, "hs_secret_file", "", "File with the shared secret of HS256, HS384 or HS512, in place of a set. Only its owner and group may be able to read it.")
		s.List(&i.Algorithms, "algorithms", "", "Algorithms that its tokens may use. Empty: EdDSA, ES256, RS256; HS256 with hs_secret_file.")
		s.Text(&i.CallerClaim, "caller_claim", "sub", "Claim that names who calls.")
	})
}

// Check tells what is wrong with the issuers that Bind has bound to the key, by the names of its fields. It reads files.
func (c *Config) Check(s *config.Set, key string) error {
	var field *FieldError
	if err := c.Validate(); errors.As(err, &field) {
		return s.Errorf(fmt.Sprintf("%s[%d].%s", key, field.Index, field.Field), "%v", field.Err)
	} else if err != nil {
		return s.Errorf(key, "%v", err)
	}
	return nil
}

// FieldError is what is wrong with one field of one issuer.
type FieldError struct {
	Index int    // of the issuer in Config.Issuers
	Field string // as Bind names it
	Err   error
}

func (e *FieldError) Error() string {
	return fmt.Sprintf("issuer %d: %s: %v", e.Index+1, e.Field, e.Err)
}
func (e *FieldError) Unwrap() error { return e.Err }

// Validate tells what is wrong with the issuers and their files, as a *FieldError where it is one field. It asks no URL.
func (c *Config) Validate() error {
	_, err := c.sources()
	return err
}

// sources are the issuers in the order of the list, with the keys of those that have a file.
func (c *Config) sources() ([]*source, error) {
	if len(c.Issuers) == 0 || len(c.Issuers) > maxIssuers {
		return nil, fmt.Errorf("%d issuers: must be 1 to %d", len(c.Issuers), maxIssuers)
	}
	list := make([]*source, 0, len(c.Issuers))
	for i, issuer := range c.Issuers {
		wrong := func(field, format string, args ...any) error {
			return &FieldError{Index: i, Field: field, Err: fmt.Errorf(format, args...)}
		}
		if issuer.CallerClaim == "" {
			issuer.CallerClaim = "sub"
		}
		secret := issuer.HSSecretFile != ""
		if len(issuer.Algorithms) == 0 {
			if issuer.Algorithms = defaultAlgorithms(); secret {
				issuer.Algorithms = []string{"HS256"}
			}
		}
		var set []string
		field, path := "jwks_file", issuer.JWKSFile
		for _, f := range [][2]string{{"jwks_file", issuer.JWKSFile}, {"jwks_url", issuer.JWKSURL}, {"hs_secret_file", issuer.HSSecretFile}} {
			if f[1] != "" {
				set = append(set, f[0])
				field, path = f[0], f[1]
			}
		}
		switch {
		case issuer.Issuer == "":
			return nil, wrong("issuer", "missing")
		case slices.ContainsFunc(list, func(s *source) bool { return s.Issuer.Issuer == issuer.Issuer }):
			return nil, wrong("issuer", "%q is there twice", issuer.Issuer)
		case issuer.Audience == "":
			return nil, wrong("audience", "missing: tokens that the issuer made for others would do")
		case len(set) == 0:
			return nil, wrong("jwks_file", "missing: one of jwks_file, jwks_url and hs_secret_file is needed")
		case len(set) > 1:
			return nil, wrong(set[1], "%s is set, too: it must be one of them", set[0])
		}
		for _, algorithm := range issuer.Algorithms {
			hs, known := algorithms()[algorithm]
			switch {
			case !known:
				return nil, wrong("algorithms", "%q is not known or not safe", algorithm)
			case hs && !secret:
				return nil, wrong("algorithms", "%s needs hs_secret_file: a public key is no secret", algorithm)
			case !hs && secret:
				return nil, wrong("algorithms", "%s needs a key set, and hs_secret_file is set", algorithm)
			}
		}
		if issuer.JWKSURL != "" {
			if err := checkURL(issuer.JWKSURL); err != nil {
				return nil, wrong(field, "%w", err)
			}
		}
		s := &source{Issuer: issuer, path: path}
		if issuer.JWKSURL == "" {
			keys, err := s.readFile()
			if err == nil && len(keys.byID) == 0 {
				err = fmt.Errorf("%s: holds no keys", path)
			}
			if err != nil {
				return nil, wrong(field, "%w", err)
			}
			s.keys.Store(keys)
		}
		list = append(list, s)
	}
	return list, nil
}

// checkURL refuses addresses whose answers others could forge, and such with a password, which would be printed.
func checkURL(text string) error {
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Host == "" || u.Hostname() == "" || u.Opaque != "":
		return errors.New("is no URL such as https://idp.example/jwks.json")
	case u.User != nil || u.Fragment != "" || strings.Contains(text, "#"):
		return errors.New("must have no user, password or fragment")
	case u.Scheme == "https", u.Scheme == "http" && config.Loopback(u.Hostname()):
		return nil
	}
	return errors.New("must be https, or http on a loopback address")
}
