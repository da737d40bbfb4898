// Package jwt verifies JSON Web Tokens (RFC 7519) of configured issuers, and keeps the issuers' keys up to date.
//
// A [Verifier] knows who signed a token and what it claims. It knows nothing of rights: those are for its callers.
//
// Invariants:
//
//   - A key belongs to one issuer, one key id and one algorithm. A token that names any other combination is refused
//     before its signature is looked at, so neither a token nor a JWK chooses how it is verified.
//   - What a token holds opens no file and no connection: jku, x5u, jwk and x5c are not read.
//   - Work for a token is bounded before it begins: [MaxToken] bytes, two dots, GOMAXPROCS signatures at a time.
//   - An issuer's key set is replaced as a whole. A set that is bad leaves the one before it in use.
//   - A token with an unknown key has a URL fetched once in 30 s at most, and waits for that for 1 s at most, in the
//     company of few others. It never has a file read.
//   - Errors and logs hold nothing of a token.
//   - Each issuer has one goroutine. It ends with Close.
//
// What these rules are learned from: RFC 8725 (algorithms), CVE-2026-49998 (keys of another issuer), CVE-2026-32301 (URLs
// from claims), CVE-2025-22149 (keys that were withdrawn), CVE-2025-30204 (dots), CVE-2026-55689 (no audience).
package jwt
