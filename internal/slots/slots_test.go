package slots_test

import (
	"testing"

	"github.com/push-manager/push-manager/internal/slots"
)

// The figures stand in proto/README.md, for authors in other languages.
func TestHashIsAsDocumented(t *testing.T) {
	h := slots.Hash("alice", "room-1")
	if got, want := h, uint64(6995902236231864671); got != want {
		t.Errorf("hash %d, want %d", got, want)
	}
	if got, want := slots.Of(h), 351; got != want {
		t.Errorf("slot %d, want %d", got, want)
	}
}

func TestHashDoesNotAllocate(t *testing.T) {
	if n := testing.AllocsPerRun(100, func() { slots.Hash("alice", "lobby") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
