package discovery

import (
	"cmp"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/push-manager/push-manager/internal/plain"
)

// registry decides who is known, from what etcd said and which links live. It
// has no clock, no goroutine and no lock: the Watcher's loop owns it.
type registry struct {
	// Static.
	log      *slog.Logger
	m        *watcherMetrics
	maxNodes int
	grace    time.Duration
	alive    func(id string) bool // nil: nobody vouches

	// What etcd holds, by key. Malformed values are not in it.
	records map[string]record
	// Malformed values already counted: key to modification revision.
	bad map[string]int64
	// Keys that are no node's, already counted.
	foreign map[string]bool
	// Nodes without a key that are kept, by id: since when.
	held map[string]time.Time
	// More than half of all nodes are held.
	panicking bool
	// Ids that several keys claim.
	contested map[string]bool
	// records has changed since the last settle.
	dirty bool
	// The set as last reported, by id.
	current map[string]Node
	quiet   quiet
}

// record is one well-formed key.
type record struct {
	node    Node
	created int64
}

// entry is one key as etcd told it, parsed outside of the loop.
type entry struct {
	key               string
	node              Node
	foreign           bool  // not a node's key, whatever it holds
	bad               error // not nil: malformed
	created, modified int64
}

func newRegistry(cfg Config, m *watcherMetrics) *registry {
	return &registry{
		log:       cfg.Logger,
		m:         m,
		maxNodes:  cfg.MaxNodes,
		grace:     cfg.Grace,
		alive:     cfg.Alive,
		records:   map[string]record{},
		bad:       map[string]int64{},
		foreign:   map[string]bool{},
		held:      map[string]time.Time{},
		contested: map[string]bool{},
		current:   map[string]Node{},
	}
}

// replace takes over a complete list. keepMissing leaves the keys that are not
// in it as they were.
func (r *registry) replace(now time.Time, list []entry, keepMissing bool) {
	present := make(map[string]bool, len(list))
	for _, e := range list {
		present[e.key] = true
	}
	if !keepMissing {
		before := len(r.records)
		maps.DeleteFunc(r.records, func(key string, _ record) bool { return !present[key] })
		maps.DeleteFunc(r.bad, func(key string, _ int64) bool { return !present[key] })
		maps.DeleteFunc(r.foreign, func(key string, _ bool) bool { return !present[key] })
		r.dirty = r.dirty || len(r.records) < before
	}
	for _, e := range list {
		r.put(now, e)
	}
}

// put takes over one key.
func (r *registry) put(now time.Time, e entry) {
	switch {
	case e.foreign:
		r.putForeign(now, e.key)
		return
	case e.bad != nil:
		r.putBad(now, e)
		return
	}
	delete(r.bad, e.key)
	had, known := r.records[e.key]
	if !known && len(r.records) >= r.maxNodes {
		r.m.overLimit.Inc()
		if n, ok := r.quiet.say(now); ok {
			r.log.Error("too many nodes registered, ignoring new ones",
				"key", plain.Line(e.key, textMax), "limit", r.maxNodes, "unreported", n)
		}
		return
	}
	rec := record{node: e.node, created: e.created}
	r.records[e.key] = rec
	r.dirty = r.dirty || had != rec
}

// putBad notes a malformed value once for each time it was written. What the key
// said before stays.
func (r *registry) putBad(now time.Time, e entry) {
	if r.bad[e.key] == e.modified {
		return
	}
	if len(r.bad) < r.maxNodes {
		r.bad[e.key] = e.modified
	}
	r.m.badValues.Inc()
	if n, ok := r.quiet.say(now); ok {
		r.log.Warn("malformed registration skipped", "key", plain.Line(e.key, textMax), "err", e.bad, "unreported", n)
	}
}

// putForeign notes a key that is no node's once, however often it is written: to its owner it
// may be in order.
func (r *registry) putForeign(now time.Time, key string) {
	if r.foreign[key] {
		return
	}
	if len(r.foreign) < r.maxNodes {
		r.foreign[key] = true
	}
	r.m.foreign.Inc()
	if n, ok := r.quiet.say(now); ok {
		r.log.Warn("a key below the prefix of the nodes is no node's and is ignored: nodes stand right below it", "key", plain.Line(key, textMax), "unreported", n)
	}
}

