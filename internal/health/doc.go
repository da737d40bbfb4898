// Package health tells whether pushes can be delivered, and why not. It is not about
// whether the process lives: a restart would not bring its peers back.
//
// Invariants:
//
//   - A [Monitor] is not ready before its first look, and ready from the first look on
//     that finds no reason against it.
//   - It stops being ready when there has been some reason at every look for
//     Config.Patience: a stream that breaks and is back, or the silence in which one
//     Controller takes over from another, changes nothing. It is ready again at the
//     first look without any reason, so it never goes on and off within Patience.
//   - Where it was never ready within 5 s of Start, the log says so once, with the reasons.
//   - While it is not ready all reasons stand in NotReady, those of a moment too.
//   - Time in which this process did not run is not held against its peers.
//   - Config.OnChange is called from one goroutine at a time, in order, once for each
//     change and once for what Start finds.
//   - Drain is for good: whatever the checks say, it is not ready any more.
package health
