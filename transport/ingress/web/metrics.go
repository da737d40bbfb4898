package web

import (
	"sync"

	"connectrpc.com/connect"
	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/label"
)

// instruments are the metrics of HTTP. What becomes of pushes is counted where they enter.
type instruments struct {
	set    *metrics.Set
	panics *metrics.Counter
	made   sync.Map // of *metrics.Counter by outcome
}

// outcome is of a request: what it spoke, "none" for one that has got to no method, and the code of its answer. Both are
// few.
type outcome struct{ protocol, code string }

func newInstruments(set *metrics.Set) *instruments {
	return &instruments{set: set, panics: set.GetOrCreateCounter("push_manager_http_panics_total")}
}

func (i *instruments) count(protocol, code string) {
	o := outcome{protocol, code}
	c, ok := i.made.Load(o)
	if !ok {
		if protocol == connect.ProtocolGRPCWeb {
			protocol = "grpc_web"
		}
		c = i.set.GetOrCreateCounter(label.Name("push_manager_http_requests_total", "protocol", protocol, "code", code))
		i.made.Store(o, c)
	}
	c.(*metrics.Counter).Inc() //nolint:forcetypeassert // Nothing else is in it.
}
