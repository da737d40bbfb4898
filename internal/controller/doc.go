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
// # Reports
//
// Reports that have a boot id and a number take effect as if they came in the
// order of their numbers. A membership keeps the number of the report that
// confirmed it last. What has ended keeps no number of its own: each of the 1,024
// slots of a node has the highest number that has ended something there, and a join
// below it is ErrOld, to be made again with another number. So the memory for it is
// constant, and no time has to be guessed after which nothing comes late. SyncNode
// compares a digest of each slot and sets whole slots; proto/README.md describes it.
//
// # The start
//
// A store that is empty because the process has just started must not be believed.
// With Config.Warmup look-ups are UNAVAILABLE, and change streams wait for their
// synced, until each node that is registered in etcd has said by SyncNode that it
// has told this store everything. A node that says nothing is waited for until
// Warmup has passed, one that is reporting four times as long. Without etcd nobody
// knows which nodes there are, and it lasts for Warmup. An etcd that has lost its
// data together with the Controller looks like a first start. Health and readiness
// stay good: nodes must reach the Controller for the warm-up to end.
//
// # Nodes that die
//
// With Config.Client the Controller watches the nodes registered in etcd. A node
// that has memberships, is not registered and calls SyncNode no more loses them at
// once. One that still calls it was lost in etcd and lives: it loses them after
// Config.NodeGrace, and so does one that never calls it. While etcd cannot be
// reached nothing is dropped.
//
// A node that is registered with another boot id than that of its memberships has
// been restarted, and what the process before has reported goes in the same way. A
// node begins with LeaveRoom{node_id: itself} without a user and a room, which ends
// all that was reported before. One that does not is still served right: it answers
// "not here" for users it does not have, and Push-Manager counts them offline.
//
// # Invariants
//
//   - A change is told to the watchers after it is visible to look-ups.
//   - A report (JoinRoom, LeaveRoom) is answered when each follower (FollowRoutes) has
//     acknowledged every change from before the answer, does not trust what it had from
//     before it, or is gone. That takes a lease and a second at most.
//   - Each watcher gets synced first; every later change is sent to it, named or,
//     when it is too slow for names, as all=true.
//   - No watcher can make the store wait: it has a bounded set of pending names.
//   - What a look-up returns is immutable; replies are encoded outside of the lock.
//
// Locks: Memory.mu and hub.mu are never held together; hub.mu is taken before
// watcher.mu. roster.mu is a leaf.
package controller
