// Package conformance plays a Push-Manager against a Connect-Node, ours or
// anybody's in any language, and tells what the node does otherwise than
// proto/README.md says. It needs the address of the node's gRPC port, and better
// also users that are connected and a way to see what reaches them.
//
// A check is one line of the protocol, and has one plain line of what is expected.
// It opens streams of its own, under manager ids of its own, so no check sees what
// another one has left. What belongs to every frame (each delivery acknowledged
// once, misses in the frame of their ack, sums that add up) is looked at in all of
// them.
//
// A node that has only the unary methods gets the checks of those, and one that has
// both gets all.
package conformance
