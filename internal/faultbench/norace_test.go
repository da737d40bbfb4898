//go:build !race

package faultbench

const (
	raceEnabled = false
	volume      = 1000 // pushes in each fault window
)
