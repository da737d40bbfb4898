// Controller is the reference Controller: it knows who is connected where. It is
// the same as push-manager controller.
package main

import (
	"os"

	"github.com/push-manager/push-manager/internal/app/controller"
	"github.com/push-manager/push-manager/internal/cli"
)

func main() {
	os.Exit(cli.Main(cli.CommandLine{
		Name:        "controller",
		Description: "The reference Controller: who is connected where.",
		Commands:    []cli.Command{controller.Command()},
	}, os.Args[1:]))
}
