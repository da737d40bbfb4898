package node

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/position"
	pubsub "github.com/push-manager/push-manager/proto"
)

var logFeatures = append(slices.Clone(everyFeature), pubsub.Feature_FEATURE_ROOM_LOG)

// reader is a connection of a client that keeps its position.
type reader struct {
	user    string
	cursor  *Cursor
	asked   func() // before it takes a message; nil: nothing
	telling func() // before it takes a position, likewise

	mu   sync.Mutex
	desk *desk    // Guarded by mu. The client has read what stands on the wire, and told what was told behind that.
	told []string // positions, each with the number of frames before it
	gaps []string
	deaf bool // it takes no position
}

func (p *reader) Deliver(m *Message) Outcome { return p.DeliverLasting(m, nil) }

func (p *reader) DeliverLasting(m *Message, c *Confirmation) Outcome {
	if p.asked != nil {
		p.asked()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.desk.now = time.Now()
	if p.cursor.Holds(m) {
		return Failed
	}
	return p.desk.offer(m, c)
}

func (p *reader) Resume(position string) bool {
	if p.telling != nil {
		p.telling()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.deaf {
		return false
	}
	p.told = append(p.told, position)
	return true
}

func (p *reader) Gap(room string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gaps = append(p.gaps, room)
	return true
}

func (p *reader) shown() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.desk.write(len(p.desk.queue))
	return p.desk.shown()
}

func (p *reader) want(t testing.TB, frames ...string) {
	t.Helper()
	synctest.Wait()
	if got := p.shown(); !slices.Equal(got, frames) {
		t.Errorf("%s was shown %q, want %q", p.user, got, frames)
	}
}

// position is the last that the client was told, "" for none.
func (p *reader) position(t testing.TB) *position.Position {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.told) == 0 {
		return nil
	}
	at, err := position.Parse(p.told[len(p.told)-1])
	if err != nil {
		t.Fatal(err)
	}
	return &at
}

// tellings are the positions that the client was told, and the rooms of which it was told a gap.
func (p *reader) tellings() (told, gaps []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.told), slices.Clone(p.gaps)
}

// last is the last position that the client was told, "" for none.
func (p *reader) last() string {
	told, _ := p.tellings()
	if len(told) == 0 {
		return ""
	}
	return told[len(told)-1]
}

func (p *reader) times() int {
	told, _ := p.tellings()
	return len(told)
}

func (p *reader) missing() []string {
	_, gaps := p.tellings()
	slices.Sort(gaps)
	return gaps
}

func (p *reader) turn(deaf bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deaf = deaf
}

type logBench struct {
	*bench

	users *Users[*reader]
}

func serveLogs(t testing.TB, cfg Config) *logBench {
	t.Helper()
	users := NewLastingUsers[*reader](logFeatures...)
	cfg.Sessions = users
	return &logBench{serve(t, cfg), users}
}

// come connects a client that has a position.
func (b *logBench) come(t testing.TB, user, position string, rooms ...string) *reader {
	t.Helper()
	p := &reader{user: user, desk: newDesk(false)}
	c, err := b.server.Cursor(user, p, position)
	if err != nil || c == nil {
		t.Fatalf("a cursor: %v, %v", c, err)
	}
	p.cursor = c
	b.users.Add(user, p)
	for _, room := range rooms {
		c.Join(room)
	}
	return p
}

func (b *logBench) go1(p *reader) {
	b.users.Remove(p.user, p)
	p.mu.Lock()
	p.desk.inbox.Close()
	p.mu.Unlock()
	p.cursor.Close()
}

// logger is a manager that has logs.
type logger struct {
	*manager

	t      testing.TB
	follow chan *pubsub.LogFollow
	reads  chan *pubsub.LogRead
	ended  chan error

	mu   sync.Mutex
	acks map[uint64]uint32
}

const testEpoch = 77

