// Package jobs runs broadcast jobs: one message to many users, at a speed.
//
// It is for Push-Manager itself: its API changes without notice.
//
// Every user has a turn, a number that follows from the id alone (ids.Turn). A job goes through all turns from the lowest to
// the highest, whomever it is for: who is connected, the members of rooms, a list. So one number, the next turn, says how
// far it is, and a user who moves from node to node has one turn all the same.
//
// Nobody gets the message twice, and this is why:
//
//   - Before users are sent anything, the record of the job in etcd says that their turns are over, and counts them as open.
//     That is one write, which fails if anybody else has written since (a compare-and-swap of the record's revision).
//   - Turns never go back. Whoever takes a job over begins at the next turn, and counts who is open as unknown. They may have
//     got it, so they are not sent it again.
//   - An instance that was paused may send what it has written before, late: nobody else does.
//
// So leases decide only who is to go on with a job, never whether it is safe to.
//
// The counts add up, because users are counted in the write that ends their turns:
//
//	targets = delivered + offline + failed + unknown + open
//
// A pause, and every other change from outside, is a compare-and-swap of the same record. The next write of whoever runs the
// job then fails, it reads the record and obeys: one tick (250 ms) later at most nobody's turn comes any more.
//
// Goroutines: one that looks at the jobs each second, one for each job that runs here, and for each of these one that
// fetches users ahead and one for each push under way. Close waits for all of them.
package jobs
