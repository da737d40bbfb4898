// Package devstack runs everything on one machine, in one process: etcd, the
// reference Controller, reference Connect-Nodes and Push-Manager.
//
// It is what push-manager dev runs, and what tests start in-process. The parts
// are the real programs with their real configuration, talking over loopback.
//
// Invariants:
//
//   - Nothing listens on anything but loopback.
//   - etcd's data and the files of Secure are in a directory of their own. A temporary
//     one is removed at the end; one that the caller named is kept.
//   - With Secure no connection between parts is plain but that to the metrics, and
//     nobody is let in who does not show a certificate, a key or a token. The parts
//     know of it by the settings that operators use.
//   - A Start that fails leaves nothing running. Drain stops in reverse: first
//     Push-Manager, then the Connect-Nodes, the Controller, and etcd last.
package devstack