func (b *logBench) logger(t testing.TB, instance string) *logger {
	t.Helper()
	m, err := b.openFor(t, &pubsub.Hello{ProtocolVersion: 1, ManagerId: instance, InstanceId: instance, Features: logFeatures}, 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	l := &logger{
		manager: m, t: t, follow: make(chan *pubsub.LogFollow, 1000), reads: make(chan *pubsub.LogRead, 10_000), ended: make(chan error, 1),
		acks: map[uint64]uint32{},
	}
	go func() {
		for {
			r, err := m.stream.Recv()
			if err != nil {
				l.ended <- err
				return
			}
			if r.LogFollow != nil {
				l.follow <- r.LogFollow
			}
			for _, read := range r.GetLogReads() {
				l.reads <- read
			}
			l.mu.Lock()
			for _, a := range r.GetAcks() {
				for i, n := range a.GetDelivered() {
					l.acks[a.GetFirst()+uint64(i)] = n
				}
			}
			l.mu.Unlock()
		}
	}()
	synctest.Wait()
	return l
}

func (l *logger) mark(partition uint32, after, seq uint64, room string, seqs ...uint64) {
	l.t.Helper()
	k := &pubsub.LogMark{Partition: partition, Partitions: 2, Epoch: testEpoch, After: after, Seq: seq}
	if room != "" {
		k.Rooms = []*pubsub.LogRoom{{RoomId: room, Seqs: seqs}}
	}
	l.send(&pubsub.DeliverRequest{LogMarks: []*pubsub.LogMark{k}})
	synctest.Wait()
}

// begin marks where the logs are.
func (l *logger) begin(seq0, seq1 uint64) {
	l.t.Helper()
	l.mark(0, seq0, seq0, "")
	l.mark(1, seq1, seq1, "")
}

// logged is a message to a room at a place in partition 1.
func logged(seq uint64, room string, users ...string) *pubsub.Delivery {
	d := lasting(fmt.Sprintf("%s-%d", room, seq), users...)
	d.RoomId = room
	d.Log = &pubsub.LogPosition{Partition: 1, Seq: seq, Epoch: testEpoch}
	return d
}

// page answers a read.
func (l *logger) page(read *pubsub.LogRead, seq uint64, more bool, seqs ...uint64) {
	l.t.Helper()
	p := &pubsub.LogPage{Gate: read.GetGate(), Epoch: testEpoch, Partition: 1, Seq: seq, More: more}
	for _, s := range seqs {
		p.Entries = append(p.Entries, logged(s, read.GetRoomId()))
	}
	l.send(&pubsub.DeliverRequest{LogPages: []*pubsub.LogPage{p}})
	synctest.Wait()
}

// read is the only one that was asked, within a second.
func (l *logger) read(room string, after uint64) *pubsub.LogRead {
	l.t.Helper()
	time.Sleep(time.Second)
	synctest.Wait()
	select {
	case r := <-l.reads:
		if r.GetRoomId() != room || r.GetEpoch() != testEpoch || len(r.GetAfter()) != 2 || r.GetAfter()[1] != after || r.GetGate() == 0 {
			l.t.Fatalf("asked %v, want %s behind %d", r, room, after)
		}
		if len(l.reads) > 0 {
			l.t.Fatalf("one more read: %v", <-l.reads)
		}
		return r
	default:
		l.t.Fatalf("no read of %s", room)
		return nil
	}
}

// letIn answers the read for those who have come into a room without a position: there is nothing behind after.
func (l *logger) letIn(room string, after uint64) {
	l.t.Helper()
	l.page(l.read(room, after), after, false)
}

func (l *logger) noRead(wait time.Duration) {
	l.t.Helper()
	time.Sleep(wait)
	synctest.Wait()
	if len(l.reads) > 0 {
		l.t.Errorf("asked %v", <-l.reads)
	}
}

func (l *logger) wantFollow(epoch uint64, after ...uint64) {
	l.t.Helper()
	synctest.Wait()
	select {
	case f := <-l.follow:
		if f.GetEpoch() != epoch || !slices.Equal(f.GetAfter(), after) {
			l.t.Errorf("follows %v, want epoch %d behind %v", f, epoch, after)
		}
	default:
		l.t.Error("does not follow")
	}
}

func at(seq0, seq1 uint64) string {
	p := position.Position{Epoch: testEpoch, Places: []position.Place{{Partition: 0, Seq: seq0}, {Partition: 1, Seq: seq1}}}
	return p.String()
}

// logTest is a node with a manager, which says that the logs are at 5 and 10.
func logTest(t *testing.T, f func(t *testing.T, b *logBench, m *logger)) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLogs(t, Config{})
		first := b.come(t, "first", "")
		m := b.logger(t, "pm")
		m.wantFollow(0)
		m.begin(5, 10)
		b.go1(first)
		f(t, b, m)
	})
}

func TestAMemberWhoComesBackGetsWhatItHasMissedInOrderAndOnceWhileLiveOnesGoOn(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p := b.come(t, "u", at(5, 3), "r")
		var want []string
		seqs := func(from, to uint64) (list []uint64) {
			for s := from; s <= to; s++ {
				list = append(list, s)
				want = append(want, fmt.Sprintf("r-%d", s))
			}
			return list
		}
		m.deliver(logged(104, "r", "u"))
		read := m.read("r", 3)
		p.want(t) // 104 is held
		m.deliver(logged(105, "r", "u"))
		synctest.Wait()
		m.page(read, 103, true, seqs(4, 103)...)
		p.want(t, want...)
		m.deliver(logged(106, "r", "u"))
		synctest.Wait()
		read = m.read("r", 103)
		m.page(read, 105, false, seqs(104, 105)...)
		read = m.read("r", 105) // 106 was held, and behind the page
		m.page(read, 107, false, seqs(106, 107)...)
		m.deliver(logged(107, "r", "u"), logged(108, "r", "u"))
		want = append(want, "r-108")
		p.want(t, want...)
		m.mu.Lock()
		defer m.mu.Unlock()
		for seq, delivered := range map[uint64]uint32{1: 0, 2: 0, 3: 0, 4: 1, 5: 1} {
			if m.acks[seq] != delivered {
				t.Errorf("delivery %d was acknowledged with %d, want %d", seq, m.acks[seq], delivered)
			}
		}
	})
}

