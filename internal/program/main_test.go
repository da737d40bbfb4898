package program_test

import (
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// The pool library keeps two goroutines of a pool of its own from the start on.
	goleak.VerifyTestMain(m, goleak.IgnoreCurrent())
}
