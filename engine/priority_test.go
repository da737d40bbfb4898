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

func TestSheddingRefusesByPriority(t *testing.T) {
	e := &Engine{gate: gate{most: bounds(100)}}
	for name, test := range map[string]struct {
		shed Shedding
		want [priorities]error
	}{
		"nothing":     {Shedding{}, [priorities]error{}},
		"memory low":  {Shedding{Memory: 1}, [priorities]error{ErrMemory}},
		"memory most": {Shedding{Memory: 3}, [priorities]error{ErrMemory, ErrMemory, ErrMemory}},
		"busy low":    {Shedding{Busy: BusyParts}, [priorities]error{ErrBusy}},
		"busy most":   {Shedding{Busy: 3 * BusyParts}, [priorities]error{ErrBusy, ErrBusy, ErrBusy}},
		"both":        {Shedding{Memory: 1, Busy: 2 * BusyParts}, [priorities]error{ErrMemory, ErrBusy}},
	} {
		e.Shed(test.shed)
		if got := e.Shedding(); got != test.shed {
			t.Errorf("%s: it says %+v", name, got)
		}
		for _, p := range Priorities() {
			got, want := e.Admit(p), test.want[p.Rank()]
			if !errors.Is(got, want) || want != nil && !errors.Is(got, ErrOverloaded) {
				t.Errorf("%s: %v: %v, want %v", name, p, got, want)
			}
		}
	}
	e.Shed(Shedding{Busy: BusyParts + BusyParts/2})
	refused := 0
	for range 10_000 {
		if errors.Is(e.Admit(Normal), ErrBusy) {
			refused++
		}
	}
	if refused < 4000 || refused > 6000 { // 20 standard deviations
		t.Errorf("of normal pushes %d in 10,000 are refused, want a half", refused)
	}
}

// Admit is called for each request before it is decoded.
func TestAdmitAllocatesNothing(t *testing.T) {
	e := &Engine{gate: gate{most: bounds(100)}}
	for name, s := range map[string]Shedding{"idle": {}, "busy": {Busy: BusyParts / 2}, "refusing": {Memory: 3}} {
		e.Shed(s)
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
