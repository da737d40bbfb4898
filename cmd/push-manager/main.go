package main

import (
	"os"
	"path/filepath"

	"github.com/push-manager/push-manager/internal/app/connectnode"
	"github.com/push-manager/push-manager/internal/app/controller"
	"github.com/push-manager/push-manager/internal/app/pushmanager"
	"github.com/push-manager/push-manager/internal/certcmd"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/keycmd"
	"github.com/push-manager/push-manager/internal/pushctl"
)

func main() {
	// In the container image pushctl is a link to this program, which has all that pushctl needs: half as large as two files.
	if filepath.Base(os.Args[0]) == "pushctl" {
		os.Exit(pushctl.Main())
	}
	os.Exit(cli.Main(commandLine(), os.Args[1:]))
}

func commandLine() cli.CommandLine {
	return cli.CommandLine{
		Name:        "push-manager",
		Description: "Fans pushes out to the Connect-Nodes that hold the users.",
		Commands:    []cli.Command{pushmanager.Command(), dev(), controller.Command(), connectnode.Command(), pushmanager.CheckCommand(), certcmd.Command(), keycmd.Command()},
	}
}
