// Controller is the reference Controller: it knows who is connected where. It is
// the same as push-manager controller.
package main

import (
	"os"

	"github.com/push-manager/push-manager/internal/program"
)

func main() {
	os.Exit(program.Main(program.CommandLine{
		Name:        "controller",
		Description: "The reference Controller: who is connected where.",
		Commands:    []program.Command{program.ControllerCommand()},
	}, os.Args[1:]))
}
