package engine

import (
	"errors"
	"testing"

	"pgregory.net/rapid"
)

func TestPriorityNames(t *testing.T) {
	for _, p := range Priorities() {
		if got, ok := ParsePriority(p.String()); !ok || got != p {
			t.Errorf("%v reads as %v, %v", p, got, ok)
		}
	}
	for _, name := range []string{"", "Critical", "critical ", "urgent", "0", "low,critical"} {
		if p, ok := ParsePriority(name); ok || p > Normal {
			t.Errorf("%q reads as %v, %v", name, p, ok)
		}
	}
	var zero Priority
	if zero != Normal {
		t.Error("the zero value is not Normal")
	}
}

func TestSharesOfABound(t *testing.T) {
	for _, test := range []struct{ bound, low, normal, high, critical int }{
		{1, 1, 1, 1, 1},
		{2, 1, 2, 2, 2},
		{16, 8, 14, 15, 16},
		{8192, 4096, 7168, 7680, 8192},
		{1 << 17, 1 << 16, 7 << 14, 15 << 13, 1 << 17},
	} {
		got := [...]int{Low.Share(test.bound), Normal.Share(test.bound), High.Share(test.bound), Critical.Share(test.bound)}
		if want := [...]int{test.low, test.normal, test.high, test.critical}; got != want {
			t.Errorf("of %d: %v, want %v", test.bound, got, want)
		}
	}
}

// A push comes in exactly when fewer are inside than the share of its priority, whoever
// they are, and room says the same beforehand.
func TestGateKeepsTheSharesOfPriorities(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bound := rapid.IntRange(1, 40).Draw(t, "bound")
		g := gate{most: bounds(bound)}
		inside := 0
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			if inside > 0 && rapid.IntRange(0, 2).Draw(t, "leaves") == 0 {
				g.leave()
				inside--
				continue
			}
			p := rapid.SampledFrom([]Priority{Low, Normal, High, Critical}).Draw(t, "priority")
			want := inside < p.Share(bound)
			if got := g.room(p); got != want {
				t.Fatalf("room for %v with %d of %d inside: %v", p, inside, bound, got)
			}
			if got := g.enter(p); got != want {
				t.Fatalf("%v enters with %d of %d inside: %v", p, inside, bound, got)
			}
			if inside++; !want { // who is refused leaves
				g.leave()
				inside--
			}
			if n := g.inside(); n != int64(inside) {
				t.Fatalf("%d inside, want %d", n, inside)
			}
		}
	})
}

func TestSheddingRefusesTheLowestPriorities(t *testing.T) {
	e := &Engine{gate: gate{most: bounds(100)}}
	for n := range priorities {
		e.Shed(n)
		for _, p := range Priorities() {
			err := e.Admit(p)
			if refused := errors.Is(err, ErrMemory) && errors.Is(err, ErrOverloaded); refused != (p.Rank() < n) {
				t.Errorf("%d are shed, and %v: %v", n, p, err)
			}
		}
	}
}

// Admit is called for each request before it is decoded.
func TestAdmitAllocatesNothing(t *testing.T) {
	e := &Engine{gate: gate{most: bounds(100)}}
	for name, n := range map[string]int{"idle": 0, "refusing": 3} {
		e.Shed(n)
		if n := testing.AllocsPerRun(1000, func() { _ = e.Admit(Low) }); n > 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkAdmit(b *testing.B) {
	e := &Engine{gate: gate{most: bounds(100)}}
	for b.Loop() {
		if err := e.Admit(Normal); err != nil {
			b.Fatal(err)
		}
	}
}
