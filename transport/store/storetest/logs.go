package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/store"
)

// LogLimits are those of logs. Zero is the implementation's default, which keeps at least 10,000 messages of a room.
type LogLimits struct {
	MaxPerRoom, MaxBytes int
}

// LogData is what logs keep, across the times that they are open.
type LogData interface {
	// OpenLogs opens logs on the data. The test calls closeLogs.
	OpenLogs(t *testing.T, limits LogLimits) (logs store.Logs, closeLogs func(ctx context.Context) error)
	// Renew loses everything, as where disks are replaced. Nothing is open meanwhile.
	Renew(t *testing.T)
}

// RunLogs tests an implementation. empty makes data with nothing in it; those of an earlier test are not used any more.
func RunLogs(t *testing.T, empty func(t *testing.T) LogData) {
	for name, test := range map[string]func(t *testing.T, data LogData){
		"EachRoomHasItsMessagesInOrder":            orderPerRoom,
		"ReadHasWhatWasAppendedBefore":             logReadsItsWrites,
		"PagesEndAtMostMessagesAndBytes":           logPages,
		"AMessageComesBackAsItWas":                 everyLogField,
		"NothingIsReadAfterItsExpiry":              logExpiry,
		"WhatARoomHasTooMuchLeavesAGap":            gapOfRoom,
		"WhatTheLogHasTooMuchLeavesAGap":           gapOfLog,
		"HeadsAndEpochAreThoseOfTheLog":            heads,
		"FollowTellsEverythingInOrder":             follow,
		"FollowEndsWhenItIsToldTo":                 followEnds,
		"FollowersMissNothingWhileOthersAppend":    followWhileAppending,
		"ConcurrentAppendsAreAllThere":             logConcurrent,
		"RoomsAreToldApartWhateverTheirIds":        hostileRooms,
		"LargePayloadsComeBackAndTooLargeAreNamed": logLarge,
		"WhatIsStoredOutlivesTheLogs":              logReopen,
		"CallsWhoseTimeIsUpReturn":                 logDeadlines,
	} {
		t.Run(name, func(t *testing.T) { test(t, empty(t)) })
	}
}

// openedLogs are logs that are closed when the test ends.
type openedLogs struct {
	store.Logs

	t     *testing.T
	close func()
}

func openLogs(t *testing.T, data LogData, limits LogLimits) *openedLogs {
	t.Helper()
	logs, closeLogs := data.OpenLogs(t, limits)
	o := &openedLogs{Logs: logs, t: t, close: sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), wait)
		defer cancel()
		if err := closeLogs(ctx); err != nil {
			t.Errorf("close: %v", err)
		}
	})}
	t.Cleanup(o.close)
	return o
}

// logEntry is a message for a room that lasts for an hour.
func logEntry(room, payload string) store.LogEntry {
	return store.LogEntry{Message: &engine.Stored{MessageID: "m", Room: room, Payload: []byte(payload)}, Expires: time.Now().Add(time.Hour)}
}

// logEntries are those of the room "r".
func logEntries(payloads []string) (all []store.LogEntry) {
	for _, payload := range payloads {
		all = append(all, logEntry("r", payload))
	}
	return all
}

// add appends entries, all of which must be stored, and returns their places.
func (o *openedLogs) add(entries ...store.LogEntry) (places []uint64) {
	o.t.Helper()
	ctx, cancel := context.WithTimeout(o.t.Context(), wait)
	defer cancel()
	for part := range slices.Chunk(entries, 500) {
		for i, err := range o.AppendLog(ctx, part) {
			if err != nil {
				o.t.Fatalf("append to %q: %v", part[i].Message.Room, err)
			}
		}
	}
	for _, e := range entries {
		if int(e.Place.Partition) != o.Partition(e.Message.Room) || e.Place.Seq == 0 || e.Place.Epoch == 0 {
			o.t.Fatalf("room %q is in partition %d, a message of it in place %+v", e.Message.Room, o.Partition(e.Message.Room), e.Place)
		}
		places = append(places, e.Place.Seq)
	}
	return places
}

// page is ReadLog, which must work.
func (o *openedLogs) page(room string, after uint64, most, size int) store.LogPage {
	o.t.Helper()
	ctx, cancel := context.WithTimeout(o.t.Context(), wait)
	defer cancel()
	page, err := o.ReadLog(ctx, room, after, most, size)
	if err != nil {
		o.t.Fatalf("read %q: %v", room, err)
	}
	return page
}

