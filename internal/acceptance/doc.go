// Package acceptance holds the tests that drive the real programs from outside:
// push-manager as a process of its own, Biz-Servers over gRPC, clients over
// WebSockets, Controllers and Connect-Nodes of several ages. Some tests need programs
// that are not ours (grpcurl, Node.js, HAProxy, nginx), and are skipped where these are
// missing, but not with CI=true.
package acceptance
