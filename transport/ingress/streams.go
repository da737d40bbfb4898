package ingress

import (
	"errors"
	"sync/atomic"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

var (
	errTooManyStreams   = errors.New("too many streams are open")
	errStreamsOfOneConn = errors.New("too many streams are open on the connection")
)

// streams bounds the streams that are open: an idle one has goroutines and buffers, for as long
// as its client likes. On one connection they must leave some of Config.MaxStreams to unary calls,
// which would wait in their client without a word.
type streams struct {
	most [4]int64 // in all, by rank of the priority
	each int64    // on one connection

	opened atomic.Int64
}

func newStreams(all, each int, set *metrics.Set) *streams {
	s := &streams{each: int64(each)}
	for _, p := range engine.Priorities() {
		s.most[p.Rank()] = int64(p.Share(all))
	}
	set.GetOrCreateGauge("push_manager_api_streams_limit", func() float64 { return float64(all) })
	return s
}

// open counts a stream in. Without an error it has to be closed.
func (s *streams) open(c *throttle.Conn, p engine.Priority) error {
	if s.opened.Add(1) > s.most[p.Rank()] {
		s.opened.Add(-1)
		return errTooManyStreams
	}
	if c.Streams.Add(1) > s.each {
		s.close(c)
		return errStreamsOfOneConn
	}
	return nil
}

func (s *streams) close(c *throttle.Conn) {
	c.Streams.Add(-1)
	s.opened.Add(-1)
}
