package certs

import (
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// folderCA is the name of a Folder's own certificate.
const folderCA = "ca"

// Folder is a directory with an authority and certificates that it has signed: NAME.crt and NAME.key for each. The
// authority's name is ca. Every file is for its owner alone. It is for development and small deployments.
type Folder struct {
	Path        string
	TrustDomain string // of the names in certificates
}

// File is the path of a file.
func (f Folder) File(name string) string { return filepath.Join(f.Path, name) }

// Files are those of a certificate, with the authority.
func (f Folder) Files(name string) Files {
	return Files{Cert: f.File(name + ".crt"), Key: f.File(name + ".key"), CA: f.File(folderCA + ".crt")}
}

// WriteAuthority makes an authority as NewAuthority does, and the folder if there is none. It replaces the one before.
func (f Folder) WriteAuthority(name string, notAfter time.Time, only ...string) error {
	_, pair, err := NewAuthority(name, notAfter, only...)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(f.Path, 0o700); err != nil {
		return err
	}
	return f.write(folderCA, pair)
}

// WriteCertificate makes a certificate for spiffe://<trust domain>/<kind>/<id>, which replaces the URI in r, with a new key.
// It replaces the one of this name.
func (f Folder) WriteCertificate(name, kind, id string, r Request) error {
	if err := CheckID(id); err != nil {
		return err
	}
	var ca Pair
	for file, text := range map[string]*[]byte{folderCA + ".crt": &ca.Cert, folderCA + ".key": &ca.Key} {
		var err error
		if *text, err = os.ReadFile(f.File(file)); err != nil {
			return err
		}
	}
	signer, err := LoadAuthority(ca)
	if err != nil {
		return err
	}
	r.URI = "spiffe://" + f.TrustDomain + "/" + kind + "/" + id
	pair, err := signer.Issue(r)
	if err != nil {
		return err
	}
	return f.write(name, pair)
}

// Check reports why whoever trusts the authority of the folder would not believe a certificate at a time.
func (f Folder) Check(name string, at time.Time) error {
	s, err := f.Files(name).load(at)
	if err != nil {
		return err
	}
	_, err = s.cert.Leaf.Verify(x509.VerifyOptions{Roots: s.cas, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err
}

// CheckID refuses an id that a certificate could not carry in its URI, or that would be no part of a file's name.
func CheckID(id string) error {
	if id == "" || len(id) > 128 || strings.HasPrefix(id, ".") || strings.Trim(id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != "" {
		return fmt.Errorf("%.130q: an id in a certificate has letters, digits, and ._- between them", id)
	}
	return nil
}

// write writes a certificate and its key, each as a whole: programs may be reading them.
func (f Folder) write(name string, pair Pair) error {
	for _, file := range []struct {
		name string
		text []byte
	}{{name + ".key", pair.Key}, {name + ".crt", pair.Cert}} {
		fresh, err := os.CreateTemp(f.Path, ".new-*") // for its owner alone: 0600
		if err != nil {
			return err
		}
		_, err = fresh.Write(file.text)
		if err = errors.Join(err, fresh.Close()); err == nil {
			err = os.Rename(fresh.Name(), f.File(file.name))
		}
		if err != nil {
			return errors.Join(err, os.Remove(fresh.Name()))
		}
	}
	return nil
}
