package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/pause"
)

// The pool library keeps two goroutines of a pool of its own from the start on.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

// memory is a store in memory, whose answers a test may hold up or replace.
type memory struct {
	Store // of which a Spool uses Append only

	mu     sync.Mutex
	users  map[string][]*engine.Stored
	until  map[string][]time.Time
	sizes  []int // of batches
	err    error // of everything
	errs   map[string]error
	silent bool // until ctx ends
	delay  func(entries int) time.Duration
	seq    uint64
}

func (s *memory) Append(ctx context.Context, entries []Entry) []error {
	s.mu.Lock()
	silent, delay := s.silent, s.delay
	s.mu.Unlock()
	if silent {
		<-ctx.Done()
	}
	if delay != nil {
		pause.For(ctx, delay(len(entries)))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sizes = append(s.sizes, len(entries))
	errs := make([]error, len(entries))
	for i := range entries {
		e := &entries[i]
		switch {
		case ctx.Err() != nil:
			errs[i] = fmt.Errorf("%w: %w", engine.ErrSpoolDown, ctx.Err())
		case s.err != nil:
			errs[i] = s.err
		case s.errs[e.User] != nil:
			errs[i] = s.errs[e.User]
		default:
			s.seq++
			e.Seq = s.seq
			s.users[e.User] = append(s.users[e.User], e.Message)
			s.until[e.User] = append(s.until[e.User], e.Expires)
		}
	}
	return errs
}

func (s *memory) usage(ctx context.Context, _ int) (int64, error) {
	s.mu.Lock()
	silent, err := s.silent, s.err
	s.mu.Unlock()
	if silent {
		<-ctx.Done()
		return 0, ctx.Err()
	}
	return 42, err
}

// set changes how the store behaves.
func (s *memory) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

// memoryLogs are logs in a memory, of which a Spool uses these methods only. The user is the room.
type memoryLogs struct {
	Logs
	*memory
}

func (l memoryLogs) Partition(room string) int { return int(room[0]) }

func (l memoryLogs) AppendLog(ctx context.Context, logged []LogEntry) []error {
	entries := make([]Entry, len(logged))
	for i, e := range logged {
		entries[i] = Entry{User: e.Message.Room, Message: e.Message, Expires: e.Expires}
	}
	errs := l.memory.Append(ctx, entries)
	for i, e := range entries {
		if errs[i] == nil {
			logged[i].Place = engine.Place{Epoch: 7, Partition: uint32(l.Partition(e.User)), Seq: e.Seq}
		}
	}
	return errs
}

func (l memoryLogs) Heads(ctx context.Context) (uint64, []uint64, error) {
	_, err := l.usage(ctx, 0)
	return 7, nil, err
}

func newMemory() *memory {
	return &memory{users: map[string][]*engine.Stored{}, until: map[string][]time.Time{}}
}

// bench is a Spool in front of a memory for users and one for rooms.
type bench struct {
	*Spool

	t      *testing.T
	memory *memory
	logs   *memory
	set    *metrics.Set
}

// logged is what an AppendLog was answered.
type logged struct {
	place engine.Place
	err   error
	after time.Duration
}

// log appends to the log of a room.
func (b *bench) log(room, payload string, timeout time.Duration) <-chan logged {
	answers, began := make(chan logged, 2), time.Now() // room for one that is too many
	b.AppendLog(&engine.Stored{Room: room, Payload: []byte(payload)}, began.Add(timeout), func(place engine.Place, err error) {
		answers <- logged{place, err, time.Since(began)}
	})
	return answers
}

func spool(t *testing.T, cfg SpoolConfig) *bench {
	t.Helper()
	b := &bench{t: t, memory: newMemory(), logs: newMemory(), set: metrics.NewSet()}
	cfg.Logs = memoryLogs{memory: b.logs}
	if cfg.Metrics = b.set; cfg.Store == nil {
		cfg.Store, cfg.Usage = b.memory, b.memory.usage
	}
	var err error
	if b.Spool, err = NewSpool(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(context.Background()); err != nil {
			t.Error(err)
		}
		if bytes, length := b.queued(); bytes != 0 || length != 0 {
			t.Errorf("%d bytes and %d entries are still counted at the end", bytes, length)
		}
	})
	return b
}

