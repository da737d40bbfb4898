// Package webhook sends receipts of pushes to a URL, signed, in order and at least once.
//
// One request is under way at a time, with up to 100 receipts. It is repeated, with growing pauses, until it is answered
// with a status from 200 to 299. Then the position behind it is kept, and the next one is sent.
//
// Invariants:
//
//   - Who sends is whoever has the turn. With a store, the turn and the position are in etcd: one instance of several has the
//     turn, and another one goes on at the position when it ends. What was sent and not yet noted is sent again.
//   - The position is noted only by whoever has the turn.
//   - Nothing of a receiver is trusted: redirects are not followed, 64 KiB of an answer are read, and a request takes no longer
//     than Config.Timeout.
//   - What cannot be sent within the time for which receipts are kept is lost, and counted.
package webhook
