package jetstream

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/transport/store"
	"github.com/push-manager/push-manager/transport/store/storetest"
)

func (d embeddedData) OpenLogs(t *testing.T, limits storetest.LogLimits) (store.Logs, func(context.Context) error) {
	t.Helper()
	s, err := Open(t.Context(), Config{Dir: d.dir, Partitions: d.partitions, MaxPerRoom: limits.MaxPerRoom, MaxBytes: limits.MaxBytes})
	if err != nil {
		t.Fatal(err)
	}
	return s, s.Close
}

func (d embeddedData) Renew(t *testing.T) {
	t.Helper()
	if err := os.RemoveAll(d.dir); err != nil {
		t.Fatal(err)
	}
}

func TestEmbeddedLogsKeepTheContract(t *testing.T) {
	for _, partitions := range []int{1, 4} {
		t.Run(fmt.Sprintf("partitions=%d", partitions), func(t *testing.T) {
			storetest.RunLogs(t, func(t *testing.T) storetest.LogData { return embeddedData{t.TempDir(), partitions} })
		})
	}
}

func (d clusterData) OpenLogs(t *testing.T, limits storetest.LogLimits) (store.Logs, func(context.Context) error) {
	t.Helper()
	s, err := Open(t.Context(), Config{URLs: d.urls, Partitions: d.partitions, MaxPerRoom: limits.MaxPerRoom, MaxBytes: limits.MaxBytes})
	if err != nil {
		t.Fatal(err)
	}
	waitReady(t, s)
	return s, s.Close
}

func (d clusterData) Renew(t *testing.T) {
	t.Helper()
	d.empty(t)
}

// TestClusterLogsKeepTheContract is slow: all that is stored goes through three servers.
func TestClusterLogsKeepTheContract(t *testing.T) {
	if os.Getenv("LONG") == "" {
		t.Skip("slow: make store-long runs it")
	}
	data := clusterData{startCluster(t), 2}
	storetest.RunLogs(t, func(t *testing.T) storetest.LogData {
		data.empty(t)
		return data
	})
}

// toRoom is an entry that lasts for an hour.
func toRoom(room, payload string) store.LogEntry {
	return store.LogEntry{Message: &engine.Stored{MessageID: "m", Room: room, Payload: []byte(payload)}, Expires: time.Now().Add(time.Hour)}
}

// embedded is a store in a new directory.
func embedded(t *testing.T, cfg Config) *Store {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
	}
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close(context.Background()) })
	return s
}

// onDisk is the size of all files below a directory.
func onDisk(t *testing.T, dir string) (size int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			size += info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return size
}

func TestAPushToARoomIsWrittenOnceHoweverManyAreAway(t *testing.T) {
	dir := t.TempDir()
	s := embedded(t, Config{Dir: dir})
	spool, err := store.NewSpool(t.Context(), store.SpoolConfig{Store: s, Usage: s.Usage, Lane: s.Partition, Logs: s, LogUsage: s.LogUsage})
	if err != nil {
		t.Fatal(err)
	}
	before, done := onDisk(t, dir), make(chan error, 100)
	for i := range 100 {
		m := &engine.Stored{MessageID: fmt.Sprintf("message-%d", i), Room: "room", Payload: []byte(strings.Repeat("x", 128))}
		spool.AppendLog(m, time.Now().Add(time.Minute), func(_ engine.Place, err error) { done <- err })
	}
	for range 100 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if err := spool.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	info, err := s.logs.Load().streams[0].Info(t.Context())
	if err != nil || info.State.Msgs != 100 {
		t.Errorf("%d messages in the stream, %v", info.State.Msgs, err)
	}
	if err := s.Close(t.Context()); err != nil { // all is written
		t.Fatal(err)
	}
	if written := onDisk(t, dir) - before; written > 1<<20 || written < 100*128 {
		t.Errorf("%d bytes were written", written)
	}
}