// answer is what done was called with, and when.
type answer struct {
	results []engine.Spooled
	after   time.Duration
	calls   int
}

// push appends a message, and returns where the answer will be.
func (b *bench) push(payload string, timeout time.Duration, users ...string) <-chan answer {
	answers, began := make(chan answer, 2), time.Now()
	calls := 0
	var mu sync.Mutex
	b.Append(&engine.Stored{MessageID: payload, Payload: []byte(payload)}, users, began.Add(timeout), func(results []engine.Spooled) {
		mu.Lock()
		defer mu.Unlock()
		calls++
		answers <- answer{slices.Clone(results), time.Since(began), calls}
	})
	return answers
}

func (b *bench) metric(name string) string {
	var out strings.Builder
	b.set.WritePrometheus(&out)
	for line := range strings.Lines(out.String()) {
		if rest, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(rest)
		}
	}
	return ""
}

func (b *bench) counted(result string) string {
	return b.metric(`push_manager_store_append_total{result="` + result + `"}`)
}

func TestWhatIsAppendedIsStoredForEachUserAndAnsweredOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{})
		got := <-b.push("hello", time.Second, "u", "v", "u")
		if got.calls != 1 || len(got.results) != 3 {
			t.Fatalf("%+v", got)
		}
		for i, r := range got.results {
			if r.Err != nil || r.Seq != uint64(i+1) {
				t.Errorf("result %d: %+v", i, r)
			}
		}
		if len(b.memory.users["u"]) != 2 || len(b.memory.users["v"]) != 1 {
			t.Errorf("%v", b.memory.users)
		}
		if got := <-b.push("nobody", time.Second); got.results != nil || got.calls != 1 {
			t.Errorf("nobody: %+v", got)
		}
		if b.counted("stored") != "3" || b.metric("push_manager_store_up") != "1" || b.metric("push_manager_store_bytes") != "42" {
			t.Errorf("stored %s, up %s, bytes %s", b.counted("stored"), b.metric("push_manager_store_up"), b.metric("push_manager_store_bytes"))
		}
	})
}

func TestExpiryIsThatOfTheMessageWithinTheLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{TTL: time.Hour, MaxTTL: 2 * time.Hour})
		now := time.Now()
		for ttl, want := range map[time.Duration]time.Duration{0: time.Hour, time.Minute: time.Minute, 3 * time.Hour: 2 * time.Hour} {
			m, done := &engine.Stored{}, make(chan struct{})
			if ttl != 0 {
				m.Expires = now.Add(ttl)
			}
			user := ttl.String()
			b.Append(m, []string{user}, now.Add(time.Second), func([]engine.Spooled) { close(done) })
			<-done
			if got := b.memory.until[user][0]; !got.Equal(now.Add(want)) {
				t.Errorf("ttl %v: kept for %v, want %v", ttl, got.Sub(now), want)
			}
		}
	})
}

func TestDoneIsCalledByTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{})
		b.memory.set(func() { b.memory.delay = func(int) time.Duration { return 500 * time.Millisecond } })
		first := b.push("first", 200*time.Millisecond, "u")
		synctest.Wait()
		queued := b.push("queued", 100*time.Millisecond, "v", "w")
		past := b.push("past", -time.Second, "u")
		for name, test := range map[string]struct {
			answers <-chan answer
			after   time.Duration
		}{"being stored": {first, 200 * time.Millisecond}, "queued": {queued, 100 * time.Millisecond}, "past": {past, 0}} {
			got := <-test.answers
			if got.after != test.after {
				t.Errorf("%s: answered after %v, want %v", name, got.after, test.after)
			}
			for _, r := range got.results {
				if !errors.Is(r.Err, engine.ErrSpoolDown) || r.Err.Error() != "did not answer in time" {
					t.Errorf("%s: %v", name, r.Err)
				}
			}
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if len(first)+len(queued)+len(past) != 0 {
			t.Error("done was called twice")
		}
		if len(b.memory.users["v"]) != 0 {
			t.Error("what nobody waits for any more was stored")
		}
		if b.counted("late") != "4" {
			t.Errorf("%s were late", b.counted("late"))
		}
	})
}

