package certs

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const node1 = "spiffe://test/connect-node/n1"

func TestEverythingIsReplacedUnderLoadWithoutAFailedHandshake(t *testing.T) {
	oldCA, oldCert := authority(t)
	newCA, newCert := authority(t)
	both := bytes.Join([][]byte{oldCert, newCert}, nil)
	manager := "spiffe://test/push-manager/pm"
	serverFiles, clientFiles := filesOf(t, oldCA.issue(t, node1), oldCert), filesOf(t, oldCA.issue(t, manager), oldCert)
	theirs, ours := open(t, serverFiles, 5*time.Millisecond), open(t, clientFiles, 5*time.Millisecond)
	managers, err := Allowed("test", []string{"push-manager/*"})
	if err != nil {
		t.Fatal(err)
	}
	addr := server(t, theirs.Server(Side{ClientAuth: tls.RequireAndVerifyClientCert, Check: managers}))
	client := ours.Client(Side{Check: Node("test", "n1")})

	var stop atomic.Bool
	var load sync.WaitGroup
	var good, bad atomic.Int64
	var ended [4]atomic.Int64 // handshakes, of each
	for i := range ended {
		load.Go(func() {
			for !stop.Load() {
				if _, err := connect(client, addr); err != nil {
					bad.Add(1)
					t.Errorf("handshake: %v", err)
					return
				}
				good.Add(1)
				ended[i].Add(1)
			}
		})
	}
	taken := func(o opened, serial string) {
		t.Helper()
		becomes(t, "another certificate", func() bool { return o.serial() != serial })
	}
	// As it is done: both authorities are trusted, then the certificates change, each a while before its key.
	write(t, serverFiles.CA, both)
	write(t, clientFiles.CA, both)
	becomes(t, "both authorities", func() bool { return theirs.taken.Get() == 1 && ours.taken.Get() == 1 })
	for file, uri := range map[Files]string{serverFiles: node1, clientFiles: manager} {
		o := theirs
		if uri == manager {
			o = ours
		}
		pair, serial, failed := newCA.issue(t, uri), o.serial(), o.failed.Get()
		write(t, file.Cert, pair.Cert)
		becomes(t, "a certificate without its key", func() bool { return o.failed.Get() > failed })
		time.Sleep(100 * time.Millisecond)
		if o.serial() != serial {
			t.Error("a certificate was taken over without its key")
		}
		write(t, file.Key, pair.Key)
		taken(o, serial)
	}
	for i := range ended { // A handshake may still be under way with what the old authority has signed.
		n := ended[i].Load()
		becomes(t, "handshakes with the new certificates", func() bool { return ended[i].Load() >= n+2 || bad.Load() > 0 })
	}
	write(t, serverFiles.CA, newCert)
	write(t, clientFiles.CA, newCert)
	becomes(t, "the new authority alone", func() bool { return theirs.taken.Get() == 3 && ours.taken.Get() == 3 })
	time.Sleep(100 * time.Millisecond)
	stop.Store(true)
	load.Wait()
	if good.Load() < 20 || bad.Load() > 0 {
		t.Errorf("%d handshakes, %d failed", good.Load(), bad.Load())
	}
	for _, o := range []opened{theirs, ours} {
		if n := o.log.count("not taken over"); n != 1 {
			t.Errorf("one bad set was logged %d times", n)
		}
	}

	// Who comes with what the old authority has signed is refused, and so is a server that shows it.
	old := open(t, filesOf(t, oldCA.issue(t, manager), both), time.Hour)
	if _, err := connect(old.Client(Side{Check: Anybody}), addr); err == nil {
		t.Error("the old authority is still good for clients")
	}
	oldServer := open(t, filesOf(t, oldCA.issue(t, node1), both), time.Hour)
	if _, err := connect(client, server(t, oldServer.Server(Side{}))); err == nil {
		t.Error("the old authority is still good for servers")
	}
}

func TestNoSessionIsResumedPastTheAuthorities(t *testing.T) {
	oldCA, oldCert := authority(t)
	_, newCert := authority(t)
	files := filesOf(t, oldCA.issue(t, node1), oldCert)
	theirs := open(t, files, 5*time.Millisecond)
	addr := server(t, theirs.Server(Side{ClientAuth: tls.RequireAndVerifyClientCert}))
	mine := oldCA.issue(t, "spiffe://test/a")
	pair, err := tls.X509KeyPair(mine.Cert, mine.Key)
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{
		ServerName: "localhost", Certificates: []tls.Certificate{pair}, RootCAs: theirs.current.Load().cas, NextProtos: []string{"h2"},
		ClientSessionCache: tls.NewLRUClientSessionCache(4),
	}
	dial := func() (bool, error) {
		conn, err := tls.Dial("tcp", addr, config)
		if err != nil {
			return false, err
		}
		defer conn.Close()
		_, err = conn.Read(make([]byte, 1))
		return conn.ConnectionState().DidResume, err
	}
	for range 3 {
		if resumed, err := dial(); err != nil || resumed {
			t.Fatalf("resumed %v, %v", resumed, err)
		}
	}
	write(t, files.CA, newCert)
	becomes(t, "the new authority", func() bool { return theirs.taken.Get() == 1 })
	if _, err := dial(); err == nil {
		t.Error("a client of the old authority is let in")
	}
}

