// Package compression makes frames of the Deliver stream smaller and brings them
// back: what Push-Manager's links and a Connect-Node must have in common about it.
//
// It is for Push-Manager itself: its API changes without notice.
//
// # Contract
//
//   - A frame is compressed as a whole and for itself. The pushes in it share what
//     JSON bodies have in common, keys and values; frames share nothing, so that a
//     codec is a function, no stream has a state to keep or to lose, and idle
//     streams cost nothing.
//   - [Encoder] and [Decoder] are safe for concurrent use and are made once for all
//     streams. What they need to work with is kept for as many calls as run at once,
//     not for as many streams as there are.
//   - The input of a Decoder is hostile. It makes room for what was declared, never
//     for more, and anything else than exactly that many bytes is an error.
package compression
