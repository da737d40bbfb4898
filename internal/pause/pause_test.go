package pause_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/push-manager/push-manager/internal/pause"
)

func TestFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		if !pause.For(t.Context(), time.Second) || time.Since(began) != time.Second {
			t.Errorf("waited %v", time.Since(began))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if pause.For(ctx, time.Hour) || time.Since(began) != 2*time.Second {
			t.Errorf("waited %v", time.Since(began))
		}
	})
}

func TestJitter(t *testing.T) {
	for _, d := range []time.Duration{0, 1, time.Second} {
		for range 1000 {
			if got := pause.Jitter(d); got < d/2 || got > d {
				t.Fatalf("%v of %v", got, d)
			}
		}
	}
}
