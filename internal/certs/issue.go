package certs

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"time"
)

// backdate is how much earlier than now a new certificate is valid: clocks differ.
const backdate = 5 * time.Minute

// Authority signs certificates, for development and tests.
type Authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// Pair is a certificate and its key in PEM.
type Pair struct{ Cert, Key []byte }

// Request is what a certificate is for.
type Request struct {
	Hosts          []string // names and IP addresses
	URI            string   // empty: none
	Server, Client bool
	NotBefore      time.Time // zero: a little before now
	NotAfter       time.Time
}

// NewAuthority makes an authority with a key of its own. only are names, with what is below them, and IP addresses: where
// there are any, certificates for others are not believed. Then whoever trusts the authority risks nothing elsewhere.
func NewAuthority(name string, notAfter time.Time, only ...string) (*Authority, Pair, error) {
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotAfter: notAfter,
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	for _, host := range only {
		if ip := net.ParseIP(host); ip != nil {
			if v4 := ip.To4(); v4 != nil {
				ip = v4
			}
			template.PermittedIPRanges = append(template.PermittedIPRanges, &net.IPNet{IP: ip, Mask: net.CIDRMask(8*len(ip), 8*len(ip))})
		} else {
			template.PermittedDNSDomains = append(template.PermittedDNSDomains, host)
		}
		template.PermittedDNSDomainsCritical = true
	}
	return sign(template, nil)
}

// LoadAuthority is the authority of a certificate and its key.
func LoadAuthority(p Pair) (*Authority, error) {
	pair, err := tls.X509KeyPair(p.Cert, p.Key)
	if err != nil {
		return nil, fmt.Errorf("authority: %w", err)
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok || !pair.Leaf.IsCA {
		return nil, errors.New("authority: the certificate is not one of an authority")
	}
	return &Authority{pair.Leaf, key}, nil
}

// Issue makes a certificate with a new key.
func (a *Authority) Issue(r Request) (Pair, error) {
	template := &x509.Certificate{NotBefore: r.NotBefore, NotAfter: r.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature}
	for _, host := range r.Hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	if r.URI != "" {
		u, err := url.Parse(r.URI)
		if err != nil {
			return Pair{}, err
		}
		template.URIs = []*url.URL{u}
	}
	if r.Server {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	if r.Client {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	}
	_, pair, err := sign(template, a)
	return pair, err
}

// sign makes a certificate of a template, signed by itself where there is no authority.
func sign(template *x509.Certificate, by *Authority) (*Authority, Pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, Pair{}, err
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return nil, Pair{}, err
	}
	if template.NotBefore.IsZero() {
		template.NotBefore = time.Now().Add(-backdate)
	}
	parent, signer := template, crypto.Signer(key)
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		return nil, Pair{}, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, Pair{}, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, Pair{}, err
	}
	return &Authority{cert, key}, Pair{
		Cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		Key:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
	}, nil
}
