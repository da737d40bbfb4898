package jwt

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/sys/unix"
)

// TestTokenOpensNoFileAndNoConnection: jku, x5u, kid and iss are texts, whatever they look like (CVE-2026-32301).
func TestTokenOpensNoFileAndNoConnection(t *testing.T) {
	key, stranger := keyOf(t, "k", "EdDSA"), keyOf(t, "s", "EdDSA")
	var connections atomic.Int32
	bait := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(setOf(t, stranger)) }))
	bait.Config.ConnState = func(net.Conn, http.ConnState) { connections.Add(1) }
	bait.Start()
	defer bait.Close()

	dir := t.TempDir()
	file := write(t, filepath.Join(dir, "jwks.json"), setOf(t, stranger))
	watch, err := unix.InotifyInit1(unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(watch) }()
	if _, err := unix.InotifyAddWatch(watch, dir, unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	fetched := make(chan string, 100)
	fromURL := Issuer{Issuer: issuerB, Audience: audience, JWKSURL: "http://localhost/jwks"}
	v, err := New(Config{
		Issuers: []Issuer{fileOf(t, key), fromURL},
		dial: func(_ context.Context, _, address string) (net.Conn, error) {
			fetched <- address
			return nil, os.ErrDeadlineExceeded
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	template := bait.URL + "/{{.iss}}/${iss}/{iss}/%s"
	for _, text := range []string{bait.URL, template, file, "file://" + file, "../../../" + file, "..\\..\\x", "' OR 1=1 --", "\x00", "{{kid}}"} {
		header := map[string]any{"kid": text, "jku": bait.URL + "/jwks", "x5u": bait.URL + "/cert", "jwk": stranger.jwk(), "x5c": []string{"MIIB"}}
		for _, iss := range []string{issuerA, issuerB, text} {
			want := IssuerWrong
			switch iss {
			case issuerA:
				want = UnknownKey
			case issuerB: // whose set never comes
				want = Unavailable
			}
			refused(t, v, stranger.sign(t, good(jwt.MapClaims{"iss": iss}), header), want)
		}
	}
	if n := connections.Load(); n > 0 {
		t.Errorf("%d connections to where a token points", n)
	}
	var events [4096]byte
	if n, err := unix.Read(watch, events[:]); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("a file was opened where a token points: %d bytes of events, %v", n, err)
	}
	if _, err := os.ReadFile(file); err != nil { // the watch would have seen it
		t.Fatal(err)
	}
	if n, err := unix.Read(watch, events[:]); err != nil || n == 0 {
		t.Errorf("the watch sees nothing: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	select {
	case address := <-fetched:
		fetched <- address
	case <-ctx.Done():
		t.Error("the URL of the configuration is not asked")
	}
	v.Close()
	close(fetched)
	for address := range fetched {
		if address != "localhost:80" {
			t.Errorf("a connection to %s, which no configuration names", address)
		}
	}
}
