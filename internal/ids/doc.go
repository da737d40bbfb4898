// Package ids has the rule for the ids of users, rooms and nodes: 1 to MaxBytes bytes of
// valid UTF-8 without control characters. Whoever takes an id from outside checks it here. It also has the rule for
// the names of tenants, which stand before the ids of their users and rooms.
package ids