func TestWhatAMarkNamesAndHasNotComeIsRead(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p, q := b.come(t, "u", "", "r"), b.come(t, "v", "", "r")
		m.letIn("r", 10)
		m.deliver(logged(11, "r", "u")) // "v" is not named, and gets it all the same.
		m.mark(1, 10, 11, "r", 11)
		m.noRead(2 * joinQuiet)
		for _, c := range []*reader{p, q} {
			if got := c.position(t); got == nil || c.last() != at(5, 11) {
				t.Errorf("%s was told %v", c.user, got)
			}
		}
		m.deliver(logged(14, "r", "u"))
		m.mark(1, 11, 14, "r", 12, 14)
		read := m.read("r", 11)
		m.deliver(logged(15, "r", "u")) // Nothing is held.
		p.want(t, "r-11", "r-14", "r-15")
		m.page(read, 15, false, 12, 14, 15)
		p.want(t, "r-11", "r-14", "r-15", "r-12")
		q.want(t, "r-11", "r-14", "r-15", "r-12")
		m.noRead(2 * joinQuiet)
		if got := p.last(); got != at(5, 14) {
			t.Errorf("told %v", p.position(t))
		}
	})
}

// A node hears up to a second later what was written. A client may come with a newer position than its node has, such as that of
// a push which a page shows.
func TestNothingFromBeforeTheClientsPositionComesBecauseItsNodeHearsOfItLater(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p := b.come(t, "u", at(5, 12), "r")
		m.page(m.read("r", 12), 14, false, 13, 14)
		p.want(t, "r-13", "r-14")
		m.mark(1, 10, 14, "r", 11, 12, 13, 14)
		m.noRead(5 * time.Second)
		m.mark(1, 14, 15, "r", 15) // What the client has not had is read as ever.
		m.page(m.read("r", 14), 15, false, 15)
		p.want(t, "r-13", "r-14", "r-15")

		many := make([]uint64, 0, 2*lacksMost)
		for seq := range uint64(cap(many)) {
			many = append(many, 16+seq)
		}
		p = b.come(t, "v", at(5, 20), "r")
		m.page(m.read("r", 20), 22, false, 21, 22)
		m.mark(1, 15, many[len(many)-1], "r", many...)
		for _, after := range []uint64{15, 22} { // u has had nothing of it, v has.
			if read := m.read("r", after); after == 15 {
				m.page(read, 22, true, many[:7]...)
			} else {
				m.page(read, many[len(many)-1], false, many[7:]...)
			}
		}
		var want []string
		for _, seq := range many[5:] {
			want = append(want, fmt.Sprintf("r-%d", seq))
		}
		p.want(t, want...)
	})
}

// What a client has had says nothing of a log that has lost its end.
func TestWhatIsWrittenAnewBehindALostEndIsReadForThoseWhoHadWhatStoodThere(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p := b.come(t, "u", at(5, 12), "r")
		m.page(m.read("r", 12), 14, false, 13, 14)
		m.mark(1, 10, 14, "r", 11, 12, 13, 14)
		m2 := b.logger(t, "pm-2")
		m.stream.CloseSend()
		m2.wantFollow(testEpoch, 5, 14)
		m2.mark(1, 11, 12, "r", 12)
		m2.page(m2.read("r", 11), 12, false, 12)
		p.want(t, "r-13", "r-14", "r-12")
	})
}

func TestAPositionIsNotBeyondWhatOneConnectionHasNotTaken(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p, q := b.come(t, "u", "", "r"), b.come(t, "v", "", "r")
		m.letIn("r", 10)
		p.desk.room = 1
		m.deliver(logged(11, "r", "u", "v"), logged(12, "r", "u", "v"))
		m.mark(1, 10, 20, "r", 11, 12)
		read := m.read("r", 11)
		time.Sleep(2 * time.Second)
		if p.last() != at(5, 11) || q.last() != at(5, 20) {
			t.Errorf("told %v and %v", p.position(t), q.position(t))
		}
		m.page(read, 20, false, 12) // still full
		read = m.read("r", 11)
		p.want(t, "r-11")
		m.page(read, 20, false, 12)
		p.want(t, "r-11", "r-12")
		m.noRead(2 * joinQuiet)
		if p.last() != at(5, 20) {
			t.Errorf("told %v", p.position(t))
		}
		q.want(t, "r-11", "r-12")
	})
}

