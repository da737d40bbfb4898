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

func (crowd) Room(_ context.Context, room string, add func(user, node []byte)) (bool, uint64, error) {
	for i := range 100 {
		add(crowdMember(room, i))
	}
	return true, 0, nil
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
		Source: crowd{}, Shards: 1, Shard: func(string) int { return 0 },
		Go: func(_ int, task func()) error { task(); return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	q := time.Now()
	before := live()
	for i := range rooms {
		d.Rooms.Ask(0, []string{"room-" + strconv.Itoa(i)}, q, &teller{})
	}
	between := live()
	var snap [1]*Snapshot
	for i := range users {
		askUsers(d, []string{fmt.Sprintf("u-user-%07d", i)}, snap[:], &teller{})
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

// crowdOf is the answer about a room with so many members, as user and node.
func crowdOf(members int) [][2][]byte {
	list := make([][2][]byte, members)
	for i := range list {
		list[i][0], list[i][1] = crowdMember("room-0", i)
	}
	return list
}

// build is a look-up.
func build(b *builder, members [][2][]byte, old *Snapshot) *Snapshot {
	for _, m := range members {
		b.add(m[0], m[1])
	}
	s := b.snapshot(true, old)
	b.reset()
	return s
}

// TestUnchangedRoomsAllocateNothing holds for the members: what a look-up finds
// unchanged is compared and forgotten.
func TestUnchangedRoomsAllocateNothing(t *testing.T) {
	b, members := newBuilder(maphash.MakeSeed(), newNames()), crowdOf(1000)
	old := build(b, members, nil)
	got := testing.AllocsPerRun(10, func() {
		if build(b, members, old) != old {
			t.Error("an equal answer is another snapshot")
		}
	})
	if got > 1 { // the list of groups
		t.Errorf("%v allocations", got)
	}
}

// TestChangedGroupsAllocateOneBlock holds for the ids: there is no allocation for each
// member.
func TestChangedGroupsAllocateOneBlock(t *testing.T) {
	b, members := newBuilder(maphash.MakeSeed(), newNames()), crowdOf(1000)
	build(b, members, nil)
	got := testing.AllocsPerRun(10, func() { build(b, members, nil) })
	// A group has itself, its list and its ids; a snapshot itself and its list. What
	// shared needs is gone with the look-up.
	if got > 3*100+2+50 {
		t.Errorf("%v allocations for 100 groups", got)
	}
}

func BenchmarkBuild(b *testing.B) {
	for _, n := range []int{100, 10_000} {
		for _, known := range []bool{false, true} {
			b.Run(fmt.Sprintf("members=%d/unchanged=%v", n, known), func(b *testing.B) {
				w, members := newBuilder(maphash.MakeSeed(), newNames()), crowdOf(n)
				var old *Snapshot
				b.ReportAllocs()
				for b.Loop() {
					if s := build(w, members, old); known {
						old = s
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/member")
			})
		}
	}
}
