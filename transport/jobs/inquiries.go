package jobs

import (
	"context"
	"sync"
	"time"
)

// inquiries have nodes asked for their users by one job of this instance at a time, in the order in which they come: a node looks at all
// its users for each, one after the other. Time in that line is not counted against the node.
type inquiries struct {
	mu sync.Mutex
	// Guarded by mu.
	nodes map[string]*queue // those that are asked at the moment
}

// queue is the line before one node.
type queue struct {
	place chan struct{} // has room for one. Those who wait for it get it in their order
	users int           // who asks, and who waits. Guarded by inquiries.mu

	// Owned by whoever has the place.
	failed time.Time // when a question ended in err
	err    error
}

// ask asks a node. A question has listTimeout, from when its turn in the line comes. The error of the one before is that of those who
// came while it was asked, too: a node that does not answer is waited for once, and not once for each job.
func (l *inquiries) ask(ctx context.Context, node string, question func(context.Context) (users []string, last uint64, err error)) (users []string, last uint64, err error) {
	came := time.Now()
	l.mu.Lock()
	if l.nodes == nil {
		l.nodes = map[string]*queue{}
	}
	line := l.nodes[node]
	if line == nil {
		line = &queue{place: make(chan struct{}, 1)}
		l.nodes[node] = line
	}
	line.users++
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if line.users--; line.users == 0 {
			delete(l.nodes, node)
		}
	}()
	select {
	case line.place <- struct{}{}:
		defer func() { <-line.place }()
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
	if line.err != nil && !came.After(line.failed) {
		return nil, 0, line.err
	}
	asking, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	users, last, err = question(asking)
	line.err = nil
	if err != nil && ctx.Err() == nil { // a job that has been paused meanwhile says nothing of the node
		line.failed, line.err = time.Now(), err
	}
	return users, last, err
}
