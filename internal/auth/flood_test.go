package auth

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/auth/authtest"
	"github.com/push-manager/push-manager/internal/auth/jwt"
)

// TestBadTokensAtOnceAreBoundedAsThoseInTurn: calls come many at a time on one connection, and verifying one may wait for its
// issuer. They must not all begin before the first one has turned out to be bad.
func TestBadTokensAtOnceAreBoundedAsThoseInTurn(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // an issuer that does not answer, so that a verification takes a second
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	files := authtest.New(t, callersOf("", "a"))
	const slow = "https://slow.example"
	tokens, err := jwt.New(jwt.Config{Issuers: append(files.Issuers(), jwt.Issuer{Issuer: slow, Audience: authtest.Audience, JWKSURL: "http://" + silent.Addr().String() + "/"})})
	if err != nil {
		t.Fatal(err)
	}
	defer tokens.Close()
	o := open(t, files, func(c *Config) { c.Tokens = tokens })
	s := NewSession(nil)
	const calls = 500
	var all sync.WaitGroup
	reasons := make([]error, calls)
	for i := range calls {
		token := unsigned(t, fmt.Sprintf(`{"alg":"EdDSA","kid":"k%d"}`, i), fmt.Sprintf(`{"iss":%q}`, slow))
		all.Go(func() { _, reasons[i] = o.ask(s, "Bearer "+token) })
	}
	all.Wait()
	verified, err := strconv.Atoi(o.metric("push_manager_auth_verifications_total"))
	if err != nil || verified < 1 || verified >= 2*badBurst+badRate {
		t.Errorf("%d of %d tokens were verified (%v)", verified, calls, err)
	}
	waiting := 0
	for _, err := range reasons {
		if errors.Is(err, TooMany) {
			waiting++
		}
	}
	if waiting+verified < calls {
		t.Errorf("%d tokens were verified, %d told to wait, of %d", verified, waiting, calls)
	}
	// A good one that is new on the connection is served once it has calmed down, and another connection at once.
	good := "Bearer " + files.Token("a", time.Hour)
	if name, err := o.ask(NewSession(nil), good); name != "a" {
		t.Errorf("another connection: %v", err)
	}
}

// TestCallsWithOneBadTokenPayOnce: a caller that has not noticed that its token has ended is served when it has.
func TestCallsWithOneBadTokenPayOnce(t *testing.T) {
	files := authtest.New(t, callersOf("", "a"))
	o := open(t, files)
	s := NewSession(nil)
	old := "Bearer " + files.Token("a", -time.Hour)
	var all sync.WaitGroup
	for range 500 {
		all.Go(func() {
			if _, err := o.ask(s, old); !errors.Is(err, Expired) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if name, err := o.ask(s, "Bearer "+files.Token("a", time.Hour)); name != "a" {
		t.Error(err)
	}
}

// unsigned is a token whose signature is wrong.
func unsigned(t *testing.T, header, claims string) string {
	t.Helper()
	part := base64.RawURLEncoding.EncodeToString
	return part([]byte(header)) + "." + part([]byte(claims)) + "." + part(make([]byte, 64))
}
