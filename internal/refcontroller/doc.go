// Package refcontroller is the reference Controller: it knows which user is in which
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
// Push-Managers serve the routes from before meanwhile, which lack who joins now. So a
// JoinRoom or LeaveRoom that has a number is executed at once and answered after the
// warm-up, or when its caller gives up. SyncNode never waits for it, nor does the call by
// which a node begins, nor a report without a number: nodes that do not number their
// reports tell a Controller that has forgotten by JoinRoom, and for them it waits.
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
// Which process is the node's, etcd says. Without etcd, or while it is out of reach, the
// last one that began is: a SyncNode or a beginning LeaveRoom of an earlier process that
// comes late takes the id back, and ends what the living one has reported. That one's next
// report is ABORTED, and its next SyncNode, two seconds later at most, takes the id again
// and tells everything. For so long its users are missing.
//
// # Invariants
//
//   - A change becomes visible to look-ups and is told to the watchers in one step. Who
//     hears of it and looks it up finds it.
//   - A report (JoinRoom, LeaveRoom) is answered when each follower (FollowRoutes) has
//     acknowledged every change from before the answer, does not trust what it had from
//     before it, or is gone. That takes a lease and a second at most.
//   - Each watcher gets synced first; every later change is sent to it, named or,
//     when it is too slow for names, as all=true.
//   - No watcher can make the store wait: it has a bounded set of pending names.
//   - What a look-up returns is immutable; replies are encoded outside of the lock.
//
// Locks: Memory.mu is taken before hub.mu, hub.mu before watcher.mu. roster.mu is a
// leaf.
package refcontroller