// remove takes over a deleted key.
func (r *registry) remove(key string) {
	if _, known := r.records[key]; known {
		delete(r.records, key)
		r.dirty = true
	}
	delete(r.bad, key)
	delete(r.foreign, key)
}

// settle draws the conclusions: it returns the new set when it differs from the
// one reported last.
func (r *registry) settle(now time.Time) ([]Node, bool) {
	if !r.dirty && len(r.held) == 0 {
		return nil, false
	}
	r.dirty = false
	next := r.registered()
	r.hold(now, next)
	for id := range r.held {
		next[id] = r.current[id]
	}
	r.m.nodes.Store(int64(len(next)))
	r.m.held.Store(int64(len(r.held)))
	if maps.Equal(next, r.current) {
		return nil, false
	}
	r.current = next
	nodes := slices.SortedFunc(maps.Values(next), func(a, b Node) int { return cmp.Compare(a.ID, b.ID) })
	return nodes, true
}

// registered is the set as etcd has it. Of the keys that claim one id the one
// created last wins; keys created together are ordered by name, so that every
// process picks the same.
func (r *registry) registered() map[string]Node {
	winners := make(map[string]string, len(r.records)) // id to key
	contested := map[string]bool{}
	for key, rec := range r.records {
		id := rec.node.ID
		rivalKey, taken := winners[id]
		if taken {
			contested[id] = true
			rival := r.records[rivalKey]
			if rec.created < rival.created || (rec.created == rival.created && key < rivalKey) {
				continue
			}
		}
		winners[id] = key
	}
	r.noteContested(contested, winners)
	nodes := make(map[string]Node, len(winners))
	for id, key := range winners {
		nodes[id] = r.records[key].node
	}
	return nodes
}

// noteContested warns once for each id that begins to be claimed twice.
func (r *registry) noteContested(contested map[string]bool, winners map[string]string) {
	for id := range contested {
		if !r.contested[id] {
			r.m.conflicts.Inc()
			r.log.Warn("several keys claim one node id, the one created last wins", "node", id, "key", plain.Line(winners[id], textMax))
		}
	}
	r.contested = contested
	r.m.contested.Store(int64(len(contested)))
}

// hold decides about the nodes that were known and have no key now: those whose
// link lives stay for the grace, the others go at once.
func (r *registry) hold(now time.Time, registered map[string]Node) {
	for id := range r.held {
		if _, back := registered[id]; back {
			delete(r.held, id)
		}
	}
	for id := range r.current {
		if _, ok := registered[id]; ok {
			continue
		}
		if r.alive == nil || !r.alive(id) {
			delete(r.held, id)
			continue
		}
		if _, ok := r.held[id]; !ok {
			r.held[id] = now
			r.log.Warn("node is gone from etcd and its link lives: keeping it for now", "node", id, "grace", r.grace)
		}
	}
	r.notePanic(now, len(registered)+len(r.held))
	if r.panicking {
		return
	}
	for id, since := range r.held {
		if now.Sub(since) >= r.grace {
			delete(r.held, id)
			r.log.Warn("node did not come back to etcd: removed", "node", id)
		}
	}
}

// notePanic turns the panic threshold on and off. One node that is gone is never
// a panic, whatever its share.
func (r *registry) notePanic(now time.Time, known int) {
	panicking := len(r.held) >= 2 && len(r.held)*2 > known
	if panicking == r.panicking {
		return
	}
	r.panicking = panicking
	if panicking {
		r.m.panics.Inc()
		r.m.panicking.Store(1)
		r.log.Error("most nodes are gone from etcd while their links live: keeping them until their links end",
			"held", len(r.held), "known", known)
		return
	}
	r.m.panicking.Store(0)
	for id := range r.held {
		r.held[id] = now // the grace begins anew for those that are still missing
	}
	r.log.Info("etcd knows the majority of the nodes again", "held", len(r.held), "known", known)
}

// quiet limits how often something is logged: once in ten seconds.
type quiet struct {
	last     time.Time
	unspoken int
}

// say tells whether to log now, and how many times were passed over.
func (q *quiet) say(now time.Time) (unspoken int, ok bool) {
	if !q.last.IsZero() && now.Sub(q.last) < 10*time.Second {
		q.unspoken++
		return 0, false
	}
	unspoken = q.unspoken
	q.last, q.unspoken = now, 0
	return unspoken, true
}
