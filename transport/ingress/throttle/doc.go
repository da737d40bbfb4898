// Package throttle is the layer between the connections of clients and gRPC: it decides which
// connections there are, and when each is read. It is for Push-Manager itself: its API changes without notice.
//
// It wraps what the credentials of the server return, so it sees HTTP/2 whether there is TLS
// below it or not:
//
//	socket -> credentials (TLS, or none) -> Conn -> gRPC's reader -> Tap -> handler
//
// Invariants:
//
//   - Work under way is bounded. A unary call counts from when gRPC has read its headers until it
//     is answered, and for 50 ms at the most: after that it waits for a slow node. While
//     Config.Calls count, connections keep what they have read to themselves, and the kernel
//     keeps the rest.
//   - Connections wait in four lines, by priority. With critical calls they never wait. Whoever
//     has waited for maxHold is read next, whatever there is room for.
//   - Of the connections that wait, one for each core is let in at a time. The next one has its
//     turn when that one is back for more, since all of its calls are counted then.
//   - A client that has begun something ends it within Config.Timeout: its hello, the head of a
//     frame, and the headers of a call. Its frames are not tiny.
//   - Connections that have not said hello are bounded for each network, those that have for each
//     network and in all. A network is an address of IPv4, or a /64 of IPv6.
//   - A panic ends the connection that brought it about, and nothing else.
//
// Goroutines: none but timers. Read and Tap run on gRPC's reader of the connection.
package throttle
