// Package jetstream is a store.Store and store.Logs in NATS JetStream: in a server of this process, or in one or a cluster elsewhere.
//
// It is for Push-Manager itself: its API changes without notice.
//
// A partition is one stream for users and one for rooms. The hash of an id chooses it, so their number is fixed when the store is
// made.
//
//	stream PM_INBOX_<p>
//	pmi.<p>.<user>.m       messages of a user, in order; at most Config.MaxPerUser
//	pmi.<p>.<user>.k.<key> the latest message of a user with a collapse key
//	pmi.<p>.head           one message that stays, see below
//	stream PM_LOG_<p>
//	pmg.<p>.<room>         messages to a room, in order; at most Config.MaxPerRoom
//	stream PM_RCPT
//	pmr.<sender>           receipts of a sender's pushes; at most Config.MaxReceipts, for a day
//
// user, key, room and sender are hashes of 128 bits: no byte of a subject comes from outside. The message itself holds the id,
// and what is read is compared with it.
//
// Invariants:
//
//   - What was stored for a user is never pushed out: a message that does not fit is refused.
//   - In a log of rooms a new message pushes out the oldest: of its room above Config.MaxPerRoom, of all rooms above the log's size.
//     Nothing else leaves a log but for its age, so what ReadLog says of a gap needs no memory of what was dropped.
//   - The epoch of the logs is the hash of the times at which the streams were made. An append that overlaps with
//     their loss may carry the epoch before; whoever holds that place is told of a gap.
//   - There are no consumers. Reads are batches of direct gets, which any replica answers. One that lags may leave out
//     what was stored last, so the leader is asked before a read says that nothing more follows. Any compares the place
//     that a replica has got to with that of the leader; the message head makes every answer carry it.
//   - A message carries its expiry, and reads leave it out from then on. JetStream takes a user's away at that time or later, and
//     a room's after Config.MaxTTL.
//   - What comes back is input: an entry that cannot be read is left out and counted.
//   - While the store cannot be reached every call fails at once, or by the end of its context. Nothing is buffered for later.
package jetstream
