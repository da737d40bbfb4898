package link

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// roomLogs note what they are told.
type roomLogs struct {
	mu     sync.Mutex
	told   []string
	askers map[LogAsker]int // how often each has gone
	last   LogAsker
	then   func(a LogAsker, read LogRead) // what a read brings about, nil for nothing
}

func (r *roomLogs) note(a LogAsker, format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.told = append(r.told, fmt.Sprintf(format, args...))
	if r.askers == nil {
		r.askers = map[LogAsker]int{}
	}
	r.askers[a] += 0
	r.last = a
}

func (r *roomLogs) Follow(a LogAsker, epoch uint64, after []uint64) {
	r.note(a, "%s: follow %d %v", a.Node(), epoch, after)
}

func (r *roomLogs) Read(a LogAsker, read LogRead) {
	r.note(a, "%s: read %s %d %d %v", a.Node(), read.Room, read.Gate, read.Epoch, read.After)
	if r.then != nil {
		r.then(a, read)
	}
}

func (r *roomLogs) Gone(a LogAsker) {
	r.note(a, "%s: gone", a.Node())
	r.mu.Lock()
	defer r.mu.Unlock()
	r.askers[a]++
}

func (r *roomLogs) heard() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.told)
}

func (r *roomLogs) asker() LogAsker {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last
}

// logging are the features of a node that keeps cursors.
var logging = []pubsub.Feature{pubsub.Feature_FEATURE_ROOM_LOG, pubsub.Feature_FEATURE_DEDUPE}

// marks and pages are those that have arrived.
func (s *script) marks() (list []*pubsub.LogMark) {
	for _, f := range s.all() {
		list = append(list, f.GetLogMarks()...)
	}
	return list
}

func (s *script) pages() (list []*pubsub.LogPage) {
	for _, f := range s.all() {
		list = append(list, f.GetLogPages()...)
	}
	return list
}

// entry is a message of a page.
func logEntry(seq uint64, size int, ttl time.Duration) LogEntry {
	return LogEntry{
		Message: &engine.Stored{
			MessageID: fmt.Sprint("m", seq), Sender: "s", PayloadHash: 7, Payload: content(strings.Repeat("x", size)),
			Room: "r", CollapseKey: "k", Exclude: []string{"u1", "u2"},
		},
		Place: engine.Place{Epoch: 5, Partition: 2, Seq: seq}, Expires: time.Now().Add(ttl),
	}
}

func TestRoomLogsAreOfferedWhereThereIsSomebodyToReadThem(t *testing.T) {
	for _, cfg := range []Config{{}, {RoomLogs: &roomLogs{}}} {
		if got := slices.Contains(offers(&cfg), pubsub.Feature_FEATURE_ROOM_LOG); got != (cfg.RoomLogs != nil) {
			t.Errorf("offered: %v", got)
		}
	}
}