func TestErrorsOfTheStoreReachTheirUsers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{})
		quota := fmt.Errorf("user has 1000 messages waiting%w", quiet{engine.ErrSpoolQuota})
		b.memory.errs = map[string]error{"over": quota, "full": engine.ErrSpoolFull, "down": fmt.Errorf("%w: read tcp 10.0.0.1: reset", engine.ErrSpoolDown)}
		got := <-b.push("m", time.Second, "u", "over", "full", "down")
		for i, want := range []string{"", "user has 1000 messages waiting", "is full", "not reachable"} {
			text := ""
			if err := got.results[i].Err; err != nil {
				text = err.Error()
			}
			if text != want {
				t.Errorf("result %d is %q, want %q", i, text, want)
			}
		}
		for result, want := range map[string]string{"stored": "1", "quota": "1", "full": "1", "down": "1"} {
			if b.counted(result) != want {
				t.Errorf("%s: %s, want %s", result, b.counted(result), want)
			}
		}
		for range 10 { // one user whom the store never answers for does not close it to others
			<-b.push("m", time.Second, "down", "u")
		}
		if !b.Up() {
			t.Error("down")
		}
	})
}

// quiet is an error without words.
type quiet struct{ error }

func (quiet) Error() string   { return "" }
func (q quiet) Unwrap() error { return q.error }

func TestAStoreThatFailsIsLeftAloneUntilAProbeSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{})
		b.memory.set(func() { b.memory.err = engine.ErrSpoolDown })
		for range maxFailures {
			if got := <-b.push("m", time.Second, "u"); !errors.Is(got.results[0].Err, engine.ErrSpoolDown) {
				t.Fatalf("%+v", got)
			}
		}
		asked := len(b.memory.sizes)
		if got := <-b.push("m", time.Second, "u"); got.after != 0 || len(b.memory.sizes) != asked || b.Up() || b.metric("push_manager_store_up") != "0" {
			t.Errorf("refused after %v, asked %d more, up %v", got.after, len(b.memory.sizes)-asked, b.Up())
		}
		b.memory.set(func() { b.memory.err = nil })
		time.Sleep(probeInterval + time.Millisecond)
		if got := <-b.push("m", time.Second, "u"); got.results[0].Err != nil || !b.Up() {
			t.Errorf("after the probe: %v, up %v", got.results[0].Err, b.Up())
		}
		// One failure is enough where only the probe has succeeded, three are needed where messages were stored.
		b.memory.set(func() { b.memory.err = engine.ErrSpoolDown })
		<-b.push("m", time.Second, "u")
		if !b.Up() {
			t.Error("down after one failure")
		}
	})
}

func TestAStoreThatDoesNotAnswerForASecondIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{})
		b.memory.set(func() { b.memory.silent = true })
		first := b.push("m", time.Minute, "u")
		synctest.Wait()
		behind := b.push("m", time.Minute, "u", "v")
		for name, answers := range map[string]<-chan answer{"first": first, "behind it": behind} {
			if got := <-answers; got.after != answerTimeout || !errors.Is(got.results[0].Err, engine.ErrSpoolDown) {
				t.Errorf("%s: %+v", name, got)
			}
		}
		if b.Up() {
			t.Error("up")
		}
		time.Sleep(5 * time.Second)
		if got := <-b.push("m", time.Minute, "u"); got.after != 0 {
			t.Errorf("refused after %v", got.after)
		}
	})
}

