// Package storetest is the contracts of a store.Store and of store.Logs as tests. An implementation runs them against itself, in each form
// that it has.
//
// It is for Push-Manager itself: its API changes without notice.
package storetest
