package webhook

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

func verify(secret, body []byte, header string) bool {
	stamp, signature, _ := strings.Cut(strings.TrimPrefix(header, "t="), ",v1=")
	at, err := strconv.ParseInt(stamp, 10, 64)
	if err != nil || time.Since(time.Unix(at, 0)).Abs() > 5*time.Minute {
		return false
	}
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(stamp + "." + string(body)))
	got, err := hex.DecodeString(signature)
	return err == nil && hmac.Equal(got, mac.Sum(nil))
}

// TestTheDocumentedReceiverBelievesUsAndNobodyElse: verify is the function in docs/lasting.md.
func TestTheDocumentedReceiverBelievesUsAndNobodyElse(t *testing.T) {
	secret, body, now := []byte(testSecret), []byte(`{"receipts":[]}`), time.Now()
	header := sign(secret, body, now)
	if !verify(secret, body, header) {
		t.Errorf("it does not believe %s", header)
	}
	for name, believed := range map[string]bool{
		"another body":      verify(secret, []byte("{}"), header),
		"another secret":    verify([]byte("fedcba9876543210"), body, header),
		"an old one":        verify(secret, body, sign(secret, body, now.Add(-6*time.Minute))),
		"of the future":     verify(secret, body, sign(secret, body, now.Add(6*time.Minute))),
		"another time":      verify(secret, body, strings.Replace(header, "t=1", "t=2", 1)),
		"no signature":      verify(secret, body, header[:strings.Index(header, ",")]),
		"no header":         verify(secret, body, ""),
		"a part of it":      verify(secret, body, header[:len(header)-2]),
		"another algorithm": verify(secret, body, strings.Replace(header, "v1=", "v0=", 1)),
	} {
		if believed {
			t.Errorf("it believes %s", name)
		}
	}
	source, err := os.ReadFile("documented_test.go")
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../../docs/lasting.md")
	if err != nil {
		t.Fatal(err)
	}
	_, function, _ := strings.Cut(string(source), "\nfunc verify")
	function, _, _ = strings.Cut(function, "\n}\n")
	if !strings.Contains(string(page), "func verify"+function+"\n}\n") {
		t.Error("the function in docs/lasting.md is another one")
	}
}