func TestAStoreThatIsAwayAtFirstRefusesUntilItIsThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		away := &memory{users: map[string][]*engine.Stored{}, until: map[string][]time.Time{}, err: engine.ErrSpoolDown}
		s, err := NewSpool(t.Context(), SpoolConfig{Store: away, Usage: away.usage})
		if err != nil {
			t.Fatal(err)
		}
		b := &bench{Spool: s, t: t, memory: away}
		if got := <-b.push("m", time.Second, "u"); got.after != 0 || !errors.Is(got.results[0].Err, engine.ErrSpoolDown) || len(away.sizes) != 0 {
			t.Errorf("%+v", got)
		}
		away.set(func() { away.err = nil })
		time.Sleep(probeInterval + time.Millisecond)
		if got := <-b.push("m", time.Second, "u"); got.results[0].Err != nil {
			t.Errorf("%+v", got)
		}
		if err := s.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestAStoreThatIsAwayAtFirstIsToldOnceForAllLanes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		away := &memory{err: engine.ErrSpoolDown}
		var log bytes.Buffer
		s, err := NewSpool(t.Context(), SpoolConfig{
			Store: away, Usage: away.usage, Lanes: 4, Lane: func(string) int { return 0 }, Logger: slog.New(slog.NewTextHandler(&log, nil)),
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Close(t.Context()); err != nil {
			t.Error(err)
		}
		if got := strings.Count(log.String(), "does not answer"); got != 1 {
			t.Errorf("told %d times:\n%s", got, &log)
		}
	})
}

func TestALaneThatDoesNotAnswerKeepsNoOtherWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fine := newMemory()
		stuck := &memory{}
		b := spool(t, SpoolConfig{
			Lanes: 2, Lane: func(user string) int { return int(user[0]) % 2 }, Store: lanes{fine, stuck},
			Usage: func(ctx context.Context, lane int) (int64, error) {
				return []*memory{fine, stuck}[lane].usage(ctx, lane)
			},
		})
		stuck.set(func() { stuck.silent = true })
		slow, fast := b.push("m", time.Minute, "a"), b.push("m", time.Minute, "b") // 'a' is odd
		if got := <-fast; got.after != 0 || got.results[0].Err != nil {
			t.Errorf("%+v", got)
		}
		if got := <-slow; got.after != answerTimeout {
			t.Errorf("%+v", got)
		}
		time.Sleep(20 * time.Second)
		if got := <-b.push("m", time.Minute, "b", "a"); got.after != 0 || got.results[0].Err != nil || got.results[1].Err == nil {
			t.Errorf("%+v", got)
		}
	})
}

// lanes sends a batch to the store of its lane.
type lanes struct {
	*memory
	odd *memory
}

func (l lanes) Append(ctx context.Context, entries []Entry) []error {
	if entries[0].User[0]%2 == 1 {
		return l.odd.Append(ctx, entries)
	}
	return l.memory.Append(ctx, entries)
}

func TestTheQueueIsBounded(t *testing.T) {
	for name, test := range map[string]struct {
		cfg     SpoolConfig
		payload int
		fits    int
	}{
		"bytes":   {SpoolConfig{QueueBytes: 1000 + 10*entryBytes}, 1000, 10}, // they share the payload
		"entries": {SpoolConfig{QueueLen: 7}, 10, 7},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := spool(t, test.cfg)
				b.memory.set(func() { b.memory.delay = func(int) time.Duration { return 100 * time.Millisecond } })
				answers := b.push(strings.Repeat("x", test.payload), time.Minute, strings.Split("abcdefghijkl", "")...)
				bytes, length := b.queued()
				if length != test.fits || bytes != test.payload+test.fits*entryBytes {
					t.Errorf("%d entries, %d bytes wait", length, bytes)
				}
				got := <-answers
				stored, busy := 0, 0
				for _, r := range got.results {
					switch {
					case r.Err == nil:
						stored++
					case errors.Is(r.Err, engine.ErrSpoolDown) && r.Err.Error() == "cannot keep up":
						busy++
					}
				}
				if stored != test.fits || busy != 12-test.fits {
					t.Errorf("%d stored, %d refused", stored, busy)
				}
				if got := <-b.push("m", time.Minute, "u"); got.results[0].Err != nil {
					t.Errorf("there is room again: %v", got.results[0].Err)
				}
			})
		})
	}
}