func TestWhatCannotBeReadInALogIsLeftOutAndCounted(t *testing.T) {
	s := embedded(t, Config{})
	_, subject := s.logPlace("r")
	other, user := toRoom("another room", "for somebody else"), message("r", "for a user")
	for _, payload := range []string{"first", "second"} {
		for _, data := range [][]byte{nil, []byte("\xff\xff\xff"), []byte("\x2a\x01r"), encode("", other.Message, other.Expires), encode("r", user.Message, user.Expires)} {
			if _, err := s.js.Publish(t.Context(), subject, data); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.AppendLog(t.Context(), []store.LogEntry{toRoom("r", payload)})[0]; err != nil {
			t.Fatal(err)
		}
	}
	page, err := s.ReadLog(t.Context(), "r", 0, 10, 1<<20)
	if err != nil || page.More || page.Gap || page.Last != 12 || len(page.Entries) != 2 || string(page.Entries[1].Message.Payload) != "second" {
		t.Errorf("%+v, %v", page, err)
	}
	if s.corrupt.Get() != 10 {
		t.Errorf("%d were counted", s.corrupt.Get())
	}
	var told []string
	err = s.Follow(t.Context(), 0, 0, func(e store.LogEntry) bool {
		told = append(told, string(e.Message.Payload))
		return e.Place.Seq < 12
	}, func(uint64) {})
	if err != nil || !slices.Equal(told, []string{"for somebody else", "first", "for somebody else", "second"}) {
		t.Errorf("told %q, %v", told, err)
	}
}

// TestMessagesThatAreDroppedBeforeTheyAreToldHoldNoFollowerUp is about the last messages of a log.
func TestMessagesThatAreDroppedBeforeTheyAreToldHoldNoFollowerUp(t *testing.T) {
	s := embedded(t, Config{})
	for range 5 {
		if err := s.AppendLog(t.Context(), []store.LogEntry{toRoom("r", "message")})[0]; err != nil {
			t.Fatal(err)
		}
	}
	if err := s.logs.Load().streams[0].Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, after := range []uint64{0, 5} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		told := uint64(0)
		err := s.Follow(ctx, 0, after, func(store.LogEntry) bool { return true }, func(seq uint64) { told = seq; cancel() })
		if err != nil || told != 5 {
			t.Errorf("behind %d: told up to %d, %v", after, told, err)
		}
		cancel()
		if page, err := s.ReadLog(t.Context(), "r", after, 10, 1<<20); err != nil || page.Gap != (after == 0) || len(page.Entries) != 0 {
			t.Errorf("behind %d: %+v, %v", after, page, err)
		}
	}
	if page, err := s.ReadLog(t.Context(), "r", 6, 10, 1<<20); err != nil || !page.Gap {
		t.Errorf("a place that the log does not have yet: %+v, %v", page, err)
	}
}

func TestAMessageThatWouldNotFitIntoTheLogIsRefused(t *testing.T) {
	s := embedded(t, Config{MaxBytes: 1 << 20, Partitions: 2}) // 128 KiB for each partition's log
	if err := s.AppendLog(t.Context(), []store.LogEntry{toRoom("r", strings.Repeat("x", 30<<10))})[0]; err != nil {
		t.Error(err)
	}
	err := s.AppendLog(t.Context(), []store.LogEntry{toRoom("r", strings.Repeat("x", 40<<10))})[0]
	if !errors.Is(err, engine.ErrSpoolFull) || !strings.HasPrefix(err.Error(), "takes messages of at most 32768 bytes") {
		t.Errorf("%v", err)
	}
	e := toRoom("r", "small")
	for range 1000 {
		e.Message.Exclude = append(e.Message.Exclude, strings.Repeat("u", 40))
	}
	if err := s.AppendLog(t.Context(), []store.LogEntry{e})[0]; !errors.Is(err, engine.ErrSpoolFull) {
		t.Errorf("with a long list of whom to exclude: %v", err)
	}
}

