package pushctl

import (
	"fmt"

	"github.com/push-manager/push-manager/internal/buildinfo"
)

type versionCmd struct{}

// Run prints one line, or all that is known of the build.
func (*versionCmd) Run(t *terminal) error {
	build := buildinfo.Read("pushctl")
	return t.answer(build, fmt.Sprintln(build.Name, build.Version))
}
