//go:build unix

package pushctl

import (
	"os/exec"
	"syscall"
)

// endWithAll makes a command end with everything that it has started.
func endWithAll(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
}
