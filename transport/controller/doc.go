// Package controller asks the deployment's Controller where rooms and users are:
// a route.Source over gRPC, and the change stream that tells the directory what
// to forget.
//
// It is for Push-Manager itself: its API changes without notice.
//
// The Controller needs GetRoomInfo and GetUserNode. GetUserNodes, FollowRoutes and
// WatchRoutes, where there is no FollowRoutes, are probed: UNIMPLEMENTED means "do
// without" until the connection is made anew or Config.ProbeAgainAfter has passed,
// and is logged once.
//
// # Promises
//
//   - Every error of a look-up wraps route.ErrUnavailable and says what was asked.
//   - A Controller that refuses connections fails a look-up at once; one that
//     accepts and never answers fails it when its context ends.
//   - One retry for each look-up, while the budget lasts: retries stay below a
//     tenth of the look-ups.
//   - A reply is walked by hand and never becomes a tree of messages: a room of a
//     million members costs its ids and little more. Ids that no push could name
//     are skipped and counted.
//   - Vouch is called only after the stream's synced and InvalidateAll, for half a
//     second at a time, and no further than 3 s after the moment before which every
//     change is known to be applied. A pause of this process ends it by itself; only
//     a mark that was sent after the pause renews it.
//   - What the Controller sends ends the stream at most, never the process.
//
// # Several replicas
//
// Look-ups go round robin to all addresses of the target; the change stream is
// open to one of them. Replicas must therefore share their changes: each names a
// change on its streams only once it is visible at all of them.
//
// # Keepalive
//
// While the change stream is open an idle connection is pinged each 10 s, and a
// ping without an answer for 3 s ends it. A Controller that has WatchRoutes must
// therefore set keepalive.EnforcementPolicy{MinTime: 5 * time.Second}: gRPC's
// default would cut the connection off. One without is never pinged when idle.
package controller
