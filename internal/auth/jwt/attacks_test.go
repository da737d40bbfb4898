package jwt

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// refused wants one reason, and an error without anything of the token.
func refused(t *testing.T, v *Verifier, raw string, want Reason) {
	t.Helper()
	token, err := v.Verify(t.Context(), raw)
	if token != nil || !errors.Is(err, want) {
		t.Errorf("%+v, %v, want %s", token, err, want)
	}
}

// TestForgedTokensAreRefused has the attacks of RFC 8725, each of which some library has let through.
func TestForgedTokensAreRefused(t *testing.T) {
	ed, es, rs := keyOf(t, "ed", "EdDSA"), keyOf(t, "es", "ES256"), keyOf(t, "rs", "RS256")
	stranger, b := keyOf(t, "ed", "EdDSA"), keyOf(t, "only-b", "EdDSA")
	issuers := []Issuer{fileOf(t, ed, es, rs), fileOf(t, b, keyOf(t, "ed", "ES256"))}
	issuers[1].Issuer = issuerB
	v := open(t, Config{Issuers: issuers})
	for _, p := range []pair{ed, es, rs} {
		if _, err := v.Verify(t.Context(), p.sign(t, good(nil), nil)); err != nil {
			t.Fatalf("%s: %v", p.kid, err)
		}
	}
	claims := func() string {
		text, err := json.Marshal(good(nil))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}()
	// hmacWith signs with a public key as if it were a secret: who has published it knows it.
	hmacWith := func(algorithm string, secret []byte) string {
		unsigned := strings.TrimSuffix(raw(fmt.Sprintf(`{"alg":%q,"typ":"JWT","kid":"rs"}`, algorithm), claims, ""), ".")
		mac := hmac.New(sha256.New, secret)
		mac.Write([]byte(unsigned))
		return unsigned + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
	}
	public := rs.jwk().Key
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	jwkText, err := json.Marshal(rs.jwk())
	if err != nil {
		t.Fatal(err)
	}
	good1 := ed.sign(t, good(nil), nil)
	parts := strings.Split(good1, ".")
	last := good1[len(good1)-1] // of 86 characters, of which the last has four bits that are nothing
	padded := good1[:len(good1)-1] + map[byte]string{'A': "B", 'Q': "R", 'g': "h", 'w': "x"}[last]

	for name, tc := range map[string]struct {
		raw  string
		want Reason
	}{
		"alg none":                        {raw(`{"alg":"none","typ":"JWT"}`, claims, ""), Algorithm},
		"alg None":                        {raw(`{"alg":"None","typ":"JWT","kid":"ed"}`, claims, ""), Algorithm},
		"alg nOnE":                        {raw(`{"alg":"nOnE","kid":"ed"}`, claims, "x"), Algorithm},
		"alg none by the library":         {signNone(t, good(nil)), Algorithm},
		"no alg":                          {raw(`{"typ":"JWT","kid":"ed"}`, claims, "x"), Algorithm},
		"alg is no text":                  {raw(`{"alg":["EdDSA"],"kid":"ed"}`, claims, "x"), Algorithm},
		"HS256 with the public key, PEM":  {hmacWith("HS256", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), Algorithm},
		"HS256 with the public key, DER":  {hmacWith("HS256", der), Algorithm},
		"HS256 with the public key, JWK":  {hmacWith("HS256", jwkText), Algorithm},
		"HS256 with nothing":              {hmacWith("HS256", nil), Algorithm},
		"RS256 for the ES256 key":         {rs.sign(t, good(nil), map[string]any{"kid": "es"}), UnknownKey},
		"ES256 for the RS256 key":         {es.sign(t, good(nil), map[string]any{"kid": "rs"}), UnknownKey},
		"ES256 for the EdDSA key":         {es.sign(t, good(nil), map[string]any{"kid": "ed"}), UnknownKey},
		"RS512, which is not allowed":     {pair{"rs", jwt.SigningMethodRS512, rs.private}.sign(t, good(nil), nil), Algorithm},
		"PS256 with the RS256 key":        {pair{"rs", jwt.SigningMethodPS256, rs.private}.sign(t, good(nil), nil), Algorithm},
		"crit":                            {ed.sign(t, good(nil), map[string]any{"crit": []string{"exp"}}), Algorithm},
		"crit, empty":                     {ed.sign(t, good(nil), map[string]any{"crit": []string{}}), Algorithm},
		"crit, b64":                       {ed.sign(t, good(nil), map[string]any{"crit": []string{"b64"}, "b64": false}), Algorithm},
		"key of a stranger, same kid":     {stranger.sign(t, good(nil), nil), Signature},
		"key of B for a token of A":       {b.sign(t, good(nil), nil), UnknownKey},
		"key of A for a token of B":       {ed.sign(t, good(jwt.MapClaims{"iss": issuerB}), nil), UnknownKey},
		"kid of A's key, which B has too": {es.sign(t, good(jwt.MapClaims{"iss": issuerB}), map[string]any{"kid": "ed"}), Signature},
		"no kid":                          {ed.sign(t, good(nil), map[string]any{"kid": nil}), UnknownKey},
		"kid null":                        {raw(`{"alg":"EdDSA","kid":null}`, claims, "x"), Malformed},
		"kid is no text":                  {raw(`{"alg":"EdDSA","kid":{"a":1}}`, claims, "x"), Malformed},
		"kid of 300 bytes":                {ed.sign(t, good(nil), map[string]any{"kid": strings.Repeat("k", 300)}), Malformed},
		"embedded key":                    {stranger.sign(t, good(nil), map[string]any{"jwk": stranger.jwk()}), Signature},
		"iss of a stranger":               {ed.sign(t, good(jwt.MapClaims{"iss": "https://c.example"}), nil), IssuerWrong},
		"iss with a slash more":           {ed.sign(t, good(jwt.MapClaims{"iss": issuerA + "/"}), nil), IssuerWrong},
		"iss in capitals":                 {ed.sign(t, good(jwt.MapClaims{"iss": strings.ToUpper(issuerA)}), nil), IssuerWrong},
		"iss is a list":                   {ed.sign(t, good(jwt.MapClaims{"iss": []string{issuerA}}), nil), IssuerWrong},
		"no iss":                          {ed.sign(t, good(jwt.MapClaims{"iss": nil}), nil), IssuerWrong},
		"Iss":                             {ed.sign(t, good(jwt.MapClaims{"iss": nil, "Iss": issuerA}), nil), IssuerWrong},
		"no aud":                          {ed.sign(t, good(jwt.MapClaims{"aud": nil}), nil), Audience},
		"aud of another":                  {ed.sign(t, good(jwt.MapClaims{"aud": "billing"}), nil), Audience},
		"aud that begins alike":           {ed.sign(t, good(jwt.MapClaims{"aud": []string{audience + "2", "push"}}), nil), Audience},
		"aud empty":                       {ed.sign(t, good(jwt.MapClaims{"aud": []string{}}), nil), Audience},
		"aud with a number":               {ed.sign(t, good(jwt.MapClaims{"aud": []any{audience, 1}}), nil), Malformed},
		"typ of an ID token":              {ed.sign(t, good(nil), map[string]any{"typ": "secevent+jwt"}), Malformed},
		"typ is a list":                   {ed.sign(t, good(nil), map[string]any{"typ": []string{"JWT"}}), Malformed},
		"claims of another token":         {parts[0] + "." + strings.Split(ed.sign(t, good(jwt.MapClaims{"sub": "root"}), nil), ".")[1] + "." + parts[2], Signature},
		"signature with other spare bits": {padded, Malformed},
		"signature with padding":          {good1 + "==", Malformed},
		"signature cut off":               {good1[:len(good1)-2], Signature},
		"no signature":                    {parts[0] + "." + parts[1] + ".", Signature},
		"line break in it":                {parts[0] + "." + parts[1] + ".\n" + parts[2], Malformed},
		"Bearer before it":                {"Bearer " + good1, Malformed},
		"claims null":                     {raw(`{"alg":"EdDSA","kid":"ed"}`, `null`, "x"), IssuerWrong},
		"claims no object":                {raw(`{"alg":"EdDSA","kid":"ed"}`, `["iss"]`, "x"), Malformed},
		"header null":                     {raw(`null`, claims, "x"), Algorithm},
		"sub missing":                     {ed.sign(t, good(jwt.MapClaims{"sub": nil}), nil), Subject},
		"sub empty":                       {ed.sign(t, good(jwt.MapClaims{"sub": ""}), nil), Subject},
		"sub a number":                    {ed.sign(t, good(jwt.MapClaims{"sub": 7}), nil), Subject},
		"sub with a line break":           {ed.sign(t, good(jwt.MapClaims{"sub": "a\nb"}), nil), Subject},
		"empty":                           {"", Malformed},
		"dots":                            {"..", Malformed},
	} {
		t.Run(name, func(t *testing.T) { refused(t, v, tc.raw, tc.want) })
	}
}

