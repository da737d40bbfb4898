// Connect-node is the reference Connect-Node: a WebSocket gateway that
// Push-Manager delivers to. It is the same as push-manager connect-node.
package main

import (
	"os"

	"github.com/push-manager/push-manager/internal/program"
)

func main() {
	os.Exit(program.Main(program.CommandLine{
		Name:        "connect-node",
		Description: "The reference Connect-Node: a WebSocket gateway.",
		Commands:    []program.Command{program.ConnectNodeCommand()},
	}, os.Args[1:]))
}
