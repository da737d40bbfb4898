package web

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
)

// What pages of an allowed origin may send, and see of a reply.
const (
	corsHeaders = "Authorization, Connect-Protocol-Version, Connect-Timeout-Ms, Content-Type, Grpc-Timeout, Traceparent, Tracestate, X-API-Key, X-Grpc-Web, X-Priority, X-User-Agent"
	corsExposed = "Grpc-Message, Grpc-Status, Grpc-Status-Details-Bin, Retry-After"
	corsMaxAge  = "7200" // seconds; browsers keep it no longer
)

// origins are those whose pages may call (RFC 6454).
type origins []string

// newOrigins refuses what no browser would send as an origin, and so would never match.
func newOrigins(list []string) (origins, error) {
	for _, o := range list {
		if err := CheckOrigin(o); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// CheckOrigin refuses what is not an origin such as "https://chat.example:8443".
func CheckOrigin(o string) error {
	u, err := url.Parse(o)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.Scheme+"://"+u.Host != o || strings.ToLower(o) != o || strings.Contains(o, "*") {
		return fmt.Errorf("%q is not an origin such as https://chat.example, in lower case and without a path", o)
	}
	return nil
}

// admitOrigin tells whether a request may go on. A page of another origin may call if that is listed. Every browser names
// the origin of what is no plain GET; whoever names none is no page.
func (s *Server) admitOrigin(w http.ResponseWriter, r *http.Request) bool {
	given := r.Header["Origin"]
	if len(given) == 0 {
		return true
	}
	listed := len(given) == 1 && slices.Contains(s.origins, given[0])
	if !listed && (len(given) != 1 || !own(given[0], r)) {
		s.fail(w, r, errOrigin)
		return false
	}
	if !listed {
		return true
	}
	h := w.Header()
	h.Add("Vary", "Origin")
	h.Set("Access-Control-Allow-Origin", given[0])
	h.Set("Access-Control-Expose-Headers", corsExposed)
	if r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" {
		return true
	}
	h.Set("Access-Control-Allow-Methods", "GET, POST")
	h.Set("Access-Control-Allow-Headers", corsHeaders)
	h.Set("Access-Control-Max-Age", corsMaxAge)
	w.WriteHeader(http.StatusNoContent)
	return false
}

// own tells whether an origin is that of this server: pages of ours, as the client has reached them. A name could be one
// that somebody else has pointed at this machine, so without TLS, where no certificate speaks for it, only addresses and
// localhost are believed.
func own(origin string, r *http.Request) bool {
	if r.TLS != nil {
		return origin == "https://"+r.Host
	}
	if origin != "http://"+r.Host {
		return false
	}
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	_, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil || host == "localhost"
}
