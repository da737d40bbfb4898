package discovery

import (
	"net/netip"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/push-manager/push-manager/internal/ids"
)

func TestParseNode(t *testing.T) {
	const key = ConnectNodePrefix + "key-1"
	lan := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	for name, tc := range map[string]struct {
		key, value string
		nets       []netip.Prefix
		want       Node
		bad        string
	}{
		"contract":           {value: `{"Op":0,"Addr":"192.168.1.10:50052","Metadata":{"node_id":"connect-node-1"}}`, want: Node{ID: "connect-node-1", Addr: "192.168.1.10:50052"}},
		"boot id":            {value: `{"Addr":"h:1","Metadata":{"node_id":"n","boot_id":"b"}}`, want: Node{ID: "n", Addr: "h:1", BootID: "b"}},
		"foreign boot id":    {value: `{"Addr":"h:1","Metadata":{"boot_id":7}}`, want: Node{ID: "key-1", Addr: "h:1"}},
		"no metadata":        {value: `{"Addr":"h:1"}`, want: Node{ID: "key-1", Addr: "h:1"}},
		"null metadata":      {value: `{"Op":0,"Addr":"h:1","Metadata":null}`, want: Node{ID: "key-1", Addr: "h:1"}},
		"foreign metadata":   {value: `{"Addr":"h:1","Metadata":7}`, want: Node{ID: "key-1", Addr: "h:1"}},
		"other metadata":     {value: `{"Addr":"h:1","Metadata":{"zone":3}}`, want: Node{ID: "key-1", Addr: "h:1"}},
		"empty node_id":      {value: `{"Addr":"h:1","Metadata":{"node_id":""}}`, want: Node{ID: "key-1", Addr: "h:1"}},
		"deeper key":         {key: ConnectNodePrefix + "a/b", value: `{"Addr":"h:1"}`, want: Node{ID: "b", Addr: "h:1"}},
		"ipv6":               {value: `{"Addr":"[2001:db8::1]:65535"}`, want: Node{ID: "key-1", Addr: "[2001:db8::1]:65535"}},
		"loopback":           {value: `{"Addr":"127.0.0.1:1"}`, want: Node{ID: "key-1", Addr: "127.0.0.1:1"}},
		"allowed network":    {value: `{"Addr":"10.1.2.3:1"}`, nets: lan, want: Node{ID: "key-1", Addr: "10.1.2.3:1"}},
		"not json":           {value: `hello`, bad: "value:"},
		"empty":              {value: ``, bad: "value:"},
		"array":              {value: `[]`, bad: "value:"},
		"delete op":          {value: `{"Op":1,"Addr":"h:1"}`, bad: "Op is 1"},
		"oversize":           {value: `{"Addr":"h:1","Metadata":"` + strings.Repeat("x", maxValueBytes) + `"}`, bad: "limit"},
		"node_id number":     {value: `{"Addr":"h:1","Metadata":{"node_id":1}}`, bad: "metadata:"},
		"id with control":    {value: `{"Addr":"h:1","Metadata":{"node_id":"a\n"}}`, bad: "control"},
		"id too long":        {value: `{"Addr":"h:1","Metadata":{"node_id":"` + strings.Repeat("x", 257) + `"}}`, bad: "257"},
		"id empty":           {key: ConnectNodePrefix, value: `{"Addr":"h:1"}`, bad: "empty"},
		"id not utf-8":       {key: ConnectNodePrefix + "\xff", value: `{"Addr":"h:1"}`, bad: "UTF-8"},
		"no address":         {value: `{}`, bad: "host:port"},
		"scheme":             {value: `{"Addr":"file:///etc/passwd"}`, bad: "port"},
		"scheme with port":   {value: `{"Addr":"http://h:1"}`, bad: "host:port"},
		"unix":               {value: `{"Addr":"unix:/x"}`, bad: "port"},
		"target with slash":  {value: `{"Addr":"dns/x:1"}`, bad: "no name"},
		"many addresses":     {value: `{"Addr":"` + strings.Repeat("h:1,", 900) + `h:1"}`, bad: "host:port"},
		"two addresses":      {value: `{"Addr":"a,b:1"}`, bad: "no name"},
		"port 0":             {value: `{"Addr":"h:0"}`, bad: "port"},
		"port too high":      {value: `{"Addr":"h:65536"}`, bad: "port"},
		"port name":          {value: `{"Addr":"h:http"}`, bad: "port"},
		"port sign":          {value: `{"Addr":"h:+1"}`, bad: "port"},
		"no port":            {value: `{"Addr":"h"}`, bad: "host:port"},
		"no host":            {value: `{"Addr":":1"}`, bad: "host is empty"},
		"host too long":      {value: `{"Addr":"` + strings.Repeat("h", 254) + `:1"}`, bad: "too long"},
		"unspecified":        {value: `{"Addr":"0.0.0.0:1"}`, bad: "unspecified"},
		"cloud metadata":     {value: `{"Addr":"169.254.169.254:80"}`, bad: "link-local"},
		"mapped metadata":    {value: `{"Addr":"[::ffff:169.254.169.254]:80"}`, bad: "link-local"},
		"link-local v6 zone": {value: `{"Addr":"[fe80::1%eth0]:80"}`, bad: "zone"},
		"foreign network":    {value: `{"Addr":"192.168.1.1:1"}`, nets: lan, bad: "outside"},
		"name with networks": {value: `{"Addr":"h:1"}`, nets: lan, bad: "names"},
	} {
		t.Run(name, func(t *testing.T) {
			k := tc.key
			if k == "" {
				k = key
			}
			got, err := parseNode(k, []byte(tc.value), tc.nets)
			if tc.bad != "" {
				if err == nil || !strings.Contains(err.Error(), tc.bad) {
					t.Fatalf("got %v, %v; want an error with %q", got, err, tc.bad)
				}
				if len(err.Error()) > 512 {
					t.Fatalf("error has %d bytes", len(err.Error()))
				}
				return
			}
			if err != nil || got != tc.want {
				t.Fatalf("got %v, %v; want %v", got, err, tc.want)
			}
		})
	}
}