func TestBatchesAreBoundedAndGoDownForASlowStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{})
		users := make([]string, 5000)
		for i := range users {
			users[i] = fmt.Sprint(i)
		}
		<-b.push("m", time.Minute, users...)
		if most := slices.Max(b.memory.sizes); most != maxBatch {
			t.Errorf("a batch of %d", most)
		}
		b.memory.set(func() {
			b.memory.sizes, b.memory.delay = nil, func(entries int) time.Duration { return time.Duration(entries) * 1500 * time.Microsecond }
		})
		got := <-b.push("m", time.Minute, users...)
		for _, r := range got.results {
			if r.Err != nil {
				t.Fatalf("%v: a store that is slow was taken for one that is away", r.Err)
			}
		}
		if last := b.memory.sizes[len(b.memory.sizes)-2]; last > 250 {
			t.Errorf("batches of %d, although they take so long", last)
		}
		b.memory.set(func() { b.memory.sizes, b.memory.delay = nil, nil })
		<-b.push(strings.Repeat("x", 1<<20), time.Minute, "a", "b", "c", "d", "e", "f")
		if most := slices.Max(b.memory.sizes); most != 4 {
			t.Errorf("a batch of %d MiB", most)
		}
	})
}

func TestCloseStoresWhatWaitsAndRefusesTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{})
		b.memory.set(func() { b.memory.delay = func(int) time.Duration { return 50 * time.Millisecond } })
		var all []<-chan answer
		for range 10 {
			all = append(all, b.push("m", time.Minute, "u"))
		}
		if err := b.Close(t.Context()); err != nil {
			t.Error(err)
		}
		for i, answers := range all {
			if got := <-answers; got.results[0].Err != nil {
				t.Errorf("message %d: %v", i, got.results[0].Err)
			}
		}
		if got := <-b.push("m", time.Minute, "u"); got.after != 0 || got.results[0].Err.Error() != "is closing" {
			t.Errorf("afterwards: %+v", got)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{})
		b.memory.set(func() { b.memory.delay = func(int) time.Duration { return 900 * time.Millisecond } })
		first := b.push("m", time.Minute, "u")
		synctest.Wait()
		behind := b.push("m", time.Minute, "u")
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := b.Close(ctx); err == nil {
			t.Error("messages were lost without a word")
		}
		for _, answers := range []<-chan answer{first, behind} {
			if got := <-answers; !errors.Is(got.results[0].Err, engine.ErrSpoolDown) || got.after != 100*time.Millisecond {
				t.Errorf("%+v", got)
			}
		}
	})
}

