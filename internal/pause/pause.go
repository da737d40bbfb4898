// Package pause waits between two attempts.
package pause

import (
	"context"
	"math/rand/v2"
	"time"
)

// For waits for d and tells whether ctx still lives.
func For(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// Jitter spreads d over its upper half, so that a fleet does not move in step.
func Jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }
