// Package redisstore keeps the memberships of the reference Controller in Redis, 7.0 or
// later: any number of Controllers share one. It is a refcontroller.Shared.
//
// # How it works
//
//   - Each change is one run of a script, store.lua, which also appends the change to a
//     stream. Entries are numbered without gaps: whoever finds one missing, because the
//     stream is bounded, tells its watchers to forget everything.
//   - Each Controller reads the stream and tells its watchers. A report is answered once
//     this Controller has told the change, its watchers have acknowledged it, and all
//     other Controllers have written into the stream that theirs have.
//   - Each Controller says four times a second that it lives, and for how long its
//     watchers trust their answers; a mark goes back to a watcher only after that was
//     taken. One that is silent is waited for until nobody can trust it any more, half a
//     second more than the lease.
//   - All look-ups go to the primary. A large room is read in pages: what changes
//     meanwhile is told afterwards.
//   - Memberships end when the Controllers end them, as with a store in memory; they carry
//     no time of their own.
//
// # What was lost
//
// The id of the store is a random one that stands in Redis, and the run of the server. A
// Redis that was emptied, restarted or replaced by a replica is another store: each script
// compares, and fails. The nodes then compare their memberships with it and send what
// is missing, and until they have nobody is believed. So nothing depends on what
// of the last second was on disk, or at the replica.
//
// # Keys
//
// All keys begin with the prefix and a hash tag, so that they are in one slot of a Redis Cluster: the
// script changes several at once. Another prefix is another deployment, and likely another
// shard. Redis must not evict keys (maxmemory-policy noeviction).
package redisstore
