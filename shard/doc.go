// Package shard gives every key one shard: a fixed number of ordered lanes, each
// with a bounded pool of goroutines for the work that may block.
//
// It is for Push-Manager itself: its API changes without notice.
//
// Invariants:
//
//   - A key belongs to the same shard for the life of the Set. Set.For is a hash,
//     seeded per process so that nobody can aim keys at one shard.
//   - Shards share nothing mutable. Work of one shard can neither fill another's
//     pool nor wait for it.
//   - Shard.Go never blocks. A full pool is an error for the caller to account
//     for, not a queue: the pool's worth is its bound.
//   - A task that panics takes nothing down. The task itself settles what it owes
//     in a deferred call; the pool counts and reports.
//
// The package knows no pushes, nodes or rooms.
package shard
