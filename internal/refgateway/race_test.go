//go:build race

package refgateway

const raceEnabled = true
