// Package app is what the programs below it have in common: a Lifecycle of parts, which are
// started in order and stopped in reverse, the addresses that they listen at (listen.go, which
// refuses those that need TLS), their certificates (tls.go), and the section etcd of their
// configuration. Each program is one package: config.go is the table of its settings, run.go its
// start and stop.
//
// Invariants of a program:
//
//   - Start returns once everything listens; peers (etcd, Controller, nodes) may
//     still be away. What is missing then stands in NotReady.
//   - A Start that fails leaves nothing running.
//   - Drain is called once. It ends by its context, whatever peers do: first
//     nobody new comes, then what is in flight is finished, then the parts stop.
package app
