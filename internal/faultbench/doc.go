// Package faultbench breaks the deployment around real Push-Managers and checks
// that they keep their word. It has tests only.
//
// # The bench
//
// Push-Manager is the real program, built once, as a process of its own. Around it
// stand Connect-Nodes by script (they speak Deliver frame by frame, so they can be
// late, partial, silent, or lie) and real ones (transport/node in child processes of
// the test binary, to be killed and stopped), a Controller by script, embedded etcd,
// and a TCP proxy in front of any of them. True half-open connections need network
// namespaces, and with them root; without it those tests are skipped.
//
// # The two ledgers
//
// What arrived is noted on the nodes' side, before the node acknowledges it; what the
// callers were told is noted on theirs. The payload of a push is its id. The checker
// compares both, for every push:
//
//   - I1: no success is claimed that did not happen, and what is said to be failed or
//     offline has not arrived
//   - I2: targets = delivered + offline + failed + unknown
//   - I3: a push arrives at most once at each client
//   - I4: an error with ErrorInfo means that nothing arrived
//   - I7: every call returns by its deadline
//   - I10: pushes with the same key arrive in the order in which they were made
//
// A push with PushOptions is a message, in one try or in several with one id. I3, I1 and I10 then
// mean the message: no connection gets it twice, who acknowledged it or has it stored gets it,
// and a user sees messages in the order in which they were made, whatever connections they come
// to. Beyond these:
//
//   - I11: nothing is shown later than it is good for
//
// A message to a room that stands in the room's log is owed to every member who was in the room and had a position when it was
// pushed, wherever the member is in the end (roomlog_people_test.go).
//
// Tests of single faults also hold to these, each for its fault:
//
//   - I5: goroutines, descriptors and what waits are back where they were before
//   - I8: pushes succeed again
//   - I9: pushes to the other node did not suffer
//
// A push that breaks a promise is printed with all that happened to it and around it.
//
// # Running
//
// The faults are listed in docs/faults.md, and the tests name its ids. The fast ones
// run with all other tests. `make faults` runs the slow ones, too, and `make chaos` random
// faults that overlap, the same again for the same SEED, for as long as DURATION says.
// `make honesty` runs the programs as they ship with real WebSocket clients that come, move
// and go while nodes are killed, stopped and drained and the Controller is restarted: what
// callers are told is held against what the clients got, and who stayed connected is owed
// every push. `make soak` looks for what grows: half of the peak load for a long time while
// a node leaves and joins every five seconds. `make recovery` repeats outages and judges how
// soon all is well again, `make lasting` has messages with ids, acknowledgements and a store
// survive all of that, and `make rolling` restarts everything behind a balancer;
// docs/measurements.md has what they have shown.
package faultbench
