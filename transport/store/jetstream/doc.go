// Package jetstream is a store.Store in NATS JetStream: in a server of this process, or in one or a cluster elsewhere.
//
// It is for Push-Manager itself: its API changes without notice.
//
// A partition is one stream. The hash of a user's id chooses it, so their number is fixed when the store is made.
//
//	stream PM_INBOX_<p>
//	pmi.<p>.<user>.m       messages of a user, in order; at most Config.MaxPerUser
//	pmi.<p>.<user>.k.<key> the latest message of a user with a collapse key
//	pmi.<p>.head           one message that stays, see below
//
//	stream PM_RCPT
//	pmr.<sender>           receipts of a sender's pushes; at most Config.MaxReceipts, for a day
//
// user, key and sender are hashes of 128 bits: no byte of a subject comes from outside. The message itself holds the user's id,
// and what is read is compared with it.
//
// Invariants:
//
//   - What was stored is never pushed out: a message that does not fit is refused.
//   - There are no consumers. Reads are batches of direct gets, which any replica answers. One that lags may leave out
//     what was stored last, so the leader is asked before a read says that nothing more follows. Any compares the place
//     that a replica has got to with that of the leader; the message head makes every answer carry it.
//   - A message carries its expiry. JetStream takes it away at that time or later; reads do not rely on it.
//   - What comes back is input: an entry that cannot be read is left out and counted.
//   - While the store cannot be reached every call fails at once, or by the end of its context. Nothing is buffered for later.
package jetstream
