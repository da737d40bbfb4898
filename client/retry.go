package client

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/push-manager/push-manager/internal/pause"
)

// Retries bound how often pushes are repeated.
type Retries struct {
	// Tries of one push, the first one included. 0 means 8, 1 that nothing is repeated.
	Tries int
	// Ratio is how many repeats a push pays for. 0 means 0.2: in the long run one repeat for five pushes.
	Ratio float64
	// Burst is how many repeats may come on top of that. 0 means 1000.
	Burst int
}

func (r Retries) withDefaults() Retries {
	if r.Tries == 0 {
		r.Tries = 8
	}
	if r.Ratio == 0 {
		r.Ratio = 0.2
	}
	if r.Burst == 0 {
		r.Burst = 1000
	}
	return r
}

// Retry is one push that is about to be repeated.
type Retry struct {
	Target    Target // "job:sale" for a call about a job
	MessageID string // "" for none
	// Err is why. It has a Reason, or the push has a MessageID, or it is a call about a job.
	Err *Error
	// Delay is how long the push waits.
	Delay time.Duration
}

// budget is what a Client has left for repeats: when everything is refused, repeats must not make up most of the work.
type budget struct {
	ratio, burst float64

	mu   sync.Mutex
	left float64 // guarded by mu
}

func newBudget(r Retries) *budget {
	return &budget{ratio: r.Ratio, burst: float64(r.Burst), left: float64(r.Burst)}
}

// earn is called for each push.
func (b *budget) earn() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.left = min(b.left+b.ratio, b.burst)
}

// trySpend takes one repeat, if there is one left.
func (b *budget) trySpend() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.left < 1 {
		return false
	}
	b.left--
	return true
}

// Pauses before a push whose fate is unknown is repeated, and before a stream that broke is opened again: they double.
const (
	minBackoff = 50 * time.Millisecond
	maxBackoff = 5 * time.Second
)

func backoff(failures int) time.Duration {
	return pause.Jitter(min(minBackoff<<min(failures, 16), maxBackoff))
}

// tries are those of one push.
type tries struct {
	c         *Client
	to        Target
	messageID string

	n     int
	maybe bool   // one of them may have been delivered
	last  *Error // about all of them
}

func (c *Client) newTries(to Target, messageID string) tries {
	c.budget.earn()
	return tries{c: c, to: to, messageID: messageID}
}

// note takes a failed try into the account.
func (t *tries) note(err *Error) (refused bool) {
	t.n++
	refused = err.NotSent
	t.maybe = t.maybe || !refused
	// A refusal is about the last try only.
	err.NotSent, err.Tries = !t.maybe, t.n
	t.last = err
	return refused
}

// next notes how a try ended, and tells whether there is another one within the time that is left, and when. There is none if it may
// not be repeated for another reason.
func (t *tries) next(ctx context.Context, left time.Duration, err *Error, may bool) (delay time.Duration, again bool) {
	refused := t.note(err)
	switch {
	case !may || t.n >= t.c.cfg.retries.Tries:
		return 0, false
	case refused && err.Reason != "" && err.retry:
		delay = err.RetryAfter
	case !refused && (t.messageID != "" || t.to.kind == ofJob) && unclear(err.Code):
		delay = backoff(t.n - 1)
	default:
		return 0, false
	}
	if delay >= left || !t.c.budget.trySpend() {
		return 0, false
	}
	t.tell(ctx, delay)
	return delay, true
}

// nextPaid is next for a push of a PushStream that was refused as a whole. What repeats cost is paid for all of its pushes together.
func (t *tries) nextPaid(ctx context.Context, left time.Duration, err *Error, paid bool) bool {
	t.note(err)
	if !paid || t.n >= t.c.cfg.retries.Tries || err.RetryAfter >= left {
		return false
	}
	t.tell(ctx, err.RetryAfter)
	return true
}

func (t *tries) tell(ctx context.Context, delay time.Duration) {
	if t.c.cfg.onRetry != nil {
		t.c.cfg.onRetry(ctx, Retry{t.to, t.messageID, t.last, delay})
	}
}

// unclear tells whether another try can end better: not after what a caller has done, or has no right to.
func unclear(code codes.Code) bool {
	switch code {
	case codes.Unavailable, codes.Internal, codes.Unknown, codes.Aborted, codes.ResourceExhausted, codes.DeadlineExceeded:
		return true
	default:
		return false
	}
}

// wait waits for the next try. What ends the waiting is the caller's deadline or cancellation; t.last says so.
func (t *tries) wait(ctx context.Context, d time.Duration) bool {
	if pause.For(ctx, d) {
		return true
	}
	ended := errorOf(ctx.Err(), true)
	ended.NotSent, ended.Tries = !t.maybe, t.n
	t.last = ended
	return false
}
