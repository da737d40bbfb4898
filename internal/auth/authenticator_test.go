package auth

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	golangjwt "github.com/golang-jwt/jwt/v5"

	"github.com/push-manager/push-manager/internal/auth/apikey"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	"github.com/push-manager/push-manager/internal/auth/jwt"
)

// callersOf is a policy of callers that are found by a token of their name, and what else more says.
func callersOf(more string, names ...string) string {
	var b strings.Builder
	b.WriteString("version: 1\ncallers:\n")
	for _, name := range names {
		fmt.Fprintf(&b, "- {name: %s, match: [{jwt: {issuer: %q, subject: %s}}], allow: [{methods: [PushToUser], users: [%s]}]}\n", name, authtest.Issuer, name, name)
	}
	return b.String() + more
}

// opened is an Authenticator over files.
type opened struct {
	*Authenticator

	files *authtest.Files
	set   *metrics.Set
	log   *bytes.Buffer
}

func open(t testing.TB, files *authtest.Files, change ...func(*Config)) *opened {
	t.Helper()
	o := &opened{files: files, set: metrics.NewSet(), log: &bytes.Buffer{}}
	log := slog.New(slog.NewTextHandler(o.log, nil))
	policies, err := OpenPolicies(PoliciesConfig{File: files.Policy, Logger: log, Metrics: o.set})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(policies.Close)
	keys, err := apikey.Open(apikey.Config{File: files.Keys})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(keys.Close)
	tokens, err := jwt.New(jwt.Config{Issuers: files.Issuers()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tokens.Close)
	cfg := Config{Policies: policies, Keys: keys, Tokens: tokens, Metrics: o.set}
	for _, c := range change {
		c(&cfg)
	}
	if o.Authenticator, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	return o
}

// reload has all files read, inside of a bubble.
func (o *opened) reload() {
	o.policies.Reload()
	o.keys.Reload()
	o.tokens.Reload()
	synctest.Wait()
}

func (o *opened) metric(name string) string {
	var b bytes.Buffer
	o.set.WritePrometheus(&b)
	for line := range strings.Lines(b.String()) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// ask authenticates a call of a connection with one header.
func (o *opened) ask(s *Session, header string) (name string, err error) {
	p, err := o.Authenticate(s, []string{header}, time.Now())
	if err != nil {
		return "", err
	}
	return p.Name, nil
}

// certificate is a connection whose certificate has been verified.
func certificate(notAfter time.Time, names ...string) *Session {
	leaf := &x509.Certificate{NotAfter: notAfter, Subject: pkix.Name{CommonName: "ops.internal", Organization: []string{"ops.internal"}}}
	for _, name := range names {
		if strings.Contains(name, "/") {
			u, err := url.Parse(name)
			if err != nil {
				panic(err)
			}
			leaf.URIs = append(leaf.URIs, u)
		} else {
			leaf.DNSNames = append(leaf.DNSNames, name)
		}
	}
	return NewSession(&tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}, VerifiedChains: [][]*x509.Certificate{{leaf}}})
}

func TestEachCredentialNamesItsCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := authtest.New(t, callersOf("", "a"))
		key, id := files.NewKey(time.Time{})
		old, oldID := files.NewKey(time.Now().Add(-time.Second))
		orphan, _ := files.NewKey(time.Time{})
		files.WritePolicy(callersOf(fmt.Sprintf("- {name: b, match: [{key: %s}, {key: %s}, {san: b.internal}, {san: \"spiffe://prod.example/b\"}], allow: [{methods: [BroadcastMessage]}]}\n"+
			"- {name: ops, match: [{san: ops.internal}], allow: [{methods: ['*']}]}\n", id, oldID), "a"))
		o := open(t, files)
		far := time.Now().Add(time.Hour)
		unsigned := golangjwt.NewWithClaims(golangjwt.SigningMethodNone, golangjwt.MapClaims{"iss": authtest.Issuer, "aud": authtest.Audience, "sub": "a", "exp": far.Unix()})
		none, err := unsigned.SignedString(golangjwt.UnsafeAllowNoneSignatureType)
		if err != nil {
			t.Fatal(err)
		}
		claim := func(name string, value any) func(golangjwt.MapClaims) {
			return func(c golangjwt.MapClaims) { c[name] = value }
		}
		plain := func() *Session { return NewSession(nil) }
		for name, test := range map[string]struct {
			session *Session
			headers []string
			want    string
			err     error
		}{
			"a token":                            {plain(), []string{"Bearer " + files.Token("a", time.Hour)}, "a", nil},
			"a token, another case":              {plain(), []string{"bearer " + files.Token("a", time.Hour)}, "a", nil},
			"a key":                              {plain(), []string{"Bearer " + key}, "b", nil},
			"a DNS name":                         {certificate(far, "x.internal", "b.internal"), nil, "b", nil},
			"a URI":                              {certificate(far, "spiffe://prod.example/b"), nil, "b", nil},
			"a token and a certificate":          {certificate(far, "b.internal"), []string{"Bearer " + files.Token("a", time.Hour)}, "a", nil},
			"a bad token and a good certificate": {certificate(far, "b.internal"), []string{"Bearer " + files.Token("nobody", time.Hour)}, "", NoCaller},
			"nothing":                            {plain(), nil, "", NoCredential},
			"TLS without a certificate":          {NewSession(&tls.ConnectionState{}), nil, "", NoCredential},
			"a certificate that nobody verified": {NewSession(&tls.ConnectionState{PeerCertificates: []*x509.Certificate{{DNSNames: []string{"b.internal"}}}}), nil, "", NoCredential},
			"the common name of another":         {certificate(far, "x.internal"), nil, "", NoCaller},
			"the names of two callers":           {certificate(far, "b.internal", "ops.internal"), nil, "", NoCaller},
			"a certificate that ended":           {certificate(time.Now(), "b.internal"), nil, "", Expired},
			"two headers":                        {plain(), []string{"Bearer " + key, "Bearer " + key}, "", Malformed},
			"two headers, one empty":             {plain(), []string{"Bearer " + key, ""}, "", Malformed},
			"an empty header":                    {plain(), []string{""}, "", Malformed},
			"no scheme":                          {plain(), []string{key}, "", Malformed},
			"another scheme":                     {plain(), []string{"Basic " + key}, "", Malformed},
			"two keys in one":                    {plain(), []string{"Bearer " + key + "," + key}, "", Malformed},
			"an empty token":                     {plain(), []string{"Bearer "}, "", Malformed},
			"16 KiB":                             {plain(), []string{"Bearer " + strings.Repeat("x", 16<<10)}, "", Malformed},
			"10,000 dots":                        {plain(), []string{"Bearer " + strings.Repeat(".", 8000)}, "", Malformed},
			"a token of nobody":                  {plain(), []string{"Bearer " + files.Token("A", time.Hour)}, "", NoCaller},
			"a key of nobody":                    {plain(), []string{"Bearer " + orphan}, "", NoCaller},
			"a key that ended":                   {plain(), []string{"Bearer " + old}, "", Expired},
			"a token that ended":                 {plain(), []string{"Bearer " + files.Token("a", -time.Minute)}, "", Expired},
			"a token for others":                 {plain(), []string{"Bearer " + files.Token("a", time.Hour, claim("aud", "others"))}, "", Reason(jwt.Audience)},
			"a token for nobody":                 {plain(), []string{"Bearer " + files.Token("a", time.Hour, func(c golangjwt.MapClaims) { delete(c, "aud") })}, "", Reason(jwt.Audience)},
			"a token of a stranger":              {plain(), []string{"Bearer " + files.Token("a", time.Hour, claim("iss", "https://evil.example"))}, "", Reason(jwt.IssuerWrong)},
			"an unsigned token":                  {plain(), []string{"Bearer " + none}, "", Reason(jwt.Algorithm)},
			"a token that was changed":           {plain(), []string{"Bearer " + files.Token("a", time.Hour) + "x"}, "", Reason(jwt.Signature)},
		} {
			for range 2 { // the second time it is known
				p, err := o.Authenticate(test.session, test.headers, time.Now())
				got := ""
				if err == nil {
					got = p.Name
				}
				if got != test.want || !errors.Is(err, test.err) {
					t.Errorf("%s: %q, %v, want %q, %v", name, got, err, test.want, test.err)
				}
				if err == nil && (strings.Contains(p.Credential, "pmk_") || strings.Count(p.Credential, ".") > 1 || p.Credential == "") {
					t.Errorf("%s: the credential is told as %q", name, p.Credential)
				}
			}
		}
	})
}