func TestNodesFollowAndReadRoomLogs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, n := &roomLogs{}, scripted(logging...)
		w := scriptedWorld(t, Config{RoomLogs: r}, n)
		n.say(&pubsub.DeliverResponse{
			LogFollow: &pubsub.LogFollow{Epoch: math.MaxUint64, After: []uint64{1, 0, math.MaxUint64}},
			LogReads:  []*pubsub.LogRead{{RoomId: "shop/r", Gate: 7, Epoch: 5, After: []uint64{0, 2, 9}}, {RoomId: "ü", Gate: 3}},
		}, &pubsub.DeliverResponse{LogFollow: &pubsub.LogFollow{}})
		want := []string{
			fmt.Sprintf("A: follow %d [1 0 %d]", uint64(math.MaxUint64), uint64(math.MaxUint64)), "A: read shop/r 7 5 [0 2 9]", "A: read ü 3 0 []", "A: follow 0 []",
		}
		if got := r.heard(); !slices.Equal(got, want) {
			t.Errorf("heard %q", got)
		}
		if st := w.set.Stats(); st.LogReads != 2 {
			t.Errorf("%+v", st)
		}
		a := r.asker()
		mark := &LogMark{Epoch: 5, Partition: 2, Partitions: 4, After: 8, Seq: 12, Rooms: []LogRoom{{"r", []uint64{9, 300}}, {"s", []uint64{11}}}}
		if !a.Mark(mark) || !a.Mark(&LogMark{Epoch: 5}) {
			t.Error("a mark is not taken")
		}
		a.Page(&LogPage{Gate: 7, Epoch: 5, Partition: 2, Seq: 12, More: true, Gap: true, Entries: []LogEntry{logEntry(9, 3, time.Minute), logEntry(10, 3, -time.Second), logEntry(12, 0, time.Hour*24*365)}})
		a.Page(&LogPage{Gate: 7, Seq: 99})
		a.Page(&LogPage{Gate: 8, Seq: 99})
		a.Page(&LogPage{Gate: 3, Error: "store\nis down"})
		synctest.Wait()
		wantMark := &pubsub.LogMark{Epoch: 5, Partition: 2, Partitions: 4, After: 8, Seq: 12, Rooms: []*pubsub.LogRoom{{RoomId: "r", Seqs: []uint64{9, 300}}, {RoomId: "s", Seqs: []uint64{11}}}}
		if got := n.marks(); len(got) != 2 || !proto.Equal(got[0], wantMark) {
			t.Errorf("marks %v", got)
		}
		delivery := func(seq uint64, text string, ttl uint32) *pubsub.Delivery {
			return &pubsub.Delivery{
				Content: &pubsub.MessageContent{Data: []byte(text)}, RoomId: "r", MessageId: fmt.Sprint("m", seq), Sender: "s", PayloadHash: 7, TtlMs: ttl, CollapseKey: "k",
				Log: &pubsub.LogPosition{Epoch: 5, Partition: 2, Seq: seq, ExcludeUserIds: []string{"u1", "u2"}},
			}
		}
		wantPage := &pubsub.LogPage{Gate: 7, Epoch: 5, Partition: 2, Seq: 12, More: true, Gap: true, Entries: []*pubsub.Delivery{delivery(9, "xxx", 60_000), delivery(12, "", math.MaxUint32)}}
		wantPage.Entries[1].Content.Data = nil
		wantError := &pubsub.LogPage{Gate: 3, Error: "store is down"}
		got := n.pages()
		if len(got) != 2 || !proto.Equal(got[0], wantPage) || !proto.Equal(got[1], wantError) {
			t.Errorf("pages %v", got)
		}
		n.kill()
		synctest.Wait()
		if got := r.heard(); !slices.Equal(got, append(want, "A: gone")) {
			t.Errorf("heard %q", got)
		}
		a.Page(&LogPage{Gate: 7})
		if a.Mark(mark) {
			t.Error("a mark is taken after the end")
		}
		if st := w.set.Stats(); st.LogReads != 0 || st.LogBytes != 0 || w.set.meters.strikes.Get() != 0 {
			t.Errorf("%+v, %d strikes", st, w.set.meters.strikes.Get())
		}
	})
}

// Every stream of a node that reads logs goes once, however it ends.
func TestEachStreamThatMayReadLogsGoesOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := &roomLogs{}
		w := newWorld(t, Config{RoomLogs: r, Shards: 2})
		n, old := scripted(logging...), &fakeNode{id: "B"}
		w.start("a:1", n.fakeNode)
		w.start("b:1", old)
		w.register("A", "a:1", "B", "b:1")
		w.up(4)
		synctest.Wait()
		n.say(&pubsub.DeliverResponse{LogFollow: &pubsub.LogFollow{}}, &pubsub.DeliverResponse{Drain: true})
		n.kill()
		old.kill()
		time.Sleep(time.Second)
		n = scripted(logging...)
		w.start("a:1", n.fakeNode)
		time.Sleep(5 * time.Second)
		n.say(&pubsub.DeliverResponse{LogReads: []*pubsub.LogRead{{RoomId: "r", Gate: 1}}})
		w.set.Close()
		if len(r.askers) < 4 {
			t.Errorf("%d streams", len(r.askers))
		}
		for a, gone := range r.askers {
			if gone != 1 || a.Node() != "A" {
				t.Errorf("a stream of %s has gone %d times", a.Node(), gone)
			}
		}
	})
}

func TestWhatCannotBeReadIsAViolation(t *testing.T) {
	long := strings.Repeat("x", 1000)
	for name, test := range map[string]struct {
		features []pubsub.Feature
		say      *pubsub.DeliverResponse
		strikes  uint64
		heard    int
	}{
		"by a node that has not offered it": {lasting, &pubsub.DeliverResponse{LogFollow: &pubsub.LogFollow{}, LogReads: []*pubsub.LogRead{{RoomId: "r", Gate: 1}}}, 1, 0},
		"with a gate that is open":          {logging, &pubsub.DeliverResponse{LogReads: []*pubsub.LogRead{{RoomId: "r", Gate: 1}, {RoomId: "r", Gate: 1}}}, 1, 1},
		"with gate 0":                       {logging, &pubsub.DeliverResponse{LogReads: []*pubsub.LogRead{{RoomId: "r"}}}, 1, 0},
		"of no room":                        {logging, &pubsub.DeliverResponse{LogReads: []*pubsub.LogRead{{Gate: 1}}}, 1, 0},
		"of what is no id":                  {logging, &pubsub.DeliverResponse{LogReads: []*pubsub.LogRead{{RoomId: "a\nb", Gate: 1}, {RoomId: long, Gate: 2}}}, 2, 0},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r, n := &roomLogs{}, scripted(test.features...)
				w := scriptedWorld(t, Config{RoomLogs: r}, n)
				n.say(test.say)
				if got := w.set.meters.strikes.Get(); got != test.strikes || len(r.heard()) != test.heard {
					t.Errorf("%d strikes, want %d; heard %q", got, test.strikes, r.heard())
				}
			})
		})
	}
}

