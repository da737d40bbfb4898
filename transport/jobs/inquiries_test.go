package jobs

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// slowNode answers one question at a time, as a node does, each in so much time.
type slowNode struct {
	takes time.Duration // 0: it never answers
	busy  chan struct{} // has room for one
	asked atomic.Int64
}

func (n *slowNode) list(ctx context.Context) ([]string, uint64, error) {
	n.asked.Add(1)
	if n.takes == 0 {
		<-ctx.Done()
		return nil, 0, ctx.Err()
	}
	select {
	case n.busy <- struct{}{}:
		defer func() { <-n.busy }()
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
	select {
	case <-time.NewTimer(n.takes).C:
		return []string{"alice"}, 7, nil
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
}

// TestManyJobsAskANodeInTurn: 64 of them take far longer than one question may, and each gets its answer.
func TestManyJobsAskANodeInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var of inquiries
		node := &slowNode{takes: 400 * time.Millisecond, busy: make(chan struct{}, 1)}
		var jobs sync.WaitGroup
		for i := range 64 {
			jobs.Go(func() {
				for range 3 { // pages
					if users, last, err := of.ask(t.Context(), "n1", node.list); err != nil || len(users) != 1 || last != 7 {
						t.Errorf("job %d: %v, %d, %v", i, users, last, err)
					}
				}
			})
		}
		jobs.Wait()
		if n := node.asked.Load(); n != 3*64 || len(of.nodes) != 0 {
			t.Errorf("%d questions, %d lines are left", n, len(of.nodes))
		}
	})
}

// TestANodeThatDoesNotAnswerIsWaitedForOnce and not once for each job; another node is asked meanwhile, and the same one again later.
func TestANodeThatDoesNotAnswerIsWaitedForOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var of inquiries
		silent, well := &slowNode{busy: make(chan struct{}, 1)}, &slowNode{takes: time.Millisecond, busy: make(chan struct{}, 1)}
		began := time.Now()
		var jobs sync.WaitGroup
		for i := range 64 {
			jobs.Go(func() {
				if _, _, err := of.ask(t.Context(), "silent", silent.list); !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
			})
			jobs.Go(func() {
				if _, _, err := of.ask(t.Context(), fmt.Sprint("well-", i%3), well.list); err != nil || time.Since(began) > time.Second {
					t.Errorf("%v after %v", err, time.Since(began))
				}
			})
		}
		jobs.Wait()
		if took := time.Since(began); took != listTimeout || silent.asked.Load() != 1 {
			t.Errorf("%v, %d questions", took, silent.asked.Load())
		}
		silent.takes = time.Millisecond
		if _, _, err := of.ask(t.Context(), "silent", silent.list); err != nil {
			t.Errorf("when it answers again: %v", err)
		}
	})
}

// TestAJobThatIsPausedLeavesTheLine, and what it had asked is no fault of the node's.
func TestAJobThatIsPausedLeavesTheLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var of inquiries
		node := &slowNode{takes: time.Second, busy: make(chan struct{}, 1)}
		first, pauseFirst := context.WithCancel(t.Context())
		second, pauseSecond := context.WithCancel(t.Context())
		var jobs sync.WaitGroup
		for _, ctx := range []context.Context{first, second} {
			jobs.Go(func() {
				if _, _, err := of.ask(ctx, "n1", node.list); !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		jobs.Go(func() {
			if _, _, err := of.ask(t.Context(), "n1", node.list); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		pauseSecond()
		synctest.Wait()
		pauseFirst()
		jobs.Wait()
	})
}
