// Package ids has the rule for the ids of users, rooms and nodes: 1 to MaxBytes bytes of
// valid UTF-8 without control characters. Whoever takes an id from outside checks it here.
package ids
