//go:build nodev

package main

import "github.com/push-manager/push-manager/internal/cli"

// dev keeps the name: who calls it is told why it does nothing.
func dev() cli.Command {
	return cli.Command{Name: "dev", Help: "Not in this build.", Missing: "this build has no development stack, it was made with -tags nodev"}
}
