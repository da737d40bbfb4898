package client

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/push-manager/push-manager/internal/certs"
)

// maxToken bounds a token; Push-Manager takes 8 KiB.
const maxToken = 16 << 10

func checkToken(token string) error {
	switch {
	case token == "":
		return errors.New("is empty")
	case len(token) > maxToken:
		return fmt.Errorf("has more than %d bytes", maxToken)
	case strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }):
		return errors.New("must be one token without spaces")
	}
	return nil
}

// bearer shows a token with each call.
type bearer struct {
	token func(context.Context) (string, error)
}

// GetRequestMetadata implements credentials.PerRPCCredentials. An error ends the call before it is sent.
func (b bearer) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	token, err := b.token(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkToken(token); err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	return map[string]string{"authorization": "Bearer " + token}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials. New has seen to that.
func (bearer) RequireTransportSecurity() bool { return false }

// tokenReread is how long a token of a file is used without a look at the file.
const tokenReread = time.Second

// tokenFile is a token in a file that may change.
type tokenFile struct {
	path string

	mu sync.Mutex
	// Guarded by mu.
	read  time.Time
	value string
}

// token is the last good one that the file held.
func (f *tokenFile) token(context.Context) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.value != "" && time.Since(f.read) < tokenReread {
		return f.value, nil
	}
	file, err := certs.ReadFile(f.path, maxToken)
	text := strings.TrimSpace(string(file))
	if err == nil {
		err = checkToken(text)
	}
	switch {
	case err == nil:
		f.value = text
	case f.value == "":
		return "", fmt.Errorf("token file %s: %w", f.path, err)
	}
	f.read = time.Now() // a file that is being written is read again soon, and not for each call
	return f.value, nil
}
