package arch

import (
	"net"
	"net/netip"
	"regexp"
	"strings"
	"testing"
)

// TestWhatIsShippedListensOnLoopbackUntilItHasTLS: what somebody copies without a look is
// not open to a network. An address that stands in a variable is the owner's own.
func TestWhatIsShippedListensOnLoopbackUntilItHasTLS(t *testing.T) {
	const file = "deploy/haproxy/haproxy.cfg"
	binds := regexp.MustCompile(`(?m)^\s*bind\s+(\S+)(.*)$`).FindAllStringSubmatch(read(t, file), -1)
	if len(binds) == 0 {
		t.Errorf("%s binds nothing", file)
	}
	for _, bind := range binds {
		if strings.Contains(bind[2], " ssl ") && strings.Contains(bind[2], " crt ") {
			continue
		}
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
			t.Errorf("%s: bind %s is open to a network, in plain text", file, bind[1])
		}
	}
}
