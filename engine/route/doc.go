// Package route knows which Connect-Nodes hold a user or the members of a room:
// a cache in front of the Controller that never blocks its callers.
//
// A Directory answers from memory or puts the caller in line behind one look-up:
//
//	Room/Users ──fresh──▶ Snapshot, at once
//	     └─────missing──▶ line of the key ──look-up──▶ Waiter.Routed, in order
//
// Invariants:
//
//   - At most one look-up is in flight for a key. Whoever asks for that key
//     meanwhile waits in its line and is told in the order of asking.
//   - A result is visible to newcomers only once the line before them is empty,
//     so nobody overtakes.
//   - Snapshots and their groups are immutable. Equal answers of the Controller
//     yield the same pointers, so "unchanged" is a pointer comparison.
//   - An answer that comes while a change stream vouches (Vouch) is good as long as
//     that lasts, every other one for Config.TTL. That a user has no connection or a
//     room does not exist is never taken from a cache that nobody vouches for.
//   - A Controller that cannot be reached does not take away what is known: a
//     stale answer serves for at most Config.StaleTTL.
//   - Fence: pushes with Query.Ordered that got the old snapshot of a key are
//     finished before one gets the new snapshot. So a push that heals is not
//     overtaken by the next one on the same stream.
//
// Memory: most of it is the members of rooms. The ids of a group are one block, of which
// each string in Group.Users is a part: one that is kept keeps all of them. What a
// look-up brings is copied only where it differs from what is known.
//
// Locks: one mutex for each home (shard) guards its lines. It is a leaf: no
// callback, look-up or cache eviction runs under it.
package route
