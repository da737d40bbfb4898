package certs

import (
	"path/filepath"
	"testing"
	"time"
)

func TestAnAuthorityForSomeHostsIsNotBelievedForOthers(t *testing.T) {
	now := time.Now()
	f := Folder{Path: filepath.Join(t.TempDir(), "certs"), TrustDomain: "dev"}
	if err := f.WriteAuthority("dev", now.Add(time.Hour), "localhost", "127.0.0.1", "::1"); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		hosts []string
		good  bool
	}{
		"own":      {[]string{"localhost", "127.0.0.1", "::1"}, true},
		"none":     {nil, true},
		"a name":   {[]string{"localhost", "bank.example"}, false},
		"IPv4":     {[]string{"127.0.0.2"}, false},
		"IPv6":     {[]string{"2001:db8::1"}, false},
		"wildcard": {[]string{"*.example"}, false},
	} {
		if err := f.WriteCertificate("n1", KindNode, "n1", Request{Hosts: test.hosts, Server: true, NotAfter: now.Add(time.Hour)}); err != nil {
			t.Fatal(err)
		}
		if err := f.Check("n1", now); (err == nil) != test.good {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestACertificateOfAFolderIsCheckedForATime(t *testing.T) {
	now := time.Now()
	f := Folder{Path: t.TempDir(), TrustDomain: "dev"}
	at := func(d time.Duration) error { return f.Check("n1", now.Add(d)) }
	issue := func() {
		t.Helper()
		if err := f.WriteCertificate("n1", KindNode, "n1", Request{Server: true, NotAfter: now.Add(time.Hour)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.WriteAuthority("dev", now.Add(2*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if at(0) == nil {
		t.Error("one that is not there is good")
	}
	issue()
	if err := at(59 * time.Minute); err != nil {
		t.Error(err)
	}
	if at(61*time.Minute) == nil {
		t.Error("one is good after its end")
	}
	if err := f.WriteAuthority("dev", now.Add(2*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if at(0) == nil {
		t.Error("one of an authority that was replaced is good")
	}
	for _, id := range []string{"", ".", "..", "a/b", "a b", "ä"} {
		if f.WriteCertificate("n1", KindNode, id, Request{}) == nil {
			t.Errorf("the id %q is taken", id)
		}
	}
}