// One read too many has an error for its answer. Who asks on and does not read is a nuisance, and a frame with more than
// anybody may ask, or with places of more partitions than there can be, is malformed.
func TestReadsOfAStreamAreBounded(t *testing.T) {
	r := &roomLogs{}
	w := newWorld(t, Config{RoomLogs: r})
	s := newStream(newLink(w.set, newNode(w.set, Node{"A", "a:1"}), 0), nil, &pubsub.HelloReply{Features: logging})
	gate := uint64(0)
	ask := func(n int) (strikes int) {
		s.r.resp.logReads = nil
		for range n {
			gate++
			s.r.resp.logReads = append(s.r.resp.logReads, LogRead{Room: "r", Gate: gate})
		}
		return s.roomLogs()
	}
	if strikes := ask(logReadsMax); strikes != 0 || len(r.heard()) != logReadsMax {
		t.Errorf("%d strikes, %d were asked", strikes, len(r.heard()))
	}
	if strikes := ask(10); strikes != 0 || len(s.logs.pages) != 10 || s.logs.pages[0].Error != tooManyReads || len(r.heard()) != logReadsMax {
		t.Errorf("%d strikes, pages %+v", strikes, s.logs.pages)
	}
	if strikes := ask(10_000); strikes != 10_000-2*logReadsMax+10 || len(s.logs.open) != logReadsMax || len(r.heard()) != logReadsMax {
		t.Errorf("%d strikes, %d are open", strikes, len(s.logs.open))
	}
	for name, say := range map[string]*pubsub.DeliverResponse{
		"reads":              {LogReads: slices.Repeat([]*pubsub.LogRead{{RoomId: "r"}}, 10_000)},
		"places of a read":   {LogReads: []*pubsub.LogRead{{After: make([]uint64, 10_000)}}},
		"places to follow":   {LogFollow: &pubsub.LogFollow{After: make([]uint64, 10_000)}},
		"one place too many": {LogFollow: &pubsub.LogFollow{After: make([]uint64, logPartitionsMax+1)}},
	} {
		b, err := proto.Marshal(say)
		if err != nil {
			t.Fatal(err)
		}
		var r response
		if err := r.decode(b, 10); err == nil {
			t.Errorf("10,000 %s are decoded", name)
		}
	}
}

// A node that does not read gets so many bytes of marks and pages and no more. It hears of the pages that it does not get.
func TestWhatWaitsForANodeThatDoesNotReadIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, n := &roomLogs{}, scripted(logging...)
		read := make(chan struct{})
		n.deliver = func(st deliverStream) error { return n.serve(mutual{gated{st, read}, n}) }
		w := scriptedWorld(t, Config{RoomLogs: r, Silence: time.Hour, Heartbeat: time.Minute}, n)
		l := w.set.Link(0, "A").(*Link)
		l.mu.Lock()
		s := l.way.(*stream)
		for gate := range uint64(logReadsMax) {
			s.logs.askLocked(gate + 1)
		}
		l.mu.Unlock()
		mark := &LogMark{Seq: 1}
		for i := range 1000 {
			mark.Rooms = append(mark.Rooms, LogRoom{fmt.Sprintf("room %0100d", i), []uint64{uint64(i)}})
		}
		taken := 0
		for taken < 1000 && s.logs.Mark(mark) {
			taken++
		}
		synctest.Wait()
		for gate := range uint64(logReadsMax) {
			s.logs.Page(&LogPage{Gate: gate + 1, Seq: 1, Entries: []LogEntry{logEntry(1, 255<<10, time.Hour)}})
		}
		if st := w.set.Stats(); st.LogBytes > logMarksBytes+logPagesBytes+(256<<10) || st.LogBytes < logPagesBytes/2 || taken > 40 || taken < 5 {
			t.Errorf("%d bytes wait, %d marks were taken", st.LogBytes, taken)
		}
		close(read)
		synctest.Wait()
		whole, refused := 0, 0
		for _, p := range n.pages() {
			switch {
			case len(p.GetEntries()) == 1:
				whole++
			case p.GetError() == tooMuchWaits:
				refused++
			}
		}
		if whole < 20 || refused < 10 || whole+refused != logReadsMax || len(n.marks()) != taken {
			t.Errorf("%d pages and %d errors, %d marks of %d", whole, refused, len(n.marks()), taken)
		}
		if st := w.set.Stats(); st.LogBytes != 0 || st.LogReads != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// Pages go between deliveries: a frame has one at most beside what fills it.
