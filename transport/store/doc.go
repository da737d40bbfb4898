// Package store keeps messages for users who were not reached, and logs of what was pushed to rooms, behind interfaces with an
// implementation for each system that can hold them. A Spool stands between them and the engine, which never waits for a store.
//
// It is for Push-Manager itself: its API changes without notice.
package store
