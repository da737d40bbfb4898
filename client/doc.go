// Package client pushes messages through Push-Manager: to a user, several users, a room or everybody.
//
//	c, err := client.New("localhost:50053")
//	...
//	defer c.Close()
//	result, err := c.PushToRoom(ctx, "lobby", client.Text("Hello"))
//
// # What became of a push
//
// A push ends with a [Result] or with an error, never with both.
//
//   - A Result counts the users: Delivered, Offline, Failed and Unknown add up to Targets. A push that reached nobody is a
//     Result, too. [Result.Outcome] is the one word for it.
//   - An error is an [*Error]. If NotSent is true, nothing was sent. Otherwise the push may have been delivered, and
//     errors.Is(err, [ErrUnknown]) is true.
//
// # What is pushed again
//
// A push is repeated in two cases only:
//
//   - Push-Manager refused it, said that nothing was sent, and said when to come back.
//   - Its fate is unknown, and it has a [MessageID]. Then no connection gets it twice.
//
// Repeats stay within the deadline of the push and within a budget of the Client ([WithRetries]). A Result is never
// repeated: push again with the same MessageID where Failed or Unknown users matter.
//
// # Many pushes
//
// A [Client] takes a call for each push. A [Stream] puts many pushes into few messages of one long call, and needs a
// fraction of the CPU. Pushes to one user or one room arrive in the order in which they were sent.
//
// All methods may be called from several goroutines. Package clienttest has a server for tests of programs that push,
// package etcdresolver finds Push-Managers in etcd.
package client
