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
// proto/README.md tells the protocol for nodes in other languages.
package node
