package certs

import (
	"crypto/x509"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// Names are the URIs and DNS names of a certificate that can be compared as text, 32 at most. A URI is left out that
// could be written in another way.
func Names(leaf *x509.Certificate) []string {
	const most = 32
	var list []string
	for _, u := range leaf.URIs {
		if len(list) < most && u.Opaque == "" && u.User == nil && u.RawQuery == "" && u.Fragment == "" && plainPath(u.EscapedPath()) {
			list = append(list, u.String())
		}
	}
	for _, name := range leaf.DNSNames {
		if len(list) < most && !strings.Contains(name, "/") {
			list = append(list, name)
		}
	}
	return list
}

// plainPath tells that a path has only what SPIFFE allows: letters, digits and ._- in segments that are
// none of "", "." and "..".
func plainPath(p string) bool {
	for segment := range strings.SplitSeq(strings.TrimPrefix(p, "/"), "/") {
		if segment == "." || segment == ".." || segment == "" && p != "" {
			return false
		}
		for _, c := range []byte(segment) {
			if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '.' && c != '_' && c != '-' {
				return false
			}
		}
	}
	return true
}

// CheckName refuses what Names never returns.
func CheckName(name string) error {
	if !strings.Contains(name, "/") {
		host := strings.TrimPrefix(name, "*.") // a certificate may have it; here it stands for itself
		if host == "" || len(name) > 253 || strings.Trim(host, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_") != "" {
			return fmt.Errorf("%.64q is no DNS name, nor a URI such as spiffe://prod.example/billing", name)
		}
		return nil
	}
	u, err := url.Parse(name)
	if err != nil || u.Scheme == "" || u.Host == "" || !slices.Equal(Names(&x509.Certificate{URIs: []*url.URL{u}}), []string{name}) {
		return fmt.Errorf("%.64q is no URI such as spiffe://prod.example/billing, of plain letters, digits and ._-", name)
	}
	return nil
}
