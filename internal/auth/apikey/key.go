package apikey

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"strings"
	"time"

	"github.com/push-manager/push-manager/internal/ids"
)

// Prefix is how every key begins, and nothing else that stands after Bearer.
const Prefix = "pmk_"

const (
	idLen       = 8
	secretBytes = 32
	secretLen   = (secretBytes*8 + 5) / 6 // in base64 without padding
	sumLen      = 6

	letters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)

// hashPrefix names the hash in the file.
const hashPrefix = "sha256:"

// New makes a key for a caller, and the line for the file, without a line break. The zero notAfter is a key without end.
// The key is a secret: the line does not hold it.
func New(name string, notAfter time.Time, comment string) (key, line string, err error) {
	if err := ids.Check(name, ids.MaxBytes); err != nil {
		return "", "", fmt.Errorf("name %w", err)
	}
	if comment != "" {
		if err := ids.Check(comment, ids.MaxBytes); err != nil {
			return "", "", fmt.Errorf("comment %w", err)
		}
	}
	var id [idLen]byte
	for i := 0; i < len(id); {
		var b [1]byte
		_, _ = rand.Read(b[:])                     // does not fail
		if n := b[0] & 63; int(n) < len(letters) { // or some letters would be likelier
			id[i] = letters[n]
			i++
		}
	}
	var random [secretBytes]byte
	_, _ = rand.Read(random[:]) // does not fail
	secret := base64.RawURLEncoding.EncodeToString(random[:])
	key = Prefix + string(id[:]) + "_" + secret
	sum := checksum([]byte(key))
	key += "_" + string(sum[:])

	hash := sha256.Sum256([]byte(secret))
	line = string(id[:]) + `: {hash: "` + hashPrefix + hex.EncodeToString(hash[:]) + `", name: ` + quote(name)
	if !notAfter.IsZero() {
		line += ", not_after: " + notAfter.UTC().Format(time.RFC3339)
	}
	if comment != "" {
		line += ", comment: " + quote(comment)
	}
	return key, line + "}", nil
}

// quote writes text without control characters as YAML.
func quote(text string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(text) + `"`
}

// split takes a key apart. ok is whether it is one: its form and its checksum are right.
func split(key string) (id string, secret []byte, ok bool) {
	const (
		idEnd     = len(Prefix) + idLen
		secretEnd = idEnd + 1 + secretLen
	)
	if len(key) != secretEnd+1+sumLen || key[:len(Prefix)] != Prefix || key[idEnd] != '_' || key[secretEnd] != '_' {
		return "", nil, false
	}
	text := []byte(key)
	id = key[len(Prefix):idEnd]
	return id, text[idEnd+1 : secretEnd], IsID(id) && checksum(text[:secretEnd]) == [sumLen]byte(text[secretEnd+1:])
}

// IsID tells whether a text can be the id of a key.
func IsID(text string) bool {
	return len(text) == idLen && strings.Trim(text, letters) == ""
}

// checksum is CRC-32 in base 62, with zeros in front.
func checksum(text []byte) (digits [sumLen]byte) {
	sum := crc32.ChecksumIEEE(text)
	for i := range digits {
		digits[sumLen-1-i] = letters[sum%uint32(len(letters))]
		sum /= uint32(len(letters))
	}
	return digits
}
