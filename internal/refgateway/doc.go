// Package refgateway is the reference Connect-Node: clients connect over WebSocket,
// pushes arrive over transport/node, memberships are reported by transport/node/membership.
//
// # What clients see
//
//	ws://HOST:PORT/ws?user_id=u&user_name=n&room_id=r&ack=1
//
// user_name, room_id and ack may be left out. A push is a text message:
//
//	{"type":"text","room_id":"r","user_id":"u","timestamp":1,"data":{"content":"Hello"},"metadata":{}}
//
// type is the lower-case name of the MessageType, or its number as a string when
// this version has no name for it. room_id is empty unless a room was pushed to.
// user_id is the recipient. data that is not UTF-8 comes as content_base64. All
// these keys are always there; metadata is sorted by key. A push to everybody also has
// "broadcast":true. With ack=1 a push also has, behind all these, its "id" if it has one, "ack", the number
// with which the client acknowledges it if it is to, and "replayed":true if it comes again or out of the store.
//
// A client may send, as text messages:
//
//	{"type":"join","room_id":"r2"}    answered with {"type":"joined","room_id":"r2"}
//	{"type":"leave","room_id":"r2"}   answered with {"type":"left","room_id":"r2"}
//	{"type":"ping"}                   answered with {"type":"pong"}
//	{"type":"refresh","token":"..."}  answered with {"type":"refreshed","expires":1}
//	{"type":"ack","ack":18}           not answered; with ack=1, for all pushes up to that number
//
// and gets {"type":"error","message":"FIELD: WHY"} for what is wrong, with the "room_id" when
// a join or leave named one that can be. joined and
// left come once the Controller knows, so a push after joined arrives. The room
// of the query is confirmed by joined, too; a connection that is opened without
// one gets {"type":"ready","user_id":"u","node_id":"n"} once pushes to the user
// reach it. Clients should ignore types that they do not know. The subprotocol pm.v1 is
// accepted; who asks for others is served without.
//
// With Config.Tokens a client shows a token first (identity.go), which says who it is. Until that is
// verified it is in no list but that of unverified.go, and its pings are not answered.
//
// A client that is silent for Config.PingInterval is pinged, and cut off after IdleTimeout
// (sweep in client.go). Frames are read at Config.MessageRate. What a client sends beyond waits in its socket,
// so nothing is lost and nobody else is held. The close codes (frame.go) are 1001 (the node goes),
// 4429 (cut off for being slow), 1002, 1007 and 1009 (not WebSocket, not UTF-8, too
// large), 1011 (a mistake of the gateway), 4401, 4403 and 4408 (tokens). Slow is who has more waiting than
// Config.QueueFrames or QueueBytes, or than its share of QueueTotalBytes when all
// clients together have half of that waiting. What waited for it is lost although it was
// acknowledged; what is pushed after that fails, or finds the user offline.
//
// # Who is in a room
//
// A push to a room goes to the connections that are in it: those that have joined it, by
// room_id or a message, and not left. Nothing of the room comes after left. What the
// Controller says does not put anybody into a room here. A user who is here and not in
// the room is not here for the push: offline in the account.
//
// # Users without a room
//
// The Controller learns users by JoinRoom alone. So that every connected user is
// found, each one is also a member of the room "@node:" + node id, which clients
// can neither see nor join: names that begin with "@node:" are refused.
//
// # What holds
//
//   - Nothing waits for a client. What is sent to one goes into its queue, bounded
//     by frames and bytes; a client whose queue is full is cut off, told so, and counted.
//   - All connections of a user get a push to the user or to everybody, those in the
//     room one to a room, and the user counts once. It is delivered when one of them has
//     taken it.
//   - Pushes to a connection leave in the order in which they were delivered.
//   - A push is encoded once, and held once by all queues. Only the recipient's id is
//     put in for each, and what clients with ack=1 get besides. Those without get the same bytes
//     whatever options a push has.
//   - A message id reaches a connection once (node.Inbox), but for what is marked as replayed. Nothing that has
//     expired is written. An acknowledgement confirms nothing that was not written.
//   - A client that leaves a push unacknowledged for half of its time is pinged, and cut off when it does not
//     answer. What is unacknowledged when a connection is closed, or the node drains, is given up in that
//     moment.
//   - What a client sends ends its own connection at worst: it is bounded before memory
//     is made for it, and the goroutines that work for a client recover.
//   - With Config.Tokens nobody gets a push, or is told to the Controller, without a token that was
//     good then. The connection ends soon after the token, and after its key.
//   - A room is left when the user's last connection in it on this node leaves.
//
// # Goroutines
//
// Each connection has a reader. As many writers as there are cores work off the connections
// for which something waits, while there are any. They do not wait for a client: one whose
// socket takes no more gets a writer of its own until its queue is empty. Gateway.clients
// counts them all, and Close waits for them. The servers, the sweep and the wheel, which has the timers of
// everything unacknowledged, end with Close, too. No lock is held while another package is called, but for a
// connection's Inbox, Gate and Member; and no two of ours nest, but for those of the line of connections and of the wheel, which
// are the innermost.
package refgateway