func TestAnExcludedUserGetsAMessageOfARoomNeitherLiveNorOutOfTheLog(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p, q := b.come(t, "u", "", "r"), b.come(t, "v", at(5, 10), "r")
		read := m.read("r", 10)
		d := logged(11, "r", "w")
		d.Log.ExcludeUserIds = []string{"a", "u", "v"}
		m.deliver(d)
		m.send(&pubsub.DeliverRequest{LogPages: []*pubsub.LogPage{{Gate: read.GetGate(), Epoch: testEpoch, Partition: 1, Seq: 11, Entries: []*pubsub.Delivery{d}}}})
		m.mark(1, 10, 11, "r", 11)
		m.noRead(2 * joinQuiet)
		p.want(t)
		q.want(t)
		if p.last() != at(5, 11) || q.last() != at(5, 11) {
			t.Errorf("told %v and %v", p.position(t), q.position(t))
		}
	})
}

func TestLiveMessagesAreHeldForNoLongerThanTwoSecondsWithoutTheLog(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p := b.come(t, "u", at(5, 3), "r")
		m.deliver(logged(11, "r", "u"))
		read := m.read("r", 3)
		m.send(&pubsub.DeliverRequest{LogPages: []*pubsub.LogPage{{Gate: read.GetGate(), Error: "no"}}})
		time.Sleep(logPatience)
		m.deliver(logged(12, "r", "u"))
		p.want(t, "r-12")
		read = m.read("r", 3) // again after 1 s
		m.page(read, 12, false, 4, 11, 12)
		p.want(t, "r-12", "r-4", "r-11")
		m.noRead(time.Minute)
	})
}

func TestAReadThatFailsIsAskedAgainLaterAndLater(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		b.come(t, "u", at(5, 3), "r")
		began := time.Now()
		for _, seconds := range []int{0, 1, 2, 4, 8, 16, 30, 30} {
			read := <-m.reads
			if got := time.Since(began).Round(time.Second); got != time.Duration(seconds)*time.Second {
				t.Errorf("asked after %v, want %d s", got, seconds)
			}
			began = time.Now()
			m.send(&pubsub.DeliverRequest{LogPages: []*pubsub.LogPage{{Gate: read.GetGate(), Error: "no"}}})
		}
		read := <-m.reads
		began = time.Now()
		<-m.reads // That one was not answered.
		if got := time.Since(began); got < logReadTimeout {
			t.Errorf("asked again after %v", got)
		}
		m.page(read, 10, false) // too late
	})
}

func TestAnotherManagerIsFollowedFromWhereTheNodeIs(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p := b.come(t, "u", "", "r")
		m.letIn("r", 10)
		q := b.come(t, "v", at(5, 10), "s")
		m.read("s", 10)
		m2 := b.logger(t, "pm-2")
		if len(m2.follow) > 0 {
			t.Error("two are followed")
		}
		m.mark(1, 10, 12, "")
		m.stream.CloseSend()
		m2.wantFollow(testEpoch, 5, 12)
		m2.page(m2.read("s", 10), 12, false, 11)
		q.want(t, "s-11")
		m2.mark(1, 12, 13, "r", 13)
		m2.page(m2.read("r", 12), 13, false, 13)
		p.want(t, "r-13")

		// A hole: everything of these two rooms behind 13 is read, nothing behind it is told before.
		m3 := b.logger(t, "pm-3")
		m2.stream.CloseSend()
		m3.wantFollow(testEpoch, 5, 13)
		m3.mark(1, 20, 30, "")
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if len(m3.reads) != 2 {
			t.Fatalf("%d reads", len(m3.reads))
		}
		if p.last() != at(5, 13) {
			t.Errorf("told %v", p.position(t))
		}
		for range 2 {
			read := <-m3.reads
			if read.GetAfter()[1] != 13 {
				t.Errorf("read behind %v", read.GetAfter())
			}
			m3.page(read, 30, false, 17)
		}
		p.want(t, "r-13", "r-17")
		q.want(t, "s-11", "s-17")
		time.Sleep(2 * time.Second)
		if p.last() != at(5, 30) {
			t.Errorf("told %v", p.position(t))
		}
	})
}

// TestALogThatHasLostItsEndIsFollowedFromWhereItEnds: the store has lost what it had taken, so places are given once more.
func TestALogThatHasLostItsEndIsFollowedFromWhereItEnds(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p := b.come(t, "u", "", "r")
		m.letIn("r", 10)
		m.deliver(logged(11, "r", "u"), logged(12, "r", "u"))
		m.mark(1, 10, 12, "r", 11, 12)
		p.want(t, "r-11", "r-12")
		m.mark(1, 9, 9, "")
		m.mark(1, 9, 11, "r", 10, 11)
		m.page(m.read("r", 9), 11, false, 10)
		p.want(t, "r-11", "r-12", "r-10")
		m.noRead(2 * joinQuiet)
		if p.last() != at(5, 11) {
			t.Errorf("told %v", p.position(t))
		}
	})
}

func TestAManagerThatSaysNothingIsLeftForAnother(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		b.come(t, "u", "", "r")
		m2 := b.logger(t, "pm-2")
		time.Sleep(10 * feederPatience)
		synctest.Wait()
		if len(m2.follow) == 0 {
			t.Error("is followed for ever")
		}
	})
}

