package jwt

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/push-manager/push-manager/internal/config"
)

// TestUnsafeConfigurationIsRefused, with the field at fault and no word of a secret.
func TestUnsafeConfigurationIsRefused(t *testing.T) {
	dir := t.TempDir()
	jwks := write(t, filepath.Join(dir, "jwks.json"), setOf(t, keyOf(t, "k", "EdDSA")))
	secret := write(t, filepath.Join(dir, "secret"), []byte(strings.Repeat("geheim", 6)))
	short := write(t, filepath.Join(dir, "short"), []byte("geheim"+strings.Repeat("\n", 100)))
	open := write(t, filepath.Join(dir, "open"), []byte(strings.Repeat("geheim", 6)))
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	none := write(t, filepath.Join(dir, "none"), []byte(`{"keys":[]}`))
	ok := Issuer{Issuer: issuerA, Audience: audience, JWKSFile: jwks}
	with := func(change func(*Issuer)) []Issuer {
		i := ok
		change(&i)
		return []Issuer{i}
	}
	url := func(text string) []Issuer { return with(func(i *Issuer) { i.JWKSFile, i.JWKSURL = "", text }) }
	hs := func(path string, algorithms ...string) []Issuer {
		return with(func(i *Issuer) { i.JWKSFile, i.HSSecretFile, i.Algorithms = "", path, algorithms })
	}
	for name, tc := range map[string]struct {
		issuers []Issuer
		field   string
		want    string
	}{
		"no audience":           {with(func(i *Issuer) { i.Audience = "" }), "audience", "missing"},
		"no issuer":             {with(func(i *Issuer) { i.Issuer = "" }), "issuer", "missing"},
		"issuer twice":          {[]Issuer{ok, ok}, "issuer", "twice"},
		"no keys":               {with(func(i *Issuer) { i.JWKSFile = "" }), "jwks_file", "missing"},
		"file and URL":          {with(func(i *Issuer) { i.JWKSURL = "https://a.example" }), "jwks_url", "jwks_file is set, too"},
		"file and secret":       {with(func(i *Issuer) { i.HSSecretFile = secret }), "hs_secret_file", "jwks_file is set, too"},
		"HS256 with keys":       {with(func(i *Issuer) { i.Algorithms = []string{"EdDSA", "HS256"} }), "algorithms", "HS256 needs hs_secret_file"},
		"ES256 with a secret":   {hs(secret, "HS256", "ES256"), "algorithms", "ES256 needs a key set"},
		"none":                  {with(func(i *Issuer) { i.Algorithms = []string{"none"} }), "algorithms", `"none" is not known or not safe`},
		"RS1":                   {with(func(i *Issuer) { i.Algorithms = []string{"RS1"} }), "algorithms", "not known"},
		"file not there":        {with(func(i *Issuer) { i.JWKSFile = dir + "/nowhere" }), "jwks_file", "nowhere"},
		"file is a device":      {with(func(i *Issuer) { i.JWKSFile = "/dev/zero" }), "jwks_file", "no regular file"},
		"file without keys":     {with(func(i *Issuer) { i.JWKSFile = none }), "jwks_file", "holds no keys"},
		"file with no key":      {with(func(i *Issuer) { i.Algorithms = []string{"RS256"} }), "jwks_file", "no key is for one of [RS256]"},
		"secret too short":      {hs(short), "hs_secret_file", "fewer than 32 bytes"},
		"secret others can see": {hs(open), "hs_secret_file", "has mode 0644"},
		"http":                  {url("http://idp.example/jwks"), "jwks_url", "must be https"},
		"file URL":              {url("file:///etc/passwd"), "jwks_url", "no URL"},
		"file URL with a host":  {url("file://localhost/etc/passwd"), "jwks_url", "must be https"},
		"no host":               {url("https:///jwks"), "jwks_url", "no URL"},
		"no scheme":             {url("idp.example/jwks"), "jwks_url", "no URL"},
		"password":              {url("https://u:geheim@idp.example/"), "jwks_url", "no user, password"},
		"loopback by a name":    {url("http://localhost.example/jwks"), "jwks_url", "must be https"},
	} {
		t.Run(name, func(t *testing.T) {
			v, err := New(Config{Issuers: tc.issuers})
			var field *FieldError
			if v != nil || !errors.As(err, &field) || field.Field != tc.field || field.Index != len(tc.issuers)-1 || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %s: %s", err, tc.field, tc.want)
			}
			if err != nil && strings.Contains(err.Error(), "geheim") {
				t.Errorf("shows a secret: %v", err)
			}
		})
	}
	if _, err := New(Config{}); err == nil {
		t.Error("no issuers are taken")
	}
	for _, text := range []string{"https://idp.example/jwks?x=1", "http://127.0.0.1:1/", "http://[::1]:1/", "http://localhost/"} {
		c := Config{Issuers: url(text)}
		if err := c.Validate(); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
	if err := os.Chmod(open, 0o640); err != nil {
		t.Fatal(err)
	}
	if c := (Config{Issuers: hs(open)}); c.Validate() != nil {
		t.Errorf("the group may not read it: %v", c.Validate())
	}
}

