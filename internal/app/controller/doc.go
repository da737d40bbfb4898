// Package controller is the program controller: the reference Controller as a process.
package controller
