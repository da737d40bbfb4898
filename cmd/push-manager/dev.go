//go:build !nodev

package main

import (
	"os"

	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/devstack"
)

func dev() cli.Command { return devstack.Command(os.Stdout) }
