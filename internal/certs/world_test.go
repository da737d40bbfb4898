package certs

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/goleak"
	"google.golang.org/grpc/credentials"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority makes an authority with its certificate.
func authority(t testing.TB) (*Authority, []byte) {
	t.Helper()
	a, pair, err := NewAuthority("test", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return a, pair.Cert
}

// issue makes a certificate for both sides, for localhost and a URI.
func (a *Authority) issue(t testing.TB, uri string, change ...func(*Request)) Pair {
	t.Helper()
	r := Request{Hosts: []string{"localhost"}, URI: uri, Server: true, Client: true, NotAfter: time.Now().Add(time.Hour)}
	for _, f := range change {
		f(&r)
	}
	pair, err := a.Issue(r)
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

// write replaces a file as a whole.
func write(t testing.TB, path string, text []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// filesOf writes a set into a folder of its own.
func filesOf(t testing.TB, pair Pair, ca []byte) Files {
	t.Helper()
	dir := t.TempDir()
	f := Files{Cert: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key"), CA: filepath.Join(dir, "ca.crt")}
	write(t, f.Cert, pair.Cert)
	write(t, f.Key, pair.Key)
	write(t, f.CA, ca)
	return f
}

// lines is a log that a test reads.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *lines) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.buf.String(), text)
}

// opened is a Source of a test.
type opened struct {
	*Source
	log *lines
	set *metrics.Set
}

func open(t testing.TB, f Files, interval time.Duration) opened {
	t.Helper()
	o := opened{log: &lines{}, set: metrics.NewSet()}
	s, err := Open(Config{Files: f, Role: "test", ReloadInterval: interval, Logger: slog.New(slog.NewTextHandler(o.log, nil)), Metrics: o.set})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	o.Source = s
	return o
}

func (o opened) serial() string { return o.current.Load().serial() }

// becomes waits until something holds.
func becomes(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

// server accepts on loopback until the test ends, sends a byte over each connection, and closes it.
func server(t testing.TB, creds credentials.TransportCredentials) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			raw, err := lis.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer raw.Close()
				_ = raw.SetDeadline(time.Now().Add(5 * time.Second))
				conn, _, err := creds.ServerHandshake(raw)
				if err != nil {
					return
				}
				_, _ = conn.Write([]byte{1})
				_, _ = conn.Read(make([]byte, 1)) // until the client has read it
				_ = conn.Close()
			})
		}
	})
	t.Cleanup(func() {
		_ = lis.Close()
		all.Wait()
	})
	return lis.Addr().String()
}

// connect makes a handshake and reads the byte, which tells that the server has taken our certificate, too. It returns what
// the server has shown.
func connect(creds credentials.TransportCredentials, addr string) (tls.ConnectionState, error) {
	raw, err := net.Dial("tcp", addr)
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(5 * time.Second))
	conn, info, err := creds.ClientHandshake(context.Background(), "localhost", raw)
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer conn.Close()
	_, err = io.ReadFull(conn, make([]byte, 1))
	return info.(credentials.TLSInfo).State, err
}
