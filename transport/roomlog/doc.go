// Package roomlog tells nodes what was written into the logs of rooms, and reads the logs for them. It is Push-Manager's
// side of room logs: nodes compare what they are told with what has reached them live, and read what has not.
//
// It is for Push-Manager itself: its API changes without notice.
//
//	store ─ Follow, one for each partition ─▶ index of places ─ each 500 ms ─▶ LogMark to each node that follows
//	                                      └─▶ tails of the rooms that are read
//	                                                             │
//	LogRead ─▶ Heads, one call for all ─▶ wait for the follower ─┴▶ index: nothing new ─┬▶ LogPage
//	                                                              ▶ tail ───────────────┤
//	                                                              ▶ ReadLog, one a room ┘
//
// Invariants:
//
//   - A mark names all that stands between its after and its seq: the index has no hole behind partition.from. A mark speaks
//     of nothing that is younger than settle, so that the live delivery has come if it comes at all.
//   - Marks of one partition to one stream join, but where the index begins later than the place from which they would go on.
//   - A page without More has everything that stood in the log when the read came. Heads, called after that, says up to where
//     this is; and the follower has come that far before a page leaves. So the index and a tail lack nothing of it.
//   - A tail has all of its room behind tail.from and up to partition.to.
//   - Everything is of one epoch. When the store has another one, or has lost what it had told, all of it is given up and begun
//     anew (generation): whoever waits for a page hears of a gap.
//   - Each read is answered once, 2 s after it came at the latest, or its stream is gone.
//
// What is bounded: the index (indexMost messages), tails (tailMost messages and tailBytes each, Config.TailBytes of all, those
// go first that were not read for longest), reads (maxReads), calls of ReadLog at a time (readers), what a stream is
// told at a time (marksMost, and what the link takes). A read costs a call of the store only where the index says that there
// is something and no tail has it; the reads of one room share that call.
package roomlog
