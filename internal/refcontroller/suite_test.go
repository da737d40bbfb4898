package refcontroller_test

import (
	"testing"

	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/internal/refcontroller/storetest"
)

func TestMemoryIsAStore(t *testing.T) {
	open := func(_ *testing.T, limit int, tell func(refcontroller.Change)) refcontroller.Store {
		s := refcontroller.NewMemory(limit)
		s.Notify(tell)
		return s
	}
	storetest.Run(t, open)
	storetest.RunRoutes(t, open)
}
