//go:build !race

package faultbench

import "time"

const (
	raceEnabled = false
	volume      = 1000             // pushes in each fault window
	pace        = time.Millisecond // between two pushes of one caller
)
