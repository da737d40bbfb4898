// Package pushctl is the command pushctl; cmd/pushctl says what it does.
package pushctl