// TestSpoolKeepsOrderAndAnswersOnceWhateverHappens: against a store that fails, stalls and recovers at random.
func TestSpoolKeepsOrderAndAnswersOnceWhateverHappens(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		synctest.Test(t, func(t *testing.T) {
			b := spool(t, SpoolConfig{Lanes: 3, Lane: func(user string) int { return int(user[0]) % 3 }, QueueLen: 40})
			type pushed struct {
				id      string
				users   []string
				answers <-chan answer
			}
			var all []pushed
			for i := range rapid.IntRange(1, 60).Draw(r, "pushes") {
				b.memory.set(func() {
					switch rapid.IntRange(0, 9).Draw(r, "store") {
					case 0:
						b.memory.err = engine.ErrSpoolDown
					case 1:
						b.memory.silent = true
					case 2, 3:
						b.memory.delay = func(int) time.Duration { return 80 * time.Millisecond }
					case 4, 5, 6:
						b.memory.err, b.memory.silent, b.memory.delay = nil, false, nil
					}
				})
				users := rapid.SliceOfN(rapid.SampledFrom(strings.Split("abcdefg", "")), 1, 6).Draw(r, "users")
				id := fmt.Sprint(i)
				all = append(all, pushed{id, users, b.push(id, time.Duration(rapid.IntRange(0, 2000).Draw(r, "timeout"))*time.Millisecond, users...)})
				time.Sleep(time.Duration(rapid.IntRange(0, 300).Draw(r, "pause")) * time.Millisecond)
			}
			b.memory.set(func() { b.memory.silent = false })
			time.Sleep(5 * time.Second)
			synctest.Wait()
			last := map[string]uint64{}
			for _, p := range all {
				if len(p.answers) != 1 {
					t.Fatalf("push %s was answered %d times", p.id, len(p.answers))
				}
				got := <-p.answers
				if len(got.results) != len(p.users) {
					t.Fatalf("push %s: %d results for %d users", p.id, len(got.results), len(p.users))
				}
				for i, r := range got.results {
					switch user := p.users[i]; {
					case r.Err == nil && r.Seq <= last[user]:
						t.Fatalf("push %s for %s is in place %d, behind %d", p.id, user, r.Seq, last[user])
					case r.Err == nil:
						last[user] = r.Seq
					case r.Seq != 0 || !errors.Is(r.Err, engine.ErrSpoolDown):
						t.Fatalf("push %s: %+v", p.id, r)
					}
				}
			}
		})
	})
}

func TestWhatIsAppendedToARoomIsStoredOnceAndAnsweredOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{LogUsage: func(context.Context, int) (int64, error) { return 17, nil }})
		for i := range 3 {
			answers := b.log("r", "hello", time.Second)
			if got := <-answers; got.err != nil || got.place != (engine.Place{Epoch: 7, Partition: 'r', Seq: uint64(i + 1)}) {
				t.Errorf("%+v", got)
			}
			time.Sleep(time.Minute)
			if len(answers) != 0 {
				t.Error("answered twice")
			}
		}
		if len(b.logs.users["r"]) != 3 || len(b.memory.users) != 0 {
			t.Errorf("%v, %v", b.logs.users, b.memory.users)
		}
		if b.counted("stored") != "3" || b.metric("push_manager_store_log_bytes") != "17" || b.metric("push_manager_store_bytes") != "42" {
			t.Errorf("stored %s, bytes %s and %s", b.counted("stored"), b.metric("push_manager_store_log_bytes"), b.metric("push_manager_store_bytes"))
		}
	})
}

func TestWithoutLogsAppendLogIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{})
		s, err := NewSpool(t.Context(), SpoolConfig{Store: b.memory, Usage: b.memory.usage})
		if err != nil {
			t.Fatal(err)
		}
		without := &bench{Spool: s, t: t}
		if got := <-without.log("r", "m", time.Second); !errors.Is(got.err, engine.ErrSpoolDown) || got.after != 0 {
			t.Errorf("%+v", got)
		}
		if err := s.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestExpiryInALogIsThatOfTheMessageWithinTheLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{TTL: time.Hour, MaxTTL: 2 * time.Hour})
		now := time.Now()
		for ttl, want := range map[time.Duration]time.Duration{0: time.Hour, time.Minute: time.Minute, 3 * time.Hour: 2 * time.Hour} {
			m, done := &engine.Stored{Room: ttl.String()}, make(chan struct{})
			if ttl != 0 {
				m.Expires = now.Add(ttl)
			}
			b.AppendLog(m, now.Add(time.Second), func(engine.Place, error) { close(done) })
			<-done
			if got := b.logs.until[m.Room][0]; !got.Equal(now.Add(want)) {
				t.Errorf("ttl %v: kept for %v, want %v", ttl, got.Sub(now), want)
			}
		}
	})
}

func TestAppendLogIsAnsweredByItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{})
		b.logs.set(func() { b.logs.delay = func(int) time.Duration { return 500 * time.Millisecond } })
		first := b.log("r", "first", 150*time.Millisecond)
		synctest.Wait()
		queued := b.log("s", "queued", 100*time.Millisecond)
		for name, test := range map[string]struct {
			answers <-chan logged
			after   time.Duration
		}{"being stored": {first, 150 * time.Millisecond}, "queued": {queued, 100 * time.Millisecond}, "past": {b.log("r", "past", -time.Second), 0}} {
			if got := <-test.answers; got.after != test.after || !errors.Is(got.err, engine.ErrSpoolDown) || got.err.Error() != "did not answer in time" || got.place != (engine.Place{}) {
				t.Errorf("%s: %+v", name, got)
			}
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if len(first)+len(queued) != 0 {
			t.Error("done was called twice")
		}
		if len(b.logs.users["s"]) != 0 {
			t.Error("what nobody waits for any more was stored")
		}
		if b.counted("late") != "3" {
			t.Errorf("%s were late", b.counted("late"))
		}
	})
}

func TestLogsAndInboxesDoNotRefuseForEachOther(t *testing.T) {
	for _, name := range []string{"rooms", "users"} {
		t.Run(name+" are down", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := spool(t, SpoolConfig{})
				down, up := b.logs, b.memory
				inDown, inUp := func() error { return (<-b.log("r", "m", time.Second)).err }, func() error { return (<-b.push("m", time.Second, "u")).results[0].Err }
				if name == "users" {
					down, up, inDown, inUp = up, down, inUp, inDown
				}
				down.set(func() { down.err = engine.ErrSpoolDown })
				for range maxFailures {
					if err := inDown(); !errors.Is(err, engine.ErrSpoolDown) {
						t.Fatal(err)
					}
				}
				asked := len(down.sizes)
				for range 20 { // across probes
					if err := inUp(); err != nil {
						t.Fatal(err)
					}
					if err := inDown(); !errors.Is(err, engine.ErrSpoolDown) || b.Up() {
						t.Fatalf("%v, up %v", err, b.Up())
					}
					time.Sleep(300 * time.Millisecond)
				}
				if len(down.sizes) != asked {
					t.Errorf("asked %d times although it is down", len(down.sizes)-asked)
				}
				down.set(func() { down.err = nil })
				time.Sleep(probeInterval + time.Millisecond)
				if err := inDown(); err != nil || !b.Up() || len(up.sizes) != 20 {
					t.Errorf("after the probe: %v, up %v", err, b.Up())
				}
			})
		})
	}
}

func TestRoomsAndUsersShareTheQueue(t *testing.T) {
	for name, test := range map[string]struct {
		cfg  SpoolConfig
		fits int
	}{
		"bytes":   {SpoolConfig{QueueBytes: 5 * (1000 + 2*(50+stringBytes) + entryBytes)}, 5},
		"entries": {SpoolConfig{QueueLen: 7}, 7},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := spool(t, test.cfg)
				b.logs.set(func() { b.logs.delay = func(int) time.Duration { return 100 * time.Millisecond } })
				m := &engine.Stored{Room: "r", Payload: make([]byte, 1000), Exclude: []string{strings.Repeat("a", 50), strings.Repeat("b", 50)}}
				errs := make(chan error, 10)
				for range 10 {
					b.AppendLog(m, time.Now().Add(time.Minute), func(_ engine.Place, err error) { errs <- err })
				}
				if _, length := b.queued(); length != test.fits {
					t.Errorf("%d entries wait", length)
				}
				if got := <-b.push(strings.Repeat("x", 1000), time.Minute, "u"); got.results[0].Err == nil || got.results[0].Err.Error() != "cannot keep up" {
					t.Errorf("a user beside a full queue: %v", got.results[0].Err)
				}
				busy := 0
				for range 10 {
					if err := <-errs; errors.Is(err, errBusy) {
						busy++
					} else if err != nil {
						t.Error(err)
					}
				}
				if busy != 10-test.fits {
					t.Errorf("%d were refused", busy)
				}
				if bytes, length := b.queued(); bytes != 0 || length != 0 {
					t.Errorf("%d bytes, %d entries are left", bytes, length)
				}
			})
		})
	}
}

func TestBatchesToRoomsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{})
		b.logs.set(func() { b.logs.delay = func(int) time.Duration { return 10 * time.Millisecond } })
		var all []<-chan logged
		for i := range 2000 {
			all = append(all, b.log(fmt.Sprint(i%9), "m", time.Minute))
		}
		for _, answers := range all {
			if got := <-answers; got.err != nil {
				t.Fatal(got.err)
			}
		}
		if most := slices.Max(b.logs.sizes); most != maxBatch || len(b.logs.sizes) > 6 {
			t.Errorf("batches of %d", b.logs.sizes)
		}
	})
}

func TestCloseStoresWhatWaitsForRooms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := spool(t, SpoolConfig{})
		b.logs.set(func() { b.logs.delay = func(int) time.Duration { return 50 * time.Millisecond } })
		var all []<-chan logged
		for range 10 {
			all = append(all, b.log("r", "m", time.Minute))
		}
		if err := b.Close(t.Context()); err != nil {
			t.Error(err)
		}
		for i, answers := range all {
			if got := <-answers; got.err != nil {
				t.Errorf("message %d: %v", i, got.err)
			}
		}
		if got := <-b.log("r", "m", time.Minute); got.after != 0 || !errors.Is(got.err, errClosed) {
			t.Errorf("afterwards: %+v", got)
		}
	})
}

// TestLogsKeepOrderAndAnswerOnceWhateverHappens: against logs that fail, stall and recover at random.
func TestLogsKeepOrderAndAnswerOnceWhateverHappens(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		synctest.Test(t, func(t *testing.T) {
			b := spool(t, SpoolConfig{Lanes: 3, QueueLen: 20})
			type pushed struct {
				id, room string
				answers  <-chan logged
			}
			var all []pushed
			for i := range rapid.IntRange(1, 60).Draw(r, "pushes") {
				b.logs.set(func() {
					switch rapid.IntRange(0, 9).Draw(r, "logs") {
					case 0:
						b.logs.err = engine.ErrSpoolDown
					case 1:
						b.logs.silent = true
					case 2, 3:
						b.logs.delay = func(int) time.Duration { return 80 * time.Millisecond }
					case 4, 5, 6:
						b.logs.err, b.logs.silent, b.logs.delay = nil, false, nil
					}
				})
				id, room := fmt.Sprint(i), rapid.SampledFrom(strings.Split("abcde", "")).Draw(r, "room")
				all = append(all, pushed{id, room, b.log(room, id, time.Duration(rapid.IntRange(0, 2000).Draw(r, "timeout"))*time.Millisecond)})
				time.Sleep(time.Duration(rapid.IntRange(0, 200).Draw(r, "pause")) * time.Millisecond)
			}
			b.logs.set(func() { b.logs.silent = false })
			time.Sleep(5 * time.Second)
			synctest.Wait()
			last := map[string]uint64{}
			for _, p := range all {
				if len(p.answers) != 1 {
					t.Fatalf("push %s was answered %d times", p.id, len(p.answers))
				}
				switch got := <-p.answers; {
				case got.err == nil && got.place.Seq <= last[p.room]:
					t.Fatalf("push %s to %s is in place %d, behind %d", p.id, p.room, got.place.Seq, last[p.room])
				case got.err == nil:
					last[p.room] = got.place.Seq
				case got.place != engine.Place{} || !errors.Is(got.err, engine.ErrSpoolDown):
					t.Fatalf("push %s: %+v", p.id, got)
				}
			}
		})
	})
}
