package link

import (
	"strings"
	"time"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// The states of a node, from its links.
const (
	NodeUp         = "up"         // all links take deliveries
	NodeUnary      = "unary"      // the same, and the node has no Deliver
	NodePartly     = "partly"     // some links do not
	NodeStalled    = "stalled"    // the node owes overdue answers
	NodeDraining   = "draining"   // it has said that it goes
	NodeConnecting = "connecting" // the first attempt after the start, or after a loss, is under way
	NodeDown       = "down"       // not reachable
)

// NodeDetails is what a person wants to know of a node. What is of links is the sum over all of them; times are of the one
// that has waited longest.
type NodeDetails struct {
	Node

	State       string
	Trouble     string // why it is not reachable, "" while it is, or while nothing has failed yet
	BootID      string
	Connections int // live links
	Links       int
	Queued      int // deliveries that wait to be written
	QueuedBytes int
	QueuedFor   time.Duration
	Unacked     int // deliveries that were written
	UnackedFor  time.Duration
	Window      int    // how many of them there may be
	Features    uint32 // that the node has and we offer: bits by number of pubsub.Feature
	Breaks      uint64 // links that were up and ended, unless the node drained
	Stalls      uint64
	Acks        []uint64 // frames by time until they were acknowledged, see AckBounds
}

// AckBounds are the upper bounds of the buckets of NodeDetails.Acks in seconds, but for the last one.
func AckBounds() []float64 {
	return []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}
}

// FeatureNames are the features of nodes that exist, by number, such as DEDUPE.
func FeatureNames() map[int32]string {
	names := map[int32]string{}
	for number, name := range pubsub.Feature_name {
		if number != int32(pubsub.Feature_FEATURE_UNSPECIFIED) {
			names[number] = strings.TrimPrefix(name, "FEATURE_")
		}
	}
	return names
}

// featureName is what people are shown of a feature.
func featureName(f pubsub.Feature) string { return strings.TrimPrefix(f.String(), "FEATURE_") }

// Details calls use with each node, ordered by id. What it gets is valid until it returns.
func (s *Set) Details(use func(d *NodeDetails)) {
	var d NodeDetails
	for _, n := range s.snapshot.Load().nodes {
		n.describe(&d)
		use(&d)
	}
}

func (n *node) describe(d *NodeDetails) {
	*d = NodeDetails{Node: Node{n.id, n.addr}, Links: len(n.links), Breaks: n.breaks.Get(), Stalls: n.stalls.Get(), Acks: n.acks.Append(d.Acks[:0])}
	able, byState := 0, [len(stateText)]int{}
	stalled := 0
	for _, l := range n.links {
		var t engine.LinkState
		l.mu.Lock()
		byState[l.state]++
		d.Connections += live(l.state)
		d.Queued += l.load.len
		d.QueuedBytes += l.load.bytes
		if l.queue.len > 0 {
			d.QueuedFor = max(d.QueuedFor, time.Duration(n.set.clock.ran.Load()-l.queue.slot(0).at))
		}
		if l.stalled {
			stalled++
		}
		if live(l.state) == 1 && l.refusal == engine.Sent {
			able++
		}
		if l.way != nil {
			l.way.describeLocked(&t)
			if s, isStream := l.way.(*stream); isStream {
				d.Features |= uint32(s.can)
			}
		}
		l.mu.Unlock()
		d.Unacked += t.Unacked
		d.Window += t.Window
		d.UnackedFor = max(d.UnackedFor, t.UnackedFor)
	}
	n.mu.Lock()
	d.BootID = n.boot
	if n.trouble != "none" {
		d.Trouble = n.trouble
	}
	n.mu.Unlock()
	switch {
	case able == 0 && byState[draining] > 0:
		d.State = NodeDraining
	case d.Connections == 0 && byState[connecting] > 0 && d.Trouble == "":
		d.State = NodeConnecting
	case d.Connections == 0:
		d.State = NodeDown
	case stalled > 0 && able == 0:
		d.State = NodeStalled
	case able < d.Links:
		d.State = NodePartly
	case byState[unary] > 0:
		d.State = NodeUnary
	default:
		d.State = NodeUp
	}
}
