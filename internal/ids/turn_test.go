package ids

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"
)

// The figure stands in proto/README.md, for authors in other languages.
func TestTurnIsAsDocumented(t *testing.T) {
	if got, want := Turn("alice"), uint64(3159282601090220207); got != want {
		t.Errorf("turn of alice: %d, want %d", got, want)
	}
}

func TestTurnAllocatesNothing(t *testing.T) {
	if n := testing.AllocsPerRun(100, func() { Turn("alice") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// A line of some of many users is what sorting all of them would give, whatever the order in which they come.
func TestALineHasTheFirstOnes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		users := rapid.SliceOfN(rapid.StringMatching(`[a-c]{1,4}`), 0, 400).Draw(t, "users")
		line := Line{First: rapid.SampledFrom([]uint64{0, LastTurn / 3}).Draw(t, "first"), Last: LastTurn, Limit: rapid.IntRange(1, 20).Draw(t, "limit")}
		first := line.First
		for _, user := range users {
			line.Add(user)
		}
		got := line.Users()
		all := map[string]uint64{}
		for _, user := range users {
			if turn := Turn(user); turn >= first && turn <= line.Last {
				all[user] = turn
			}
		}
		for i, u := range got {
			if all[u.User] != u.Turn || i > 0 && got[i-1].Turn >= u.Turn {
				t.Fatalf("%d: %v behind %v", i, u, got[max(i-1, 0)])
			}
			delete(all, u.User)
		}
		if len(all) > 0 {
			t.Fatalf("%v are missing up to %d", all, line.Last)
		}
		if len(got) > line.Limit || len(got) < line.Limit && line.Last != LastTurn {
			t.Fatalf("%d users of at most %d, up to %d", len(got), line.Limit, line.Last)
		}
	})
}

func TestALineCanBeCutShorter(t *testing.T) {
	line := Line{Last: LastTurn, Limit: 100}
	for i := range 50 {
		line.Add(fmt.Sprint("u", i))
	}
	line.Cut(10)
	got := line.Users()
	if len(got) != 10 || line.Last != got[9].Turn {
		t.Errorf("%d users up to %d", len(got), line.Last)
	}
	line.Last = got[4].Turn
	if got = line.Users(); len(got) != 5 {
		t.Errorf("%d users", len(got))
	}
}
