package slots_test

import (
	"testing"

	"github.com/push-manager/push-manager/internal/slots"
)

// The figures stand in proto/README.md, for authors in other languages.
func TestHashIsAsDocumented(t *testing.T) {
	h := slots.Hash("alice", "lobby")
	if got, want := h, uint64(17282378313406953472); got != want {
		t.Errorf("hash %d, want %d", got, want)
	}
	if got, want := slots.Of(h), 0; got != want {
		t.Errorf("slot %d, want %d", got, want)
	}
}

func TestHashDoesNotAllocate(t *testing.T) {
	if n := testing.AllocsPerRun(100, func() { slots.Hash("alice", "lobby") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