func TestEncodedValueIsRead(t *testing.T) {
	value, err := encodeValue("a/b", "h:1", map[string]string{"zone": "z"})
	if err != nil {
		t.Fatal(err)
	}
	key := keyOf(ConnectNodePrefix, "a/b")
	if strings.Count(key, "/") != 3 {
		t.Fatalf("the id reached out of its segment: %q", key)
	}
	got, err := parseNode(key, []byte(value), nil)
	if want := (Node{ID: "a/b", Addr: "h:1"}); err != nil || got != want {
		t.Fatalf("got %v, %v; want %v", got, err, want)
	}
	if want := `{"Op":0,"Addr":"h:1","Metadata":{"node_id":"a/b","zone":"z"}}`; value != want {
		t.Fatalf("got %s; want %s", value, want)
	}
}

func FuzzParseNode(f *testing.F) {
	f.Add("/services/connect-node/a", []byte(`{"Op":0,"Addr":"192.168.1.10:50052","Metadata":{"node_id":"n"}}`))
	f.Add("", []byte(`{"Addr":"[::1]:1","Metadata":[]}`))
	for _, value := range []string{
		"", "null", "[]", "{", `{"Addr":""}`, `{"Addr":1}`, `{"Addr":"h"}`, `{"Addr":"h:0"}`, `{"Addr":"h:65536"}`, `{"Addr":"file:///etc/passwd"}`,
		`{"Addr":"unix:///x"}`, `{"Addr":"169.254.169.254:80"}`, `{"Addr":"h:1\n"}`, `{"Addr":"h:1","Metadata":{"node_id":""}}`,
		`{"Addr":"h:1","Metadata":{"node_id":7}}`, `{"Addr":"h:1","Metadata":{"node_id":"\u0000"}}`, `{"Addr":"h:1","Addr":"i:2"}`, "\xff",
	} {
		f.Add("/services/connect-node/n", []byte(value))
	}
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		node, err := parseNode(key, value, nil)
		if err != nil {
			return
		}
		if node.ID == "" || len(node.ID) > ids.MaxBytes || !utf8.ValidString(node.ID) || strings.Contains(node.Addr, "/") {
			t.Fatalf("accepted %q", node)
		}
	})
}

func TestOnlyKeysRightBelowThePrefixAreNodes(t *testing.T) {
	for key, want := range map[string]bool{
		"/services/connect-node/node-1":        true,
		"/services/connect-node/a%2Fb":         true, // how a slash in an id is written
		"/services/connect-node/":              false,
		"/services/connect-node/zone-a/node-1": false,
		"/services/connect-node/node-1/":       false,
		"/services/connect-node//node-1":       false,
		"/services/connect-node":               false,
		"/services/connect-node-2/node-1":      false,
		"/services/push-manager/node-1":        false,
	} {
		if got := ofNode(ConnectNodePrefix, key); got != want {
			t.Errorf("%s: a node's key %v, want %v", key, got, want)
		}
	}
}
