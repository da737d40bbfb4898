// Package replay sends users what is stored for them. It is Push-Manager's side of a replay: a node asks, the store is
// read, and each message goes through the engine like any other push.
//
// It is for Push-Manager itself: its API changes without notice.
//
//	Catchup ─ fresh ─ Any for up to 1,000 users ─ nothing: End
//	                          │
//	                          ▼
//	                        ready ─▶ Trim what is taken ─ Read a page ─ Start each message ─ wait for the node's acks
//	                          ▲                              │ nothing: End                        │
//	                          └───── Taken, all of it ─ waiting ◀──────────────────────────────────┘
//
// A page is Config.Page messages or 256 KiB, and never more than the node's window. The next page is read when the client
// has taken this one.
//
// Invariants:
//
//   - Nothing is skipped. A page ends at the first message that the node has not taken, and its replay with it. The node
//     asks again later. Two kinds of message are passed over, because no other try can deliver them: what has expired,
//     and what can be no message any more (another content has had its id, or it breaks today's limits).
//   - Nothing overtakes. Each message names the one before it (engine.Replay.After). So a node refuses what comes
//     behind a message that was lost on the way.
//   - Trimmed is what the node has acknowledged and the client has taken, and nothing else. What was trimmed is not sent again.
//   - A replay ends without a reason only after a look at the store that found nothing. The look begins after
//     everything before it was taken. Store.Read and Store.Any see all whose Append had returned, so a message that is
//     stored later leads to a Nudge, and the node asks again.
//   - Nobody waits for a store for longer than 2 s. A replay that is not answered by then ends with a reason.
//
// Replays of one user know nothing of each other. A page that one of them has read goes out even if another one
// trims it meanwhile: it is the client of the other one that has it, and a device that has connected gets what was
// stored when it did. Places only rise, so a trim takes nothing that a later Read would have to bring, but what a
// client of the user has taken. That is what the inbox of a user is: of all devices together.
//
// What is bounded: workers (Config.Concurrency), and so the pushes in flight, which are Concurrency times Page at
// most; replays of a node and in all (maxOpen), each some hundred bytes while it is not worked on; calls of Replay
// (maxCalls). A replay whose client takes nothing ends after 30 s, or with the stream of its node. Only its worker waits for the
// store and for the node; a replay that waits for its client has no goroutine.
package replay
