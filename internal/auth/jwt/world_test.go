package jwt

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/golang-jwt/jwt/v5"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	issuerA  = "https://a.example"
	issuerB  = "https://b.example"
	audience = "push-manager"
)

// pair is a key with its id.
type pair struct {
	kid     string
	method  jwt.SigningMethod
	private any // what golang-jwt signs with
}

// keyOf makes a key of an algorithm. RSA keys are made once: they take long.
func keyOf(t testing.TB, kid, algorithm string) pair {
	t.Helper()
	var private any
	var err error
	switch algorithm[:2] {
	case "Ed":
		_, private, err = ed25519.GenerateKey(rand.Reader)
	case "ES":
		curve := map[string]elliptic.Curve{"ES256": elliptic.P256(), "ES384": elliptic.P384(), "ES512": elliptic.P521()}[algorithm]
		private, err = ecdsa.GenerateKey(curve, rand.Reader)
	case "HS":
		private = []byte(strings.Repeat("k", minSecret))
	default:
		private, err = rsaKey()
	}
	if err != nil {
		t.Fatal(err)
	}
	return pair{kid, jwt.GetSigningMethod(algorithm), private}
}

var rsaKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

// jwk is the public key as issuers publish it.
func (p pair) jwk() jose.JSONWebKey {
	return jose.JSONWebKey{Key: p.private.(crypto.Signer).Public(), KeyID: p.kid, Algorithm: p.method.Alg(), Use: "sig"}
}

func setOf(t testing.TB, keys ...pair) []byte {
	t.Helper()
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, p := range keys {
		set.Keys = append(set.Keys, p.jwk())
	}
	text, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// write replaces a file as a whole, as who writes it must.
func write(t testing.TB, path string, text []byte) string {
	t.Helper()
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}

// good are claims that issuer A's tokens for us have; with changes, of which nil takes a claim away.
func good(changes jwt.MapClaims) jwt.MapClaims {
	now := time.Now()
	c := jwt.MapClaims{"iss": issuerA, "aud": audience, "sub": "billing", "iat": now.Unix(), "exp": now.Add(time.Hour).Unix()}
	for name, value := range changes {
		if c[name] = value; value == nil {
			delete(c, name)
		}
	}
	return c
}

// sign makes a token, with changes of its header.
func (p pair) sign(t testing.TB, c jwt.Claims, header map[string]any) string {
	t.Helper()
	token := jwt.NewWithClaims(p.method, c)
	token.Header["kid"] = p.kid
	for name, value := range header {
		if token.Header[name] = value; value == nil {
			delete(token.Header, name)
		}
	}
	raw, err := token.SignedString(p.private)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// raw is a token of any three texts.
func raw(header, claims, signature string) string {
	e := base64.RawURLEncoding.EncodeToString
	return e([]byte(header)) + "." + e([]byte(claims)) + "." + e([]byte(signature))
}

func open(t testing.TB, cfg Config) *Verifier {
	t.Helper()
	v, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Close)
	return v
}

// fileOf is issuer A with these keys in a file.
func fileOf(t testing.TB, keys ...pair) Issuer {
	t.Helper()
	return Issuer{Issuer: issuerA, Audience: audience, JWKSFile: write(t, filepath.Join(t.TempDir(), "jwks.json"), setOf(t, keys...))}
}
