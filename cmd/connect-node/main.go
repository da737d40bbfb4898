// Connect-node is the reference Connect-Node: a WebSocket gateway that
// Push-Manager delivers to. It is the same as push-manager connect-node.
package main

import (
	"os"

	"github.com/push-manager/push-manager/internal/app/connectnode"
	"github.com/push-manager/push-manager/internal/cli"
)

func main() {
	os.Exit(cli.Main(cli.CommandLine{
		Name:        "connect-node",
		Description: "The reference Connect-Node: a WebSocket gateway.",
		Commands:    []cli.Command{connectnode.Command()},
	}, os.Args[1:]))
}
