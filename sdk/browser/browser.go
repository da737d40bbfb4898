// Package browser holds push-client.js: a browser's connection to a gateway, as one ES module without dependencies. A gateway
// serves it to its pages. docs/browser.md says how a page uses it.
package browser

import (
	_ "embed"
	"net/http"
)

//go:embed push-client.js
var module []byte

// Serve is an http.HandlerFunc that serves the module. Any page may import it: it is the same for everybody.
func Serve(w http.ResponseWriter, _ *http.Request) {
	h := w.Header()
	h.Set("Content-Type", "text/javascript; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-cache")
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Cross-Origin-Resource-Policy", "cross-origin")
	_, _ = w.Write(module) // the browser has gone if it fails
}
