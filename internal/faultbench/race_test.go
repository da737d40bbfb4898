//go:build race

package faultbench

import "time"

// The race detector costs five times the CPU, and finds what it finds with fewer
// pushes, too.
const (
	raceEnabled = true
	volume      = 150
	pace        = 5 * time.Millisecond
)
