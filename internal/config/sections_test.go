package config_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/push-manager/push-manager/internal/config"
)

// TestListOfSectionsComesFromEverySource, with the same fields and defaults.
func TestListOfSectionsComesFromEverySource(t *testing.T) {
	two := []issuer{{"https://a.example", []string{"ES256", "RS256"}, 3}, {"b", []string{"EdDSA"}, 7}}
	inline := `[{issuer: "https://a.example", algorithms: [ES256, RS256]}, {issuer: b, fetch: {retries: 7}}]`
	for name, tc := range map[string]struct {
		src  sources
		want []issuer
	}{
		"default":         {sources{}, nil},
		"file":            {sources{yaml: "auth:\n  jwt:\n    - issuer: https://a.example\n      algorithms: [ES256, RS256]\n    - issuer: b\n      fetch:\n        retries: 7\n"}, two},
		"file, one line":  {sources{yaml: "auth: {jwt: " + inline + "}\n"}, two},
		"file, as a text": {sources{yaml: "auth:\n  jwt: '" + inline + "'\n"}, two},
		"variable":        {sources{env: map[string]string{"AUTH_JWT": inline}}, two},
		"variable, lines": {sources{env: map[string]string{"AUTH_JWT": "- issuer: https://a.example\n  algorithms: ES256,RS256\n- issuer: b\n  fetch: {retries: 7}\n"}}, two},
		"variable, JSON":  {sources{env: map[string]string{"AUTH_JWT": `[{"issuer":"https://a.example","algorithms":["ES256","RS256"]},{"issuer":"b","fetch":{"retries":7}}]`}}, two},
		"flag":            {sources{args: []string{"--auth-jwt=" + inline}, yaml: "auth: {jwt: [{issuer: c}]}\n"}, two},
		"flag, empty":     {sources{args: []string{"--auth-jwt=[]"}, yaml: "auth: {jwt: [{issuer: c}]}\n"}, nil},
		"file, empty":     {sources{yaml: "auth: {jwt: []}\n"}, nil},
		"nothing in it":   {sources{yaml: "auth: {jwt: [{}]}\n"}, []issuer{{"", []string{"EdDSA"}, 3}}},
		"a variable in the file is a text": {
			sources{yaml: "auth: {jwt: [{issuer: \"${ISS}\"}]}\n", env: map[string]string{"ISS": "a}, {issuer: b"}}, []issuer{{"a}, {issuer: b", []string{"EdDSA"}, 3}},
		},
		"${ in a flag is a text": {sources{args: []string{`--auth-jwt=[{issuer: "${ISS}"}]`}, env: map[string]string{"ISS": "a"}}, []issuer{{"${ISS}", []string{"EdDSA"}, 3}}},
	} {
		t.Run(name, func(t *testing.T) {
			c, _, err := load(t, tc.src)
			if diff := cmp.Diff(tc.want, c.Issuers); diff != "" || err != nil {
				t.Errorf("%v\n%s", err, diff)
			}
		})
	}
}

// TestWrongSectionIsNamedByItsPlace, in one line.
func TestWrongSectionIsNamedByItsPlace(t *testing.T) {
	env := func(text string) sources { return sources{env: map[string]string{"AUTH_JWT": text}} }
	file := func(text string) sources { return sources{yaml: "auth:\n  jwt:\n" + text} }
	for name, tc := range map[string]struct {
		src  sources
		want string
	}{
		"unknown field":           {file("    - issuer: a\n    - isuer: b\n"), `config.yaml:4: unknown key "auth.jwt[1].isuer", did you mean "auth.jwt[1].issuer"?`},
		"unknown field, variable": {env("[{isuer: b}]"), `AUTH_JWT: unknown key "auth.jwt[0].isuer", did you mean "auth.jwt[0].issuer"?`},
		"unknown field, flag":     {sources{args: []string{"--auth-jwt=[{x: 1}]"}}, `--auth-jwt: unknown key "auth.jwt[0].x"`},
		"unknown, and a flag is before it": {
			sources{yaml: "auth: {jwt: [{x: 1}]}\n", args: []string{"--auth-jwt=[{issuer: a}]"}}, `config.yaml:1: unknown key "auth.jwt[0].x"`,
		},
		"bounds":                   {file("    - fetch: {retries: 10}\n"), "config.yaml:3: auth.jwt[0].fetch.retries: 10 must be from 0 to 9"},
		"bounds, variable":         {env("[{}, {fetch: {retries: x}}]"), `AUTH_JWT: auth.jwt[1].fetch.retries: "x" is not a whole number`},
		"set twice":                {file("    - {issuer: a, issuer: b}\n"), "auth.jwt[0].issuer is set twice"},
		"no value":                 {file("    - issuer:\n"), "config.yaml:3: auth.jwt[0].issuer has no value"},
		"a section for a text":     {file("    - issuer: {a: b}\n"), `unknown key "auth.jwt[0].issuer.a"`},
		"a list for a text":        {file("    - issuer: [{a: b}]\n"), "config.yaml:3: auth.jwt[0].issuer: a section is not understood here"},
		"a text for a section":     {file("    - fetch: 7\n"), "auth.jwt[0].fetch must be a section with keys below it"},
		"not only sections":        {file("    - issuer: a\n    - b\n"), "config.yaml:4: auth.jwt[1] must be a section"},
		"no sections":              {file("    - a\n    - b\n"), "config.yaml:3: auth.jwt: is no list of sections"},
		"a section":                {file("    issuer: a\n"), `unknown key "auth.jwt.issuer"`},
		"too many":                 {file("    - {}\n    - {}\n    - {}\n    - {}\n"), "config.yaml:3: auth.jwt: has more than 3 sections"},
		"too many, variable":       {env("[{}, {}, {}, {}]"), "AUTH_JWT: has more than 3 sections"},
		"no YAML":                  {env("[{"), "AUTH_JWT: is no YAML"},
		"no list":                  {env("issuer: a"), "AUTH_JWT: is no list of sections such as [{key: value}]"},
		"two documents":            {env("[]\n---\n[]"), "AUTH_JWT: is more than one YAML document"},
		"control character":        {env(`[{issuer: "a\u0001b"}]`), "AUTH_JWT: auth.jwt[0].issuer: has a control character at byte 1"},
		"a place as a name":        {sources{yaml: "auth:\n  \"jwt[0].issuer\": x\n"}, "a key is no name"},
		"sections for another key": {sources{yaml: "shards: [{a: b}]\n"}, "config.yaml:1: shards: a section is not understood here"},
		"anchors":                  {file("    - &a {issuer: b}\n    - *a\n"), "auth.jwt"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := load(t, tc.src)
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, want %s", err, tc.want)
			}
		})
	}
}