// TestWhatIsRevokedIsRefused: nothing that is known outlives its reason.
func TestWhatIsRevokedIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := authtest.New(t, "")
		key, id := files.NewKey(time.Now().Add(time.Hour))
		policy := func(names ...string) string {
			return callersOf(fmt.Sprintf("- {name: k, match: [{key: %s}, {san: k.internal}], allow: [{methods: [BroadcastMessage]}]}\n", id), names...)
		}
		files.WritePolicy(policy("a", "b"))
		o := open(t, files)
		s, cert := NewSession(nil), certificate(time.Now().Add(2*time.Hour), "k.internal")
		a, b := "Bearer "+files.Token("a", time.Hour), "Bearer "+files.Token("b", 10*time.Minute)
		wants := func(header, want string, why error) {
			t.Helper()
			if got, err := o.ask(s, header); got != want || !errors.Is(err, why) {
				t.Errorf("%q, %v, want %q, %v", got, err, want, why)
			}
		}
		wants(a, "a", nil)
		wants(b, "b", nil)
		wants("Bearer "+key, "k", nil)

		files.WritePolicy(policy("b")) // a caller goes
		o.reload()
		wants(a, "", NoCaller)
		wants(b, "b", nil)
		wants("Bearer "+key, "k", nil)

		files.WritePolicy("version: 1\ncallers: [{name: x}]") // a bad file changes nothing
		time.Sleep(time.Minute)
		wants(b, "b", nil)
		synctest.Wait()
		if n := strings.Count(o.log.String(), "policy not taken over"); n != 1 {
			t.Errorf("a bad policy is logged %d times:\n%s", n, o.log)
		}
		if !strings.Contains(o.log.String(), "line 2: callers[0]") {
			t.Errorf("the line is not told:\n%s", o.log)
		}
		if ok, failed := o.metric(`push_manager_policy_reloads_total{result="ok"}`), o.metric(`push_manager_policy_reloads_total{result="failed"}`); ok != "1" || failed == "0" {
			t.Errorf("%s taken over, %s failed", ok, failed)
		}
		files.WritePolicy(policy("a", "b")) // and comes back
		o.reload()
		time.Sleep(keepBad)
		wants(a, "a", nil)

		time.Sleep(8*time.Minute + 58*time.Second - keepBad) // b ends
		wants(b, "b", nil)
		time.Sleep(2 * time.Second)
		wants(b, "b", nil) // clocks may differ by 30 s
		time.Sleep(31 * time.Second)
		wants(b, "", Expired)
		wants(a, "a", nil)

		files.DropKey(id)
		o.reload()
		wants("Bearer "+key, "", Reason(apikey.Unknown))
		wants(a, "a", nil)

		if p, err := o.Authenticate(cert, nil, time.Now()); err != nil || p.Name != "k" {
			t.Errorf("the certificate: %v", err)
		}
		time.Sleep(2 * time.Hour)
		if _, err := o.Authenticate(cert, nil, time.Now()); !errors.Is(err, Expired) {
			t.Errorf("a certificate that ended: %v", err)
		}
	})
}

// TestAKnownCredentialCostsNoMemory: neither on the connection that it came on last, nor on one with others.
func TestAKnownCredentialCostsNoMemory(t *testing.T) {
	files := authtest.New(t, "")
	key, id := files.NewKey(time.Time{})
	files.WritePolicy(callersOf(fmt.Sprintf("- {name: k, match: [{key: %s}, {san: k.internal}], allow: [{methods: [BroadcastMessage]}]}\n", id), "a"))
	o := open(t, files)
	s, cert := NewSession(nil), certificate(time.Now().Add(time.Hour), "k.internal")
	token, apiKey := []string{"Bearer " + files.Token("a", time.Hour)}, []string{"Bearer " + key}
	for name, ask := range map[string]func() error{
		"the last token":            func() error { _, err := o.Authenticate(s, token, time.Now()); return err },
		"a key beside it":           func() error { _, err := o.Authenticate(s, apiKey, time.Now()); return err },
		"the name of a certificate": func() error { _, err := o.Authenticate(cert, nil, time.Now()); return err },
	} {
		_, _ = o.Authenticate(s, token, time.Now())
		if err := ask(); err != nil {
			t.Fatal(err)
		}
		if n := testing.AllocsPerRun(1000, func() { _ = ask() }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	if n := o.metric("push_manager_auth_verifications_total"); n != "2" {
		t.Errorf("%s verifications", n)
	}
}

// TestABadCredentialIsVerifiedOnceASecond, whatever its caller does.
func TestABadCredentialIsVerifiedOnceASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := authtest.New(t, callersOf("", "a"))
		o := open(t, files)
		s := NewSession(nil)
		one := "Bearer " + files.Token("nobody", time.Hour)
		for range 3 {
			for range 1000 {
				if _, err := o.ask(s, one); !errors.Is(err, NoCaller) {
					t.Fatal(err)
				}
			}
			time.Sleep(keepBad)
		}
		if n := o.verified.Get(); n != 3 {
			t.Errorf("one bad token was verified %d times in 3 s", n)
		}
	})
}

