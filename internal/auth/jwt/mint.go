package jwt

import (
	"bytes"
	"fmt"

	"github.com/golang-jwt/jwt/v5"

	"github.com/push-manager/push-manager/internal/config"
)

// ReadSecret reads the file of a shared secret, as an Issuer's HSSecretFile.
func ReadSecret(path string) ([]byte, error) {
	secret, err := config.ReadSecretFile(path, maxSecret)
	if err != nil {
		return nil, err
	}
	if secret = bytes.TrimSpace(secret); len(secret) < minSecret {
		return nil, fmt.Errorf("%s: has fewer than %d bytes", path, minSecret)
	}
	return secret, nil
}

// Mint makes a token with these claims, signed with a shared secret by HS256. It is for development and tests: whoever can
// verify such a token can make one.
func Mint(secret []byte, claims map[string]any) (string, error) {
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims(claims)).SignedString(secret)
	if err != nil {
		return "", fmt.Errorf("mint a token: %w", err)
	}
	return token, nil
}