func TestAPositionOfAnotherEpochIsAGapInEachRoom(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		old := position.Position{Epoch: 1, Places: []position.Place{{Partition: 1, Seq: 99}}}
		p := b.come(t, "u", old.String(), "r", "s")
		m.noRead(time.Second)
		m.deliver(logged(11, "r", "u"))
		p.want(t, "r-11")
		if !slices.Equal(p.missing(), []string{"r", "s"}) {
			t.Errorf("gaps %v", p.missing())
		}
		time.Sleep(2 * joinQuiet)
		if told, _ := p.tellings(); len(told) == 0 || told[0] != at(5, 10) {
			t.Errorf("told %v", p.position(t))
		}
		// The epoch changes while it is there: once, and not again at once.
		time.Sleep(epochPause)
		for _, epoch := range []uint64{2, testEpoch, 2} {
			for partition := range uint32(2) {
				m.send(&pubsub.DeliverRequest{LogMarks: []*pubsub.LogMark{{Partition: partition, Partitions: 2, Epoch: epoch, After: 3, Seq: 3}}})
			}
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if !slices.Equal(p.missing(), []string{"r", "r", "s", "s"}) {
			t.Errorf("gaps %v", p.missing())
		}
		if got := p.position(t); got.Epoch != 2 {
			t.Errorf("told %v", got)
		}
	})
}

// TestARoomJoinedAfterTheLogsHaveBegunAnewIsMissedAsTheOthers: the client's position was of the logs before.
func TestARoomJoinedAfterTheLogsHaveBegunAnewIsMissedAsTheOthers(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		time.Sleep(epochPause)
		p, q := b.come(t, "u", at(5, 3)), b.come(t, "v", "")
		for partition := range uint32(2) {
			m.send(&pubsub.DeliverRequest{LogMarks: []*pubsub.LogMark{{Partition: partition, Partitions: 2, Epoch: 2, After: 3, Seq: 3}}})
		}
		synctest.Wait()
		p.cursor.Join("r")
		q.cursor.Join("r")
		time.Sleep(2 * joinQuiet)
		if got := p.position(t); !slices.Equal(p.missing(), []string{"r"}) || got == nil || got.Epoch != 2 {
			t.Errorf("gaps %v, told %v", p.missing(), got)
		}
		if len(q.missing()) > 0 {
			t.Error("who had no position is told of a gap")
		}
		p.cursor.Join("s")
		time.Sleep(time.Second)
		synctest.Wait()
		if len(p.missing()) != 1 {
			t.Errorf("gaps %v", p.missing())
		}
	})
}

// TestAPositionWaitsForRoomsThatAreExpected: the Controller may take long to let a client into the second of its rooms.
func TestAPositionWaitsForRoomsThatAreExpected(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p := b.come(t, "u", at(5, 3))
		p.cursor.Expect("r")
		p.cursor.Expect("s")
		p.cursor.Expect("refused")
		p.cursor.Join("r")
		m.page(m.read("r", 3), 10, false)
		m.deliver(logged(11, "r", "u"))
		m.mark(1, 10, 11, "r", 11)
		m.noRead(2 * joinQuiet)
		if p.times() > 0 {
			t.Errorf("told %v", p.position(t))
		}
		p.cursor.Leave("refused")
		p.cursor.Join("s")
		m.page(m.read("s", 3), 11, false, 7)
		p.want(t, "r-11", "s-7")
		m.noRead(2 * joinQuiet)
		if p.last() != at(5, 11) {
			t.Errorf("told %v", p.position(t))
		}
		p.cursor.Expect("s") // it is in
		m.deliver(logged(12, "r", "u"))
		m.mark(1, 11, 12, "r", 12)
		m.noRead(2 * joinQuiet)
		if p.last() != at(5, 12) {
			t.Errorf("told %v", p.position(t))
		}
	})
}

// TestAPositionOfLogsThatBeginAnewMeanwhileIsNotKept: the logs become others while the client is told where it is.
func TestAPositionOfLogsThatBeginAnewMeanwhileIsNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLogs(t, Config{})
		p := b.come(t, "u", "", "r")
		m := b.logger(t, "pm")
		mark := func(epoch, seq uint64) {
			m.send(&pubsub.DeliverRequest{LogMarks: []*pubsub.LogMark{{Partitions: 1, Epoch: epoch, After: seq, Seq: seq}}})
		}
		times := 0
		p.telling = func() {
			if times++; times == 2 {
				time.Sleep(epochPause)
				mark(2, 3)
				time.Sleep(time.Millisecond)
			}
		}
		mark(testEpoch, 500)
		time.Sleep(2 * time.Second)
		p.cursor.Leave("r")
		m.send(&pubsub.DeliverRequest{LogMarks: []*pubsub.LogMark{{Partitions: 1, Epoch: testEpoch, After: 500, Seq: 501}}})
		time.Sleep(epochPause + resumeTick + 100*time.Millisecond)
		synctest.Wait()
		if times != 2 {
			t.Fatalf("told %d times", times)
		}
		p.cursor.Join("s")
		time.Sleep(2 * joinQuiet)
		synctest.Wait()
		if !slices.Contains(p.missing(), "s") || p.position(t).Epoch != 2 || len(m.reads) > 0 {
			t.Errorf("gaps %v, told %v, %d reads", p.missing(), p.position(t), len(m.reads))
		}
	})
}

