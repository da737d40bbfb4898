package certs

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// The kinds of our own names: spiffe://<trust domain>/<kind>/<id>.
const (
	KindManager    = "push-manager"
	KindNode       = "connect-node"
	KindController = "controller"
	KindClient     = "client"
)

// Check judges the certificate of the other side, whose chain has been verified. Its error is a *PeerError.
type Check func(leaf *x509.Certificate) error

// PeerError says that the other side is somebody else.
type PeerError struct {
	Want string
	Got  []string // its names
}

func (e *PeerError) Error() string {
	return fmt.Sprintf("the certificate is not for %s, but for %q", e.Want, e.Got)
}

// NodeID is the id of the Connect-Node that the other side is, "" if its certificate names none.
func (e *PeerError) NodeID() string {
	for _, name := range e.Got {
		if rest, ok := strings.CutPrefix(name, "spiffe://"); ok {
			if _, id, ok := strings.Cut(rest, "/"+KindNode+"/"); ok {
				return id
			}
		}
	}
	for _, name := range e.Got {
		if !strings.Contains(name, "://") {
			return name
		}
	}
	return ""
}

// Anybody takes every certificate whose chain is right.
func Anybody(*x509.Certificate) error { return nil }

// Node takes the certificate of one Connect-Node: spiffe://<trust domain>/connect-node/<id>, or the DNS name <id>.
// Without a trust domain only the latter.
func Node(trustDomain, id string) Check {
	want := []string{id}
	if trustDomain != "" {
		want = append(want, "spiffe://"+trustDomain+"/"+KindNode+"/"+id)
	}
	return func(leaf *x509.Certificate) error {
		got := Names(leaf)
		for _, name := range got {
			if name == want[0] || len(want) > 1 && name == want[1] {
				return nil
			}
		}
		return &PeerError{Want: fmt.Sprintf("node %q", id), Got: got}
	}
}

// SpeaksFor tells whether the holder of a certificate, who has been let in, may report what a Connect-Node knows; an empty
// id stands for all nodes. A certificate whose URIs name nodes or Push-Managers, of any trust domain, speaks for these nodes
// alone. One without a URI speaks for the node of its DNS name. Any other is one that nodes share.
func SpeaksFor(leaf *x509.Certificate, id string) error {
	got := Names(leaf)
	var ours, shared bool // names of nodes and Push-Managers, names that say neither
	for _, name := range got {
		rest, isURI := strings.CutPrefix(name, "spiffe://")
		_, path, _ := strings.Cut(rest, "/")
		kind, of, _ := strings.Cut(path, "/")
		switch {
		case id != "" && (isURI && kind == KindNode && of == id || !isURI && name == id):
			return nil
		case isURI && (kind == KindNode || kind == KindManager):
			ours = true
		case strings.Contains(name, "://"):
			shared = true
		}
	}
	if shared && !ours {
		return nil
	}
	return &PeerError{Want: fmt.Sprintf("node %q", id), Got: got}
}

// Allowed takes the certificates that one of the patterns names: a URI, a DNS name, or with a slash in it a path of the
// trust domain. A star at the end stands for any rest.
func Allowed(trustDomain string, patterns []string) (Check, error) {
	if len(patterns) == 0 {
		return nil, errors.New("names nobody")
	}
	full := make([]string, len(patterns))
	for i, p := range patterns {
		switch head, star := strings.CutSuffix(p, "*"); {
		case strings.Contains(head, "*"):
			return nil, fmt.Errorf("%q has a star that is not its end", p)
		case strings.Trim(head, "/") == "" || strings.HasSuffix(head, "://"):
			return nil, fmt.Errorf("%q names nobody in particular", p)
		case strings.Contains(p, "://"):
			// A star in place of the trust domain, or of a part of it, would let strangers in.
			if u, err := url.Parse(head); err != nil || u.Host == "" || star && u.Path == "" {
				return nil, fmt.Errorf("%q is no URI such as spiffe://prod.example/push-manager/*", p)
			}
			full[i] = p
		case strings.Contains(p, "/") && trustDomain == "":
			return nil, fmt.Errorf("%q is a path of the trust domain, and trust_domain is not set", p)
		case strings.Contains(p, "/"):
			full[i] = "spiffe://" + trustDomain + "/" + strings.TrimPrefix(p, "/")
		default:
			full[i] = p
		}
	}
	want := "one of " + strings.Join(full, ", ")
	return func(leaf *x509.Certificate) error {
		got := Names(leaf)
		for _, name := range got {
			for _, p := range full {
				head, star := strings.CutSuffix(p, "*")
				if name == p || star && len(name) > len(head) && strings.HasPrefix(name, head) {
					return nil
				}
			}
		}
		return &PeerError{Want: want, Got: got}
	}, nil
}

// CheckTrustDomain reports what cannot be a trust domain.
func CheckTrustDomain(name string) error {
	if len(name) > 255 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789.-_") != "" {
		return fmt.Errorf("%q is no trust domain such as prod.example", name)
	}
	return nil
}