// TestBadCredentialsCountAgainstNobody: behind a balancer they come on the connection of others, whose credentials are taken,
// those that nobody has seen before, too.
func TestBadCredentialsCountAgainstNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := authtest.New(t, "")
		key, id := files.NewKey(time.Time{})
		files.WritePolicy(callersOf(fmt.Sprintf("- {name: k, match: [{key: %s}], allow: [{methods: [BroadcastMessage]}]}\n", id), "a"))
		o := open(t, files)
		s := NewSession(nil)
		good := files.Token("a", time.Hour)
		for i := range 1000 {
			forged := files.Token(fmt.Sprint("a", i), time.Hour)
			for _, bad := range []struct {
				header string
				why    error
			}{
				{fmt.Sprintf("Bearer %d.x.y", i), Malformed},
				{fmt.Sprintf("Bearer %s%d", key, i), Malformed},
				{"Bearer " + forged[:strings.LastIndexByte(forged, '.')] + good[strings.LastIndexByte(good, '.'):], Reason(jwt.Signature)},
			} {
				if _, err := o.ask(s, bad.header); !errors.Is(err, bad.why) {
					t.Fatal(err)
				}
			}
		}
		if name, err := o.ask(s, "Bearer "+key); name != "k" {
			t.Errorf("a key: %v", err)
		}
		if name, err := o.ask(s, "Bearer "+good); name != "a" {
			t.Errorf("a token: %v", err)
		}
	})
}

// TestTokensOfOneConnectionWaitForEachOther, those on others do not, and nothing waits but signatures. Where the line takes
// too long, the token counts as none that is bad.
func TestTokensOfOneConnectionWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := authtest.New(t, "")
		key, id := files.NewKey(time.Time{})
		files.WritePolicy(callersOf(fmt.Sprintf("- {name: k, match: [{key: %s}], allow: [{methods: [BroadcastMessage]}]}\n", id), "a"))
		o := open(t, files)
		s, first, second := NewSession(nil), "Bearer "+files.Token("a", time.Hour), "Bearer "+files.Token("a", 2*time.Hour)
		s.line <- struct{}{} // a signature is being verified
		began := time.Now()
		if name, err := o.ask(NewSession(nil), first); name != "a" {
			t.Errorf("on another connection: %v", err)
		}
		if name, err := o.ask(s, first); name != "a" {
			t.Errorf("known from there: %v", err)
		}
		if name, err := o.ask(s, "Bearer "+key); name != "k" {
			t.Errorf("a key: %v", err)
		}
		if _, err := o.ask(s, "Bearer x.y.z"); !errors.Is(err, Malformed) {
			t.Errorf("garbage: %v", err)
		}
		if waited := time.Since(began); waited != 0 {
			t.Errorf("they waited %v", waited)
		}
		refused, err := o.ask(s, second)
		if why := Reason(jwt.Unavailable); !errors.Is(err, why) || !why.Temporary() || time.Since(began) != verifyBound {
			t.Errorf("%q, %v after %v", refused, err, time.Since(began))
		}
		<-s.line
		if name, err := o.ask(s, second); name != "a" {
			t.Errorf("once it is its turn: %v", err)
		}
	})
}

// TestOneTokenIsVerifiedOnce, however many calls bring it at a time.
func TestOneTokenIsVerifiedOnce(t *testing.T) {
	files := authtest.New(t, callersOf("", "a"))
	o := open(t, files, func(c *Config) { c.CacheEntries = 100 })
	header := "Bearer " + files.Token("a", time.Hour)
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			if name, err := o.ask(NewSession(nil), strings.Clone(header)); name != "a" {
				t.Errorf("%q, %v", name, err)
			}
		})
	}
	all.Wait()
	if n := o.metric("push_manager_auth_verifications_total"); n != "1" {
		t.Errorf("verified %s times", n)
	}
}

// TestTheTableOfCredentialsIsBounded: one that was pushed out is verified again.
func TestTheTableOfCredentialsIsBounded(t *testing.T) {
	files := authtest.New(t, callersOf("", "a"))
	o := open(t, files, func(c *Config) { c.CacheEntries = 10 })
	for i := range 200 {
		if name, err := o.ask(NewSession(nil), "Bearer "+files.Token("a", time.Hour+time.Duration(i)*time.Second)); name != "a" {
			t.Fatal(err)
		}
	}
	o.known.CleanUp()
	if n := o.known.EstimatedSize(); n > 10 {
		t.Errorf("%d are kept", n)
	}
}

// BenchmarkAuthenticate is what a call pays whose credential is known.
func BenchmarkAuthenticate(b *testing.B) {
	files := authtest.New(b, callersOf("- {name: k, match: [{san: k.internal}], allow: [{methods: [BroadcastMessage]}]}\n", "a", "b"))
	o := open(b, files)
	last, other := []string{"Bearer " + files.Token("a", time.Hour)}, []string{"Bearer " + files.Token("b", time.Hour)}
	s := NewSession(nil)
	for _, c := range []struct {
		name    string
		session *Session
		headers []string
	}{{"last token of the connection", s, last}, {"another token", s, other}, {"certificate", certificate(time.Now().Add(time.Hour), "k.internal"), nil}} {
		b.Run(strings.ReplaceAll(c.name, " ", "-"), func(b *testing.B) {
			now := time.Now()
			b.ReportAllocs()
			for b.Loop() {
				if _, err := o.Authenticate(c.session, c.headers, now); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
