package program

import (
	"net"
	"strconv"

	"github.com/push-manager/push-manager/internal/config"
)

// CheckListen refuses an address that others can reach, while there is no TLS.
func CheckListen(s *config.Set, host string, allowed bool) error {
	if ip := net.ParseIP(host); ip == nil && host != "" && host != "localhost" {
		return s.Problem("listen_address", "%q is not an IP address", host)
	}
	if !config.Loopback(host) && !allowed {
		return s.Problem("listen_address", "%q can be reached by others, without TLS and authentication: only with ALLOW_INSECURE=true", host)
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
