// Package presence tells who is connected where: the members of a room in pages, where users are and with which
// connections, and what changes about a room or a user.
//
// It is for Push-Manager itself: its API changes without notice.
//
// Ids are those of the Controller, with the tenant before them. A scope ("shop/", or "") is what stands before the ids of the
// caller's tenant: it is put before what the caller names and taken off what the caller is shown. Whoever does not have
// it is not shown.
//
// # Promises
//
//   - Pages of a room are the Controller's: this package keeps nothing of them.
//   - Whoever watches and applies what comes has the truth as of the last position. What counts as the truth is what a push
//     would go by, see engine.Engine.Room: an answer that is stale, or that the Controller gives right after it has started, is not.
//   - A room or user that is watched is followed once, however many watch it, and its changes are kept once: a watcher has
//     a place among them and no queue. One that falls so far behind that they are gone gets a snapshot.
//   - Pushes take no lock of this package. It reads the routes as pushes do.
//   - Everything is bounded: Config has the bounds.
package presence