func TestListOfSectionsIsShownAndReadsBack(t *testing.T) {
	none := func(string) (string, bool) { return "", false }
	c, s, err := load(t, sources{yaml: "auth:\n  jwt:\n    - issuer: 'a: # \"$${b}\"'\n    - {algorithms: [ES256, RS256], fetch: {retries: 0}}\n"})
	if err != nil || len(c.Issuers) != 2 {
		t.Fatal(c.Issuers, err)
	}
	for _, help := range []bool{false, true} {
		var out bytes.Buffer
		if err := s.Write(&out, help); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "c.yaml")
		if err := os.WriteFile(path, out.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		again, s2 := bind()
		if err := s2.Load(config.Options{File: path, LookupEnv: none}); err != nil {
			t.Fatalf("%v\n%s", err, out.String())
		}
		if diff := cmp.Diff(c, again); diff != "" {
			t.Errorf("%s\n%s", diff, out.String())
		}
		if want := "    - issuer: \"a: # \\\"$${b}\\\"\" # config.yaml:3\n      algorithms: EdDSA # default\n"; !help && !strings.Contains(out.String(), want) {
			t.Errorf("lacks %s in\n%s", want, out.String())
		}
	}
	_, s, err = load(t, sources{env: map[string]string{"AUTH_JWT": "[{issuer: a}]"}})
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := s.Write(&out, false); err != nil {
		t.Fatal(err)
	}
	if want := "  jwt: # environment variable AUTH_JWT\n    - issuer: a # environment variable AUTH_JWT\n"; !strings.Contains(out.String(), want) {
		t.Errorf("lacks %s in\n%s", want, out.String())
	}
}

func TestDocumentsShowTheFieldsOfAList(t *testing.T) {
	_, s := bind()
	var example, table, help strings.Builder
	if err := errors.Join(s.Write(&example, true), s.WriteTable(&table), s.WriteHelp(&help, true)); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		example.String(): "  # Issuers.\n  jwt: []\n  #   - issuer: \"\" # Name of it.\n  #     algorithms: EdDSA # Algorithms.\n",
		table.String():   "| `auth.jwt` | `AUTH_JWT` |  | at most 3 sections | Issuers. |\n| `auth.jwt[].issuer` | |  |  | Name of it. |\n",
		help.String():    "  --auth-jwt=YAML\n        Issuers. ($AUTH_JWT) A YAML list of sections with issuer, algorithms, fetch.retries.\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("lacks\n%s\nin\n%s", want, text)
		}
	}
}

// TestErrorAboutASectionNamesItsPlace, whatever the list came from.
func TestErrorAboutASectionNamesItsPlace(t *testing.T) {
	for want, src := range map[string]sources{
		"config.yaml:1: auth.jwt[1].audience: odd":                 {yaml: "auth: {jwt: [{}, {}]}\n"},
		"environment variable AUTH_JWT: auth.jwt[1].audience: odd": {env: map[string]string{"AUTH_JWT": "[{}, {}]"}},
		"flag --auth-jwt: auth.jwt[1].audience: odd":               {args: []string{"--auth-jwt=[{}, {}]"}},
		"AUTH_JWT: auth.jwt[1].audience: odd":                      {},
	} {
		_, s, err := load(t, src)
		if err != nil {
			t.Fatal(err)
		}
		if got := s.Errorf("auth.jwt[1].audience", "odd"); got.Error() != want || !errors.Is(got, config.ErrUsage) {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
