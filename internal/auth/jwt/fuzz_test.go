package jwt

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/golang-jwt/jwt/v5"
)

// FuzzVerify gives any text as a token, and any texts as header and claims of a token that is signed. What is let in has
// what it must have.
func FuzzVerify(f *testing.F) {
	ed, es, rs := keyOf(f, "ed", "EdDSA"), keyOf(f, "es", "ES256"), keyOf(f, "rs", "RS256")
	v := open(f, Config{Issuers: []Issuer{fileOf(f, ed, es, rs)}})
	for _, p := range []pair{ed, es, rs} {
		f.Add(p.sign(f, good(nil), nil), "", "")
		f.Add("", p.method.Alg(), `{"iss":"https://a.example","aud":"push-manager","sub":"x","exp":4000000000}`)
	}
	f.Add(raw(`{"alg":"none"}`, `{}`, ""), `{"alg":"EdDSA","kid":"ed","crit":["x"]}`, `{"exp":1e400,"nbf":null,"aud":[[]]}`)
	f.Add("..", `{"alg":"EdDSA","kid":"ed"}`, `{"iss":"https://a.example","iss":"b","aud":["push-manager"],"exp":1796000000.5,"iat":-0}`)
	f.Add(strings.Repeat(".", MaxToken), `{"alg":"ES256","kid":"es","typ":"at+jwt"}`, `null`)
	f.Fuzz(func(t *testing.T, text, header, claims string) {
		unsigned := strings.TrimSuffix(raw(header, claims, ""), ".")
		signature, err := ed.method.Sign(unsigned, ed.private)
		if err != nil {
			t.Fatal(err)
		}
		signed := raw(header, claims, string(signature))
		for _, text := range []string{text, signed} {
			token, err := v.Verify(t.Context(), text)
			if (token == nil) == (err == nil) {
				t.Fatalf("%+v, %v", token, err)
			}
			if err != nil {
				if reason := Reason(""); !errors.As(err, &reason) || reason == Unavailable || !slices.Contains(Reasons(), reason) {
					t.Fatalf("refused for %v", err)
				}
				continue
			}
			audiences, err := token.claims.GetAudience()
			if err != nil || token.Issuer != issuerA || !slices.Contains(audiences, audience) || token.Subject == "" || token.Expires.IsZero() {
				t.Fatalf("let in: %+v", token)
			}
		}
	})
}

// FuzzJWKS gives any text as a key set. What is taken has keys of the types that their algorithms verify with.
func FuzzJWKS(f *testing.F) {
	ed, es, rs := keyOf(f, "ed", "EdDSA"), keyOf(f, "es", "ES256"), keyOf(f, "rs", "RS256")
	f.Add(setOf(f, ed, es, rs))
	for _, text := range []string{
		`{"keys":[]}`, `{}`, `{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"}]}`, `{"keys":[{"kty":"EC","crv":"P-256","x":"AA","y":"AA"}]}`,
		`{"keys":[{"kty":"OKP","crv":"Ed25519","x":"","d":""}]}`, `{"keys":[{"kty":"oct","k":"AAAA"}]}`, `{"keys":[{"kty":"RSA","x5c":["MIIB"],"x5u":":"}]}`,
		`{"keys":[null,7,"",[],{}]}`, `{"keys":[{"kty":"EC","kty":"RSA"}]}`,
	} {
		f.Add([]byte(text))
	}
	var all []string
	for algorithm := range algorithms() {
		all = append(all, algorithm)
	}
	s := &source{Issuer: Issuer{Algorithms: all}}
	f.Fuzz(func(t *testing.T, text []byte) {
		set, err := s.parse(text)
		if (set == nil) == (err == nil) {
			t.Fatalf("%+v, %v", set, err)
		}
		if err != nil {
			return
		}
		for id, key := range set.byID {
			// A key of a wrong type is another error than a signature that is wrong.
			method := jwt.GetSigningMethod(id.algorithm)
			if err := method.Verify("x.y", make([]byte, 64), key); errors.Is(err, jwt.ErrInvalidKeyType) {
				t.Errorf("%v: %v", id, err)
			}
		}
	})
}
