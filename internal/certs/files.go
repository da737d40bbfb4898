package certs

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
)

// Files are the names of PEM files. Cert and Key are both set or both empty.
type Files struct {
	Cert string // the certificate first, then what leads to its authority
	Key  string
	CA   string // the authorities that the other side's certificate is checked with
}

// The names of the files in a FileError.
const (
	CertFile = "cert_file"
	KeyFile  = "key_file"
	CAFile   = "ca_file"
)

// FileError is what is wrong with a set, and the file that is at fault.
type FileError struct {
	File string // CertFile, KeyFile or CAFile
	Err  error
}

func (e *FileError) Error() string { return e.File + ": " + e.Err.Error() }
func (e *FileError) Unwrap() error { return e.Err }

const (
	maxPEM   = 1 << 20  // all authorities that a system trusts have 300 KB
	maxKey   = 16 << 10 // an RSA key of 16,384 bits has 13 KB, and checking a larger one takes minutes
	maxChain = 16       // certificates
	maxCAs   = 4096
)

// set is what the files held at one moment. It is immutable.
type set struct {
	cert    *tls.Certificate // nil: none
	cas     *x509.CertPool   // nil: no file
	expires time.Time        // the earliest end in the chain, or the latest of an authority without one
	sum     [sha256.Size]byte
}

// Check reports what is wrong with the files now, as a *FileError.
func (f Files) Check() error {
	_, err := f.load(time.Now())
	return err
}

// Expires is when the first certificate of our chain ends, or without one the last of the authorities. Its error is a
// *FileError.
func (f Files) Expires() (time.Time, error) {
	s, err := f.load(time.Now())
	if err != nil {
		return time.Time{}, err
	}
	return s.expires, nil
}

func (f Files) load(now time.Time) (*set, error) {
	switch {
	case f.Cert == "" && f.Key != "":
		return nil, &FileError{CertFile, errors.New("missing, while there is a key")}
	case f.Cert != "" && f.Key == "":
		return nil, &FileError{KeyFile, errors.New("missing, while there is a certificate")}
	}
	var text [3][]byte
	for i, file := range []struct {
		name, path string
		most       int64
	}{{CertFile, f.Cert, maxPEM}, {KeyFile, f.Key, maxKey}, {CAFile, f.CA, maxPEM}} {
		if file.path == "" {
			continue
		}
		var err error
		if text[i], err = ReadFile(file.path, file.most); err != nil {
			return nil, &FileError{file.name, err}
		}
		if len(text[i]) == 0 {
			return nil, &FileError{file.name, fmt.Errorf("%s is empty", file.path)}
		}
	}
	return parse(text[0], text[1], text[2], now)
}

// ReadFile reads a regular file of at most so many bytes. A pipe would wait for whoever may never write to it.
func ReadFile(path string, most int64) ([]byte, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }() // nothing was written
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	text, err := io.ReadAll(io.LimitReader(file, most+1))
	if err == nil && int64(len(text)) > most {
		err = fmt.Errorf("%s is larger than %d bytes", path, most)
	}
	return text, err
}

// parse makes a set of the texts of its files. A text is empty where there is no file.
func parse(certPEM, keyPEM, caPEM []byte, now time.Time) (*set, error) {
	s := new(set)
	sum := sha256.New()
	for _, text := range [][]byte{certPEM, keyPEM, caPEM} {
		one := sha256.Sum256(text) // of equal lengths: what is in one file is not in the next
		_, _ = sum.Write(one[:])   // a hash takes everything
	}
	sum.Sum(s.sum[:0])
	if len(caPEM) > 0 {
		cas, err := certificates(caPEM, maxCAs)
		if err != nil {
			return nil, &FileError{CAFile, err}
		}
		s.cas = x509.NewCertPool()
		for _, ca := range cas {
			s.cas.AddCert(ca)
			if !now.Before(ca.NotBefore) && ca.NotAfter.After(s.expires) {
				s.expires = ca.NotAfter
			}
		}
		if !now.Before(s.expires) {
			return nil, &FileError{CAFile, errors.New("no authority in it is valid now")}
		}
	}
	if len(certPEM) == 0 {
		return s, nil
	}
	chain, err := certificates(certPEM, maxChain)
	if err != nil {
		return nil, &FileError{CertFile, err}
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, &FileError{CertFile, fmt.Errorf("certificate and key: %w", err)}
	}
	pair.Leaf = chain[0]
	s.cert, s.expires = &pair, chain[0].NotAfter
	for _, c := range chain {
		if now.Before(c.NotBefore) {
			return nil, &FileError{CertFile, fmt.Errorf("not valid before %s", c.NotBefore.UTC().Format(time.RFC3339))}
		}
		if c.NotAfter.Before(s.expires) {
			s.expires = c.NotAfter
		}
	}
	if !now.Before(s.expires) {
		return nil, &FileError{CertFile, fmt.Errorf("expired at %s", s.expires.UTC().Format(time.RFC3339))}
	}
	return s, nil
}

// certificates are those of a PEM file, one at least. A block that is cut off is an error: the file is
// being written.
func certificates(text []byte, most int) ([]*x509.Certificate, error) {
	var list []*x509.Certificate
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		text = rest
		if block.Type != "CERTIFICATE" {
			continue // some tools put the key beside it
		}
		if len(list) == most {
			return nil, fmt.Errorf("more than %d certificates", most)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(list)+1, err)
		}
		list = append(list, c)
	}
	switch {
	case bytes.Contains(text, []byte("-----BEGIN")):
		return nil, errors.New("a PEM block in it is cut off or damaged")
	case len(list) == 0:
		return nil, errors.New("no certificate in it")
	}
	return list, nil
}
