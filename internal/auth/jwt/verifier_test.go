package jwt

import (
	"bytes"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/golang-jwt/jwt/v5"
)

func TestTokenOfAnIssuerTellsWhoCallsAndItsClaims(t *testing.T) {
	for algorithm, secret := range algorithms() {
		t.Run(algorithm, func(t *testing.T) {
			key := keyOf(t, "k1", algorithm)
			issuer := Issuer{Issuer: issuerA, Audience: audience, CallerClaim: "client_id"}
			if secret {
				issuer.HSSecretFile = write(t, filepath.Join(t.TempDir(), "secret"), append(key.private.([]byte), '\n'))
			} else {
				issuer.JWKSFile = fileOf(t, key).JWKSFile
			}
			issuer.Algorithms = []string{algorithm}
			v := open(t, Config{Issuers: []Issuer{issuer}})
			claims := good(jwt.MapClaims{"client_id": "crm", "tenant": "shop", "rooms": []string{"order-*"}, "aud": []string{"x", audience}})
			token, err := v.Verify(t.Context(), key.sign(t, claims, nil))
			if err != nil {
				t.Fatal(err)
			}
			var tenant string
			var rooms []string
			if _, err := token.Claim("tenant", &tenant); err != nil || tenant != "shop" {
				t.Errorf("tenant %q, %v", tenant, err)
			}
			if ok, err := token.Claim("rooms", &rooms); !ok || err != nil || len(rooms) != 1 {
				t.Errorf("rooms %q, %v, %v", rooms, ok, err)
			}
			if ok, err := token.Claim("Tenant", &tenant); ok || err != nil {
				t.Errorf("a claim of another name: %v, %v", ok, err)
			}
			if ok, err := token.Claim("tenant", &rooms); !ok || err == nil || err.Error() != "claim tenant is no *[]string" {
				t.Errorf("a claim of another type: %v, %v", ok, err)
			}
			wantKey := key.kid
			if secret {
				wantKey = ""
			}
			if token.Issuer != issuerA || token.Subject != "crm" || token.KeyID != wantKey || token.Expires.Unix() != claims["exp"] {
				t.Errorf("%+v", token)
			}
		})
	}
}

// TestKeyWithoutIdIsForTokensWithoutIt alone.
func TestKeyWithoutIdIsForTokensWithoutIt(t *testing.T) {
	key := keyOf(t, "", "EdDSA")
	v := open(t, Config{Issuers: []Issuer{fileOf(t, key)}})
	if _, err := v.Verify(t.Context(), key.sign(t, good(nil), map[string]any{"kid": nil})); err != nil {
		t.Error(err)
	}
	refused(t, v, key.sign(t, good(nil), map[string]any{"kid": "x"}), UnknownKey)
}

// TestNothingOfATokenIsLoggedOrInAnError, whatever becomes of it.
func TestNothingOfATokenIsLoggedOrInAnError(t *testing.T) {
	const planted = "planted-5c1f"
	key := keyOf(t, "k", "EdDSA")
	var log bytes.Buffer
	v, err := New(Config{Issuers: []Issuer{fileOf(t, key)}, Logger: slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		t.Fatal(err)
	}
	for _, raw := range []string{
		key.sign(t, good(jwt.MapClaims{"iss": planted}), nil),
		key.sign(t, good(jwt.MapClaims{"aud": planted}), nil),
		key.sign(t, good(jwt.MapClaims{"sub": planted, "exp": 1}), nil),
		key.sign(t, good(jwt.MapClaims{"sub": planted + "\n"}), nil),
		key.sign(t, good(nil), map[string]any{"kid": planted}),
		raw(`{"alg":"`+planted+`"}`, `{}`, ""),
		raw(`{"alg":"EdDSA"}`, `{"iss":`+planted, ""),
		planted,
	} {
		if _, err := v.Verify(t.Context(), raw); err == nil || strings.Contains(err.Error(), planted) || strings.Contains(err.Error(), "\n") {
			t.Errorf("refused with %v", err)
		}
	}
	token, err := v.Verify(t.Context(), key.sign(t, good(jwt.MapClaims{"x": planted}), nil))
	if err != nil {
		t.Fatal(err)
	}
	var number int
	if _, err := token.Claim("x", &number); err == nil || strings.Contains(err.Error(), planted) {
		t.Errorf("a claim of another type: %v", err)
	}
	v.Close()
	if strings.Contains(log.String(), planted) {
		t.Errorf("logged: %s", &log)
	}
}
