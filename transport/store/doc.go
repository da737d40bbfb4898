// Package store keeps messages for users who were not reached, and receipts of pushes, behind interfaces with an implementation
// for each system that can hold them. A Spool, and a ReceiptLog, stand between it and the engine, which never waits for a store.
//
// It is for Push-Manager itself: its API changes without notice.
package store
