// Package certs reads certificates from files, reads them again while the program runs, and secures
// connections with them.
//
// A [Source] holds one set of files: a certificate with its key, authorities, or both. It makes
// credentials for gRPC, of a server or a client.
//
// Invariants:
//
//   - A set is used as a whole or not at all: the key fits the certificate, every block parses, the
//     chain is valid now, and so is at least one authority. Otherwise the set before it stays in use.
//   - Each handshake uses the set of its moment, authorities included. Connections that exist go on.
//   - A session is never resumed where certificates of clients count: it would skip today's authorities.
//   - Peers are known by their subject alternative names, never by the common name.
//   - The goroutine of a Source ends with Close.
package certs
