// Package ingress is the push API over gRPC: it turns the bytes of a request into
// an engine.Push, and what became of it into the bytes of a reply.
//
// It is for Push-Manager itself: its API changes without notice.
//
// Invariants:
//
//   - A gRPC error with google.rpc.ErrorInfo means that nothing was sent. Where
//     that is not certain (a panic after the engine had the push) the error
//     carries none.
//   - status.go is the only place that knows status codes.
//   - A request is counted before it is taken apart: nothing is allocated for a
//     list that is over its limit, and no protobuf message is built at all.
//   - The payload is never encoded again. It is the caller's own bytes of
//     MessageContent, unknown fields included. A timestamp of 0 is stamped by
//     appending the field: of a scalar on the wire the last one wins.
//   - How large a message is, is read before it: from the transport of its call (receive.go).
//   - The bytes of one request are copied once, out of gRPC's pooled buffers, into
//     a buffer that ids and payload are parts of. It is not written while the push is
//     under way, and used for another request after that: whoever keeps an id or a
//     payload beyond the push must clone it.
//   - The goroutine that completes a push of a PushStream never waits for the
//     stream's client.
//   - A request comes in when there is memory for it (space.go), and all else that clients may
//     have many of is bounded: calls, streams (fit.go says how many fit).
//   - Who has space for a request and dawdles loses it (body.go).
//   - Connections, and when they are read, are the job of package throttle.
//   - A call is let in by one function, admit, which asks everything that can be asked before its
//     request is read. The places in flight are counted by the engine.
//   - A push pays last, for its caller and its tenant or for neither (callers.go). What is refused later for what it asks
//     gets its quota back.
//   - Who is refused for who calls is told to the audit log (audit.go), and nobody waits for that.
//   - On the way down (server.go) nobody is refused who could not know better: first health says
//     NOT_SERVING, then, Config.DrainNotice later, every client is told to go and
//     streams end, and only what still comes after that is refused with DRAINING.
//   - A connection that is older than Config.ConnectionAge goes the same way, alone.
//   - A push without options is what it was before there were options: it pays a nil check.
//   - Of a push with a message id that has reached all, a retry is answered and not sent (messageids.go). One that is under
//     way is waited for: by the goroutine of a unary call, and by nobody for a push of a PushStream.
//   - A caller sees the receipts of its own pushes only, from memory that no watcher can make grow (receipts.go).
//
// Metadata entries are counted as they stand on the wire: a key that comes twice
// counts twice, and its last value is the one that clients see.
//
// Goroutines: gRPC's own, and for each PushStream one reader. The handler's
// goroutine is the stream's writer, because a stream ends when its handler
// returns, and a stream that drains has to end while its reader waits for the
// client. Drain and Close wait for both.
package ingress
