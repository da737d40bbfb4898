package jwt

import (
	"bytes"
	"crypto"
)

// Key is the key of an issuer that a token was signed with.
type Key struct {
	issuer string
	id     keyID
	key    any
}

// Has tells whether the issuer still has this very key under its id. It verifies nothing and never waits: it is for those
// who keep what a token said for as long as the token is good, such as connections, and ask whenever Generation has changed.
func (v *Verifier) Has(k Key) bool {
	s := v.issuers[k.issuer]
	if s == nil {
		return false
	}
	now, ok := s.keys.Load().lookup(k.id)
	if !ok {
		return false
	}
	switch key := k.key.(type) {
	case []byte:
		secret, ok := now.([]byte)
		return ok && bytes.Equal(secret, key)
	case interface{ Equal(crypto.PublicKey) bool }: // all public keys of the standard library
		return key.Equal(now)
	}
	return false
}
