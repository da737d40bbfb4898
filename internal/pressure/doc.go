// Package pressure watches what a process runs out of, memory and cores, and says which
// pushes it is to refuse for that.
//
// Memory: what is in use, which is what the last collection found to be alive and all
// that is not heap, is held against GOMEMLIMIT. Garbage does not count: with a limit and a
// raised GOGC the heap grows to the limit as a matter of course. From 85 % on low
// priority is refused, from 95 % on all but critical. Without a limit nothing is.
//
// Cores: the median time that goroutines have waited for a core is the length of the queue
// that everything in this process stands in, whichever part has caused it. How long a
// node takes is not in it. While it is above a target, more and more is refused, the lowest
// priority first, and less and less again once it is below. It takes several bad readings
// in a row, and so many pushes in flight that refusing some would help.
//
// A Monitor has one goroutine, which Close waits for. It takes a few microseconds at each
// reading; a push costs nothing but a load of what was said last.
package pressure
