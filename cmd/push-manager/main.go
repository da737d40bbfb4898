package main

import (
	"os"

	"github.com/push-manager/push-manager/internal/devstack"
	"github.com/push-manager/push-manager/internal/program"
)

func main() {
	os.Exit(program.Main(commandLine(), os.Args[1:]))
}

func commandLine() program.CommandLine {
	return program.CommandLine{
		Name:        "push-manager",
		Description: "Fans pushes out to the Connect-Nodes that hold the users.",
		Commands: []program.Command{
			serve(),
			devstack.Command(os.Stdout, startIn),
			program.ControllerCommand(),
			program.ConnectNodeCommand(),
		},
	}
}
