// Package quota counts how many pushes a tenant or a caller may ask for in a day, over all Push-Managers together.
//
// It is for Push-Manager itself: its API changes without notice.
//
// A counter in etcd says how many pushes of a day have been handed out. Each Push-Manager takes slices from it by
// compare-and-swap and spends them on its own:
//
//	/push-manager/quota/<tenant>/<yyyymmdd>            decimal, at most the limit
//	/push-manager/quota/_callers/<caller>/<yyyymmdd>   the same; no tenant has such a name
//
// A day ends at midnight UTC by the clock of the Push-Manager. Clocks that differ do no harm: each push counts on
// the day of the instance that took it, and the key of either day takes it. Keys go 48 h after the lease of their
// last writer was granted, so every key outlives its day.
//
// Invariants:
//
//   - A push never waits. [Quota.Take] is one atomic addition while there is enough; one goroutine talks to etcd.
//   - A slice is 0.1 % of the limit, or an eighth of what is left of the day if that is less. So a quota costs about
//     a thousand writes a day, whatever its size, and what idle instances hold at the end is 0.1 % each. Who spends
//     slices faster than four in a second gets up to four at a time.
//   - A push that comes before the next slice goes on credit, up to a part of what is left. The next slice pays for
//     it. The last fifth of a day has no credit, so the limit is not exceeded: who comes before a slice then is told
//     to come again at once ([ErrPending]).
//   - Who is not pushed for holds nothing.
//   - While etcd does not answer, an instance goes on with what it has. Then Config.OnError decides: refuse, or let pass
//     until its own pushes alone have certainly used up the day.
//   - What others write into a counter is input. It changes the state of that quota only. A value that is no count,
//     or is less than this instance alone has taken, is replaced with the next slice.
package quota