// TestKubernetesSwapsALink: a volume of a Secret has links to ..data/<file>, and ..data is a link to a folder that is
// replaced in one step.
func TestKubernetesSwapsALink(t *testing.T) {
	ca, caCert := authority(t)
	dir := t.TempDir()
	version := func(name string, pair Pair) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name, "tls.crt"), pair.Cert)
		write(t, filepath.Join(dir, name, "tls.key"), pair.Key)
		write(t, filepath.Join(dir, name, "ca.crt"), caCert)
		if err := os.Symlink(name, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version("..v0", ca.issue(t, node1))
	for _, name := range []string{"tls.crt", "tls.key", "ca.crt"} {
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	o := open(t, Files{Cert: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key"), CA: filepath.Join(dir, "ca.crt")}, 2*time.Millisecond)
	for _, name := range []string{"..v1", "..v2", "..v3"} {
		serial := o.serial()
		version(name, ca.issue(t, node1))
		becomes(t, "what the link leads to", func() bool { return o.serial() != serial })
	}
}

func TestABadSetIsNotTakenOver(t *testing.T) {
	ca, caCert := authority(t)
	good := ca.issue(t, node1)
	ended := func(r *Request) { r.NotBefore, r.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(-time.Minute) }
	early := func(r *Request) { r.NotBefore = time.Now().Add(time.Minute) }
	endedCA, endedPair, err := NewAuthority("ended", time.Now().Add(-time.Minute))
	if err != nil || endedCA == nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]struct {
		change func(f Files)
		file   string
		text   string
	}{
		"expired":          {func(f Files) { p := ca.issue(t, node1, ended); write(t, f.Cert, p.Cert); write(t, f.Key, p.Key) }, CertFile, "expired at"},
		"not yet valid":    {func(f Files) { p := ca.issue(t, node1, early); write(t, f.Cert, p.Cert); write(t, f.Key, p.Key) }, CertFile, "not valid before"},
		"another key":      {func(f Files) { write(t, f.Key, ca.issue(t, node1).Key) }, CertFile, "private key does not match"},
		"no key":           {func(f Files) { _ = os.Remove(f.Key) }, KeyFile, "no such file"},
		"empty":            {func(f Files) { write(t, f.Cert, nil) }, CertFile, "is empty"},
		"half written":     {func(f Files) { write(t, f.CA, append(bytes.Clone(caCert), caCert[:len(caCert)/2]...)) }, CAFile, "cut off"},
		"chain half there": {func(f Files) { write(t, f.Cert, append(bytes.Clone(good.Cert), caCert[:len(caCert)/2]...)) }, CertFile, "cut off"},
		"no PEM":           {func(f Files) { write(t, f.CA, []byte("hello")) }, CAFile, "no certificate"},
		"ended authority":  {func(f Files) { write(t, f.CA, endedPair.Cert) }, CAFile, "valid now"},
		"too large":        {func(f Files) { write(t, f.Key, bytes.Repeat([]byte("x"), maxKey+1)) }, KeyFile, "larger than"},
		"a folder":         {func(f Files) { _ = os.Remove(f.CA); _ = os.Mkdir(f.CA, 0o700) }, CAFile, "no regular file"},
	} {
		t.Run(name, func(t *testing.T) {
			f := filesOf(t, good, caCert)
			o := open(t, f, time.Hour)
			serial := o.serial()
			bad.change(f)
			o.Reload() // as SIGHUP does
			becomes(t, "a failure that is counted", func() bool { return o.failed.Get() == 1 })
			if o.serial() != serial || o.taken.Get() != 0 {
				t.Error("it was taken over")
			}
			var which *FileError
			if err := f.Check(); !errors.As(err, &which) || which.File != bad.file || !strings.Contains(err.Error(), bad.text) {
				t.Errorf("Check: %v", err)
			}
			if _, err := Open(Config{Files: f, Role: "test"}); err == nil {
				t.Error("a Source starts with it")
			}
		})
	}
	f := filesOf(t, good, append(bytes.Clone(endedPair.Cert), caCert...))
	if err := f.Check(); err != nil {
		t.Errorf("an authority that has ended beside one that has not: %v", err)
	}
}

func TestMetricsTellTheExpiryAndTheReloads(t *testing.T) {
	ca, caCert := authority(t)
	f := filesOf(t, ca.issue(t, node1), caCert)
	o := open(t, f, time.Hour)
	later := ca.issue(t, node1, func(r *Request) { r.NotAfter = time.Now().Add(30 * time.Minute) })
	write(t, f.Cert, later.Cert)
	write(t, f.Key, later.Key)
	o.Reload()
	becomes(t, "a reload", func() bool { return o.taken.Get() == 1 })
	if left := time.Until(o.current.Load().expires); left < 29*time.Minute || left > 30*time.Minute {
		t.Errorf("it expires in %v", left)
	}
	var text bytes.Buffer
	o.set.WritePrometheus(&text)
	for _, want := range []string{
		`push_manager_tls_reloads_total{role="test",result="ok"} 1`, `push_manager_tls_reloads_total{role="test",result="failed"} 0`,
		`push_manager_tls_certificate_expiry_timestamp_seconds{role="test"} `,
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("%s is missing in\n%s", want, text.String())
		}
	}
}

func TestWhoIsLetIn(t *testing.T) {
	ca, caCert := authority(t)
	stranger, _ := authority(t)
	mine := open(t, filesOf(t, ca.issue(t, node1), caCert), time.Hour)
	managers, err := Allowed("test", []string{"push-manager/*"})
	if err != nil {
		t.Fatal(err)
	}
	required := server(t, mine.Server(Side{ClientAuth: tls.RequireAndVerifyClientCert, Check: managers}))
	optional := server(t, mine.Server(Side{ClientAuth: tls.VerifyClientCertIfGiven, Check: managers}))
	noServer := func(r *Request) { r.Client = false }
	ended := func(r *Request) { r.NotBefore, r.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(-time.Minute) }
	early := func(r *Request) { r.NotBefore = time.Now().Add(time.Minute) }
	named := func(r *Request) { r.URI, r.Hosts = "", []string{"push-manager"} }
	for name, who := range map[string]struct {
		pair Pair
		ok   bool
	}{
		"a manager":              {ca.issue(t, "spiffe://test/push-manager/pm"), true},
		"a node":                 {ca.issue(t, node1), false},
		"of another domain":      {ca.issue(t, "spiffe://evil/push-manager/pm"), false},
		"the domain as a prefix": {ca.issue(t, "spiffe://test.evil/push-manager/pm"), false},
		"no id":                  {ca.issue(t, "spiffe://test/push-manager/"), false},
		"a way round":            {ca.issue(t, "spiffe://test/push-manager/../connect-node/n1"), false},
		"escaped":                {ca.issue(t, "spiffe://test/push-manager/%70m"), false},
		"escaped slash":          {ca.issue(t, "spiffe://test/push-manager/a%2fb"), false},
		"a query":                {ca.issue(t, "spiffe://test/push-manager/pm?x"), false},
		"a DNS name":             {ca.issue(t, "", named), false},
		"of another authority":   {stranger.issue(t, "spiffe://test/push-manager/pm"), false},
		"for servers only":       {ca.issue(t, "spiffe://test/push-manager/pm", noServer), false},
		"expired":                {ca.issue(t, "spiffe://test/push-manager/pm", ended), false},
		"not yet valid":          {ca.issue(t, "spiffe://test/push-manager/pm", early), false},
	} {
		// crypto/tls itself would not send what the server does not ask for.
		pair, err := tls.X509KeyPair(who.pair.Cert, who.pair.Key)
		if err != nil {
			t.Fatal(err)
		}
		for _, addr := range []string{required, optional} {
			config := &tls.Config{ServerName: "localhost", RootCAs: mine.current.Load().cas, NextProtos: []string{"h2"}}
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
			conn, err := tls.Dial("tcp", addr, config)
			if err == nil {
				_, err = conn.Read(make([]byte, 1))
				_ = conn.Close()
			}
			if (err == nil) != who.ok {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	anonymous := filesOf(t, ca.issue(t, node1), caCert)
	anonymous.Cert, anonymous.Key = "", ""
	nobody := open(t, anonymous, time.Hour)
	if _, err := connect(nobody.Client(Side{}), required); err == nil {
		t.Error("without a certificate: let in where one is required")
	}
	if _, err := connect(nobody.Client(Side{}), optional); err != nil {
		t.Errorf("without a certificate: %v where it is optional", err)
	}
	for name, config := range map[string]*tls.Config{
		"TLS 1.2": {ServerName: "localhost", RootCAs: mine.current.Load().cas, NextProtos: []string{"h2"}, MaxVersion: tls.VersionTLS12},
		"no ALPN": {ServerName: "localhost", RootCAs: mine.current.Load().cas},
	} {
		conn, err := tls.Dial("tcp", optional, config)
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
			_ = conn.Close()
		}
		if err == nil {
			t.Errorf("%s: let in", name)
		}
	}
	if mine.handshakeFailures.Get() == 0 {
		t.Error("nothing was counted")
	}
}

func TestAClientKnowsItsServer(t *testing.T) {
	ca, caCert := authority(t)
	stranger, _ := authority(t)
	client := open(t, filesOf(t, ca.issue(t, "spiffe://test/push-manager/pm"), caCert), time.Hour)
	role, err := Allowed("test", []string{"connect-node/*"})
	if err != nil {
		t.Fatal(err)
	}
	for name, server1 := range map[string]struct {
		pair                       Pair
		byID, byRole, byHost, none bool
		says                       string // the node that it is instead
	}{
		"the node":             {ca.issue(t, node1), true, true, true, true, ""},
		"another node":         {ca.issue(t, "spiffe://test/connect-node/n2"), false, true, true, true, "n2"},
		"by DNS name":          {ca.issue(t, "", func(r *Request) { r.Hosts = []string{"n1"} }), true, false, false, true, ""},
		"another by DNS name":  {ca.issue(t, "", func(r *Request) { r.Hosts = []string{"n2"} }), false, false, false, true, "n2"},
		"a star":               {ca.issue(t, "", func(r *Request) { r.Hosts = []string{"*"} }), false, false, false, true, "*"},
		"another trust domain": {ca.issue(t, "spiffe://evil/connect-node/n1"), false, false, true, true, "n1"},
		"a manager":            {ca.issue(t, "spiffe://test/push-manager/n1"), false, false, true, true, "localhost"},
		"another authority":    {stranger.issue(t, node1), false, false, false, false, ""},
		"a client":             {ca.issue(t, node1, func(r *Request) { r.Server = false }), false, false, false, false, ""},
	} {
		theirs := open(t, filesOf(t, server1.pair, caCert), time.Hour)
		addr := server(t, theirs.Server(Side{}))
		for how, try := range map[string]struct {
			side Side
			ok   bool
		}{
			"id": {Side{Check: Node("test", "n1")}, server1.byID}, "role": {Side{Check: role}, server1.byRole},
			"host": {Side{}, server1.byHost}, "none": {Side{Check: Anybody}, server1.none},
		} {
			_, err := connect(client.Client(try.side), addr)
			if (err == nil) != try.ok {
				t.Errorf("%s, checked by %s: %v", name, how, err)
			}
			var peer *PeerError
			if how == "id" && server1.says != "" && (!errors.As(err, &peer) || peer.NodeID() != server1.says) {
				t.Errorf("%s: %v, says that it is %q, want %q", name, err, peer.NodeID(), server1.says)
			}
		}
	}
}

func TestPatternsThatCannotBeMeant(t *testing.T) {
	for _, bad := range []string{"", "*", "/*", "spiffe://*", "spiffe://test*", "a*b", "**", "://x", "spiffe:///x"} {
		if _, err := Allowed("test", []string{bad}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	if _, err := Allowed("", []string{"push-manager/*"}); err == nil || !strings.Contains(err.Error(), "trust_domain") {
		t.Errorf("a path without a trust domain: %v", err)
	}
	if _, err := Allowed("test", nil); err == nil {
		t.Error("nobody is taken")
	}
	for _, good := range []string{"", "prod.example", "a_b-c.9"} {
		if err := CheckTrustDomain(good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"A", "a/b", "a b", "a:1", strings.Repeat("a", 256)} {
		if CheckTrustDomain(bad) == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func FuzzParse(f *testing.F) {
	ca, caCert := authority(f)
	pair := ca.issue(f, node1)
	f.Add(pair.Cert, pair.Key, caCert)
	f.Add([]byte{}, []byte{}, caCert)
	f.Add(pair.Cert[:40], pair.Key, []byte("-----BEGIN"))
	f.Fuzz(func(t *testing.T, cert, key, ca []byte) {
		s, err := parse(cert, key, ca, time.Now())
		if err == nil && (s.cert == nil) != (len(cert) == 0) {
			t.Error("a set without its certificate")
		}
		if err == nil && s.cert != nil {
			_ = Node("test", "n1")(s.cert.Leaf)
			_ = s.serial()
		}
	})
}

// TestAURIIsNoDNSName: an authority that may sign only some DNS names may often sign any URI.
func TestAURIIsNoDNSName(t *testing.T) {
	for _, uri := range []string{"billing.example", "node-1", "/billing.example", "//billing.example", "spiffe:///billing", "spiffe:billing"} {
		u, err := url.Parse(uri)
		if err != nil {
			t.Fatal(err)
		}
		leaf := &x509.Certificate{URIs: []*url.URL{u}, DNSNames: []string{"other.example"}}
		if got := Names(leaf); len(got) != 1 || got[0] != "other.example" {
			t.Errorf("%s: %q", uri, got)
		}
		if Node("", uri)(leaf) == nil {
			t.Errorf("%s: is a node's", uri)
		}
	}
}
