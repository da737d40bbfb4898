package position

import (
	"errors"
	"math"
	"reflect"
	"testing"
)

func TestPositionsComeBackAsTheyWere(t *testing.T) {
	for _, p := range []Position{
		{Epoch: 1},
		{Epoch: math.MaxUint64, Places: []Place{{0, 0}}},
		{Epoch: 7, Places: []Place{{0, 1}, {3, math.MaxUint64}, {63, 12}}},
	} {
		got, err := Parse(p.String())
		if err != nil || !reflect.DeepEqual(got, p) {
			t.Errorf("%+v came back as %+v, %v", p, got, err)
		}
		if seq, ok := got.In(3); ok != (len(p.Places) == 3) || ok && seq != math.MaxUint64 {
			t.Errorf("%+v: in partition 3 it is %d, %v", p, seq, ok)
		}
	}
}

// FuzzParse: whatever a client holds is a position that comes back, or none.
func FuzzParse(f *testing.F) {
	p := Position{Epoch: 7, Places: []Place{{0, 1}, {3, 1 << 40}}}
	for _, text := range []string{"", "AQ", p.String(), p.String() + "A", "AQAAAAAAAAAAAAA", "AgAAAAAAAAAA", "%00"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := Parse(text)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		if again, err := Parse(p.String()); err != nil || !reflect.DeepEqual(again, p) {
			t.Errorf("%q is %+v, which comes back as %+v, %v", text, p, again, err)
		}
	})
}
