// Package observe sees every alert fire and clear, and every panel of the dashboard show something, in a real Prometheus that
// scrapes real programs under load. It has tests only; `make observe` runs them.
//
// The rules are those of deploy/prometheus with one mechanical change: windows and waits are a sixtieth, from 15 s to 60 s for
// windows and from 1 s to 20 s for waits. Everything else of an expression stays.
package observe