func signNone(t *testing.T, claims jwt.MapClaims) string {
	t.Helper()
	raw, err := jwt.NewWithClaims(jwt.SigningMethodNone, claims).SignedString(jwt.UnsafeAllowNoneSignatureType)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// TestTokensOfKubernetesAndOfRFC9068AreTaken: those without typ, and with at+jwt.
func TestTokensOfKubernetesAndOfRFC9068AreTaken(t *testing.T) {
	key := keyOf(t, "k", "EdDSA")
	v := open(t, Config{Issuers: []Issuer{fileOf(t, key)}})
	for _, typ := range []any{nil, "JWT", "jwt", "at+jwt", "application/at+jwt"} {
		if _, err := v.Verify(t.Context(), key.sign(t, good(nil), map[string]any{"typ": typ})); err != nil {
			t.Errorf("typ %v: %v", typ, err)
		}
	}
}

func TestTimesOfATokenAreChecked(t *testing.T) {
	key := keyOf(t, "k", "EdDSA")
	v := open(t, Config{Issuers: []Issuer{fileOf(t, key)}})
	in := func(d time.Duration) int64 { return time.Now().Add(d).Unix() }
	const taken Reason = ""
	for name, tc := range map[string]struct {
		changes jwt.MapClaims
		want    Reason
	}{
		"no exp":                   {jwt.MapClaims{"exp": nil}, Lifetime},
		"exp null":                 {jwt.MapClaims{"exp": json.RawMessage("null")}, Malformed},
		"exp a text":               {jwt.MapClaims{"exp": "9999999999"}, Malformed},
		"exp 1e300":                {jwt.MapClaims{"exp": json.RawMessage("1e300")}, Malformed},
		"exp 1e19, which wraps":    {jwt.MapClaims{"exp": json.RawMessage("1e19")}, Malformed},
		"exp below zero":           {jwt.MapClaims{"exp": -1}, Malformed},
		"exp zero":                 {jwt.MapClaims{"exp": 0}, Expired},
		"ended a minute ago":       {jwt.MapClaims{"exp": in(-time.Minute)}, Expired},
		"ended within the leeway":  {jwt.MapClaims{"exp": in(-10 * time.Second)}, taken},
		"ends in 24 h":             {jwt.MapClaims{"exp": in(24 * time.Hour)}, taken},
		"ends in 25 h":             {jwt.MapClaims{"exp": in(25 * time.Hour)}, Lifetime},
		"ends in a fraction":       {jwt.MapClaims{"exp": float64(in(time.Hour)) + 0.5}, taken},
		"begins in a minute":       {jwt.MapClaims{"nbf": in(time.Minute)}, NotYet},
		"begins within the leeway": {jwt.MapClaims{"nbf": in(10 * time.Second)}, taken},
		"nbf a text":               {jwt.MapClaims{"nbf": "1"}, Malformed},
		"made in a minute":         {jwt.MapClaims{"iat": in(time.Minute)}, NotYet},
		"iat 1e300":                {jwt.MapClaims{"iat": json.RawMessage("1e300")}, Malformed},
		"no iat":                   {jwt.MapClaims{"iat": nil}, taken},
	} {
		t.Run(name, func(t *testing.T) {
			if token, err := v.Verify(t.Context(), key.sign(t, good(tc.changes), nil)); tc.want != taken && !errors.Is(err, tc.want) || tc.want == taken && (err != nil || token == nil) {
				t.Errorf("%+v, %v, want %q", token, err, tc.want)
			}
		})
	}
}

// TestLargeTokensAreRefusedBeforeTheyAreParsed: a split at 10^5 dots has cost others gigabytes (CVE-2025-30204).
func TestLargeTokensAreRefusedBeforeTheyAreParsed(t *testing.T) {
	key := keyOf(t, "k", "EdDSA")
	v := open(t, Config{Issuers: []Issuer{fileOf(t, key)}})
	largest := key.sign(t, good(nil), nil)
	for n := MaxToken; len(largest) < MaxToken-2; n-- { // base64 leaves no length for some
		if text := key.sign(t, good(jwt.MapClaims{"x": strings.Repeat("x", n*3/4-len(largest)*3/4)}), nil); len(text) <= MaxToken {
			largest = text
		}
	}
	if _, err := v.Verify(t.Context(), largest); err != nil {
		t.Errorf("%d bytes: %v", len(largest), err)
	}
	for name, raw := range map[string]string{
		"1 MiB":          key.sign(t, good(jwt.MapClaims{"x": strings.Repeat("x", 1<<20)}), nil),
		"10^5 dots":      strings.Repeat(".", 100_000),
		"8,000 dots":     strings.Repeat(".", 8_000),
		"one byte more":  largest + strings.Repeat("A", MaxToken+1-len(largest)),
		"deeply nested":  "x" + strings.Repeat("[", 1<<20),
		"a dot too many": key.sign(t, good(nil), nil) + ".",
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, v, raw, Malformed)
			if n := testing.AllocsPerRun(10, func() { _, _ = v.Verify(t.Context(), raw) }); n > 0 {
				t.Errorf("%v allocations: it was parsed", n)
			}
		})
	}
}
