// Package hooks tells other services who connects to a gateway, disconnects, joins and leaves: in requests to URLs that a file names,
// signed, in order and at least once.
//
// An event waits in memory until it is on disk, which takes some milliseconds, and then on disk until the receiver has taken it. Each hook has a
// queue and a sender of its own, which is that of [webhook].
//
// Invariants:
//
//   - [Hooks.Emit] never waits.
//   - The events of a hook are sent in the order of their Emit, one request at a time. One that was sent and not answered is sent again.
//   - What does not fit in memory, or on disk, or is older than a day, is lost, and counted.
//   - A file that is wrong is refused as a whole, and the one before counts.
package hooks
