// Package cli runs a program as a process: its command line and configuration, the
// garbage collector, signals and exit codes. internal/app has the programs.
//
// Invariants:
//
//   - Run turns signals into a Drain and the end into an exit code: 0 asked to
//     stop, 1 failed, 2 called wrongly. A second signal ends the process at once.
//   - What is wrong with a command line or a setting is one line that names it.
package cli
