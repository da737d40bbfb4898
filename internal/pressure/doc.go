// Package pressure watches how much memory a process has left, and says which pushes it is to
// refuse for that.
//
// What is in use, which is what the last collection found to be alive and all that is not
// heap, is held against GOMEMLIMIT. Garbage does not count: with a limit and a raised GOGC the
// heap grows to the limit as a matter of course. From 85 % on low priority is refused, from
// 95 % on all but critical (control.go). Without a limit nothing is.
//
// A Monitor has one goroutine, which Close waits for. It takes a few microseconds at each
// reading; a push costs nothing but a load of what was said last.
package pressure
