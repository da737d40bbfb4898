package discovery

import (
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	valCtxCh = nil // see there
	goleak.VerifyTestMain(m)
}

// eventually waits until ok holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("not within 1m: %s", what)
		}
		time.Sleep(5 * time.Millisecond) // polling real sockets
	}
}
