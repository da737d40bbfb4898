// Package invoke tells how a person calls one of our commands, as a line that runs
// in any terminal on this machine: commands name each other in what they print, and
// not everybody has installed them.
package invoke
