package jetstream

import (
	"fmt"
	"testing"

	"go.uber.org/goleak"

	"github.com/push-manager/push-manager/transport/store"
	"github.com/push-manager/push-manager/transport/store/storetest"
)

// The pool library keeps two goroutines of a pool of its own from the start on.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

// embeddedData is that of an embedded store.
type embeddedData struct {
	dir        string
	partitions int
}

func (d embeddedData) Files() string { return d.dir }

func (d embeddedData) Open(t *testing.T, limits storetest.Limits) store.Store {
	t.Helper()
	s, err := Open(t.Context(), Config{Dir: d.dir, Partitions: d.partitions, MaxPerUser: limits.MaxPerUser, MaxBytes: limits.MaxBytes})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestEmbeddedStoreKeepsTheContract(t *testing.T) {
	for _, partitions := range []int{1, 4} {
		t.Run(fmt.Sprintf("partitions=%d", partitions), func(t *testing.T) {
			storetest.Run(t, func(t *testing.T) storetest.Data { return embeddedData{t.TempDir(), partitions} })
		})
	}
}
