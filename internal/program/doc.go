// Package program is what the programs of this repository have in common: command
// lines, configuration, signals and exit codes, memory, and Parts, which are started
// in order and stopped in reverse. Push-Manager stands on top of it in
// cmd/push-manager; the reference Controller and Connect-Node are here.
//
// Invariants:
//
//   - Start returns once everything listens; peers (etcd, Controller, nodes) may
//     still be away. What is missing then stands in NotReady.
//   - A Start that fails leaves nothing running.
//   - Drain is called once. It ends by its context, whatever peers do: first
//     nobody new comes, then what is in flight is finished, then the parts stop.
//   - Run turns signals into a Drain and the end into an exit code: 0 asked to
//     stop, 1 failed, 2 called wrongly. A second signal ends the process at once.
package program
