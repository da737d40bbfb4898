package web

import (
	"net/http"
	"slices"
)

// Console is a page for people and what it shows.
type Console struct {
	// Files serves the page to everybody, below /console/; for a path that it does not have it calls missing. nil: there is no page.
	Files func(missing http.Handler) http.Handler
	// Data is what the page shows, by the name below /console/. It is for callers with the right Console, and for no page
	// of another origin.
	Data map[string]http.Handler
}

func (s *Server) consoleRoutes(mux *http.ServeMux) {
	if s.cfg.Console.Files == nil {
		return
	}
	missing := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.fail(w, r, errNotFound) })
	mux.Handle("GET /console/", s.cfg.Console.Files(missing))
	for name, h := range s.cfg.Console.Data {
		mux.HandleFunc("GET /console/"+name, func(w http.ResponseWriter, r *http.Request) {
			if !s.ownHost(r) {
				s.fail(w, r, errOrigin)
				return
			}
			if err := s.cfg.Ingress.AllowConsole(r.Context(), s.arrival(r, "")); err != nil {
				w.Header().Set("Cache-Control", "no-store")
				s.fail(w, r, err)
				return
			}
			h.ServeHTTP(w, r)
		})
	}
}

// ownHost tells whether a request was sent to a name that is ours, and by no page of another one. A page's GET of its own names no
// origin, and somebody may have pointed another name at this machine, see own. One that is listed as an origin is ours; that its
// pages may push does not let them see the console under another name.
func (s *Server) ownHost(r *http.Request) bool {
	if origin := r.Header.Get("Origin"); origin != "" && origin != "http://"+r.Host && origin != "https://"+r.Host {
		return false
	}
	if r.TLS != nil || own("http://"+r.Host, r) {
		return true
	}
	return slices.Contains(s.origins, "http://"+r.Host) || slices.Contains(s.origins, "https://"+r.Host)
}
