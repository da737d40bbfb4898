package jwt

import (
	"path/filepath"
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
