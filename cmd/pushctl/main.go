// Pushctl is a person's client of Push-Manager: it pushes, lists what is
// registered, shows pushes as a user would get them, and tries a Connect-Node of
// one's own.
//
// It exits with what became of a push, the worst first: 5 when it is unknown whether
// somebody got it, 4 when it failed for somebody, 3 when nobody was there to get it,
// 0 otherwise. Anything else that went wrong is 1, a wrong command line 2.
package main

import (
	"os"

	"github.com/push-manager/push-manager/internal/pushctl"
)

func main() { os.Exit(pushctl.Main()) }