// TestWhatAClientHasHadAccordingToItsPositionDoesNotComeAgain where its node is not as far as the one before was.
func TestWhatAClientHasHadAccordingToItsPositionDoesNotComeAgain(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p, q := b.come(t, "u", at(5, 12), "r"), b.come(t, "v", "", "r")
		m.page(m.read("r", 10), 13, false, 11, 12, 13)
		m.mark(1, 10, 14, "r", 11, 12, 13, 14)
		m.page(m.read("r", 13), 14, false, 14)
		p.want(t, "r-13", "r-14")
		q.want(t, "r-11", "r-12", "r-13", "r-14")
		m.noRead(2 * joinQuiet)
		if p.last() != at(5, 14) || q.last() != at(5, 14) {
			t.Errorf("told %v and %v", p.position(t), q.position(t))
		}
		// A place beyond the end of the log is none.
		far := b.come(t, "w", at(5, 1000), "r")
		read := m.read("r", 1000)
		m.send(&pubsub.DeliverRequest{LogPages: []*pubsub.LogPage{{Gate: read.GetGate(), Epoch: testEpoch, Partition: 1, Seq: 14, Gap: true}}})
		synctest.Wait()
		m.mark(1, 14, 15, "r", 15)
		m.page(m.read("r", 14), 15, false, 15)
		far.want(t, "r-15")
	})
}

func TestWhatIsNotKeptAnyMoreIsSaidToThoseWhomItConcerns(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p, q := b.come(t, "u", at(5, 3), "r"), b.come(t, "v", at(5, 7), "r")
		read := m.read("r", 3)
		m.send(&pubsub.DeliverRequest{LogPages: []*pubsub.LogPage{{
			Gate: read.GetGate(), Epoch: testEpoch, Partition: 1, Seq: 10, Gap: true, Entries: []*pubsub.Delivery{logged(6, "r"), logged(9, "r")},
		}}})
		m.noRead(time.Second)
		p.want(t, "r-6", "r-9")
		q.want(t, "r-9")
		if !slices.Equal(p.missing(), []string{"r"}) || len(q.missing()) > 0 {
			t.Errorf("gaps %v and %v", p.missing(), q.missing())
		}
	})
}

func TestAClientWithoutAPositionGetsOneAndNothingFromBefore(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p := b.come(t, "u", "", "r")
		m.letIn("r", 10)
		m.noRead(time.Second)
		if got, _ := p.tellings(); !slices.Equal(got, []string{at(5, 10)}) {
			t.Errorf("told %v", got)
		}
		// It keeps it over a room that it left: that is read from there.
		p.cursor.Leave("r")
		m.mark(1, 10, 20, "r", 15)
		p.cursor.Join("r")
		m.page(m.read("r", 10), 20, false, 15)
		p.want(t, "r-15")
	})
}

// TestAClientWithoutAPositionGetsWhatIsStoredForItInOrder: managers may know of it when it asks to come in, and book as stored what
// its connection does not take before it is in. What it is given from the log comes before what is new.
func TestAClientWithoutAPositionGetsWhatIsStoredForItInOrder(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		other := b.come(t, "other", "", "r")
		m.letIn("r", 10)
		late := b.come(t, "late", "")
		m.deliver(logged(11, "r", "other"))
		m.mark(1, 10, 11, "r", 11)
		late.cursor.Expect("r")
		m.deliver(logged(12, "r", "other"))
		m.mark(1, 11, 12, "r", 12) // The node is beyond it when late is let in.
		late.cursor.Join("r")
		m.deliver(logged(13, "r", "other", "late"))
		read := m.read("r", 11)
		late.want(t) // 13 is held.
		m.page(read, 13, false, 12, 13)
		m.deliver(logged(14, "r", "other", "late"))
		late.want(t, "r-12", "r-13", "r-14")
		other.want(t, "r-11", "r-12", "r-13", "r-14")
		m.mark(1, 12, 14, "r", 13, 14)
		m.noRead(2 * joinQuiet)
		for _, p := range []*reader{late, other} {
			if p.last() != at(5, 14) {
				t.Errorf("%s was told %v", p.user, p.position(t))
			}
		}
	})
}

