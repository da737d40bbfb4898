package pushctl

import "github.com/push-manager/push-manager/internal/buildinfo"

type versionCmd struct{}

// Run prints one line, or all that is known of the build as JSON.
func (*versionCmd) Run(t *terminal) error { return buildinfo.Write(t.out, "pushctl", t.json) }
