// Pushload pushes to a Push-Manager at a rate and reports what became of the pushes
// and how long they took, from the moment that each was due.
//
// It exits with 0 when the rate was achieved and few pushes went wrong, with 1 when
// the rate fell short by more than a twentieth, when more went wrong than
// --max-errors allows or nothing could be measured, and with 2 when it was called
// wrongly. Ctrl-C ends a run early: the results are those until then.
package main

import (
	"os"

	"github.com/push-manager/push-manager/internal/pushload"
)

func main() { os.Exit(pushload.Main()) }