func TestDeliveriesDoNotWaitBehindPages(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, n := &roomLogs{}, scripted(logging...)
		read := make(chan struct{})
		n.deliver = func(st deliverStream) error { return n.serve(mutual{gated{st, read}, n}) }
		const frame = 32 << 10
		w := scriptedWorld(t, Config{RoomLogs: r, FrameBytes: frame}, n)
		l := w.set.Link(0, "A").(*Link)
		l.mu.Lock()
		s := l.way.(*stream)
		for gate := range uint64(logReadsMax) {
			s.logs.askLocked(gate + 1)
		}
		l.mu.Unlock()
		for gate := range uint64(logReadsMax) {
			s.logs.Page(&LogPage{Gate: gate + 1, Seq: 1, Entries: []LogEntry{logEntry(1, 2*frame, time.Hour)}})
		}
		synctest.Wait() // the wire is full
		var pushes []*pending
		for range 40 {
			pushes = append(pushes, w.begin(w.toUser("u1", strings.Repeat("y", frame/4))))
		}
		synctest.Wait()
		close(read)
		for _, p := range pushes {
			if r := w.end(p); r.Delivered != 1 {
				t.Errorf("%+v", r)
			}
		}
		synctest.Wait()
		waited, left := 0, len(pushes)
		for _, f := range n.all() {
			if len(f.GetLogPages()) > 1 {
				t.Errorf("%d pages in a frame", len(f.GetLogPages()))
			}
			if len(f.GetDeliveries()) == 0 && left > 0 && len(f.GetLogPages()) > 0 {
				waited++
			}
			left -= len(f.GetDeliveries())
		}
		if got := len(n.pages()); got != logReadsMax {
			t.Errorf("%d pages", got)
		}
		if waited > 8 { // those that were on the wire before
			t.Errorf("deliveries waited for %d frames of pages", waited)
		}
	})
}

// A page that is too large for a frame is cut, and the node reads on. A message that no frame can hold is missing.
func TestPagesFitIntoFrames(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, n := &roomLogs{}, scripted(logging...)
		const limit = 4096
		scriptedWorld(t, Config{RoomLogs: r, MaxFrameBytes: limit, FrameBytes: limit, CompressionMinBytes: limit}, n)
		n.say(&pubsub.DeliverResponse{LogReads: []*pubsub.LogRead{{RoomId: "r", Gate: 1}, {RoomId: "r", Gate: 2}, {RoomId: "r", Gate: 3}}})
		var list []LogEntry
		for i := range 20 {
			list = append(list, logEntry(uint64(10+i), 500, time.Hour))
		}
		a := r.asker()
		a.Page(&LogPage{Gate: 1, Seq: 100, Entries: list})
		a.Page(&LogPage{Gate: 2, Seq: 100, Entries: append([]LogEntry{logEntry(5, limit, time.Hour)}, list[:2]...)})
		a.Page(&LogPage{Gate: 3, Seq: 100, Entries: []LogEntry{logEntry(1, 5, 0), logEntry(5, limit-300, time.Hour)}})
		if a.Mark(&LogMark{Rooms: []LogRoom{{strings.Repeat("r", limit), []uint64{1}}}}) {
			t.Error("a mark is taken that fits into no frame")
		}
		synctest.Wait()
		got := n.pages()
		if len(got) != 3 {
			t.Fatalf("%d pages", len(got))
		}
		if e := got[0].GetEntries(); len(e) == 0 || len(e) > 7 || !got[0].GetMore() || got[0].GetGap() || got[0].GetSeq() != e[len(e)-1].GetLog().GetSeq() {
			t.Errorf("cut: %d messages, up to %d, more %v", len(e), got[0].GetSeq(), got[0].GetMore())
		}
		if e := got[1].GetEntries(); len(e) != 2 || !got[1].GetGap() || got[1].GetMore() || got[1].GetSeq() != 100 {
			t.Errorf("too large: %v", got[1])
		}
		if e := got[2].GetEntries(); len(e) != 1 || got[2].GetGap() || got[2].GetSeq() != 100 {
			t.Errorf("just fits: %d messages, gap %v", len(e), got[2].GetGap())
		}
		for _, f := range n.all() {
			if size := f.SizeVT(); size > limit {
				t.Errorf("a frame of %d bytes", size)
			}
		}
	})
}

func TestAMarkIsEncodedOnce(t *testing.T) {
	m := &LogMark{Epoch: 1, Seq: 9, Rooms: []LogRoom{{"r", []uint64{9}}}}
	if a, b := m.field(), m.field(); &a[0] != &b[0] || len(a) != cap(a) {
		t.Errorf("%p %p, %d of %d bytes", a, b, len(a), cap(a))
	}
}
