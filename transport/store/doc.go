// Package store keeps messages for users who were not reached, logs of what was pushed to rooms, and receipts of pushes, behind interfaces
// with an implementation for each system that can hold them. A Spool, and a ReceiptLog, stand between them and the engine, which never
// waits for a store.
//
// It is for Push-Manager itself: its API changes without notice.
package store