func TestAPositionIsToldAtMostOnceASecondAndNotToTheIdle(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p, idle := b.come(t, "u", "", "r"), b.come(t, "v", "")
		m.letIn("r", 10)
		idle.cursor.Join("s")
		m.letIn("s", 10)
		for seq := uint64(11); seq <= 50; seq++ {
			m.deliver(logged(seq, "r", "u"))
			m.mark(1, seq-1, seq, "r", seq)
			time.Sleep(100 * time.Millisecond)
		}
		synctest.Wait()
		if n := p.times(); n < 3 || n > 6 {
			t.Errorf("told %d times", n)
		}
		if n := idle.times(); n != 1 {
			t.Errorf("the idle one was told %d times", n)
		}
		time.Sleep(resumeAge)
		synctest.Wait()
		if n := idle.times(); n != 2 || idle.last() != at(5, 50) {
			t.Errorf("the idle one was told %d times", n)
		}
		// Who has no room in its queue is told later.
		p.turn(true)
		n := p.times()
		m.mark(1, 50, 51, "r", 51)
		m.page(m.read("r", 50), 51, false, 51)
		time.Sleep(5 * time.Second)
		p.turn(false)
		time.Sleep(2 * time.Second)
		if p.times() != n+1 || p.last() != at(5, 51) {
			t.Errorf("told %d times, at last %v", p.times()-n, p.position(t))
		}
	})
}

func TestMembersWhoComeBackTogetherAreReadForTogether(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		const members = 10_000
		reads := 0
		stop := make(chan struct{})
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				case read := <-m.reads:
					reads++
					p := &pubsub.LogPage{Gate: read.GetGate(), Epoch: testEpoch, Partition: 1, Seq: 110}
					for s := max(read.GetAfter()[1]+1, 11); s <= 110; s++ {
						p.Entries = append(p.Entries, logged(s, "r"))
					}
					m.send(&pubsub.DeliverRequest{LogPages: []*pubsub.LogPage{p}})
				}
			}
		}()
		all := make([]*reader, members)
		for i := range all {
			all[i] = b.come(t, fmt.Sprint(i), at(5, 10), "r")
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Second)
		close(stop)
		<-done
		for _, p := range all {
			if got := p.shown(); len(got) != 100 || got[0] != "r-11" || got[99] != "r-110" {
				t.Fatalf("%s was shown %d", p.user, len(got))
			}
		}
		t.Logf("%d reads", reads)
		if reads > 120 {
			t.Errorf("%d reads", reads)
		}
	})
}

func TestAManagerThatBreaksTheRulesOfTheLogsIsCutOff(t *testing.T) {
	for name, f := range map[string]func(m *logger, read *pubsub.LogRead){
		"no partitions": func(m *logger, _ *pubsub.LogRead) {
			m.send(&pubsub.DeliverRequest{LogMarks: []*pubsub.LogMark{{Epoch: testEpoch}}})
		},
		"2^32 partitions": func(m *logger, _ *pubsub.LogRead) {
			m.send(&pubsub.DeliverRequest{LogMarks: []*pubsub.LogMark{{Epoch: testEpoch, Partitions: 1<<32 - 1, Partition: 1<<32 - 2}}})
		},
		"a partition beyond the last": func(m *logger, _ *pubsub.LogRead) { m.mark(2, 0, 0, "") },
		"other partitions": func(m *logger, _ *pubsub.LogRead) {
			m.send(&pubsub.DeliverRequest{LogMarks: []*pubsub.LogMark{{Epoch: testEpoch, Partitions: 3}}})
		},
		"a mark from behind":           func(m *logger, _ *pubsub.LogRead) { m.mark(1, 12, 11, "") },
		"places that fall":             func(m *logger, _ *pubsub.LogRead) { m.mark(1, 10, 20, "r", 12, 11) },
		"a place beyond the mark":      func(m *logger, _ *pubsub.LogRead) { m.mark(1, 10, 20, "r", 21) },
		"a room in two partitions":     func(m *logger, _ *pubsub.LogRead) { m.mark(0, 5, 20, "r", 11) },
		"a page with places that fall": func(m *logger, read *pubsub.LogRead) { m.page(read, 20, false, 12, 11) },
		"a page with a place beyond":   func(m *logger, read *pubsub.LogRead) { m.page(read, 20, false, 21) },
		"a page without an end":        func(m *logger, read *pubsub.LogRead) { m.page(read, 10, true) },
		"a page of another partition": func(m *logger, read *pubsub.LogRead) {
			m.send(&pubsub.DeliverRequest{LogPages: []*pubsub.LogPage{{Gate: read.GetGate(), Epoch: testEpoch, Partition: 9, Seq: 20}}})
		},
		"a page of many": func(m *logger, read *pubsub.LogRead) {
			seqs := make([]uint64, pageEntriesMost+1)
			for i := range seqs {
				seqs[i] = 11 + uint64(i)
			}
			m.page(read, 1<<20, false, seqs...)
		},
		"an entry without a place": func(m *logger, read *pubsub.LogRead) {
			m.send(&pubsub.DeliverRequest{LogPages: []*pubsub.LogPage{{Gate: read.GetGate(), Epoch: testEpoch, Partition: 1, Seq: 20, Entries: []*pubsub.Delivery{lasting("x")}}}})
		},
		"an entry of another room": func(m *logger, read *pubsub.LogRead) {
			m.send(&pubsub.DeliverRequest{LogPages: []*pubsub.LogPage{{Gate: read.GetGate(), Epoch: testEpoch, Partition: 1, Seq: 20, Entries: []*pubsub.Delivery{logged(11, "s")}}}})
		},
	} {
		t.Run(name, func(t *testing.T) {
			logTest(t, func(t *testing.T, b *logBench, m *logger) {
				p := b.come(t, "u", "", "r")
				m.mark(1, 10, 11, "r", 11)
				f(m, m.read("r", 10))
				if err := <-m.ended; status.Code(err) != codes.FailedPrecondition {
					t.Errorf("ended with %v", err)
				}
				m2 := b.logger(t, "pm-2")
				m2.mark(1, 11, 11, "")
				m2.page(m2.read("r", 10), 11, false, 11)
				p.want(t, "r-11")
			})
		})
	}
}

