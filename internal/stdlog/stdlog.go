// Package stdlog takes the standard logger away from libraries. Programs import it, and nothing
// else of theirs has to be done before main.
//
// A library that logs through package log writes to standard error on its own: in the middle of
// --help, or as a line of text in a log of JSON. Until To is called such lines are dropped, and
// then they are lines of the program's log.
//
// The metrics library logs while it is initialised, on a host without pressure stall
// information. Go initialises packages in the order of their import paths, each after what it
// imports; this one imports nothing but the standard library, and the metrics library waits for
// packages whose paths come after ours. TestNoProgramWritesUnasked holds that.
package stdlog

import (
	"io"
	"log" //nolint:depguard // it is what this package takes away from others
	"log/slog"
)

func init() { //nolint:gochecknoinits // it has to be done before other packages are initialised
	log.SetOutput(io.Discard)
}

// To sends what libraries log to logger, at debug level: they mean their own users, not ours.
func To(logger *slog.Logger) {
	log.SetFlags(0)
	log.SetOutput(slog.NewLogLogger(logger.Handler(), slog.LevelDebug).Writer())
}
