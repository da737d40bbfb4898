// Package pubsub is the wire: the messages and services that Push-Manager, Biz-Servers, Controllers and Connect-Nodes
// speak, generated from the four .proto files beside it (`make generate`).
//
// Nothing here is written by hand but this comment. Wire types stop in transport: the packages engine, engine/route
// and shard do not know them.
package pubsub
