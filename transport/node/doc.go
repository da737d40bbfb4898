// Package node makes a gateway a Connect-Node: it serves the Deliver stream and
// the unary methods of pubsub.ConnectNodeService, registers the node in etcd and
// brings the keepalive policy that managers need. The gateway brings its
// connections: [Users] holds those that implement [Conn]. A gateway that holds them in
// its own way implements [Sessions].
//
// # Embedding
//
//	users := node.NewUsers[*client]()
//	srv, err := node.New(node.Config{NodeID: "connect-node-1", Sessions: users})
//	err = srv.Run(ctx, node.RunConfig{Listener: listener, Etcd: etcd, Members: reports})
//
// Run returns when ctx has ended and the node has left. A gateway that has a grpc.Server of its own,
// or more to do in between, takes the steps itself:
//
//	gs := grpc.NewServer(node.ServerOptions()...)
//	srv.Attach(gs)
//	go gs.Serve(listener)
//	srv.Register(etcd, "192.168.1.10:50052")
//
// and to leave, in this order:
//
//	srv.Deregister(ctx) // nobody new comes
//	srv.Drain(ctx)      // managers finish and close; returns at ctx at the latest
//	gs.Stop()           // whoever is left is cut off
//	srv.Close()
//
// examples/connect-node is a whole program. Where managers speak TLS, the grpc.Server also gets
// grpc.Creds with those of [NewCredentials], with Run as one of RunConfig.Options: docs/securing.md
// says how.
//
// # What holds
//
//   - A stream has two goroutines: the reader, which is that of the call and hands
//     messages over, and the sender of acks. The sender belongs to the Server: it
//     ends with its call, and Close waits for it.
//   - Deliveries of a stream reach Sessions in the order of their seq, one after
//     the other. Streams know nothing of each other, but for those of one shard of one
//     process of a manager: a newer one supersedes the older, which hands nothing over
//     but the delivery in its hands, and begins when that is done. While Sessions hangs
//     in it for longer than Config.TakeoverTimeout the newer one is refused, and the
//     manager comes again.
//   - A delivery is acked after Sessions has answered for each of its users, once.
//     delivered + not_here + failed = the users it named. Where more ids were
//     missed than fit into a frame of 1 MiB, the delivery is refused if nobody
//     was reached, and else the rest is left out: the manager takes it as unknown.
//   - Acks are written as they become ready, all that are ready in one frame. The
//     reader does not wait for the writing, except that a manager which does not
//     read lets at most 1 MiB of missed ids gather, and at most Config.MaxUnacked
//     acks: then its own stream stands or ends.
//   - What both sides must agree on (seq, audiences and their versions, targets)
//     is checked; a difference ends the stream with FAILED_PRECONDITION, after the
//     acks of what was handed over. The next stream starts with nothing.
//   - A panic in Sessions settles the users of that delivery as failed, is counted
//     and logged, and ends nothing.
//   - A compressed frame is what it holds. It is unpacked into memory of its
//     declared length, which is checked before and has the bound of all frames.
//   - Frames are taken apart without copying: strings and Data of a [Message] are
//     views into the frame, which nobody writes to and which lives as long as they
//     do. Ids of audiences are copied.
//
// # Lasting delivery
//
// A gateway whose clients acknowledge, or that has what was stored replayed to them, uses [NewLastingUsers] with
// connections that keep an [Inbox], and a [Gate] for each of them: they are [LastingConn] and [Gated]. It names the features that
// it has; what it does not name it never sees, and [Message].Options are nil. For each connection:
//
//	c.inbox.Acks = true                     // its client acknowledges
//	c.inbox.Gate = srv.Gate(user, c, 32)    // closed
//	users.Add(user, c)
//	member.Join("")                         // of membership; its Joined("") calls
//	c.inbox.Gate.Ready()                    // what is stored is asked for
//	...
//	users.Remove(user, c)
//	c.inbox.Close()                         // under the connection's lock
//	c.inbox.Gate.Leave()
//
// What holds of it:
//
//   - A message without options costs a nil check.
//   - A connection is given no id twice: one that it has had is not shown and counts as [Duplicate]. The last 64 are
//     remembered, and one that was given up is not.
//   - A user who is [Pending] is settled once: by the first acknowledgement, with the last connection that gives up, at
//     Options.AckBy, or with [Server.Drain], whichever is first. A stream that ends tells nobody.
//   - Receipts are written after the frame with their ack, gathered for 50 ms.
//   - Behind a closed gate direct messages keep their order, and go behind what is out of the store. A gate is closed for no longer
//     than 2 s without a word from the store.
//   - What is stored is asked for of one manager. When its stream ends another is asked; when a stream begins, all
//     users are asked for once more, 1,000 a second.
//   - The store is told to forget what the client has acknowledged, or the connection has taken where the client cannot.
//   - Locks: a connection's, then that of the gates, of the logs of rooms or of a stream's receipts, then that of a stream's acks. Nothing
//     is called back with one of ours held.
//
// # Logs of rooms
//
// Clients that keep a position get what was pushed to their rooms while they were away. Their connections are [LogConn] and have a
// [Cursor]; Sessions name FEATURE_ROOM_LOG, and FEATURE_DEDUPE because a message may come live and out of the log:
//
//	c.cursor, err = srv.Cursor(user, c, position)  // "": the client has none yet
//	users.Add(user, c)
//	c.cursor.Expect(room)                          // the client asks for it, and the Controller has not answered
//	c.cursor.Join(room)                            // once the connection takes messages of the room
//	...
//	c.cursor.Close()
//
// What holds of it:
//
//   - What stands in the log of a room behind the position with which a client has joined it comes to the connection, or the client is
//     told of a gap. This does not depend on any live message.
//   - A position that a client is told speaks only of what the connection has taken before.
//   - What was stored comes in order, and before what is new, unless the log does not answer for 2 s or the room does not come to rest for
//     10 s.
//   - A message comes twice to one connection only if 64 others came in between.
//   - A node without cursors follows nobody, and notes nothing. Idle cursors cost memory alone.
//
// proto/README.md tells the protocol for nodes in other languages.
package node
