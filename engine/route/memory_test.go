package route

import (
	"context"
	"fmt"
	"hash/maphash"
	"math"
	"runtime"
	"strconv"
	"testing"
	"time"
)

// crowd is a Controller with rooms of 100 members on ten nodes; ids have 14 bytes and
// each user is in several rooms, as in the memory suite of benchmarks/e2e.
type crowd struct{}

func crowdMember(room string, i int) (user, node []byte) {
	n, _ := strconv.Atoi(room[len("room-"):])
	n = n*10 + i
	return fmt.Appendf(nil, "u-user-%07d", n), fmt.Appendf(nil, "connect-node-%d", n/10%100)
}

func (crowd) Room(_ context.Context, room string, add func(user, node []byte)) (bool, error) {
	for i := range 100 {
		add(crowdMember(room, i))
	}
	return true, nil
}

func (crowd) Users(_ context.Context, users []string, nodes [][]string) error {
	for i, user := range users {
		nodes[i] = []string{"connect-node-" + user[len(user)-2:]}
	}
	return nil
}

// live is the heap that is in use, once nothing more of it turns out to be garbage.
func live() int {
	var m runtime.MemStats
	for last := uint64(math.MaxUint64); ; last = m.HeapAlloc {
		runtime.GC()
		runtime.ReadMemStats(&m)
		if m.HeapAlloc >= last {
			return int(m.HeapAlloc)
		}
	}
}

// TestMemoryOfWhatIsCached keeps the figures of PERF.md true: a member is its id, a
// string's header, and a tenth of a group; a user is three objects beside its id.
func TestMemoryOfWhatIsCached(t *testing.T) {
	const rooms, users = 1000, 20_000
	d, err := New(Config{
		Source: crowd{}, Homes: 1, Home: func(string) int { return 0 },
		Go: func(_ int, task func()) error { task(); return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	q := Query{Now: time.Now()}
	before := live()
	for i := range rooms {
		d.Room(0, "room-"+strconv.Itoa(i), q, &teller{})
	}
	between := live()
	var snap [1]*Snapshot
	for i := range users {
		d.Users(0, []string{fmt.Sprintf("u-user-%07d", i)}, snap[:], q, &teller{})
	}
	after := live()
	if s := d.Stats(); s.Rooms != rooms || s.Members != 100*rooms || s.Users != users {
		t.Fatalf("cached: %+v", s)
	}
	for _, c := range []struct {
		what      string
		got, most int
	}{
		{"member in a room of 100 on ten nodes", (between - before) / (100 * rooms), 42},
		{"user", (after - between) / users, 400},
	} {
		t.Logf("a %s costs %d bytes", c.what, c.got)
		if c.got > c.most {
			t.Errorf("a %s costs %d bytes, most are %d", c.what, c.got, c.most)
		}
	}
}

// build is a look-up of a room of the crowd, with members times as many members.
func build(b *builder, times int, old *Snapshot) *Snapshot {
	for i := range 100 * times {
		user, node := crowdMember("room-0", i)
		b.add(user, node)
	}
	s := b.snapshot(true, old)
	b.reset()
	return s
}

// TestUnchangedRoomsAllocateNothing holds for the members: what a look-up finds
// unchanged is compared and forgotten.
func TestUnchangedRoomsAllocateNothing(t *testing.T) {
	b := newBuilder(maphash.MakeSeed(), newNames())
	old := build(b, 1, nil)
	own := testing.AllocsPerRun(10, func() { crowdMember("room-0", 1) })
	got := testing.AllocsPerRun(10, func() {
		if build(b, 1, old) != old {
			t.Error("an equal answer is another snapshot")
		}
	})
	if got -= 100 * own; got > 1 { // the list of groups
		t.Errorf("%v allocations", got)
	}
}

// TestChangedGroupsAllocateOneBlock holds for the ids: there is no allocation for each member.
func TestChangedGroupsAllocateOneBlock(t *testing.T) {
	b := newBuilder(maphash.MakeSeed(), newNames())
	build(b, 1, nil)
	own := testing.AllocsPerRun(10, func() { crowdMember("room-0", 1) })
	got := testing.AllocsPerRun(10, func() { build(b, 1, nil) })
	// A group has itself, its list and its ids; a snapshot itself and its list. What
	// shared needs is gone with the look-up.
	if got -= 100 * own; got > 3*10+2+30 {
		t.Errorf("%v allocations for ten groups", got)
	}
}

func BenchmarkBuild(b *testing.B) {
	for _, times := range []int{1, 100} {
		for _, known := range []bool{false, true} {
			b.Run(fmt.Sprintf("members=%d/unchanged=%v", 100*times, known), func(b *testing.B) {
				var members [][2][]byte
				for i := range 100 * times {
					user, node := crowdMember("room-0", i)
					members = append(members, [2][]byte{user, node})
				}
				w := newBuilder(maphash.MakeSeed(), newNames())
				var old *Snapshot
				b.ReportAllocs()
				for b.Loop() {
					for _, m := range members {
						w.add(m[0], m[1])
					}
					s := w.snapshot(true, old)
					if known {
						old = s
					}
					if !w.reset() {
						w = newBuilder(w.seed, w.names)
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(members)), "ns/member")
			})
		}
	}
}
