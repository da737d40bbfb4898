// Package web serves the services of an ingress.Server over HTTP/1.1 and HTTP/2, in plain text and over TLS: as Connect,
// gRPC-Web and gRPC (https://connectrpc.com/docs/protocol), as the JSON of Connect, and pushes by short paths.
//
// It decides nothing about a call. Each one gets the shape of one that gRPC has read (call.go), and enters the handlers
// that gRPC calls: who calls, what that may do and spend, memory, limits, the audit log and the numbers are the same.
// JSON becomes protobuf on the way in, when the call has been let in and there is memory for it, and protobuf becomes
// JSON on the way out (json.go, short.go).
//
// It is for Push-Manager itself: its API changes without notice.
//
// Its own are the routes (routes.go), which pages of other origins may call (origin.go), and how errors look (errors.go).
package web
