package web

import (
	"cmp"
	"net/http"

	"github.com/push-manager/push-manager/docs"
)

// pushService is the one that most short paths are for.
const pushService = "PushManagerService"

// routes is what is served where: every method that gRPC serves at its own path, the short paths, and the document.
func (s *Server) routes() (*http.ServeMux, error) {
	mux := http.NewServeMux()
	byName := map[string]*method{}
	for _, service := range s.cfg.Ingress.Services() {
		methods, err := s.methods(service)
		if err != nil {
			return nil, err
		}
		for _, m := range methods {
			mux.Handle(m.procedure, m)
			byName[m.procedure] = m
		}
	}
	for _, p := range shorts {
		mux.Handle("POST "+p.Path, s.shortHandler(p, byName["/pubsub."+cmp.Or(p.Service, pushService)+"/"+p.Method]))
		mux.HandleFunc(p.Path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Allow", http.MethodPost)
			s.failWith(w, http.StatusMethodNotAllowed, errWrongMethod)
		})
	}
	mux.HandleFunc("GET /openapi.yaml", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/yaml")
		_, _ = w.Write(docs.OpenAPI) // it fails for a client that has gone
	})
	s.consoleRoutes(mux)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { s.fail(w, r, errNotFound) })
	return mux, nil
}
