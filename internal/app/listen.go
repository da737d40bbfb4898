package app

import (
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"unicode"

	"google.golang.org/grpc/resolver"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/transport/discovery"
)

// CheckListen refuses a host to listen on that is no IP address.
func CheckListen(s *config.Set, key, host string) error {
	if ip := net.ParseIP(host); ip == nil && host != "" && host != "localhost" {
		return s.Errorf(key, "%q is not an IP address", host)
	}
	return nil
}

// BindMetricsAddress adds the key. CheckMetricsAddress must follow Load.
func BindMetricsAddress(s *config.Set, host *string) {
	s.Text(host, "metrics_address", "", "Address that metrics_port listens on. Empty: listen_address. It may be one that others reach: what is served there needs no TLS.")
}

// CheckMetricsAddress puts the default in. Profiles are more than others may have.
func CheckMetricsAddress(s *config.Set, host *string, listen string, profiles bool, risks *Risks) error {
	if *host == "" {
		*host = listen
	}
	if err := CheckListen(s, "metrics_address", *host); err != nil {
		return err
	}
	if profiles && !config.Loopback(*host) {
		return risks.Add("pprof_remote", "profiles are served at %q to others, without TLS and authentication", *host)
	}
	return nil
}

// Port is a port to listen on and the key that it is from.
type Port struct {
	Key    string
	Number int
}

// CheckPorts refuses a port that two listeners of a program want. 0 is a free one for each.
func CheckPorts(s *config.Set, ports ...Port) error {
	taken := map[int]string{}
	for _, p := range ports {
		if by, ok := taken[p.Number]; ok && p.Number != 0 {
			return s.Errorf(p.Key, "%d is %s, too", p.Number, by)
		}
		taken[p.Number] = p.Key
	}
	return nil
}

// CheckAddresses refuses addresses of ours and of the Controller that can never work.
// With several, the Controller's may be a list of HOST:PORT.
func CheckAddresses(s *config.Set, advertised, controller string, several bool) error {
	if advertised != "" {
		if err := discovery.CheckAddress(advertised); err != nil {
			return s.Errorf("advertise_address", "%v", err)
		}
	}
	targets := []string{controller}
	if several && strings.Contains(controller, ",") && !strings.Contains(controller, "://") {
		targets = strings.Split(controller, ",")
	}
	for _, target := range targets {
		target = strings.TrimSpace(target)
		if target == "" && len(targets) > 1 {
			continue // a comma too many does no harm
		}
		if err := CheckTarget(target); err != nil {
			return s.Errorf("controller_address", "%v", err)
		}
	}
	return nil
}

// CheckTarget tells what is wrong with a gRPC target. gRPC itself takes whatever it does not know
// for a name, and looks it up for ever.
func CheckTarget(target string) error {
	if strings.ContainsFunc(target, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }) {
		return fmt.Errorf("%q is no gRPC target: it holds a space", target)
	}
	if u, err := url.Parse(target); err == nil && u.Scheme != "" && resolver.Get(u.Scheme) != nil {
		if strings.Trim(u.Path, "/") == "" && u.Opaque == "" {
			return fmt.Errorf("%q is no gRPC target: it names nothing", target)
		}
		return nil
	}
	if scheme, _, found := strings.Cut(target, "://"); found {
		return fmt.Errorf("%q is no gRPC target: the scheme %q is unknown", target, scheme)
	}
	host, port, err := net.SplitHostPort(target)
	if err != nil { // gRPC has a port for names without one
		host, port = strings.Trim(target, "[]"), "443"
	}
	if strings.Contains(target, ",") {
		return fmt.Errorf("%q is no gRPC target: it is a list, and one is wanted; a name may stand for several (dns:///NAME:PORT)", target)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || host == "" || strings.ContainsAny(host, "/%?#@,:") && net.ParseIP(host) == nil {
		return fmt.Errorf("%q is no gRPC target such as HOST:PORT", target)
	}
	return nil
}

// Advertised is the address that others reach a listener at: what the operator
// says, or the listener's own, or this machine's first address.
func Advertised(configured string, listener net.Addr) string {
	if configured != "" {
		return configured
	}
	tcp, ok := listener.(*net.TCPAddr)
	if !ok {
		return listener.String()
	}
	host := tcp.IP
	if host.IsUnspecified() {
		host = firstAddress()
	}
	return net.JoinHostPort(host.String(), strconv.Itoa(tcp.Port))
}

func firstAddress() net.IP {
	fallback := net.IPv4(127, 0, 0, 1)
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return fallback
	}
	var v6 net.IP
	for _, a := range addrs {
		ip, ok := a.(*net.IPNet)
		switch {
		case !ok || !ip.IP.IsGlobalUnicast():
		case ip.IP.To4() != nil:
			return ip.IP
		case v6 == nil:
			v6 = ip.IP
		}
	}
	if v6 != nil {
		return v6
	}
	return fallback
}
