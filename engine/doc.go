// Package engine takes one push from validation to outcome.
//
// It is for Push-Manager itself: its API changes without notice.
//
//	Do/Start ─ validate ─ admit ─ route ─ stage ─▶ Link.Send ─▶ Delivery.Ack/Drop/Lose ─ heal? ─ finish
//
// A push never changes goroutines on the fast path: with its route in the cache it
// is validated, staged and sent on the caller's goroutine; the link's reader
// settles its deliveries and the last one to settle finishes it. What can block (a
// look-up) runs in the shard's pool. What a settled delivery brings about, heals and what a
// fence held back, is done by one goroutine for each shard, in the order of coming.
//
// With Options.ClientAck or Options.Store a push goes on once its deliveries are settled, see
// lasting.go:
//
//	deliveries settled ─ receipts ─ Spool.Append ─ Directory.Locate ─ Link.Nudge ─ finish
//
// A push to a room with Options.Store is written into the room's log once, before it is routed, and
// ends with its receipts, see roomlog.go:
//
//	validate ─ admit ─ Spool.AppendLog ─ route ─ as above ─ receipts ─ finish
//
// Invariants:
//
//   - Every target of a push ends in exactly one of delivered, offline, failed and
//     unknown, and their sum is the number of targets (Result).
//   - A delivery is settled exactly once, by whichever comes first: the node's
//     ack, its link, or the push's deadline. Only an ack makes it delivered.
//   - An error from Do, Start or Push.Result means that nothing was written.
//   - Sent again is only what is known not to have been delivered: users that a
//     node does not have, and deliveries that were never written because the node
//     is gone. Once, after one fresh look-up, within the deadline.
//   - A push to several rooms goes to each user of their union once, on each node that has the user in one of them.
//   - Pushes of one Order reach a connection in the order of their start, for each
//     room and user, those that are sent again, too: see fence.go, and rooms.go for several rooms.
//   - A push by a route that is known to have changed is no success.
//   - Completer.Complete is called exactly once for each push that Start took, and Receipts.Receipt
//     at most once for an Async one.
//   - Stored is a part of Offline, Unsure of Stored, Acked and Duplicates of Delivered. Users
//     count as acked only where it is certain, and as unsure where they may have got the message.
//   - A message is stored for nobody whom it has reached for certain. It is stored for nobody once
//     its TTL has passed, where a newer one with its collapse key has taken its place, where its id
//     was used for another content, and where it is too large. Of users whom nobody can tell apart
//     all are stored if one may be missing.
//   - A push to a room that stands in the room's log has a place (Result.Place), which each of its
//     deliveries tells its link. Whom it has not reached is stored, by number: nobody is listed.
//   - Live delivery to a room does not hang on the Spool: without an answer in 150 ms, or half of
//     the push's time, the push goes without a place. So do those behind it in its Order, which wait for it.
//   - The books of a message that is stored for a user close when each node that a look-up names, which
//     began after the Spool's answer, has taken a nudge, or for want of time.
//   - Nothing waits without a bound: whoever holds a delivery settles it by its
//     deadline, so a push whose route is known needs no timer. One that has to wait
//     in line has its own, and so has one that waits for receipts or the Spool.
//   - A message out of the store (Options.Replay) goes to its node and nowhere else, in the
//     order of the calls of Start for its user.
//
// Overload: a push is admitted if its priority's share of the places in flight is not used
// up (Config.MaxInFlight) and nobody has said to shed it (Shed). Admit tells beforehand, at
// the cost of a few loads. What is admitted may still find a link's queue at its bound,
// which low priorities reach first.
//
// Who holds what: the payload and the ids of a Request belong to its caller. All deliveries
// of the push share them, and nobody writes to them.
//
//   - They stay as they are until the push is finished.
//   - A link lets go of a delivery, its payload and its ids before it settles it.
//   - Nobody refers to a finished push that has gone the usual way: its caller may use it and
//     the bytes again (Push.Reusable, Push.Reset).
//   - The bytes of any other push stay as they are for ever. It is garbage when the last
//     reference goes. So a Spool may keep a push's bytes without a copy: what is stored is not
//     Reusable, and neither is a push with ClientAck, whose links come back to it.
//
// Locks: Push.mu guards the list of deliveries of one push. It is a leaf. Order.mu comes
// before the Push.mu of earlier pushes of that Order. backlog.mu, lasting.mu and asyncs.mu are
// leaves.
package engine
