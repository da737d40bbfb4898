package certs

import (
	"crypto/x509"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// Names are the URIs and DNS names of a certificate that can be compared as text, 32 at most. A URI is left out that
// could be written in another way, or that could be taken for a DNS name.
func Names(leaf *x509.Certificate) []string { return names(leaf) }

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
	if err != nil || !slices.Equal(names(&x509.Certificate{URIs: []*url.URL{u}}), []string{name}) {
		return fmt.Errorf("%.64q is no URI such as spiffe://prod.example/billing, of plain letters, digits and ._-", name)
	}
	return nil
}
