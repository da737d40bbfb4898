// Package remote tells connections apart by where they come from, for bounds that more addresses must not get round.
package remote

import (
	"net"
	"net/netip"
)

// bits is what a customer has of IPv6 addresses at least (RFC 6177, section 2).
const bits = 64

// Network is the network that an address belongs to: an address of IPv4, or a /64 of IPv6.
func Network(a net.Addr) string {
	host := Host(a)
	ip, err := netip.ParseAddr(host)
	if err != nil || ip.Unmap().Is4() {
		return host
	}
	prefix, err := ip.WithZone("").Prefix(bits)
	if err != nil {
		return host
	}
	return prefix.String()
}

// Host is an address without its port.
func Host(a net.Addr) string {
	text := a.String()
	if host, _, err := net.SplitHostPort(text); err == nil {
		return host
	}
	return text
}
