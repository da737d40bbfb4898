// Package slots divides the memberships of a node into slots, as proto/README.md
// says: a node and its Controller compare one number for each.
package slots

import "crypto/sha256"

// Count is the number of slots.
const Count = 1024

// Hash is what a membership adds to its slot's digest.
func Hash(user, room string) uint64 {
	var array [520]byte // two ids of the longest kind and what is between them
	b := append(array[:0], user...)
	b = append(b, 0)
	b = append(b, room...)
	sum := sha256.Sum256(b)
	h := uint64(0)
	for _, x := range sum[:8] {
		h = h<<8 | uint64(x)
	}
	return h
}

// Of is the slot of a membership with this hash.
func Of(hash uint64) int { return int(hash % Count) }
