// Package apikey makes API keys, and verifies them by a file that is read again while it changes.
//
// A key is pmk_<id>_<secret>_<checksum>, 63 characters:
//
//	pmk_       says what it is, for people and for scanners of leaked secrets
//	id         8 letters and digits, drawn at random. It may be shown and logged
//	secret     43 characters: 32 random bytes in base64url without padding
//	checksum   6 letters and digits: CRC-32 (IEEE) of everything before its underscore, in base 62
//
// The checksum finds typing errors and cut-off keys, here and elsewhere, without the file. It protects from nothing.
//
// The file is YAML: a line for each key, as [New] writes it, by the key's id. It holds SHA-256 of the secret's 43
// characters. A secret of 256 random bits needs no slow hash. A caller may have any number of keys, two of them while one
// takes the other's place.
//
//	4fZ1q9aB: {hash: "sha256:<64 hexadecimal digits>", name: billing, not_after: 2027-01-31T00:00:00Z, comment: rack 4}
//	9aB4fZ1q: sha256:<64 hexadecimal digits>
//
// Invariants:
//
//   - The file is taken over as a whole or not at all. One that is bad leaves the keys before it in use. So does one that
//     holds nothing, as while it is written: {} alone withdraws all keys.
//   - Others than the file's owner and group must not be able to read it.
//   - Secrets are compared by their hashes, in constant time. A key with an unknown id costs the same hash.
//   - Errors and logs hold ids at most.
//   - A Store has one goroutine. It ends with Close.
package apikey