// read returns the payloads of a room behind a place, page by page, the last place, and whether there is a gap.
func (o *openedLogs) read(room string, after uint64, most, size int) (payloads []string, last uint64, gap bool) {
	o.t.Helper()
	for last = after; ; {
		page, sum, before := o.page(room, last, most, size), 0, last
		for _, e := range page.Entries {
			if e.Message.Room != room || e.Place.Seq <= last || e.Place.Seq > page.Last || int(e.Place.Partition) != o.Partition(room) {
				o.t.Fatalf("read %q behind %d up to %d: a message for %q in place %+v", room, last, page.Last, e.Message.Room, e.Place)
			}
			last, sum = e.Place.Seq, sum+len(e.Message.Payload)
			payloads = append(payloads, string(e.Message.Payload))
		}
		if n := len(page.Entries); n > max(most, 1) || n > 1 && sum > size {
			o.t.Fatalf("a page of %d messages, %d bytes, asked for %d, %d", n, sum, most, size)
		}
		if gap = gap || page.Gap; !page.More {
			return payloads, page.Last, gap
		}
		if page.Last <= before {
			o.t.Fatalf("read %q: more, but place %d stays", room, before)
		}
		last = page.Last
	}
}

func (o *openedLogs) want(room string, after uint64, want ...string) {
	o.t.Helper()
	got, _, gap := o.read(room, after, 100, 1<<20)
	if !slices.Equal(got, want) || gap {
		o.t.Errorf("behind place %d %.80q has %s (gap %v), want %s", after, room, brief(got), gap, brief(want))
	}
}

func orderPerRoom(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{})
	var mixed []store.LogEntry
	for i := range 300 {
		mixed = append(mixed, logEntry(fmt.Sprintf("room %d", i%7), fmt.Sprintf("message %d", i)))
	}
	for part := range slices.Chunk(mixed, 64) {
		o.add(part...)
	}
	last := map[uint32]uint64{}
	for i, e := range mixed {
		if e.Place.Seq <= last[e.Place.Partition] || e.Place.Epoch != mixed[0].Place.Epoch {
			t.Errorf("message %d is in place %+v, behind %d", i, e.Place, last[e.Place.Partition])
		}
		last[e.Place.Partition] = e.Place.Seq
	}
	for r := range 7 {
		room := fmt.Sprintf("room %d", r)
		var want []string
		var places []uint64
		for i := r; i < 300; i += 7 {
			want, places = append(want, fmt.Sprintf("message %d", i)), append(places, mixed[i].Place.Seq)
		}
		o.want(room, 0, want...)
		got, end, gap := o.read(room, places[10], 5, 1<<20)
		if !slices.Equal(got, want[11:]) || end < places[len(places)-1] || gap {
			t.Errorf("%q behind place %d has %s up to %d, gap %v", room, places[10], brief(got), end, gap)
		}
		o.want(room, end)
	}
	o.want("nobody's", 0)
}

func logReadsItsWrites(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{})
	last := uint64(0)
	for i := range 200 {
		payload := fmt.Sprintf("message %d", i)
		place := o.add(logEntry("r", payload))[0]
		if i%5 == 0 {
			_, heads, err := o.Heads(t.Context())
			if err != nil || heads[o.Partition("r")] < place {
				t.Fatalf("heads %v, %v, behind an append to place %d", heads, err, place)
			}
		}
		o.want("r", last, payload)
		last = place
	}
}

func logPages(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{})
	want := numbered(0, 25)
	places := o.add(logEntries(want)...)
	size := len("message 00")
	for _, test := range []struct{ most, bytes, first int }{
		{10, 1 << 20, 10}, {25, 1 << 20, 25}, {24, 1 << 20, 24}, {100, 1 << 20, 25}, {100, 3 * size, 3}, {100, 1, 1}, {100, 0, 1}, {1, 0, 1}, {0, 0, 1},
	} {
		page := o.page("r", 0, test.most, test.bytes)
		if len(page.Entries) != test.first || page.More != (test.first < len(want)) || page.Last < places[test.first-1] || page.More && page.Last >= places[test.first] {
			t.Errorf("%d messages, %d bytes: a page of %d up to %d, more %v", test.most, test.bytes, len(page.Entries), page.Last, page.More)
		}
		if got, _, gap := o.read("r", 0, test.most, test.bytes); !slices.Equal(got, want) || gap {
			t.Errorf("%d messages, %d bytes: %s in all, gap %v", test.most, test.bytes, brief(got), gap)
		}
	}
}