// TestKeysOfASetAreForWhatTheySay: of a set with keys of all sorts those are used that can be.
func TestKeysOfASetAreForWhatTheySay(t *testing.T) {
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	rs, ed, es := keyOf(t, "rs", "RS256"), keyOf(t, "ed", "EdDSA"), keyOf(t, "es", "ES256")
	jwk := func(p pair, change func(*jose.JSONWebKey)) string {
		k := p.jwk()
		change(&k)
		text, err := json.Marshal(k)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	same := func(*jose.JSONWebKey) {}
	all := &source{Issuer: Issuer{Algorithms: slices.Sorted(maps.Keys(algorithms()))}}
	for name, tc := range map[string]struct {
		jwk  string
		want []string // its algorithms; nil: not used
	}{
		"EdDSA":                  {jwk(ed, same), []string{"EdDSA"}},
		"Ed25519 (RFC 9864)":     {jwk(ed, func(k *jose.JSONWebKey) { k.Algorithm = "Ed25519" }), []string{"EdDSA"}},
		"RSA without alg":        {jwk(rs, func(k *jose.JSONWebKey) { k.Algorithm = "" }), []string{"PS256", "PS384", "PS512", "RS256", "RS384", "RS512"}},
		"RSA for PS256":          {jwk(rs, func(k *jose.JSONWebKey) { k.Algorithm = "PS256" }), []string{"PS256"}},
		"RSA that says HS256":    {jwk(rs, func(k *jose.JSONWebKey) { k.Algorithm = "HS256" }), nil},
		"RSA that says none":     {jwk(rs, func(k *jose.JSONWebKey) { k.Algorithm = "none" }), nil},
		"RSA with 1024 bits":     {jwk(pair{"weak", rs.method, weak}, same), nil},
		"P-256 without alg":      {jwk(es, func(k *jose.JSONWebKey) { k.Algorithm = "" }), []string{"ES256"}},
		"P-256 that says ES384":  {jwk(es, func(k *jose.JSONWebKey) { k.Algorithm = "ES384" }), nil},
		"for encryption":         {jwk(rs, func(k *jose.JSONWebKey) { k.Use = "enc" }), nil},
		"kid of 300 bytes":       {jwk(ed, func(k *jose.JSONWebKey) { k.KeyID = strings.Repeat("k", 300) }), nil},
		"kty of the future":      {`{"kty":"AKP","kid":"x","alg":"ML-DSA-44","pub":"AAAA"}`, nil},
		"curve of the future":    {`{"kty":"OKP","crv":"Ed448","kid":"x","x":"AAAA"}`, nil},
		"point not on the curve": {`{"kty":"EC","crv":"P-256","kid":"x","x":"` + strings.Repeat("A", 43) + `","y":"` + strings.Repeat("A", 43) + `"}`, nil},
		"no object":              {`7`, nil},
	} {
		t.Run(name, func(t *testing.T) {
			beside := jwk(keyOf(t, "beside", "ES512"), same)
			set, err := all.parse([]byte(`{"keys":[` + tc.jwk + `,` + beside + `]}`))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for id := range set.byID {
				if id.kid != "beside" {
					got = append(got, id.algorithm)
				}
			}
			if slices.Sort(got); !slices.Equal(got, tc.want) {
				t.Errorf("is for %v, want %v", got, tc.want)
			}
			if len(set.byID) != len(tc.want)+1 {
				t.Error("the key beside it is lost")
			}
		})
	}
}

// TestIssuersAreBoundAndCheckedByTheirNames in a program's configuration.
func TestIssuersAreBoundAndCheckedByTheirNames(t *testing.T) {
	jwks := fileOf(t, keyOf(t, "k", "EdDSA")).JWKSFile
	load := func(yaml string) (Config, error) {
		var c Config
		s := config.New()
		c.Bind(s, "auth.jwt")
		path := write(t, filepath.Join(t.TempDir(), "c.yaml"), []byte(yaml))
		if err := s.Load(config.Options{File: path, LookupEnv: func(string) (string, bool) { return "", false }}); err != nil {
			return c, err
		}
		return c, c.Check(s, "auth.jwt")
	}
	c, err := load("auth:\n  jwt:\n    - issuer: https://a.example\n      audience: push-manager\n      jwks_file: " + jwks +
		"\n      algorithms: [EdDSA, ES256]\n    - {issuer: b, audience: c, jwks_url: \"https://b.example/\", caller_claim: client_id}\n")
	if err != nil {
		t.Fatal(err)
	}
	a, b := c.Issuers[0], c.Issuers[1]
	if a.Issuer != issuerA || a.Audience != audience || a.JWKSFile != jwks || !slices.Equal(a.Algorithms, []string{"EdDSA", "ES256"}) || a.CallerClaim != "sub" ||
		b.JWKSURL != "https://b.example/" || b.CallerClaim != "client_id" || len(b.Algorithms) != 0 {
		t.Errorf("%+v", c.Issuers)
	}
	for want, yaml := range map[string]string{
		`auth.jwt[1].audience: missing`:                                            "auth:\n  jwt:\n    - {issuer: a, audience: b, jwks_file: " + jwks + "}\n    - {issuer: b, jwks_file: " + jwks + "}\n",
		`unknown key "auth.jwt[0].audiance", did you mean "auth.jwt[0].audience"?`: "auth:\n  jwt: [{issuer: a, audiance: b}]\n",
	} {
		if _, err := load(yaml); err == nil || !strings.Contains(err.Error(), want) || !errors.Is(err, config.ErrUsage) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}
