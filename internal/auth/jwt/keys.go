package jwt

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/push-manager/push-manager/internal/config"
)

const (
	maxJWKS   = 1 << 20  // bytes: large identity providers serve 10 KB
	maxSecret = 16 << 10 // bytes
	maxKeys   = 256      // in a set
	maxKeyID  = 256      // bytes

	minSecret  = 32 // bytes (RFC 7518, 3.2)
	minRSABits = 2048
	maxRSABits = 8192 // verification costs the square of it
)

// algorithms are those that can be configured, and whether they need a secret. none is not among them.
func algorithms() map[string]bool {
	return map[string]bool{
		"EdDSA": false, "ES256": false, "ES384": false, "ES512": false,
		"RS256": false, "RS384": false, "RS512": false, "PS256": false, "PS384": false, "PS512": false,
		"HS256": true, "HS384": true, "HS512": true,
	}
}

// keyID is what a token names a key of its issuer by.
type keyID struct{ kid, algorithm string }

// keySet is the keys of one issuer at one moment. It is immutable.
type keySet struct {
	byID map[keyID]any // what golang-jwt verifies with: a public key, or a secret as []byte
	sum  [sha256.Size]byte
	read time.Time
}

// lookup finds a key. A secret has no id: whichever a token names is right.
func (s *keySet) lookup(id keyID) (key any, ok bool) {
	if s == nil {
		return nil, false
	}
	if key, ok = s.byID[id]; !ok {
		if key, ok = s.byID[keyID{algorithm: id.algorithm}]; ok {
			_, ok = key.([]byte)
		}
	}
	return key, ok
}

// count is how many keys there are: one may be for several algorithms.
func (s *keySet) count() int {
	ids := map[string]bool{}
	for id := range s.byID {
		ids[id.kid] = true
	}
	return len(ids)
}

// readFile reads the issuer's file.
func (s *source) readFile() (*keySet, error) {
	if s.HSSecretFile == "" {
		text, err := config.ReadFile(s.path, maxJWKS)
		if err != nil {
			return nil, err
		}
		keys, err := s.parse(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.path, err)
		}
		return keys, nil
	}
	secret, err := ReadSecret(s.path)
	if err != nil {
		return nil, err
	}
	keys := &keySet{byID: map[keyID]any{}, sum: sha256.Sum256(secret), read: time.Now()}
	for _, algorithm := range s.Algorithms {
		keys.byID[keyID{algorithm: algorithm}] = secret
	}
	return keys, nil
}

// parse reads a JWK set. Keys that are for something else are left out; a set that has keys and not one that can be used
// is an error, as is one that is ambiguous. A set without any keys is right: its issuer has withdrawn them.
func (s *source) parse(text []byte) (keys *keySet, err error) {
	defer func() {
		if recover() != nil { // of a library, on a text that nobody has thought of
			keys, err = nil, errors.New("is not understood")
		}
	}()
	var set struct {
		Keys *[]json.RawMessage `json:"keys"`
	}
	switch err := json.Unmarshal(text, &set); {
	case err != nil || set.Keys == nil:
		return nil, errors.New("is no JWK set")
	case len(*set.Keys) > maxKeys:
		return nil, fmt.Errorf("has more than %d keys", maxKeys)
	}
	keys = &keySet{byID: map[keyID]any{}, sum: sha256.Sum256(text), read: time.Now()}
	var unusable error
	for i, raw := range *set.Keys {
		var jwk jose.JSONWebKey
		if err := jwk.UnmarshalJSON(raw); err != nil {
			unusable = fmt.Errorf("key %d is not understood", i+1)
			continue
		}
		fits, err := algorithmsOf(&jwk)
		if err != nil {
			unusable = fmt.Errorf("key %d: %w", i+1, err)
			continue
		}
		for _, algorithm := range s.Algorithms {
			if !slices.Contains(fits, algorithm) {
				continue
			}
			id := keyID{jwk.KeyID, algorithm}
			if _, twice := keys.byID[id]; twice {
				return nil, fmt.Errorf("key %d has the kid of another key for %s", i+1, algorithm)
			}
			keys.byID[id] = jwk.Key
		}
	}
	if len(*set.Keys) > 0 && len(keys.byID) == 0 {
		if unusable == nil {
			unusable = fmt.Errorf("no key is for one of %v", s.Algorithms)
		}
		return nil, fmt.Errorf("has no key that can be used: %w", unusable)
	}
	return keys, nil
}

// algorithmsOf are the algorithms that a key may verify: those of its type, or the one that it names.
func algorithmsOf(jwk *jose.JSONWebKey) ([]string, error) {
	var fits []string
	switch key := jwk.Key.(type) {
	case ed25519.PublicKey:
		fits = []string{"EdDSA"}
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			fits = []string{"ES256"}
		case elliptic.P384():
			fits = []string{"ES384"}
		case elliptic.P521():
			fits = []string{"ES512"}
		}
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return nil, fmt.Errorf("RSA with %d bits, must be %d to %d", bits, minRSABits, maxRSABits)
		}
		fits = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
	case []byte, crypto.Signer:
		return nil, errors.New("is a secret or private key: a set holds public keys")
	}
	named := jwk.Algorithm
	if named == "Ed25519" { // RFC 9864 names EdDSA by its curve
		named = "EdDSA"
	}
	switch {
	case jwk.Use != "" && jwk.Use != "sig":
		return nil, errors.New("is not for signatures")
	case len(jwk.KeyID) > maxKeyID:
		return nil, fmt.Errorf("kid has more than %d bytes", maxKeyID)
	case named != "" && !slices.Contains(fits, named):
		return nil, errors.New("alg does not fit its type")
	case named != "":
		return []string{named}, nil
	}
	return fits, nil
}
