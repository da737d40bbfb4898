// Package micro measures the steps of a push inside one process, without sockets: the
// real shards, directory and engine over a network that acknowledges at once.
//
// What one package can measure alone has its benchmark beside the code: decoding and
// encoding in transport/ingress, frames and acks in transport/link, the node's side in
// transport/node.
package micro