func everyLogField(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{})
	expires := time.Now().Add(time.Hour).Truncate(time.Millisecond)
	for i, m := range []engine.Stored{
		{MessageID: "id", Sender: "tenant/caller", PayloadHash: 1<<32 - 1, Payload: []byte("payload\x00\xff"), CollapseKey: "key", Exclude: []string{"", "a", "é\x00", strings.Repeat("u", 256)}},
		{Payload: []byte{}},
	} {
		m.Room = fmt.Sprintf("room %d", i)
		e := store.LogEntry{Message: &m, Expires: expires}
		e.Place.Seq = o.add(e)[0]
		var told *store.LogEntry
		err := o.Follow(t.Context(), o.Partition(m.Room), e.Place.Seq-1, func(e store.LogEntry) bool { told = &e; return false }, func(uint64) {})
		if err != nil || told == nil {
			t.Fatalf("follow: %v, %v", told, err)
		}
		for _, got := range append(o.page(m.Room, 0, 10, 1<<20).Entries, *told) {
			g := got.Message
			if !got.Expires.Equal(expires) || !g.Expires.Equal(expires) || got.Place.Seq != e.Place.Seq || g.MessageID != m.MessageID || g.Sender != m.Sender ||
				g.PayloadHash != m.PayloadHash || !bytes.Equal(g.Payload, m.Payload) || g.Room != m.Room || g.CollapseKey != m.CollapseKey || !slices.Equal(g.Exclude, m.Exclude) {
				t.Errorf("stored %+v, read %+v of %+v", m, g, got)
			}
		}
	}
}

func logExpiry(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{})
	var want []string
	last := uint64(0)
	for i := range 60 {
		e := logEntry("r", fmt.Sprintf("message %d", i))
		if i%3 == 0 {
			want = append(want, string(e.Message.Payload))
		} else {
			e.Expires = time.Now().Add(-time.Second + time.Duration(i%3)*900*time.Millisecond) // by the time it is read: gone, or soon
		}
		last = o.add(e)[0]
	}
	for began := time.Now(); time.Since(began) < 1500*time.Millisecond; time.Sleep(50 * time.Millisecond) {
		asked := time.Now()
		for _, e := range o.page("r", 0, 100, 1<<20).Entries {
			if late := asked.Sub(e.Expires); late > 0 {
				t.Fatalf("%q was read although it had expired %v before", e.Message.Payload, late)
			}
		}
	}
	o.want("r", 0, want...)
	got, end, _ := o.read("r", 0, 1, 1<<20) // what has expired between them takes no place in a page
	if !slices.Equal(got, want) || end != last {
		t.Errorf("one at a time: %q up to %d, want up to %d", got, end, last)
	}
}

func gapOfRoom(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{MaxPerRoom: 20})
	first := o.add(logEntry("first", "message"))[0]
	places := o.add(logEntries(numbered(0, 20))...)
	o.want("r", places[0], numbered(1, 20)...)
	places = append(places, o.add(logEntries(numbered(20, 25))...)...)
	got, _, gap := o.read("r", places[3], 100, 1<<20) // message 4 is gone
	if !gap || !slices.Equal(got, numbered(5, 25)) {
		t.Errorf("behind a message that was dropped: gap %v, %s", gap, brief(got))
	}
	if _, _, gap := o.read("r", 0, 7, 1<<20); !gap {
		t.Error("from the beginning, page by page: no gap")
	}
	o.want("r", places[5], numbered(6, 25)...)
	o.want("r", places[24])
	o.want("first", 0, "message")
	o.want("first", first)
	for i := range 3 { // batches, in which everything before is dropped
		o.add(logEntries(numbered(100*i, 100*i+100))...)
	}
	if got, _, gap := o.read("r", places[24], 100, 1<<20); !gap || !slices.Equal(got, numbered(280, 300)) {
		t.Errorf("behind much that was dropped: gap %v, %s", gap, brief(got))
	}
}

