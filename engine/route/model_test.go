package route

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// asked is one query of TestDirectoryKeepsItsPromises, for one or more users.
type asked struct {
	m       *model
	n       int
	ordered bool
	refresh bool
	least   map[string]int // the version that an answer must have at least, if one is promised
	told    map[string]bool
}

// model is what the directory is held against. A user's node is named after the
// version of the answer.
type model struct {
	sync.Mutex
	t       *testing.T
	version map[string]int
	changed map[string]int      // the version that the last Invalidate told of
	order   map[string][]*asked // ordered queries, in order of asking
}

func (m *model) lookup(version int) string { return fmt.Sprintf("%06d", version) }

// answer checks and books what a query got for a key.
func (q *asked) answer(key string, s *Snapshot, err error) {
	m := q.m
	if q.told[key] {
		m.t.Errorf("query %d is told twice about %s", q.n, key)
	}
	q.told[key] = true
	if q.ordered {
		if line := m.order[key]; line[0] != q {
			m.t.Errorf("query %d for %s comes before query %d", q.n, key, line[0].n)
		}
		m.order[key] = slices.DeleteFunc(m.order[key], func(o *asked) bool { return o == q })
	}
	if err != nil {
		return
	}
	if got := s.Groups[0].Node; got < m.lookup(q.least[key]) {
		m.t.Errorf("query %d (ordered %v, refresh %v) got version %s of %s, older than %d", q.n, q.ordered, q.refresh, got, key, q.least[key])
	}
}

// TestDirectoryKeepsItsPromises asks in every way, in random interleavings with
// changes, errors and a change stream that comes and goes.
func TestDirectoryKeepsItsPromises(t *testing.T) {
	for seed := range uint64(300) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { interleave(t, rand.New(rand.NewPCG(seed, 7))) })
		})
	}
}

var modelUsers = []string{"a", "b", "c", "d"}

func interleave(t *testing.T, rng *rand.Rand) {
	s := &source{users: map[string][]string{}}
	d := newDirectory(t, s)
	m := &model{t: t, version: map[string]int{}, changed: map[string]int{}, order: map[string][]*asked{}}
	// While look-ups fail, stale answers serve: half of the runs do without.
	faults, watched, failing := rng.IntN(2) == 0, false, false
	change := func(u string) {
		m.version[u]++
		s.set(func(s *source) { s.users[u] = []string{m.lookup(m.version[u])} })
	}
	for _, u := range modelUsers {
		change(u)
	}
	var all []*asked
	for n := range 200 {
		u := modelUsers[rng.IntN(len(modelUsers))]
		switch rng.IntN(12) {
		case 0:
			m.Lock()
			change(u)
			m.changed[u] = m.version[u]
			m.Unlock()
			if watched {
				d.Invalidate(nil, []string{u})
			} else {
				m.Lock()
				m.changed[u] = 0
				m.Unlock()
			}
		case 1:
			gate := make(chan struct{})
			s.set(func(s *source) { s.gate = gate })
			time.AfterFunc(time.Duration(rng.IntN(250))*time.Millisecond, func() {
				s.set(func(s *source) {
					if s.gate == gate {
						s.gate = nil
					}
				})
				close(gate)
			})
		case 2:
			failing = faults && !failing
			s.set(func(s *source) {
				s.err = nil
				if failing {
					s.err = ErrUnavailable
				}
			})
		case 3:
			if watched = !watched; !watched {
				d.Vouch(time.Now())
				break
			}
			d.InvalidateAll()
			d.Vouch(time.Now().Add(1000 * time.Hour))
			m.Lock()
			maps.Copy(m.changed, m.version)
			m.Unlock()
		case 4:
			time.Sleep(time.Duration(rng.IntN(1500)) * time.Millisecond)
		case 5:
			synctest.Wait()
		default:
			all = append(all, m.ask(d, rng, n, watched && !faults))
		}
	}
	m.end(d, s, all)
}

// ask asks in a random way. promised: a change that was told of must be seen.
func (m *model) ask(d *Directory, rng *rand.Rand, n int, promised bool) *asked {
	users := slices.Clone(modelUsers[rng.IntN(len(modelUsers)):])
	if rng.IntN(2) == 0 {
		users = users[:1]
	}
	q := &asked{m: m, n: n, refresh: rng.IntN(4) == 0, least: map[string]int{}, told: map[string]bool{}}
	q.ordered = !q.refresh
	m.Lock()
	for _, u := range users {
		q.told[u] = false
		if promised {
			q.least[u] = m.changed[u]
		}
		if q.ordered {
			m.order[u] = append(m.order[u], q)
		}
	}
	m.Unlock()
	w := &modelWaiter{asked: q}
	if q.refresh {
		d.Users.Refresh(0, users, Missing{Node: m.lookup(0), Users: users, Since: time.Now()}, w)
		return q
	}
	snaps := make([]*Snapshot, len(users))
	askUsers(d, users, snaps, w)
	for i, s := range snaps {
		if s != nil {
			m.Lock()
			q.answer(users[i], s, nil)
			m.Unlock()
		}
	}
	return q
}

// end lets everything finish and looks at what is left.
func (m *model) end(d *Directory, s *source, all []*asked) {
	s.set(func(s *source) { s.err = nil })
	for range 300 { // more than there are queries: each may wait for the one before
		time.Sleep(time.Second)
		synctest.Wait()
	}
	m.Lock()
	defer m.Unlock()
	for _, q := range all {
		for key, told := range q.told {
			if !told {
				m.t.Errorf("query %d (ordered %v, refresh %v) was not told about %s", q.n, q.ordered, q.refresh, key)
			}
		}
	}
	if n := d.Stats().Waiting; n != 0 {
		m.t.Errorf("%d still waiting", n)
	}
	if n := len(d.Users.lanes[0].lines); n != 0 {
		m.t.Errorf("%d lines left", n)
	}
}

// modelWaiter is the query as a Waiter.
type modelWaiter struct {
	teller

	*asked
}

func (w *modelWaiter) Routed(keys []string, snaps []*Snapshot, err error) {
	w.m.Lock()
	defer w.m.Unlock()
	for i, key := range keys {
		if err != nil {
			w.answer(key, nil, err)
		} else {
			w.answer(key, snaps[i], nil)
		}
	}
}