func TestWhatMeansNothingHereIsIgnored(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p := b.come(t, "u", "", "r")
		m.letIn("r", 10)
		far := logged(11, "r", "u")
		far.Log.Partition = 1<<32 - 1
		other := logged(12, "r", "u")
		other.Log.Epoch = 1
		m.deliver(far, other, logged(13, "r", "u"))
		m.mark(1, 10, 13, "r", 13)
		m.send(&pubsub.DeliverRequest{LogPages: []*pubsub.LogPage{{Gate: 999, Partition: 77}, {Gate: 0, Seq: 9}}}) // asked by nobody
		p.want(t, "r-11", "r-12", "r-13")
		m.noRead(2 * joinQuiet)
		if p.last() != at(5, 13) {
			t.Errorf("told %v", p.position(t))
		}
		if got := b.server.count.logIgnored.Get(); got != 4 {
			t.Errorf("%d ignored", got)
		}
	})
}

func TestPlacesThatNoMarkCoversAreBounded(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		p := b.come(t, "u", "", "r")
		for seq := uint64(11); seq < 11+2*cameMost; seq++ {
			m.deliver(logged(seq, "r", "u"))
		}
		synctest.Wait()
		p.shown()
		logs := b.server.roomLogs
		logs.mu.Lock()
		if n := len(logs.rooms["r"].came); n != cameMost || logs.came != n {
			t.Errorf("%d are kept, counted %d", n, logs.came)
		}
		logs.mu.Unlock()
		b.go1(p)
		logs.mu.Lock()
		defer logs.mu.Unlock()
		if len(logs.rooms)+logs.came+logs.members+logs.behind+len(logs.log[1].fresh) > 0 {
			t.Error("a room without members is kept")
		}
	})
}

func TestACursorIsForThoseWhoMayHaveOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLogs(t, Config{MaxGates: 1})
		for _, text := range []string{"?", "AQ", at(1, 2) + "A"} {
			if _, err := b.server.Cursor("u", &reader{}, text); !errors.Is(err, position.ErrMalformed) {
				t.Errorf("%q: %v", text, err)
			}
		}
		p := b.come(t, "u", at(1, 2), "r")
		none, err := b.server.Cursor("v", &reader{}, "")
		if none != nil || err != nil {
			t.Errorf("one more: %v, %v", none, err)
		}
		none.Join("r")
		none.Leave("r")
		none.Close()
		if none.Holds(&Message{Options: &Options{Log: &LogPlace{}}}) {
			t.Error("nothing holds")
		}
		for i := range cursorRoomsMost + 5 {
			p.cursor.Join(fmt.Sprint("room-", i))
		}
		p.cursor.Join("room-1")
		time.Sleep(time.Second)
		logs := b.server.roomLogs
		logs.mu.Lock()
		members := logs.members
		logs.mu.Unlock()
		if n := len(p.missing()); n == 0 || members > membersFactor {
			t.Errorf("%d gaps, %d members", n, members)
		}
		b.go1(p)
		p.cursor.Close()
		p.cursor.Join("r")
		b.come(t, "v", "")
	})
	if _, err := New(Config{NodeID: "n", Sessions: NewLastingUsers[*reader](pubsub.Feature_FEATURE_ROOM_LOG)}); err == nil {
		t.Error("the logs of rooms without message ids")
	}
}

func TestIdleCursorsCostNothing(t *testing.T) {
	logTest(t, func(t *testing.T, b *logBench, m *logger) {
		for i := range 1000 {
			b.come(t, fmt.Sprint(i), "", "r")
		}
		m.letIn("r", 10)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if wait, is := b.server.roomLogs.wait(time.Now()); !is || wait < resumeAge-time.Minute {
			t.Errorf("the loop wakes after %v", wait)
		}
	})
}
