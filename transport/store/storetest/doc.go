// Package storetest is the contract of a store.Store as tests. An implementation runs them against itself, in each form
// that it has.
//
// It is for Push-Manager itself: its API changes without notice.
package storetest
