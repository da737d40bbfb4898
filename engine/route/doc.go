// Package route knows which Connect-Nodes hold a user or the members of a room:
// a cache in front of the Controller that never blocks its callers.
//
// It is for Push-Manager itself: its API changes without notice.
//
// A Table of a Directory answers from memory or puts the caller in line behind one look-up:
//
//	Table.Cached ──fresh──▶ Snapshot, at once
//	Table.Ask ──missing──▶ line of the key ──look-up──▶ Waiter.Routed, in order
//
// Invariants:
//
//   - At most one look-up is in flight for a key. Whoever asks for that key
//     meanwhile waits in its line and is told in the order of asking.
//   - A result is visible to newcomers only once the line before them is empty,
//     so nobody overtakes. The result before it is not visible any more once the first
//     in line is told, so nobody who has an answer gets an older one.
//   - Snapshots and their groups are immutable. Equal answers of the Controller
//     yield the same pointers, so "unchanged" is a pointer comparison.
//   - An answer that comes while a change stream vouches (Vouch) is good as long as
//     that lasts, every other one for Config.TTL; a hit in the last quarter of that has
//     it looked up again, and is answered all the same. That a user has no connection or
//     a room does not exist is never taken from a cache that nobody vouches for.
//   - What a node contradicts is looked up again, once in a TTL: if the Controller
//     stays with its answer, the node is believed for so long. The answer serves
//     meanwhile, for all whom it is right about.
//
// # Deltas
//
// An answer about a room that has a revision is brought up to date by moves (Directory.Moved),
// at the next query: a move costs the same in every room, and a query copies the groups that
// have changed since the last one. It is right, because for each user, room and node
//
//   - the answer has every change up to its revision, and moves up to it are passed over;
//   - every later one comes as a move, in order: those that come while the look-up is under way
//     wait for its answer, and a change stream that may have missed some begins a new generation;
//   - a move is a fact. If the answer had it already, because a large room is not read in one
//     step, it changes nothing in the end, and what it changes meanwhile no report has been
//     answered for.
//
// All else is looked up again: an answer without a revision, one that is older than what had been told
// before it was asked for, more moves than a look-up costs, a room that nobody is left in.
//
// # Unions
//
// A Union is the members of several rooms as one snapshot, kept and brought up to date by what its rooms' answers become.
// It has a line of its own: who asks while its rooms are looked up is told in the order of asking, and nobody finds an
// answer in memory before. With an unchanged number of changes in the table of rooms a query looks at nothing else. It has
// a goroutine while somebody waits for it, and one for each Refresh: they may block, and Directory.Close waits for them. All of them
// together look up so many rooms at a time, and make so few unions from the beginning, that queries about single rooms have the rest.
//
// When a look-up fails:
//
//   - An answer that may still be true serves as a stale one (Snapshot.Stale), for at
//     most Config.StaleTTL from when it was known to be true, whatever the error:
//     the Controller is away, slow, or says that it is not available yet.
//   - An answer that the Controller has announced to have changed (Invalidate) serves
//     only while the Controller is away (ErrAway), marked as changed. If it is there
//     and did not answer in time, the query gets the error. InvalidateAll announces
//     nothing about a key: it says that nothing is vouched for.
//   - An answer that takes away a user, or more than half of a room, within 5 s of a
//     new connection (Renewed) counts as a failed look-up once: the Controller may
//     just have started. When the 5 s are over it is asked again, and believed. Who
//     refreshes meanwhile gets that very answer, marked (Snapshot.Doubted).
//
// Memory: most of it is the members of rooms. The ids of a group are one block, of which
// each string in Group.Users is a part: one that is kept keeps all of them. What a
// look-up brings is copied only where it differs from what is known.
//
// Locks: one mutex for each shard guards its lines. It is a leaf: no
// callback, look-up or cache eviction runs under it. That of a Union comes before it.
package route
