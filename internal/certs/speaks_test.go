package certs

import (
	"crypto/x509"
	"net/url"
	"testing"
)

func TestWhoSpeaksForANode(t *testing.T) {
	leaf := func(uris []string, dns ...string) *x509.Certificate {
		c := &x509.Certificate{DNSNames: dns}
		c.Subject.CommonName = "n1" // never looked at
		for _, text := range uris {
			u, err := url.Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			c.URIs = append(c.URIs, u)
		}
		return c
	}
	for name, tc := range map[string]struct {
		leaf *x509.Certificate
		id   string
		want bool
	}{
		"itself":                   {leaf([]string{"spiffe://test/connect-node/n1"}), "n1", true},
		"another one":              {leaf([]string{"spiffe://test/connect-node/n2"}), "n1", false},
		"one of two":               {leaf([]string{"spiffe://test/connect-node/n2", "spiffe://test/connect-node/n1"}), "n1", true},
		"all of them":              {leaf([]string{"spiffe://test/connect-node/n1"}), "", false},
		"a path behind":            {leaf([]string{"spiffe://test/connect-node/n1/x"}), "n1", false},
		"a Push-Manager":           {leaf([]string{"spiffe://test/push-manager/n1"}), "n1", false},
		"by its DNS name":          {leaf(nil, "n1"), "n1", true},
		"by another DNS name":      {leaf(nil, "n2"), "n1", false},
		"all by a DNS name":        {leaf(nil, "n1"), "", false},
		"a URI, and a DNS name":    {leaf([]string{"spiffe://test/connect-node/n2"}, "n1"), "n1", true},
		"a name that nodes share":  {leaf([]string{"spiffe://test/ns/default/sa/gateway"}), "n1", true},
		"shared, all":              {leaf([]string{"spiffe://test/ns/default/sa/gateway"}), "", true},
		"shared, and one":          {leaf([]string{"spiffe://test/ns/default/sa/gateway", "spiffe://test/connect-node/n2"}), "n1", false},
		"no names":                 {leaf(nil), "n1", false},
		"a URI that is no SPIFFE":  {leaf([]string{"https://n1"}), "n1", true},
		"the id as a whole URI":    {leaf([]string{"spiffe://test/connect-node/n2"}), "spiffe://test/connect-node/n2", false},
		"another domain's node":    {leaf([]string{"spiffe://other/connect-node/n2"}), "n1", false},
		"escapes are no other way": {leaf([]string{"spiffe://test/connect-node/n%31"}), "n1", false},
	} {
		if got := SpeaksFor(tc.leaf, tc.id) == nil; got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
