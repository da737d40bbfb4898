// Package telemetry is what an operator sees of a process: the HTTP side with
// metrics, health, readiness and profiles, the traces, and the log.
//
// Invariants:
//
//   - Nothing here blocks a push. Spans go into a bounded queue that drops what
//     does not fit; a collector that is away or slow is counted and logged once.
//   - Whether a call is traced is decided before anything is built for it. With
//     tracing off, or for a call that is not sampled, no span, no attribute and no
//     context exists.
//   - Payloads appear in no log line, no span, no metric. Ids in spans are
//     quoted and cut at a fixed length; ids are never metric labels here.
//   - /debug/pprof/ answers clients on this machine only, unless told otherwise.
//   - The HTTP side has its own mux: what other packages register with the
//     default one is not served.
package telemetry
