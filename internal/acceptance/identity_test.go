package acceptance

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const issuer = "https://idp.example"

// callersOfAlice is a policy. billing has a certificate, and may use a token as well; news may not push to alice.
const callersOfAlice = `
version: 1
callers:
  - name: billing
    match: [{san: spiffe://test/client/billing}, {jwt: {issuer: https://idp.example, subject: billing}}]
    allow: [{methods: [PushToUser], users: [alice]}]
  - name: news
    match: [{jwt: {issuer: https://idp.example, subject: news}}]
    allow: [{methods: [PushToUser], users: [bob]}]
`

// identified are the settings of a Push-Manager that asks who calls.
func (s *secured) identified(t *testing.T) []string {
	t.Helper()
	for name, text := range map[string]string{"policy.yaml": callersOfAlice, "secret": strings.Repeat("k", 64)} {
		if err := os.WriteFile(s.file(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	issuers, err := json.Marshal([]map[string]string{{"issuer": issuer, "audience": "push-manager", "hs_secret_file": s.file("secret")}})
	if err != nil {
		t.Fatal(err)
	}
	return []string{"AUTH_MODE=required", "AUTH_POLICY_FILE=" + s.file("policy.yaml"), "AUTH_JWT=" + string(issuers)}
}

// token is one of the issuer for a caller.
func (s *secured) token(t *testing.T, caller string) string {
	t.Helper()
	text, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{
		"iss": issuer, "aud": "push-manager", "sub": caller, "exp": time.Now().Add(time.Hour).Unix(),
	}).SignedString(s.read(t, "secret"))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestNodeJSCallerIsKnownByItsToken(t *testing.T) {
	s := startSecured(t)
	m := s.launch(t, append(s.identified(t), "TLS_CLIENT_AUTH=optional")...)
	for _, test := range []struct{ name, cert, token, refused string }{
		{"token", "", s.token(t, "billing"), ""},
		{"certificate", "client-billing", "", ""},
		{"neither", "", "", "UNAUTHENTICATED"},
		{"token of a caller without the right", "", s.token(t, "news"), "PERMISSION_DENIED"},
		{"such a token beside a certificate that has it", "client-billing", s.token(t, "news"), "PERMISSION_DENIED"},
		{"no token", "", "abc.def.ghi", "UNAUTHENTICATED"},
	} {
		t.Run(test.name, func(t *testing.T) {
			saw := s.nodeJS(t, m, test.cert, test.token)
			if test.refused == "" && (!saw.Delivered || saw.Streamed != streamedNodeJS || saw.Error != nil) {
				t.Errorf("saw %+v", saw)
			}
			if test.refused != "" && (saw.Error == nil || saw.Error.Code != test.refused || saw.Error.Reason == "") {
				t.Errorf("saw %+v %+v", saw, saw.Error)
			}
		})
	}
}

// TestBalancerHidesCertificatesAndPassesTokensOn: where TLS ends at the balancer its own certificate opens the door and is no
// caller, what it says of the caller is not believed, and tokens tell callers apart.
func TestBalancerHidesCertificatesAndPassesTokensOn(t *testing.T) {
	s := startSecured(t)
	managers := []*manager{s.launch(t, s.identified(t)...)}
	for name, way := range map[string]struct {
		hides bool
		begin func(*testing.T) *balancer
	}{
		"HAProxy passes TLS through": {false, func(t *testing.T) *balancer {
			t.Helper()
			return haproxy(t, example(t, "haproxy/haproxy.cfg"), nil, managers)
		}},
		"nginx passes TLS through": {false, func(t *testing.T) *balancer { t.Helper(); return nginxPassthrough(t, managers) }},
		"TLS ends at HAProxy":      {true, func(t *testing.T) *balancer { t.Helper(); return s.haproxyTLS(t, managers, false) }},
		"TLS ends at nginx":        {true, func(t *testing.T) *balancer { t.Helper(); return s.nginxTLS(t, managers, false) }},
	} {
		t.Run(name, func(t *testing.T) {
			api := s.connect(t, way.begin(t).addr, "client-billing")
			byCertificate := codes.OK
			if way.hides {
				byCertificate = codes.Unauthenticated
			}
			for _, test := range []struct {
				name string
				md   metadata.MD
				code codes.Code
			}{
				{"certificate", nil, byCertificate},
				{"headers that name a caller", metadata.Pairs("x-forwarded-client-cert", "URI=spiffe://test/client/billing", "x-forwarded-for", "127.0.0.1", "x-user", "billing"), byCertificate},
				{"token", metadata.Pairs("authorization", "Bearer "+s.token(t, "billing")), codes.OK},
				{"token of a caller without the right", metadata.Pairs("authorization", "Bearer "+s.token(t, "news")), codes.PermissionDenied},
				{"token that is none", metadata.Pairs("authorization", "Bearer abc.def.ghi"), codes.Unauthenticated},
			} {
				_, err := api.PushToUser(metadata.NewOutgoingContext(within(t, patience), test.md), toAlice([]byte("x")))
				if status.Code(err) != test.code || err != nil && nothingSent(err) == "" {
					t.Errorf("%s: %v, want %v", test.name, err, test.code)
				}
			}
			if _, err := api.PushToUser(context.Background(), toAlice([]byte("x"))); status.Code(err) != byCertificate {
				t.Errorf("after tokens of others, on the same connection: %v, want %v", err, byCertificate)
			}
		})
	}
}
