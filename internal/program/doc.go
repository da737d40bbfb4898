// Package program holds the programs of this repository, each on one page: its
// configuration as a struct of its packages' Configs, the parts built in order,
// and the same parts stopped in reverse.
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