// TestStreamsThatSomebodyDeletesAreMadeAnew: whoever asks for the usage, as the Spool does every few seconds, misses them.
func TestStreamsThatSomebodyDeletesAreMadeAnew(t *testing.T) {
	s := embedded(t, Config{})
	for _, name := range []string{streamName(0), logName(0)} {
		if err := s.js.DeleteStream(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	within(t, "both take messages again", func() bool {
		_, err := s.Usage(t.Context(), 0)
		_, logErr := s.LogUsage(t.Context(), 0)
		return errors.Join(err, logErr,
			s.Append(t.Context(), []store.Entry{message("u", "message")})[0],
			s.AppendLog(t.Context(), []store.LogEntry{toRoom("r", "message")})[0]) == nil
	})
}

// TestUsersAreStoredWhileTheLogsAreGone also has the logs come back under another epoch.
func TestUsersAreStoredWhileTheLogsAreGone(t *testing.T) {
	s := embedded(t, Config{})
	if err := s.AppendLog(t.Context(), []store.LogEntry{toRoom("r", "message")})[0]; err != nil {
		t.Fatal(err)
	}
	epoch, _, err := s.Heads(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.js.DeleteStream(t.Context(), logName(0)); err != nil {
		t.Fatal(err)
	}
	if err := s.AppendLog(t.Context(), []store.LogEntry{toRoom("r", "message")})[0]; !errors.Is(err, engine.ErrSpoolDown) {
		t.Errorf("append to a log that is gone: %v", err)
	}
	if _, err := s.ReadLog(t.Context(), "r", 0, 10, 1<<20); err == nil {
		t.Error("read of a log that is gone: no error")
	}
	if _, _, err := s.Heads(t.Context()); err == nil {
		t.Error("heads of a log that is gone: no error")
	}
	if err := s.Append(t.Context(), []store.Entry{message("u", "message")})[0]; err != nil {
		t.Errorf("users: %v", err)
	}
	// Another instance makes it anew. This one finds out.
	if _, err := s.js.CreateStream(t.Context(), s.logConfig(0)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ReadLog(t.Context(), "r", 0, 10, 1<<20); err == nil {
		t.Error("read of logs that were made anew: no error, before anybody has asked for the epoch")
	}
	again, heads, err := s.Heads(t.Context())
	if err != nil || again == epoch || heads[0] != 0 {
		t.Errorf("epoch %d after %d, heads %v, %v", again, epoch, heads, err)
	}
	e := []store.LogEntry{toRoom("r", "message")}
	if err := s.AppendLog(t.Context(), e)[0]; err != nil || e[0].Place.Epoch != again {
		t.Errorf("%+v, %v", e[0].Place, err)
	}
}

func TestFollowEndsWhereTheLogsAreMadeAnew(t *testing.T) {
	s := embedded(t, Config{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ended, caughtUp := make(chan error, 1), make(chan struct{}, 100)
	go func() {
		ended <- s.Follow(ctx, 0, 0, func(store.LogEntry) bool { return true }, func(uint64) { caughtUp <- struct{}{} })
	}()
	<-caughtUp
	if err := s.js.DeleteStream(t.Context(), logName(0)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.js.CreateStream(t.Context(), s.logConfig(0)); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, engine.ErrSpoolDown) { // nil: it went on for a minute
		t.Errorf("ended with %v", err)
	}
}

func TestClusterLogsGoOnWhileOneServerIsGone(t *testing.T) {
	if testing.Short() {
		t.Skip("slow")
	}
	c := startCluster(t)
	logs, closeLogs := clusterData{c, 2}.OpenLogs(t, storetest.LogLimits{})
	t.Cleanup(func() { _ = closeLogs(context.Background()) })
	s := logs.(*Store)
	var want []string
	add := func() (place engine.Place) {
		t.Helper()
		payload := fmt.Sprintf("message %d", len(want))
		within(t, "append", func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			e := []store.LogEntry{toRoom("r", payload)}
			err := s.AppendLog(ctx, e)[0]
			place = e[0].Place
			return err == nil
		})
		want = append(want, payload)
		return place
	}
	for range 50 {
		add()
	}
	first := add()
	for _, srv := range c.servers { // the leader of this partition
		info, err := s.logs.Load().streams[s.Partition("r")].Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if srv.Name() == info.Cluster.Leader {
			stopServer(srv)
			break
		}
	}
	last := add()
	if last.Epoch != first.Epoch || last.Seq <= first.Seq {
		t.Errorf("place %+v follows %+v", last, first)
	}
	within(t, "heads", func() bool {
		epoch, heads, err := s.Heads(t.Context())
		return err == nil && epoch == first.Epoch && heads[last.Partition] >= last.Seq
	})
	// A message may be there twice: of an attempt that was not answered.
	check := func(what string, payloads []string) {
		t.Helper()
		if got := slices.Compact(payloads); !slices.Equal(got, want) {
			t.Errorf("%s: %d messages, want %d", what, len(got), len(want))
		}
	}
	var page store.LogPage
	within(t, "read", func() (ok bool) {
		var err error
		page, err = s.ReadLog(t.Context(), "r", 0, 1000, 1<<20)
		return err == nil
	})
	var read, told []string
	for _, e := range page.Entries {
		read = append(read, string(e.Message.Payload))
	}
	check("read", read)
	err := s.Follow(t.Context(), int(last.Partition), 0, func(e store.LogEntry) bool {
		told = append(told, string(e.Message.Payload))
		return e.Place.Seq < page.Last
	}, func(uint64) {})
	if err != nil {
		t.Error(err)
	}
	check("told", told)
}

func within(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// TestWhatWasAcknowledgedIsInTheLogAfterTheStoreIsKilled kills the server amid writes to rooms.
func TestWhatWasAcknowledgedIsInTheLogAfterTheStoreIsKilled(t *testing.T) {
	const rooms = 5
	p := &process{t: t, dir: t.TempDir(), addr: freeport.Addr(t)}
	p.start()
	t.Cleanup(func() { p.kill() })
	s, err := Open(t.Context(), Config{URLs: []string{"nats://" + p.addr}, Partitions: 2, Replicas: 1, MaxPerRoom: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	spool, err := store.NewSpool(t.Context(), store.SpoolConfig{Store: s, Usage: s.Usage, Lanes: s.Partitions(), Lane: s.Partition, Logs: s, LogUsage: s.LogUsage})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = spool.Close(ctx)
		_ = s.Close(ctx)
	})
	type kept struct {
		place   engine.Place
		payload string
	}
	var mu sync.Mutex
	var acked [rooms][]kept
	count := func() (n int) {
		mu.Lock()
		defer mu.Unlock()
		for _, all := range acked {
			n += len(all)
		}
		return n
	}
	stop := make(chan struct{})
	var writers sync.WaitGroup
	end := sync.OnceFunc(func() {
		close(stop)
		writers.Wait()
	})
	defer end()
	for r := range rooms {
		writers.Go(func() {
			under := make(chan struct{}, 100) // under way
			for i := 0; ; i++ {
				select {
				case <-stop:
					for range cap(under) {
						under <- struct{}{}
					}
					return
				case under <- struct{}{}:
				}
				payload := fmt.Sprintf("%d of %d", i, r)
				m := &engine.Stored{MessageID: payload, Room: fmt.Sprint("room ", r), Payload: []byte(payload)}
				spool.AppendLog(m, time.Now().Add(3*time.Second), func(place engine.Place, err error) {
					defer func() { <-under }()
					if err != nil {
						time.Sleep(time.Millisecond) // it is refused at once
						return
					}
					mu.Lock()
					defer mu.Unlock()
					acked[r] = append(acked[r], kept{place, payload})
				})
			}
		})
	}
	for range 2 {
		within(t, "the spool stores", spool.Up)
		target := count() + 500
		within(t, "500 messages", func() bool { return count() >= target })
		p.kill()
		within(t, "the spool refuses", func() bool { return !spool.Up() })
		p.start()
	}
	within(t, "the spool stores again", spool.Up)
	end()
	for r, all := range acked {
		room, there, last := fmt.Sprint("room ", r), map[uint64]string{}, uint64(0)
		for more := true; more; {
			var page store.LogPage
			within(t, "read", func() bool {
				page, err = s.ReadLog(t.Context(), room, last, 1000, 1<<20)
				return err == nil
			})
			if page.Gap {
				t.Fatalf("%s: a gap behind place %d", room, last)
			}
			for _, e := range page.Entries {
				there[e.Place.Seq] = string(e.Message.Payload)
			}
			last, more = page.Last, page.More
		}
		before := uint64(0)
		for i, k := range all {
			if there[k.place.Seq] != k.payload {
				t.Fatalf("%s: %q was acknowledged in place %d, where %q is", room, k.payload, k.place.Seq, there[k.place.Seq])
			}
			if k.place.Epoch != all[0].place.Epoch || k.place.Seq <= before {
				t.Fatalf("%s: message %d of %d is in place %+v, behind %d", room, i, len(all), k.place, before)
			}
			before = k.place.Seq
		}
	}
}

// TestLogsOfServersThatComeBackEmptyHaveAnotherEpoch: a server was replaced, and with it its disk.
func TestLogsOfServersThatComeBackEmptyHaveAnotherEpoch(t *testing.T) {
	p := &process{t: t, dir: t.TempDir(), addr: freeport.Addr(t)}
	p.start()
	t.Cleanup(func() { p.kill() })
	s, err := Open(t.Context(), Config{URLs: []string{"nats://" + p.addr}, Partitions: 2, Replicas: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close(context.Background()) })
	stored := func() (place engine.Place) {
		t.Helper()
		within(t, "append", func() bool {
			e := []store.LogEntry{toRoom("r", "payload")}
			err := s.AppendLog(t.Context(), e)[0]
			place = e[0].Place
			return err == nil
		})
		return place
	}
	for range 5 {
		stored()
	}
	epoch, _, err := s.Heads(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p.kill()
	p.dir = t.TempDir()
	p.start()
	within(t, "another epoch", func() bool {
		again, heads, err := s.Heads(t.Context())
		return err == nil && again != epoch && slices.Max(heads) == 0
	})
	if place := stored(); place.Epoch == epoch || place.Seq != 1 {
		t.Errorf("place %+v, of epoch %d before", place, epoch)
	}
}

func TestLogsFollowTheConfiguration(t *testing.T) {
	dir := t.TempDir()
	s := embedded(t, Config{Dir: dir, MaxBytes: 8 << 20, MaxTTL: 2 * time.Hour, Partitions: 2})
	check := func(s *Store, users, logs int64, age time.Duration) {
		t.Helper()
		inbox, log := (*s.streams.Load())[1].CachedInfo().Config, s.logs.Load().streams[1].CachedInfo().Config
		if inbox.MaxBytes != users || log.MaxBytes != logs || inbox.MaxAge != age || log.MaxAge != age+time.Minute || log.Discard != jetstream.DiscardOld || log.MaxMsgsPerSubject != 10_000 {
			t.Errorf("users %+v, logs %+v", inbox, log)
		}
	}
	check(s, 3<<20, 1<<20, 2*time.Hour)
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	check(embedded(t, Config{Dir: dir, MaxBytes: 16 << 20, MaxTTL: 3 * time.Hour, Partitions: 2}), 6<<20, 2<<20, 3*time.Hour)
}

// FuzzDecodeLog reads what a log may hold.
func FuzzDecodeLog(f *testing.F) {
	e := toRoom("r", "payload")
	e.Message.CollapseKey, e.Message.Sender, e.Message.PayloadHash, e.Message.Exclude = "key", "sender", 7, []string{"a", "b"}
	f.Add(encode("", e.Message, e.Expires))
	f.Add([]byte("\x2a\x01r\x38\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x42\x00\x4a\x00\x4a\x00"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := decodeLog(data)
		if err != nil {
			return
		}
		m := e.Message
		if m.Room == "" || e.Expires.IsZero() || len(m.Room)+len(m.Payload)+2*len(m.Exclude) > len(data) {
			t.Errorf("%+v", m)
		}
		again, err := decodeLog(encode("", m, e.Expires))
		if e.Expires.UnixMilli() > 0 && (err != nil || again.Message.Room != m.Room || !again.Expires.Equal(e.Expires) || !slices.Equal(again.Message.Exclude, m.Exclude) ||
			string(again.Message.Payload) != string(m.Payload) || again.Message.MessageID != m.MessageID) {
			t.Errorf("%+v became %+v, %v", m, again.Message, err)
		}
	})
}
