package arch

import (
	"path"
	"slices"
	"strings"
	"testing"
)

// layer says what the packages under a folder may import besides the standard library.
type layer struct {
	dir string // a folder, or all folders below it where it ends in /...

	// Our packages, in the same notation. Importing oneself is not an import.
	ours []string

	// Modules of others. nil: none, {"*"}: any.
	others []string
}

// layers is the parts of docs/architecture.md. The first that matches a folder counts. A folder that matches none
// fails the test: a new package starts by saying where it stands.
//
// Wire types (proto) are for transport and what stands above it. In engine, engine/route and shard there is not one
// library beyond those named, which keeps them testable in virtual time.
var layers = []layer{
	{dir: "shard", others: []string{"github.com/panjf2000/ants/v2"}},
	{dir: "engine/route", others: []string{"github.com/maypok86/otter/v2", "golang.org/x/sync"}},
	{dir: "engine", ours: []string{"engine/route", "internal/ids", "shard"}},
	{dir: "proto", others: []string{
		"github.com/planetscale/vtprotobuf", "google.golang.org/genproto", "google.golang.org/grpc", "google.golang.org/protobuf",
	}},
	{dir: "docs"}, // what programs carry of it
	{dir: "client", ours: []string{"internal/certs", "internal/pause", "internal/wire", "proto"}, others: []string{
		"go.opentelemetry.io/otel", "golang.org/x/sync", "google.golang.org/genproto", "google.golang.org/grpc", "google.golang.org/protobuf",
	}},
	{dir: "client/clienttest", ours: []string{"client", "proto"}, others: []string{"google.golang.org/genproto", "google.golang.org/grpc", "google.golang.org/protobuf"}},
	{dir: "client/etcdresolver", ours: []string{"transport/discovery"}, others: []string{"go.etcd.io/etcd/client/v3", "google.golang.org/grpc"}},
	{dir: "internal/auth", ours: []string{"engine", "internal/auth/...", "internal/certs", "internal/config", "internal/ids", "internal/label", "internal/reload"}, others: []string{
		"github.com/VictoriaMetrics/metrics", "github.com/maypok86/otter/v2", "go.yaml.in/yaml/v3", "golang.org/x/sync", "golang.org/x/time",
	}},
	{dir: "internal/certs", ours: []string{"internal/label", "internal/reload"}, others: []string{
		"github.com/VictoriaMetrics/metrics", "golang.org/x/time", "google.golang.org/grpc",
	}},
	{dir: "internal/histogram", others: []string{"github.com/VictoriaMetrics/metrics"}},
	{dir: "internal/ids"},
	{dir: "internal/label"},
	{dir: "internal/wire", others: []string{"google.golang.org/protobuf"}},
	{dir: "internal/pause"},
	{dir: "internal/remote"},
	{dir: "internal/plain"},
	{dir: "internal/reload"},
	{dir: "internal/slots"},  // a rule of the protocol, for both of its sides
	{dir: "internal/stdlog"}, // initialised before all others, see there
	{dir: "transport/ingress/throttle", ours: []string{"engine", "internal/remote"}, others: []string{"*"}},
	{dir: "transport/ingress/web", ours: []string{"docs", "engine", "internal/label", "transport/ingress", "transport/ingress/throttle"}, others: []string{"*"}},
	{dir: "transport/ingress", ours: []string{"engine/...", "internal/audit", "internal/auth", "internal/histogram", "internal/ids", "internal/label", "internal/plain", "internal/position", "internal/quota", "internal/remote", "internal/wire", "proto", "transport/ingress/throttle", "transport/jobs", "transport/presence"}, others: []string{"*"}},
	{dir: "transport/compression", ours: []string{"proto"}, others: []string{"github.com/klauspost/compress"}},
	{
		dir:    "transport/link",
		ours:   []string{"engine/...", "internal/histogram", "internal/ids", "internal/label", "internal/pause", "internal/plain", "internal/wire", "proto", "transport/compression"},
		others: []string{"*"},
	},
	{dir: "transport/replay", ours: []string{"engine", "internal/ids", "internal/label", "transport/link", "transport/store"}, others: []string{"github.com/VictoriaMetrics/metrics"}},
	{dir: "transport/roomlog", ours: []string{"engine", "internal/label", "internal/pause", "transport/link", "transport/store"}, others: []string{"github.com/VictoriaMetrics/metrics"}},
	{dir: "transport/jobs", ours: []string{"engine", "internal/ids", "internal/label", "internal/pause", "internal/plain", "proto"}, others: []string{
		"github.com/VictoriaMetrics/metrics", "go.etcd.io/etcd/client/v3", "google.golang.org/protobuf",
	}},
	{dir: "transport/presence", ours: []string{"engine/...", "internal/ids", "internal/label", "internal/plain", "proto", "transport/controller", "transport/link"}, others: []string{
		"github.com/VictoriaMetrics/metrics", "golang.org/x/time", "google.golang.org/protobuf",
	}},
	{dir: "transport/discovery", ours: []string{"internal/ids", "internal/pause", "internal/plain"}, others: []string{
		"github.com/VictoriaMetrics/metrics", "go.etcd.io/etcd/api/v3", "go.etcd.io/etcd/client/v3", "go.uber.org/zap",
		"google.golang.org/grpc",
	}},
	{dir: "transport/controller", ours: []string{"engine/route", "internal/ids", "internal/label", "internal/pause", "internal/plain", "internal/wire", "proto"}, others: []string{"*"}},
	{dir: "transport/store", ours: []string{"engine", "internal/pause"}, others: []string{"github.com/VictoriaMetrics/metrics"}},
	{dir: "transport/store/jetstream", ours: []string{"engine", "internal/wire", "transport/store"}, others: []string{
		"github.com/VictoriaMetrics/metrics", "github.com/nats-io/nats-server/v2", "github.com/nats-io/nats.go",
	}},
	{dir: "transport/store/storetest", ours: []string{"engine", "transport/store"}},
	{dir: "transport/node", ours: []string{"internal/certs", "internal/ids", "internal/position", "internal/wire", "proto", "transport/compression", "transport/discovery"}, others: []string{"*"}},
	{dir: "transport/node/membership", ours: []string{"internal/certs", "internal/ids", "internal/slots", "proto"}, others: []string{"*"}},
	{dir: "internal/app", ours: []string{"internal/certs", "internal/config", "transport/discovery"}, others: []string{"*"}},
	{dir: "internal/buildinfo"},
	{dir: "internal/cli", ours: []string{"internal/buildinfo", "internal/config", "internal/plain", "internal/stdlog", "internal/telemetry"}},
	{dir: "internal/config", others: []string{"go.yaml.in/yaml/v3"}},
	{dir: "sdk/browser"}, // a file for gateways to serve
	{dir: "internal/...", ours: []string{"client/...", "docs", "internal/...", "sdk/browser", "transport/...", "engine/...", "shard", "proto"}, others: []string{"*"}},
	{dir: "examples/...", ours: []string{"client", "proto", "sdk/browser", "transport/node", "transport/node/membership"}, others: []string{"*"}}, // what others have
	{dir: "cmd/...", ours: []string{"client/...", "internal/...", "transport/...", "engine/...", "shard", "proto"}, others: []string{"*"}},
	{dir: "benchmarks/...", ours: []string{"benchmarks/...", "client/...", "internal/...", "transport/...", "engine/...", "shard", "proto"}, others: []string{"*"}},
}

