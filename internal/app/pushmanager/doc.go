// Package pushmanager is Push-Manager, put together: its settings, the order in which
// its parts start and stop, and what makes it ready.
package pushmanager
