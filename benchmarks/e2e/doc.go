// Package e2e measures Push-Manager from outside, against rivals that run beside it.
//
// A [Bench] starts every part as a process of its own, on loopback: one load
// generator; for each [World] an etcd, the reference Controller and Connect-Nodes
// that count users and acknowledge; Push-Manager as it is shipped (the built binary
// of cmd/push-manager); and the rivals, which are a bare grpc-go echo, the same echo
// with Push-Manager's server settings, and the naive design. All but Push-Manager are
// this very program, started again with a role in its environment ([Role]).
//
// [Bench.Clients] measures the whole way instead: Push-Manager, the reference
// Connect-Node and the reference Controller, each the built program, and real
// WebSocket clients.
//
// # How it measures
//
//   - All servers are up and warm, then they take short turns in an order that is
//     drawn anew for each round. What is compared are turns of one round, so drift
//     of the machine falls out. The figure is the median over the rounds of the
//     ratio, with a 95 % interval from a bootstrap over rounds.
//   - An A/A control, the same server twice in each round, stands beside each
//     table; its interval must include 1.
//   - What a few percent decide, as between plain text and TLS, has two processes of
//     each kind, for each process has its own layout in memory.
//   - CPU time is the operating system's account of the server's process (its
//     CPU clock), writes and bytes are /proc/PID/io, where sockets count, and
//     allocations and frames are what the process shows at /metrics.
//   - Latency at a fixed rate counts from the moment a request was due, not from
//     when it was sent.
//   - A reply other than success counts as failed, and a figure with failures
//     is no figure.
//
// # Invariants
//
//   - Nothing listens on or talks to anything but loopback; runs are bounded in
//     time, count and calls under way.
//   - No child outlives the Bench: it ends when its standard input closes, is
//     killed on Close, and by the kernel when this process dies.
package e2e
