package health

import (
	"io"
	"net/http"
	"slices"
	"strings"
)

// Readyz serves /readyz: 200 with a line "ok" and those of notes, or 503 with the reasons of notReady. A request may leave
// out what some of the checks say, in ?exclude=. It gets 400 for one that is not in checks: a probe with a typing error shows
// at once, not when that check first fails. notReady and notes may be nil.
func Readyz(checks []string, notReady func(exclude ...string) []string, notes func() []string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var exclude []string
		for _, list := range r.URL.Query()["exclude"] {
			for name := range strings.SplitSeq(list, ",") {
				if name == "" {
					continue
				}
				if !slices.Contains(checks, name) {
					Answer(w, http.StatusBadRequest, "exclude: there is no such check. There are: "+strings.Join(checks, ",")+"\n")
					return
				}
				exclude = append(exclude, name)
			}
		}
		var reasons []string
		if notReady != nil {
			reasons = notReady(exclude...)
		}
		if len(reasons) > 0 {
			Answer(w, http.StatusServiceUnavailable, strings.Join(reasons, "\n")+"\n")
			return
		}
		lines := []string{"ok"}
		if notes != nil {
			lines = append(lines, notes()...)
		}
		Answer(w, http.StatusOK, strings.Join(lines, "\n")+"\n")
	}
}

// Answer is a line or some of text for whoever probes.
func Answer(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	// The client went away when this fails; there is nobody to tell.
	_, _ = io.WriteString(w, text)
}
