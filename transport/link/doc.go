// Package link is Push-Manager's way to the Connect-Nodes: for every shard and
// node one [Link], which keeps a long-lived Deliver stream, sends deliveries over
// it in frames and settles each with the node's acknowledgement. A node without
// Deliver is served over its unary methods with the same results.
//
// It is for Push-Manager itself: its API changes without notice.
//
// # Contract
//
//   - Only a node's ack is delivery. A delivery that was written and is not
//     acknowledged ends as lost (unknown) the moment its stream breaks or its
//     deadline passes. It is never sent again.
//   - A delivery that was taken is settled exactly once, by its deadline, by the
//     queue's age limit or by the ack deadline, whichever comes first.
//   - Deliveries taken by one link reach the node in the order of the Send calls.
//     Over unary methods that holds for each room, and for each user among the
//     deliveries to that user alone.
//   - What is of lasting delivery goes to nodes that have the feature, and to no other. A delivery
//     without options is encoded as if there were none.
//   - Each Nudge has exactly one answer, each stream that may ask for replays goes exactly once, and
//     a delivery whose clients are to acknowledge is told when nobody can tell any more.
//   - Send never blocks, and answers at once when nothing can come of it: the node
//     is down, stalled, draining, or its queue is full.
//   - Everything a node says is input: it is bounded, checked, counted, and three
//     protocol violations break the stream and quarantine the link.
//
// # One link
//
//	Send -> queue -> pick -> encode -> commit -> stream -> node
//	                                     |                  |
//	                                     v                  v
//	                      settle <---- window <- receive <- stream
//
// A link reaches its node in one of two ways, see way: a stream (stream.go), or unary calls to a
// node without Deliver (unary.go). The queue, the states and what they refuse are the link's
// (link.go), dialling is run.go's, and whose turn it is to dial dials.go's. What a tick of the
// clock (clock.go) finds late, stalled or silent is decided by tickLocked of each way. Most of what
// is logged of a node, once for all its links, is in set.go. The times and sizes are in config.go.
//
// A link does not choose users: which node a user's delivery goes to is decided before, by
// the engine with the routes of engine/route. How a frame says for whom a delivery is, by user
// ids or by an audience, is decided and encoded in address.go.
//
// The link's run goroutine dials, says hello and then is the stream's reader. It
// starts one writer per stream and waits for it before it dials again, so that
// nothing of an old stream is left when the next begins. The writer takes all that
// is queued into one frame, without a timer: while it sends, the next frame
// gathers. The reader never sends, so acks flow while the writer is blocked.
// The set's clock goroutine looks every 25 ms at the links that have something
// pending: ages, deadlines, heartbeats, silence.
//
// States: connecting (the first attempt after start or a break: the queue takes
// and keeps deliveries, for the dial timeout at most), up, unary, draining (the
// node has announced that it goes), down (an attempt has failed: Send refuses and
// further attempts follow with backoff), closed. An up link is stalled while the
// node owes an ack that is overdue; it recovers when that ack comes. A node that
// answers heartbeats and still owes the ack is not recovered, and a stall without
// any ack for the silence timeout breaks the stream.
//
// A node that is no longer registered may live, and only lose its registration, or leave
// in good order. Its links are closed for Send, what is queued is dropped, and the streams
// stay, as if the node had said that it drains, until what was written is acknowledged
// or overdue. They end at once when their address is registered again. So do those of a
// node that has moved to another address, but for those on which it drains.
//
// What a node claims about a broadcast is cut to the users that it has online, as
// it said last. So that this is not old, the frame before a broadcast carries a
// heartbeat, whose answer comes before the broadcast's ack or with it. That holds
// contradictions back, but not a node that exaggerates both. So what a node may say that it
// has online is bounded, too, by Config.NodeUsers.
//
// A stream's window starts with 64 deliveries and grows while the node keeps up, as TCP's
// congestion window does. After a stall it falls to half of what the node has managed in the
// ack timeout: what a slow node cannot take then fails in the queue, by age, and does not
// become unknown.
//
// The link's clock counts running time only: when this process was stopped or
// starved, the time in which it could not have read an ack is not held against
// the node. Deadlines of callers are held to the real clock.
//
// # Dials
//
// A link dials when it has its turn. All links together have at most Config.Dials attempts
// under way and begin at most Config.DialRate in a second. Links whose last attempt has
// failed come after all others, with half of that at most: nodes that are gone are not in
// the way of one that is new or back.
//
// An address is one suspicion, however many ids and shards want to go there. One link
// leads, and the others wait for what it finds: nobody, and all are down; another node, and
// all are down but the links of that one; theirs, and they follow. The pause between two
// attempts belongs to the address. It doubles up to Config.BackoffMax, and where more
// addresses fail than the budget allows for, it is the time that their line takes.
//
// # Audiences
//
// The stream's writer owns the audiences: which rooms the node knows at which
// version. No other goroutine sees them and they end with the stream. A node frees
// what a frame forgets after the frame's deliveries; the members of an evicted
// audience therefore make room only in the next frame, and until then a delivery
// that finds no room names its users itself.
//
// # Lasting delivery
//
// What the options of a delivery add to it is encoded in options.go. A message waits in the queue no
// longer than it is worth anything. One with a collapse key takes the place of the one before it in the
// queue, for the same user, or for the same members of a room (collapse.go).
//
// An ack with pending users settles the delivery, and frees its place in the window: nothing waits for
// people. The delivery stays with the stream (receipts.go) until its last receipt, until nobody awaits
// one any more, or until the stream ends. A stream on which only receipts are awaited stays for the
// ack timeout when its node goes.
//
// The node asks for what is stored for its users, which the reader hands to Config.Replayer, and
// is told the end of it (replay.go). A nudge has it ask again (nudge.go). Both, as heartbeats, are
// controls: they are beside the deliveries of a frame, wait for no window, and go out at once. They
// overtake what is queued.
//
// # Logs of rooms
//
// A node that has FEATURE_ROOM_LOG follows the logs of rooms and reads them (roomlog.go). The reader hands both to Config.RoomLogs,
// whose marks and pages the writer sends as controls. They go behind the deliveries of a frame, and only one page goes
// into a frame that is full without, so that deliveries wait for one page at most. A page is encoded when it is written:
// what has expired by then is left out, and what does not fit into a frame is left for another read.
//
// # Compression
//
// Where Config.Compression offers codecs and the node's hello picks one, the writer
// compresses each frame of Config.CompressionMinBytes and more, last of all and as a
// whole, unless less than an eighth would be saved. Bounds of queue, window and frame
// count the bytes before it. Streams share the encoders, see transport/compression.
//
// # Limits
//
// A node must accept frames of up to Config.MaxFrameBytes (16 MiB): a frame
// gathers up to Config.FrameBytes, but one delivery with the definition of a large
// audience may be as large as the maximum, about 800,000 members on one node. A
// delivery beyond it is dropped as too large. From the node, a frame may have 1 MiB: a
// delivery to 10,000 users of whom none is there names them all in its Miss.
//
// Of what waits beside the queue and the window there is, for each stream, at most: 65,536
// deliveries or 64 MiB with open receipts, beyond which they are given up at once; 4096 nudges, beyond which
// they are not taken; 100,000 gates, beyond which the node hears that there are too many; 64 reads of logs, as well; 1 MiB of marks,
// beyond which none is taken, and 8 MiB of pages, beyond which an error takes their place. A frame with
// more entries of a list than can be open is malformed.
//
// # Locks
//
// Set.mu is taken before Link.mu by nobody: the set decides under its own lock which
// links start and end, releases it and then acts. Link.mu is a leaf, held for lines:
// no send, no callback and no other package's lock inside (but for the delivery's own
// compare-and-swaps, and the lock of its push that AwaitsReceipts takes, which is a leaf). Settling a delivery may call Send of any link, so it
// happens with no lock held. Set.mu -> node.mu is the only nesting.
package link
