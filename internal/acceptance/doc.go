// Package acceptance holds the tests that drive the real programs from outside:
// push-manager as a process of its own, Biz-Servers over gRPC, clients over
// WebSockets, Controllers and Connect-Nodes of several ages.
package acceptance
