// Package controller is the reference Controller: it knows which user is in which
// room on which Connect-Node, answers ControllerService and streams what changes.
//
// # Memberships
//
// All that is stored are memberships: a user in a room on a node. Everything else
// follows from them.
//
//   - The same user in one room on two nodes has two memberships and stands in
//     RoomInfo.users twice, and counts once.
//   - A gateway joins a user once for each room, however many connections the user
//     has there; it does the counting. Joining again renews name and metadata.
//   - A user is on the nodes of all their memberships, the latest join first. A
//     user without a membership is not found.
//   - A room without a membership is unknown.
//   - LeaveRoom without a node_id ends the user's memberships of that room on all
//     nodes.
//
// # Nodes that die
//
// With Config.Client the Controller watches the nodes registered in etcd. A node
// that has memberships and is not registered for Config.NodeGrace loses them.
// While etcd cannot be reached nothing is dropped.
//
// A node that is restarted under its old id within the grace would inherit what
// its predecessor left behind. It therefore begins with LeaveRoom{node_id: itself}
// without a user and a room, which ends all memberships of that node. One that
// does not is still served right: it answers "not here" for users it does not
// have, and Push-Manager counts them offline. A node that was given up while it
// lived (etcd did not hear of it for longer than TTL and grace) has to join its
// users again.
//
// # Invariants
//
//   - A change is told to the watchers after it is visible to look-ups.
//   - Each watcher gets synced first; every later change is sent to it, named or,
//     when it is too slow for names, as all=true.
//   - No watcher can make a join wait: it has a bounded set of pending names.
//   - What a look-up returns is immutable; replies are encoded outside of the lock.
//
// Locks: Memory.mu and hub.mu are never held together; hub.mu is taken before
// watcher.mu.
package controller
