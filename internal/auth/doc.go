// Package auth knows who calls the push API, and what each caller may do.
//
// It is for Push-Manager itself: its API changes without notice.
//
// A [Policy] is the content of the policy file. A [Caller] is one entry of it, found by a credential: a name of a client
// certificate, a token, or an API key. Its rights say which methods it may call for which ids.
//
// Invariants:
//
//   - What no rule allows is refused. There are no rules that forbid.
//   - Names are compared byte for byte. A star stands at the end of a pattern only, for any rest, the empty one included.
//   - BroadcastMessage and WatchReceipts are allowed by their name, or by the star in methods. So is Console, but for callers
//     of a tenant.
//   - A policy is immutable. A file with one mistake is refused as a whole, with the line of the mistake.
//   - One credential belongs to one caller.
package auth