// TestImportsPointOneWay covers product files. Tests may import the real parts that they drive.
func TestImportsPointOneWay(t *testing.T) {
	for _, src := range sources(t) {
		if src.test() {
			continue
		}
		own := layerOf(src.dir)
		if own.dir == "" {
			t.Errorf("%s: the folder %q is in no layer; add it to layers in this test", src.path(), src.dir)
			continue
		}
		for _, imported := range src.imports() {
			if !own.allows(src.dir, imported) {
				t.Errorf("%s imports %q, which the layer %q may not", src.path(), imported, own.dir)
			}
		}
	}
}

func TestLayerAllows(t *testing.T) {
	engine, internal := layerOf("engine"), layerOf("internal/devstack")
	for _, test := range []struct {
		layer    layer
		imported string
		want     bool
	}{
		{engine, "net/http", true},
		{engine, module + "/shard", true},
		{engine, module + "/engine/route", true},
		{engine, module + "/proto", false},
		{engine, module + "/transport/link", false},
		{engine, "google.golang.org/grpc", false},
		{engine, "github.com/panjf2000/ants/v2", false},
		{internal, module + "/transport/link", true},
		{internal, module + "/engine", true},
		{internal, module + "/cmd/push-manager", false},
		{internal, "google.golang.org/grpc/codes", true},
		{layerOf("shard"), "github.com/panjf2000/ants/v2", true},
		{layerOf("shard"), "github.com/panjf2000/ants/v2/pool", true},
		{layerOf("shard"), "github.com/panjf2000/ants/v20", false},
	} {
		if got := test.layer.allows(test.layer.dir, test.imported); got != test.want {
			t.Errorf("%s importing %s: allowed %v, want %v", test.layer.dir, test.imported, got, test.want)
		}
	}
}

// layerOf is the layer of a folder, the zero layer for none.
func layerOf(dir string) layer {
	for _, l := range layers {
		if matches(l.dir, dir) {
			return l
		}
	}
	return layer{}
}

// allows tells whether a package of the layer, in folder dir, may import a path.
func (l layer) allows(dir, imported string) bool {
	if ours, ok := strings.CutPrefix(imported, module+"/"); ok {
		return ours == dir || slices.ContainsFunc(l.ours, func(pattern string) bool { return matches(pattern, ours) })
	}
	if first, _, _ := strings.Cut(imported, "/"); !strings.Contains(first, ".") {
		return true // the standard library has no dot in its first element
	}
	return slices.ContainsFunc(l.others, func(other string) bool { return other == "*" || within(other, imported) })
}

// matches tells whether a folder is the pattern's, which may end in /... for itself and all below.
func matches(pattern, dir string) bool {
	if top, ok := strings.CutSuffix(pattern, "/..."); ok {
		return within(top, dir)
	}
	return path.Clean(pattern) == dir
}

// within tells whether p is top or stands below it.
func within(top, p string) bool {
	return p == top || strings.HasPrefix(p, top+"/")
}
