// Package load pushes to a Push-Manager at a rate and measures what becomes of the
// pushes.
//
// In the open loop (Config.Rate above zero) a schedule says when each push is due,
// whatever the answers do. A latency counts from that moment to the answer, so a
// server that stands still for a second is charged for all the pushes that were due
// in that second, not only for those under way (no coordinated omission). In the
// closed loop (Config.Rate of zero) Config.InFlight pushes are kept under way and a
// latency counts from the sending: that finds a throughput, not a latency.
//
// Invariants:
//
//   - The same Config gives the same pushes in the same order, per lane. A lane is a
//     schedule of its own: one for all unary calls, one for each PushStream.
//   - What is under way is bounded by Config.InFlight. A push that is due while all
//     places are taken waits in the schedule, which takes no memory, and its latency
//     goes on counting.
//   - Each push that was due in the measured window is answered, ended without an
//     answer, or unsent, and the Result counts it once.
//   - Run returns at most Config.Timeout and a second after the last push was sent,
//     and leaves no goroutine behind. A client of its own that is about to connect may take
//     five seconds more.
//   - The generator's own part is measured as well: how late it sent when nothing but
//     itself could be the reason, its CPU, and how long its goroutines waited for it.
//
// Who owns what: a lane's schedule, its random numbers and the encoding of its pushes
// belong to the one goroutine that paces it. A recorder has a lock of its own and is
// shared by few. Clients of the generator's own (clients.go) belong to a goroutine each. Requests are encoded by hand around one copy of the content.
package load