func gapOfLog(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{MaxBytes: 1 << 20})
	payload := strings.Repeat("x", 8<<10)
	sent, places := map[string][]string{}, map[string][]uint64{}
	for i := range 400 {
		e := logEntry(fmt.Sprintf("room %d", i%10), fmt.Sprintf("%d %s", i, payload))
		places[e.Message.Room] = append(places[e.Message.Room], o.add(e)[0])
		sent[e.Message.Room] = append(sent[e.Message.Room], string(e.Message.Payload))
	}
	kept := 0
	for room, all := range sent {
		got, _, gap := o.read(room, 0, 100, 1<<20)
		kept += len(got)
		if !gap || !slices.Equal(got, all[len(all)-len(got):]) {
			t.Errorf("%q has %d of %d messages, or not the last ones; gap %v", room, len(got), len(all), gap)
		}
		if n := len(got); n > 1 { // one that is there, and what follows it
			o.want(room, places[room][len(all)-n], got[1:]...)
		}
		o.want(room, places[room][len(all)-1])
	}
	if kept == 0 || kept > 200 {
		t.Errorf("%d of 400 messages of 8 KiB are kept, where 1 MiB may be", kept)
	}
}

func heads(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{})
	epoch, places, err := o.Heads(t.Context())
	if err != nil || epoch == 0 || len(places) == 0 || slices.Max(places) != 0 {
		t.Fatalf("empty: epoch %d, heads %v, %v", epoch, places, err)
	}
	for i := range 20 {
		e := []store.LogEntry{logEntry(fmt.Sprintf("room %d", i), "message")}
		o.add(e...)
		places[e[0].Place.Partition] = e[0].Place.Seq
		if e[0].Place.Epoch != epoch {
			t.Errorf("epoch %d, and %d of a place", epoch, e[0].Place.Epoch)
		}
	}
	same := func() {
		t.Helper()
		if again, got, err := o.Heads(t.Context()); err != nil || again != epoch || !slices.Equal(got, places) {
			t.Errorf("epoch %d, heads %v, %v; want %d, %v", again, got, err, epoch, places)
		}
	}
	same()
	o.close()
	o = openLogs(t, data, LogLimits{})
	same()
	o.close()
	data.Renew(t)
	o = openLogs(t, data, LogLimits{})
	if again, got, err := o.Heads(t.Context()); err != nil || again == epoch || slices.Max(got) != 0 {
		t.Errorf("of logs that were made anew: epoch %d as before, heads %v, %v", again, got, err)
	}
	e := []store.LogEntry{logEntry("r", "message")}
	o.add(e...)
	if e[0].Place.Epoch == epoch {
		t.Error("a place in logs that were made anew has the old epoch")
	}
}

// followed is what a Follow of one partition has told.
type followed struct {
	mu       sync.Mutex
	payloads []string // guarded by mu
	last     uint64
	caughtUp uint64
	wrong    string
	ended    chan error
	changed  chan struct{} // has room for one
}

func (o *openedLogs) follow(ctx context.Context, partition int, after uint64) *followed {
	f := &followed{last: after, ended: make(chan error, 1), changed: make(chan struct{}, 1)}
	note := func(change func()) {
		f.mu.Lock()
		change()
		f.mu.Unlock()
		select {
		case f.changed <- struct{}{}:
		default:
		}
	}
	go func() {
		f.ended <- o.Follow(ctx, partition, after, func(e store.LogEntry) bool {
			note(func() {
				if e.Place.Seq <= f.last || int(e.Place.Partition) != partition || o.Partition(e.Message.Room) != partition {
					f.wrong = fmt.Sprintf("place %+v of %q follows %d in partition %d", e.Place, e.Message.Room, f.last, partition)
				}
				f.last, f.payloads = e.Place.Seq, append(f.payloads, string(e.Message.Payload))
			})
			return true
		}, func(seq uint64) {
			note(func() {
				if seq < f.last || seq < f.caughtUp {
					f.wrong = fmt.Sprintf("told up to %d, behind %d and %d", seq, f.last, f.caughtUp)
				}
				f.caughtUp = seq
			})
		})
	}()
	return f
}

// until waits until everything up to a place is told, and returns it.
func (f *followed) until(t *testing.T, seq uint64) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	for {
		f.mu.Lock()
		payloads, caughtUp, wrong := slices.Clone(f.payloads), f.caughtUp, f.wrong
		f.mu.Unlock()
		switch {
		case wrong != "":
			t.Fatal(wrong)
		case caughtUp >= seq:
			return payloads
		}
		select {
		case <-f.changed:
		case err := <-f.ended:
			t.Fatalf("follow has ended: %v", err)
		case <-ctx.Done():
			t.Fatalf("told up to %d, not up to %d", caughtUp, seq)
		}
	}
}

