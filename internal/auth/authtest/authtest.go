// Package authtest makes the files of package auth, and credentials for them, for tests.
package authtest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	golangjwt "github.com/golang-jwt/jwt/v5"

	"github.com/push-manager/push-manager/internal/auth/apikey"
	"github.com/push-manager/push-manager/internal/auth/jwt"
)

// The issuer of all tokens, and who they are for.
const (
	Issuer   = "https://idp.example"
	Audience = "push-manager"
)

// Files are a policy, keys, and the secret of an issuer, in a folder of the test.
type Files struct {
	Policy, Keys, Secret string

	t     testing.TB
	lines []string // of the keys
}

// New writes a policy, and keys that are none yet.
func New(t testing.TB, policy string) *Files {
	t.Helper()
	dir := t.TempDir()
	f := &Files{Policy: filepath.Join(dir, "policy.yaml"), Keys: filepath.Join(dir, "keys.yaml"), Secret: filepath.Join(dir, "secret"), t: t}
	f.write(f.Policy, policy)
	f.writeKeys()
	f.write(f.Secret, strings.Repeat("s", 64))
	return f
}

// WritePolicy replaces the policy.
func (f *Files) WritePolicy(text string) { f.t.Helper(); f.write(f.Policy, text) }

// write replaces a file as whoever deploys one should.
func (f *Files) write(path, text string) {
	f.t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		f.t.Fatal(err)
	}
}

// NewKey adds a key and returns it with its id.
func (f *Files) NewKey(notAfter time.Time) (key, id string) {
	f.t.Helper()
	key, line, err := apikey.New("test", notAfter, "")
	if err != nil {
		f.t.Fatal(err)
	}
	f.lines = append(f.lines, line)
	f.writeKeys()
	id, _, _ = strings.Cut(line, ":")
	return key, id
}

// DropKey takes a key out of its file.
func (f *Files) DropKey(id string) {
	f.t.Helper()
	f.lines = slices.DeleteFunc(f.lines, func(line string) bool { return strings.HasPrefix(line, id) })
	f.writeKeys()
}

func (f *Files) writeKeys() {
	f.t.Helper()
	if len(f.lines) == 0 {
		f.write(f.Keys, "{}")
		return
	}
	f.write(f.Keys, strings.Join(f.lines, "\n"))
}

// Issuers is the list of issuers with the one that signs tokens.
func (f *Files) Issuers() []jwt.Issuer {
	return []jwt.Issuer{{Issuer: Issuer, Audience: Audience, HSSecretFile: f.Secret}}
}

// Token is a token about a subject, with other claims where change wants them.
func (f *Files) Token(subject string, lives time.Duration, change ...func(golangjwt.MapClaims)) string {
	f.t.Helper()
	secret, err := os.ReadFile(f.Secret)
	if err != nil {
		f.t.Fatal(err)
	}
	claims := golangjwt.MapClaims{"iss": Issuer, "aud": Audience, "sub": subject, "exp": time.Now().Add(lives).Unix()}
	for _, c := range change {
		c(claims)
	}
	text, err := golangjwt.NewWithClaims(golangjwt.SigningMethodHS256, claims).SignedString(secret)
	if err != nil {
		f.t.Fatal(err)
	}
	return text
}
