package arch

import (
	"net"
	"net/netip"
	"regexp"
	"strings"
	"testing"
)

// TestEnvoyIsShippedOnLoopback: its listener, and the instances that stand there as an example.
func TestEnvoyIsShippedOnLoopback(t *testing.T) {
	addresses := regexp.MustCompile(`socket_address: \{address: ([^,]+),`).FindAllStringSubmatch(read(t, "deploy/envoy/calls.yaml"), -1)
	if len(addresses) != 4 {
		t.Errorf("%d addresses, want a listener and three instances", len(addresses))
	}
	for _, a := range addresses {
		if ip, err := netip.ParseAddr(a[1]); err != nil || !ip.IsLoopback() {
			t.Errorf("%s is open to a network", a[1])
		}
	}
}

// TestWhatIsShippedListensOnLoopback: what somebody copies without a look is not open to a
// network. An address that stands in a variable is the owner's own.
func TestWhatIsShippedListensOnLoopback(t *testing.T) {
	bind := regexp.MustCompile(`(?m)^\s*(?:bind|listen)\s+([^\s;]+)`)
	found := 0
	for _, file := range files(t) {
		if !strings.HasPrefix(file, "deploy/haproxy/") && !strings.HasPrefix(file, "deploy/nginx/") {
			continue
		}
		found++
		binds := bind.FindAllStringSubmatch(read(t, file), -1)
		if len(binds) == 0 {
			t.Errorf("%s binds nothing", file)
		}
		for _, bind := range binds {
			address := strings.Trim(bind[1], `"`)
			if variable, ok := strings.CutPrefix(address, "${"); ok {
				_, address, _ = strings.Cut(strings.TrimSuffix(variable, "}"), "-")
			}
			host, _, err := net.SplitHostPort(address)
			if err != nil {
				t.Errorf("%s: bind %s: %v", file, bind[1], err)
				continue
			}
			if ip, err := netip.ParseAddr(host); err != nil || !ip.IsLoopback() {
				t.Errorf("%s: bind %s is open to a network", file, bind[1])
			}
		}
	}
	if found < 6 {
		t.Errorf("%d files, and there are three for each balancer", found)
	}
}
