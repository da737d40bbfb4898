package pushctl

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/internal/auth/jwt"
)

// TestTokenIsGoodWhereTheSecretIs: what is made is verified as a Connect-Node does it.
func TestTokenIsGoodWhereTheSecretIs(t *testing.T) {
	dir := t.TempDir()
	secret, out, open, short := filepath.Join(dir, "secret"), filepath.Join(dir, "token"), filepath.Join(dir, "open"), filepath.Join(dir, "short")
	for path, text := range map[string]string{secret: strings.Repeat("s", 32), open: strings.Repeat("s", 32), short: "s"} {
		if err := os.WriteFile(path, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	v, err := jwt.New(jwt.Config{Issuers: []jwt.Issuer{{Issuer: "dev", Audience: "gateway", HSSecretFile: secret}}})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	args := []string{"token", "alice", "--secret-file", secret, "--issuer=dev", "--audience=gateway"}
	code, plain, errOut := pushctl(t, "", args...)
	token, err := v.Verify(t.Context(), strings.TrimSpace(plain))
	if code != exitOK || err != nil || token.Subject != "alice" {
		t.Fatalf("exit %d, %q: %v", code, errOut, err)
	}
	var rooms []string
	if there, err := token.Claim("rooms", &rooms); there || err != nil {
		t.Errorf("rooms %q, %v: nobody asked for any", rooms, err)
	}
	if code, _, errOut := pushctl(t, "", append(args, "--room=a,b", "--room=c*", "--tenant=shop", "--name=Alice", "--valid=24h", "--out", out)...); code != exitOK {
		t.Fatalf("exit %d, %q", code, errOut)
	}
	written, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	token, err = v.Verify(t.Context(), strings.TrimSpace(string(written)))
	if err != nil {
		t.Fatal(err)
	}
	var tenant, name string
	for claim, into := range map[string]any{"rooms": &rooms, "tenant": &tenant, "name": &name} {
		if there, err := token.Claim(claim, into); !there || err != nil {
			t.Errorf("%s: %v, %v", claim, there, err)
		}
	}
	if !slices.Equal(rooms, []string{"a,b", "c*"}) || tenant != "shop" || name != "Alice" {
		t.Errorf("rooms %q, tenant %q, name %q", rooms, tenant, name)
	}
	for want, more := range map[string][]string{
		"--valid": {"--valid=25h"}, "--secret-file": {"--secret-file", "/nowhere"}, open: {"--secret-file", open}, "fewer than 32 bytes": {"--secret-file", short},
	} {
		if code, _, errOut := pushctl(t, "", append(args, more...)...); code != exitUsage || !strings.Contains(errOut, want) {
			t.Errorf("%q: exit %d, %q", more, code, errOut)
		}
	}
}
