package jwt

import "testing"

func BenchmarkVerify(b *testing.B) {
	for _, algorithm := range []string{"EdDSA", "ES256", "RS256"} {
		key := keyOf(b, "k", algorithm)
		v := open(b, Config{Issuers: []Issuer{fileOf(b, key)}})
		raw := key.sign(b, good(nil), nil)
		b.Run("algorithm="+algorithm, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := v.Verify(b.Context(), raw); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
