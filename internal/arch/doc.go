// Package arch holds the tests on the repository as a whole. It has no code of its own.
//
// They keep what no compiler keeps:
//
//   - imports point one way, from cmd down to shard, and each layer has only the libraries it is meant to have;
//   - each package says once, in doc.go, what it is for;
//   - what is committed is finished;
//   - each metric stands in docs/metrics.md, and nothing else does;
//   - links between the documents lead somewhere;
//   - docs/architecture.md says of each file what is decided there.
//
// The tests read the source files; the one on metrics also asks a running push-manager dev.
package arch
