package discovery

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/plain"
)

const (
	// maxValueBytes bounds what is parsed: a value is an address and a few
	// words of metadata, and etcd would store up to 1.5 MiB.
	maxValueBytes = 4 << 10
	// maxHostBytes is the length limit of a DNS name.
	maxHostBytes = 253
	// textMax is what logs and errors have of what others have registered.
	textMax = 128
)

// Node is a registered node: who it is and where it is dialled.
type Node struct {
	ID, Addr string
	// BootID tells its process from an earlier one, empty when it does not say.
	BootID string
}

// endpoint is a value as etcd's naming/endpoints package writes it.
type endpoint struct {
	Op       uint8
	Addr     string
	Metadata map[string]string
}

// endpointIn is the same as others may write it: Metadata is whatever they like.
type endpointIn struct {
	Op       *uint8
	Addr     string
	Metadata json.RawMessage
}

// encodeValue builds the value of a registration.
func encodeValue(id, addr string, metadata map[string]string) (string, error) {
	all := make(map[string]string, len(metadata)+1)
	maps.Copy(all, metadata)
	all["node_id"] = id
	value, err := json.Marshal(endpoint{Addr: addr, Metadata: all})
	if err != nil {
		return "", fmt.Errorf("encode registration: %w", err)
	}
	return string(value), nil
}

// keyOf is the key of an id. The id is escaped, so that one with a slash cannot
// reach out of the prefix; ordinary ids stay as they are.
func keyOf(prefix, id string) string { return prefix + url.PathEscape(id) }

// ofNode tells whether a key is one of a node: the prefix and one segment more. What stands
// deeper is somebody else's, even where its last segment is the id of a node.
func ofNode(prefix, key string) bool {
	segment, below := strings.CutPrefix(key, prefix)
	return below && segment != "" && !strings.Contains(segment, "/")
}

// parseNode reads the node that a key's value describes. Anybody with access to etcd may
// have written it: one that makes this code panic is as malformed as any other.
func parseNode(key string, value []byte, nets []netip.Prefix) (_ Node, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("value: panic: %v", v)
		}
	}()
	if len(value) > maxValueBytes {
		return Node{}, fmt.Errorf("value has %d bytes, the limit is %d", len(value), maxValueBytes)
	}
	var in endpointIn
	if err := json.Unmarshal(value, &in); err != nil {
		return Node{}, fmt.Errorf("value: %w", err)
	}
	if in.Op != nil && *in.Op != 0 {
		return Node{}, fmt.Errorf("value: Op is %d, not 0 (add)", *in.Op)
	}
	id, boot, err := metadataIDs(in.Metadata)
	if err != nil {
		return Node{}, err
	}
	if id == "" {
		id = key[strings.LastIndexByte(key, '/')+1:]
	}
	if err := ids.Check(id, ids.MaxBytes); err != nil {
		return Node{}, fmt.Errorf("node id %w", err)
	}
	if err := checkAddr(in.Addr, nets); err != nil {
		return Node{}, err
	}
	if ids.Check(boot, ids.MaxBytes) != nil {
		boot = "" // Nobody needs it to reach the node.
	}
	return Node{ID: id, Addr: in.Addr, BootID: boot}, nil
}

// metadataIDs are Metadata.node_id and Metadata.boot_id, empty when there are none.
// Metadata that is no object belongs to somebody else and says nothing about them.
func metadataIDs(raw json.RawMessage) (node, boot string, err error) {
	if len(raw) == 0 || raw[0] != '{' {
		return "", "", nil
	}
	var metadata struct {
		NodeID string          `json:"node_id"`
		BootID json.RawMessage `json:"boot_id"`
	}
	if err := json.Unmarshal(raw, &metadata); err != nil {
		return "", "", fmt.Errorf("metadata: %w", err)
	}
	_ = json.Unmarshal(metadata.BootID, &boot) // What is no text is somebody else's.
	return metadata.NodeID, boot, nil
}

// CheckAddress tells what is wrong with an address to register.
func CheckAddress(addr string) error { return checkAddr(addr, nil) }

// checkAddr accepts host:port and nothing else: no scheme, no list, no port by
// name. Addresses that can only point at ourselves by accident or at a cloud's
// metadata service are refused; nets, when given, says which may be dialled.
func checkAddr(addr string, nets []netip.Prefix) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("address %q is not host:port", plain.Line(addr, textMax))
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil || number == 0 || port[0] == '+' {
		return fmt.Errorf("address %q: port is not in 1..65535", plain.Line(addr, textMax))
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return checkHostName(addr, host, nets)
	}
	ip = ip.Unmap()
	switch {
	case ip.Zone() != "":
		return fmt.Errorf("address %q has a zone", plain.Line(addr, textMax))
	case ip.IsUnspecified(), ip.IsMulticast(), ip.IsLinkLocalUnicast():
		return fmt.Errorf("address %q is unspecified, multicast or link-local", plain.Line(addr, textMax))
	case !allowed(ip, nets):
		return fmt.Errorf("address %q is outside of the allowed networks", plain.Line(addr, textMax))
	}
	return nil
}

func checkHostName(addr, host string, nets []netip.Prefix) error {
	switch {
	case host == "" || len(host) > maxHostBytes:
		return fmt.Errorf("address %q: host is empty or too long", plain.Line(addr, textMax))
	case strings.ContainsFunc(host, notInHostName):
		return fmt.Errorf("address %q: host is no name and no IP address", plain.Line(addr, textMax))
	case len(nets) > 0:
		return fmt.Errorf("address %q: names are not allowed where networks are listed", plain.Line(addr, textMax))
	}
	return nil
}

func notInHostName(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '.' && r != '_'
}

func allowed(ip netip.Addr, nets []netip.Prefix) bool {
	if len(nets) == 0 {
		return true
	}
	for _, n := range nets {
		if n.Contains(ip) {
			return true
		}
	}
	return false
}
