// Package discovery knows which nodes are registered in etcd, and registers
// ourselves there.
//
// It is for Push-Manager itself: its API changes without notice.
//
// A [Watcher] keeps the set of nodes below one prefix and reports the complete
// set after each change. A [Registration] keeps one key there for as long as its
// process lives. A [Claim] keeps a key that only one process has. [Refusals] writes whom nodes are to refuse, and a [RefusalWatch] reads
// it. All use a client that the caller owns and closes after them;
// [NewClient] makes a suitable one.
//
// # What the Watcher promises
//
//   - It lists, then watches from the next revision, and begins again with a
//     list after any watch error, be it a compaction, a lost leader or a broken
//     stream. It lists once a minute even when nothing seems wrong, and asks etcd for a
//     sign of life every few seconds and after each new connection: a watch that goes on
//     over it is silent where history has gone back.
//   - etcd out of reach removes nothing: the nodes known stay, and only
//     push_manager_discovery_stale_seconds tells. However long it was away, with the
//     default times it is listed two seconds after its return. Where connections are
//     dead that nobody has ended, they are noticed within 13 s first.
//   - A value that is malformed is logged, counted and skipped. It never touches
//     another key's node, nor the node that the same key named before.
//   - History that goes back (a wiped or restored etcd) removes nothing until a
//     second list, taken later, agrees.
//   - A node whose key is gone while Config.Alive still vouches for its link is
//     held for Config.Grace. When more than half of all nodes are held like that,
//     etcd is the likelier liar: none of them expires until etcd knows the
//     majority again or their links end.
//   - A node is a key with one segment below the prefix. Deeper keys are counted, logged once
//     and ignored.
//   - Of two keys that claim one id by Metadata.node_id, the one created later wins, the same one
//     for every Watcher. push_manager_discovery_contested_ids is above 0 as long as both are there.
//   - Config.OnChange is called from one goroutine, in order, never with the same
//     set twice in a row.
//
// # What the Registration promises
//
//   - The key is there while the process can reach etcd: after a lost lease, a
//     wiped etcd or a deleted key it is written again, with the default times two
//     seconds after etcd's return from an outage that the lease has not outlived, and
//     four seconds after a wipe or a deletion.
//   - A key that another process has taken over with another value stays theirs:
//     who registers last is the node. It is claimed again when it is free.
//   - Close deletes the key at once by revoking the lease, so that nobody waits
//     for the TTL.
//
// # What the Claim promises
//
//   - Of several holders one has the key, whenever they come: etcd decides. The others are told who has it.
//   - It is kept as a Registration keeps its key. A holder who finds another one there has lost it, and is told.
//
// # What a RefusalWatch promises
//
//   - It lists, then watches from the next revision, and lists again after any error and each minute.
//   - etcd out of reach lifts nothing: what is known counts to its end.
//   - What cannot be read, or is no Refusal, is left out.
//
// Values of registrations are the JSON of etcd's naming/endpoints package, so etcd's own gRPC
// resolver reads what a Registration writes, and a Watcher reads what etcd's
// endpoints.Manager writes. The resolver drops one slash of its target: for
// PushManagerPrefix it is etcd:////services/push-manager, with four.
package discovery
