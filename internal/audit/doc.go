// Package audit writes who did what, and who was refused, as one line of JSON each.
//
// It is for Push-Manager itself: its API changes without notice.
//
// Invariants:
//
//   - Nobody waits for it. Lines wait in a bounded queue for the one goroutine that writes; what finds no place, or
//     cannot be written, is counted.
//   - Refusals are gathered: one line for each event, caller and reason in a second, with a count. So whoever is
//     refused a million times fills neither the queue nor the disk.
//   - A line holds what a credential is known by (a name in a certificate, the id of a key), never a secret.
//   - The file is opened again on Reload, which is what logrotate expects of SIGHUP.
package audit
