package main

import (
	"os"

	"github.com/push-manager/push-manager/internal/app/connectnode"
	"github.com/push-manager/push-manager/internal/app/controller"
	"github.com/push-manager/push-manager/internal/app/pushmanager"
	"github.com/push-manager/push-manager/internal/certcmd"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/keycmd"
)

func main() { os.Exit(cli.Main(commandLine(), os.Args[1:])) }

func commandLine() cli.CommandLine {
	return cli.CommandLine{
		Name:        "push-manager",
		Description: "Fans pushes out to the Connect-Nodes that hold the users.",
		Commands:    []cli.Command{pushmanager.Command(), dev(), controller.Command(), connectnode.Command(), pushmanager.CheckCommand(), certcmd.Command(), keycmd.Command()},
	}
}
