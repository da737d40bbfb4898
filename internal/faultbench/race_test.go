//go:build race

package faultbench

// The race detector costs five times the CPU, and finds what it finds with fewer
// pushes, too.
const (
	raceEnabled = true
	volume      = 200
)