func (f *followed) end(t *testing.T) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	select {
	case err := <-f.ended:
		return err
	case <-ctx.Done():
		t.Fatal("follow does not end")
		return nil
	}
}

// inPartition are the payloads of entries in a partition behind a place.
func inPartition(entries []store.LogEntry, partition int, after uint64) (payloads []string) {
	for _, e := range entries {
		if int(e.Place.Partition) == partition && e.Place.Seq > after {
			payloads = append(payloads, string(e.Message.Payload))
		}
	}
	return payloads
}

func follow(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, places, err := o.Heads(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var followers []*followed
	for p := range places {
		f := o.follow(ctx, p, 0)
		followers = append(followers, f)
		if got := f.until(t, 0); len(got) != 0 {
			t.Errorf("nothing was appended, told %q", got)
		}
	}
	var all []store.LogEntry
	check := func() {
		t.Helper()
		if _, places, err = o.Heads(ctx); err != nil {
			t.Fatal(err)
		}
		for p, f := range followers {
			if got, want := f.until(t, places[p]), inPartition(all, p, 0); !slices.Equal(got, want) {
				t.Errorf("partition %d: told %s, want %s", p, brief(got), brief(want))
			}
		}
	}
	for part := range 5 {
		more := make([]store.LogEntry, 0, 600)
		for i := range 600 {
			more = append(more, logEntry(fmt.Sprintf("room %d", i%13), fmt.Sprintf("message %d of %d", i, part)))
		}
		more[10].Expires = time.Now().Add(-time.Minute) // has a place, too
		o.add(more...)
		all = append(all, more...)
		check()
	}
	middle := all[len(all)/2].Place
	f := o.follow(ctx, int(middle.Partition), middle.Seq)
	if got, want := f.until(t, places[middle.Partition]), inPartition(all, int(middle.Partition), middle.Seq); !slices.Equal(got, want) {
		t.Errorf("from the middle: told %s, want %s", brief(got), brief(want))
	}
	cancel()
	for _, f := range append(followers, f) {
		if err := f.end(t); err != nil {
			t.Errorf("ended with its context: %v", err)
		}
	}
}

func followEnds(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{})
	places, p := o.add(logEntries(numbered(0, 10))...), o.Partition("r")
	told := 0
	err := o.Follow(t.Context(), p, 0, func(store.LogEntry) bool { told++; return told < 4 }, func(uint64) {})
	if err != nil || told != 4 {
		t.Errorf("f has said enough after 4: told %d, %v", told, err)
	}
	if err := o.Follow(t.Context(), p, places[9]+5, func(store.LogEntry) bool { return true }, func(uint64) {}); err == nil {
		t.Error("a place that the log does not have yet: no error")
	}
}

func followWhileAppending(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	p := o.Partition("r")
	f := o.follow(ctx, p, 0)
	const writers, each = 4, 150
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				for _, err := range o.AppendLog(ctx, []store.LogEntry{logEntry("r", fmt.Sprintf("%d of %d", i, w))}) {
					if err != nil {
						t.Errorf("append: %v", err)
					}
				}
			}
		})
	}
	for range 10 {
		_, places, err := o.Heads(ctx)
		if err != nil {
			t.Fatal(err)
		}
		f.until(t, places[p])
	}
	wg.Wait()
	_, places, err := o.Heads(ctx)
	if err != nil {
		t.Fatal(err)
	}
	got := f.until(t, places[p])
	read, _, _ := o.read("r", 0, 100, 1<<20)
	if len(got) != writers*each || !slices.Equal(got, read) {
		t.Errorf("%d were appended: told %s, read %s", writers*each, brief(got), brief(read))
	}
	cancel()
	if err := f.end(t); err != nil {
		t.Error(err)
	}
}

func logConcurrent(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{})
	const writers, each = 16, 60
	var mu sync.Mutex
	seen := map[engine.Place]bool{}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				batch := []store.LogEntry{logEntry(fmt.Sprintf("own %d", w), fmt.Sprintf("message %d", i)), logEntry("shared", fmt.Sprintf("%d of %d", i, w))}
				for _, err := range o.AppendLog(t.Context(), batch) {
					if err != nil {
						t.Errorf("append: %v", err)
					}
				}
				mu.Lock()
				for _, e := range batch {
					if seen[e.Place] {
						t.Errorf("two messages in place %+v", e.Place)
					}
					seen[e.Place] = true
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for w := range writers {
		o.want(fmt.Sprintf("own %d", w), 0, numbered(0, each)...)
	}
	next := make([]int, writers)
	shared, _, _ := o.read("shared", 0, 100, 1<<20)
	for _, payload := range shared {
		var i, w int
		if _, err := fmt.Sscanf(payload, "%d of %d", &i, &w); err != nil {
			t.Fatal(err)
		}
		if next[w] != i {
			t.Errorf("of writer %d, message %d comes where %d should", w, i, next[w])
		}
		next[w] = i + 1
	}
	if len(shared) != writers*each {
		t.Errorf("%d of %d messages", len(shared), writers*each)
	}
}

