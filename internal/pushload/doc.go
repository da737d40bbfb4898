// Package pushload is the command pushload; cmd/pushload says what it does.
package pushload
