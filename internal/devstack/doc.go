// Package devstack runs everything on one machine, in one process: etcd, the
// reference Controller, reference Connect-Nodes and Push-Manager.
//
// It is what push-manager dev runs, and what tests start in-process. The parts
// are the real programs with their real configuration, talking over loopback.
//
// Invariants:
//
//   - Nothing listens on anything but loopback.
//   - etcd's data is in a directory of its own. A temporary one is removed at the
//     end; one that the caller named is kept.
//   - A Start that fails leaves nothing running. Drain stops in reverse: first
//     Push-Manager, then the Connect-Nodes, the Controller, and etcd last.
package devstack
