// Package membership keeps a Controller's picture of who is connected to a Connect-Node,
// and in which rooms, equal to the truth. It stands beside transport/node, and every
// gateway needs both: without it pushes find nobody.
//
// # Embedding
//
//	reports, err := membership.New(membership.Config{
//		NodeID: "connect-node-1", BootID: srv.BootID(), Registered: srv.Registered, Controller: "controller:50051",
//	})
//	reports.Start() // node.Server.Run does it for RunConfig.Members
//
// for each connection of a client, which implements [Client]:
//
//	m := reports.Member("alice", "Alice", client)
//	m.Join("")      // the user is here
//	m.Join("lobby") // and in a room
//	m.Leave("lobby")
//	m.Close()       // the connection has ended
//
// and to leave, after the node has gone from etcd, which Run does, too:
//
//	reports.Drain(ctx) // everybody leaves; returns at ctx at the latest
//	reports.Close()
//
// examples/connect-node is a whole Connect-Node.
//
// # What holds
//
//   - A [Member] is in a room from Join on and until Leave or Close, whatever the
//     Controller says, unless it refuses: [Member.In] decides who gets a push to the room.
//   - A user is in a room while one of the connections here is. The Controller is told the
//     difference between what is and what it was told, one call at a time for each user
//     and room, again and again until it answers (reporter.go). Memory is bounded by what the
//     connections hold, however long it is away.
//   - Joins go before leaves, and users take turns.
//   - The last word that a [Client] gets about a room is true: Joined comes once the
//     Controller knows, so that a push after it arrives.
//   - What both sides have is compared every Config.SyncInterval and mended where it
//     differs (sync.go); that also tells a Controller everything that has forgotten.
//     proto/README.md describes it.
//   - To a Controller that cannot compare, all memberships are reported again, paced,
//     when its connection was lost and is back, and after the node was lost in etcd; a
//     report that follows one without an answer is repeated.
//   - A node that starts first ends the memberships that a process before it has left
//     behind (LeaveRoom with nothing but node_id; a Controller that does not know this
//     refuses it, which does no harm).
//   - Each user is also a member of the room "@node:" + node id, so that the Controller
//     finds users without a room. Names that begin so are refused to clients.
//   - The goroutines begin with Start and end with Close, which waits for them. One that
//     panics is logged, counted and begins again.
package membership