func hostileRooms(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{})
	ids := []string{
		"a", "a.b", "a.*", "*", ">", "a.>", "$JS.API.STREAM.DELETE.X", "pmg.0.x", " ", "a b", "\t", "..", ".", "/", "tenant:a", "tenant/a", "tenant\x00a",
		"\x00", "\xff\xfe", "Ä", "A\u0308", "日本語", strings.Repeat("x", 256), strings.Repeat("x", 255), strings.Repeat(".", 256), "A", "{}", `"`, "\r\n",
		"head", "m", "NATS/1.0\r\nStatus: 204\r\n\r\n",
	}
	var all []store.LogEntry
	for _, id := range ids {
		all = append(all, logEntry(id, "first of "+id), logEntry(id, "second of "+id))
	}
	o.add(all...)
	for _, id := range ids {
		o.want(id, 0, "first of "+id, "second of "+id)
	}
}

func logLarge(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{})
	var want []string
	for i := range 6 {
		want = append(want, fmt.Sprintf("%d%s", i, strings.Repeat(string(rune('a'+i)), 256<<10-1)))
	}
	places := o.add(logEntries(want)...)
	o.want("r", 0, want...)
	if page := o.page("r", 0, 100, 256<<10); len(page.Entries) != 1 || !page.More {
		t.Errorf("a page as large as one of them: %d, %v", len(page.Entries), page.More)
	}
	// One that is too large is refused in words, and does no harm.
	err := o.AppendLog(t.Context(), []store.LogEntry{logEntry("r", strings.Repeat("x", 17<<20))})[0]
	if !errors.Is(err, engine.ErrSpoolFull) || !strings.Contains(err.Error(), "messages of at most ") {
		t.Errorf("17 MiB: %v", err)
	}
	o.add(logEntry("r", "small"))
	o.want("r", places[4], want[5], "small")
}

func logReopen(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{})
	places := o.add(logEntries(numbered(0, 50))...)
	o.close()
	o = openLogs(t, data, LogLimits{})
	o.want("r", places[9], numbered(10, 50)...)
	later := o.add(logEntry("r", "later"))[0]
	if later <= places[49] {
		t.Errorf("place %d follows %d", later, places[49])
	}
	o.want("r", places[49], "later")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	f := o.follow(ctx, o.Partition("r"), places[48])
	if got := f.until(t, later); !slices.Equal(got, []string{"message 49", "later"}) {
		t.Errorf("told %q", got)
	}
	cancel()
	if err := f.end(t); err != nil {
		t.Error(err)
	}
}

func logDeadlines(t *testing.T, data LogData) {
	o := openLogs(t, data, LogLimits{})
	o.add(logEntry("r", "message"))
	over, cancel := context.WithCancel(t.Context())
	cancel()
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		for i, err := range o.AppendLog(over, []store.LogEntry{logEntry("r", "late"), logEntry("s", "late")}) {
			if err != nil && !errors.Is(err, engine.ErrSpoolDown) {
				t.Errorf("append %d: %v", i, err)
			}
		}
		if _, err := o.ReadLog(over, "r", 0, 10, 1<<20); err == nil {
			t.Error("read: no error")
		}
		if _, _, err := o.Heads(over); err == nil {
			t.Error("heads: no error")
		}
		if err := o.Follow(over, 0, 0, func(store.LogEntry) bool { return true }, func(uint64) {}); err != nil {
			t.Errorf("follow: %v", err)
		}
	}()
	ctx, stop := context.WithTimeout(t.Context(), wait)
	defer stop()
	select {
	case <-returned:
	case <-ctx.Done():
		t.Fatal("calls do not return")
	}
	if got, _, _ := o.read("r", 0, 10, 1<<20); len(got) == 0 || got[0] != "message" {
		t.Errorf("afterwards there is %q", got)
	}
}
