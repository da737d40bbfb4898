package refgateway

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/push-manager/push-manager/internal/position"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// resumer connects a client that keeps its position, in a room if there is one.
func resumer(t testing.TB, g *Gateway, user, room, token string) *device {
	t.Helper()
	query := "user_id=" + user + "&resume=" + token
	if room != "" {
		query += "&room_id=" + room
	}
	d, _, err := dialQuery(g, query, nil)
	if err != nil {
		t.Fatal(err)
	}
	d.t = t
	var wg sync.WaitGroup
	wg.Go(d.ws.ReadLoop)
	t.Cleanup(func() {
		_ = d.ws.NetConn().Close()
		wg.Wait()
	})
	if room != "" {
		d.want(fmt.Sprintf(`{"type":"joined","room_id":%q}`, room))
		return d
	}
	return d.ready(user)
}

// only is the one connection of a user.
func only(t testing.TB, g *Gateway, user string) *conn {
	t.Helper()
	conns := g.users.Of(user)
	if len(conns) != 1 {
		t.Fatalf("%s has %d connections", user, len(conns))
	}
	return conns[0]
}

// TestMalformedPositionIsRefused with the field's name, as other bad fields are, and without the value.
func TestMalformedPositionIsRefused(t *testing.T) {
	g, _ := start(t, newController(t), nil)
	good := (&position.Position{Epoch: 7, Places: []position.Place{{Partition: 0, Seq: 12}}}).String()
	for query, want := range map[string]string{
		"resume=token":                         "400 Bad Request resume: is not a position",
		"resume=" + good + "A":                 "400 Bad Request resume: is not a position",
		"resume=" + good[:8]:                   "400 Bad Request resume: is not a position",
		"resume=" + strings.Repeat("A", 1<<12): "400 Bad Request resume: is not a position",
		"resume=" + good + "&resume=" + good:   "400 Bad Request resume: given 2 times",
		"resume=%00":                           "400 Bad Request resume: is not a position",
		"resume=" + good + "&room_id=@node:x":  "400 Bad Request room_id: ",
		"resume=" + good + "&ack=2":            "400 Bad Request ack: must be 1, or left out",
	} {
		if got := get(t, "http://"+g.HTTPAddr().String()+"/ws?user_id=u&"+query); !strings.HasPrefix(got, want) {
			t.Errorf("%.60s: %s, want %s", query, got, want)
		}
	}
	resumer(t, g, "none-yet", "", "").wantNothing()
	resumer(t, g, "some", "r", good).wantNothing()
}

// TestWhoResumesGetsIdsAndAcknowledgesNothing, but for one who has asked for that, too.
func TestWhoResumesGetsIdsAndAcknowledgesNothing(t *testing.T) {
	g, n := start(t, newController(t), nil)
	d, m := resumer(t, g, "u", "", ""), manage(t, n, "pm")
	m.wantAck(m.deliver(asking("m-1", "Hello", "u")), ack{delivered: 1})
	d.want(marked("u", "Hello", `,"id":"m-1"`))
	m.wantAck(m.deliver(to("", "Hello", "u")), ack{delivered: 1})
	d.want(textFrame("", "u", "Hello"))
}

// TestPositionAndGapAreFramesOfTheirOwn: the token as it is, and the room as the client knows it.
func TestPositionAndGapAreFramesOfTheirOwn(t *testing.T) {
	c := newController(t)
	g, p := startWithTokens(t, c, nil)
	d := admitted(t, g, "room_id=lobby", p.token("u", map[string]any{"tenant": "shop"}))
	of := only(t, g, "shop/u")
	if !of.Resume("AQID-_") || !of.Gap("shop/lobby") {
		t.Error("an idle connection has no room for them")
	}
	d.want(`{"type":"resume","token":"AQID-_"}`)
	d.want(`{"type":"gap","room_id":"lobby"}`)
}

// TestPositionWaitsForWhatTheGateHolds: a client must not be told that it is behind what it may never get.
func TestPositionWaitsForWhatTheGateHolds(t *testing.T) {
	g, n := start(t, newController(t), nil)
	m := manage(t, n, "pm", pubsub.Feature_FEATURE_REPLAY)
	d := resumer(t, g, "u", "", "")
	asked := m.catchup(1)
	m.wantAck(m.deliver(to("m-1", "held", "u")), ack{delivered: 1})
	of := only(t, g, "u")
	if of.Resume("token") || of.Gap("r") {
		t.Error("they overtake what is held")
	}
	d.wantNothing()
	m.send(&pubsub.DeliverRequest{ReplayEnds: []*pubsub.ReplayEnd{{Gate: asked.GetGate()}}})
	d.want(marked("u", "held", `,"id":"m-1"`))
	if !of.Resume("token") {
		t.Error("nothing is held any more")
	}
	d.want(`{"type":"resume","token":"token"}`)
}

// TestPositionCutsNobodyOff: a client whose queue is half full is told later, and so is what is read for it. One that
// has gone is told nothing.
func TestPositionCutsNobodyOff(t *testing.T) {
	g, n := start(t, newController(t), func(c *Config) { c.QueueFrames, c.SocketBuffer = 16, 4<<10 })
	m := manage(t, n, "pm")
	c := blocked(t, g, m, "resume=&room_id=r")
	of := only(t, g, "u")
	eventually(t, "it is in the room", func() bool { return of.member.In("r") })
	told := 0
	for ; told < 16 && of.Resume("token"); told++ {
	}
	if told == 0 || told == 16 || of.Gap("r") {
		t.Errorf("%d positions fit into half of a queue of 16", told)
	}
	read := &node.Message{RoomID: "r", Data: []byte("x"), Options: &node.Options{ID: "m", Key: 1, Log: &node.LogPlace{Seq: 1, Read: true}}}
	if out := of.DeliverLasting(read, nil); out != node.Failed {
		t.Errorf("what was read is %v", out)
	}
	if g.users.Connections() != 1 || g.count.slow.Get() != 0 {
		t.Error("the client was cut off")
	}
	_ = c.Close()
	eventually(t, "it has gone", func() bool { return g.users.Connections() == 0 })
	if !of.Resume("token") || !of.Gap("r") {
		t.Error("they are tried again for one who has gone")
	}
}

// TestWhatIsReadIsMarked, and comes once, whether it was read or came live first. It is not shown after the room was left.
func TestWhatIsReadIsMarked(t *testing.T) {
	g, _ := start(t, newController(t), nil)
	d := resumer(t, g, "u", "r", "")
	of := only(t, g, "u")
	message := func(key uint64, id, text string, read bool) *node.Message {
		return &node.Message{RoomID: "r", Timestamp: 1, Data: []byte(text), Options: &node.Options{ID: id, Key: key, Log: &node.LogPlace{Seq: key, Read: read}}}
	}
	for _, step := range []struct {
		m    *node.Message
		out  node.Outcome
		want string
	}{
		{message(1, "m-1", "missed", true), node.Delivered, inRoom("missed", `,"id":"m-1","replayed":true`)},
		{message(1, "m-1", "missed", false), node.Duplicate, ""},
		{message(2, "m-2", "live", false), node.Delivered, inRoom("live", `,"id":"m-2"`)},
		{message(2, "m-2", "live", true), node.Duplicate, ""},
	} {
		if out := of.DeliverLasting(step.m, nil); out != step.out {
			t.Errorf("%s: %v, want %v", step.m.Data, out, step.out)
		}
		if step.want != "" {
			d.want(step.want)
		}
	}
	d.wantNothing()
	d.say(`{"type":"leave","room_id":"r"}`)
	d.want(`{"type":"left","room_id":"r"}`)
	if out := of.DeliverLasting(message(3, "m-3", "late", true), nil); out != node.NotHere {
		t.Errorf("after the room was left: %v", out)
	}
	d.wantNothing()
}

// The tests below have the node's side of the logs, too: a Push-Manager by script says what stands in them.

// logEpoch is that of the script's log, which has one partition.
const logEpoch = 7

func at(seq uint64) string {
	return (&position.Position{Epoch: logEpoch, Places: []position.Place{{Seq: seq}}}).String()
}

// logged is a message to the room r, or r of a tenant, in its log.
func logged(seq uint64, room, text string, users ...string) *pubsub.Delivery {
	d := to(fmt.Sprint("m-", seq), text, users...)
	d.RoomId, d.Log = room, &pubsub.LogPosition{Seq: seq, Epoch: logEpoch}
	return d
}

// roomLog is the log of the room r, of which only the messages behind place gone are left.
type roomLog struct {
	gone, end uint64
	entries   []*pubsub.Delivery
}

func (l *roomLog) page(read *pubsub.LogRead) *pubsub.LogPage {
	p := &pubsub.LogPage{Gate: read.GetGate(), Epoch: logEpoch, Seq: l.end, Gap: read.GetAfter()[0] < l.gone}
	for _, e := range l.entries {
		if e.GetLog().GetSeq() > read.GetAfter()[0] && read.GetRoomId() == "r" {
			p.Entries = append(p.Entries, e)
		}
	}
	return p
}

// keeps has what is read answered out of a log.
func (m *manager) keeps(gone, end uint64, entries ...*pubsub.Delivery) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.log = &roomLog{gone, end, entries}
}

// following waits until the node follows, and tells it where the log ends.
func (m *manager) following(seq uint64) {
	m.t.Helper()
	eventually(m.t, "the node follows the logs", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return len(m.follows) > 0
	})
	m.mark(seq, seq)
}

func (m *manager) mark(after, seq uint64, rooms ...*pubsub.LogRoom) {
	m.t.Helper()
	m.send(&pubsub.DeliverRequest{LogMarks: []*pubsub.LogMark{{Epoch: logEpoch, Partitions: 1, After: after, Seq: seq, Rooms: rooms}}})
}

// logRead waits for the n-th question for a log.
func (m *manager) logRead(n int) (got *pubsub.LogRead) {
	m.t.Helper()
	eventually(m.t, "the node reads the log", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		if len(m.reads) >= n {
			got = m.reads[n-1]
		}
		return got != nil
	})
	return got
}

// wantPosition demands a position, whichever come before it.
func (d *device) wantPosition(seq uint64) {
	d.t.Helper()
	d.wantFrame(fmt.Sprintf(`{"type":"resume","token":%q}`, at(seq)))
}

// wantFrame is want for a client that is told positions in between.
func (d *device) wantFrame(frame string) {
	d.t.Helper()
	for {
		if got := d.next(); got == frame {
			return
		} else if !strings.HasPrefix(got, `{"type":"resume"`) {
			d.t.Fatalf("got  %s\nwant %s", got, frame)
		}
	}
}

func inRoom(text, marks string) string {
	return strings.TrimSuffix(textFrame("r", "u", text), "}") + marks + "}"
}

// TestResumedClientGetsWhatItsRoomSaid while it was away: once, in order, before what is new, and a position behind that.
func TestResumedClientGetsWhatItsRoomSaid(t *testing.T) {
	g, n := start(t, newController(t), nil)
	m := manage(t, n, "pm", pubsub.Feature_FEATURE_ROOM_LOG)
	d := resumer(t, g, "u", "r", at(10))
	m.following(12)
	read := m.logRead(1)
	if read.GetRoomId() != "r" || read.GetEpoch() != logEpoch || len(read.GetAfter()) != 1 || read.GetAfter()[0] != 10 {
		t.Errorf("the node asks for %v", read)
	}
	m.wantAck(m.deliver(logged(13, "r", "live", "u")), ack{}) // It comes out of the log.
	m.keeps(0, 13, logged(11, "r", "one"), logged(12, "r", "two"), logged(13, "r", "live"))
	m.send(&pubsub.DeliverRequest{LogPages: []*pubsub.LogPage{m.log.page(read)}})
	d.wantFrame(inRoom("one", `,"id":"m-11","replayed":true`))
	d.wantFrame(inRoom("two", `,"id":"m-12","replayed":true`))
	d.wantFrame(inRoom("live", `,"id":"m-13","replayed":true`))
	m.mark(12, 13, &pubsub.LogRoom{RoomId: "r", Seqs: []uint64{13}})
	d.wantPosition(13)
	m.wantAck(m.deliver(logged(14, "r", "next", "u")), ack{delivered: 1})
	d.wantFrame(inRoom("next", `,"id":"m-14"`))
}

// TestMarkHasReadWhatDidNotCome: the manager that sent it live is gone.
func TestMarkHasReadWhatDidNotCome(t *testing.T) {
	g, n := start(t, newController(t), nil)
	m := manage(t, n, "pm", pubsub.Feature_FEATURE_ROOM_LOG)
	m.keeps(0, 14, logged(12, "r", "said before"), logged(14, "r", "lost"))
	d := resumer(t, g, "u", "r", "")
	m.following(12)
	m.mark(12, 14, &pubsub.LogRoom{RoomId: "r", Seqs: []uint64{14}})
	d.wantFrame(inRoom("lost", `,"id":"m-14","replayed":true`))
	d.wantPosition(14)
}

// TestGapIsToldForWhatIsNotKeptAnyMore, and for a position of another log.
func TestGapIsToldForWhatIsNotKeptAnyMore(t *testing.T) {
	g, n := start(t, newController(t), nil)
	m := manage(t, n, "pm", pubsub.Feature_FEATURE_ROOM_LOG)
	m.keeps(11, 12, logged(12, "r", "two"))
	d := resumer(t, g, "u", "r", at(1))
	m.following(12)
	want := []string{`{"type":"gap","room_id":"r"}`, inRoom("two", `,"id":"m-12","replayed":true`)} // whichever is first
	for len(want) > 0 {
		got := d.next()
		if strings.HasPrefix(got, `{"type":"resume"`) && slices.Contains(want, `{"type":"gap","room_id":"r"}`) {
			t.Fatal("the position is behind a gap that was not told")
		}
		want = slices.DeleteFunc(want, func(w string) bool { return w == got })
	}
	old := &position.Position{Epoch: logEpoch + 1, Places: []position.Place{{Seq: 3}}}
	resumer(t, g, "v", "r", old.String()).wantFrame(`{"type":"gap","room_id":"r"}`)
}

// TestNobodyReadsARoomBeforeTheController has let the client in, or after the client has left.
func TestNobodyReadsARoomBeforeTheController(t *testing.T) {
	c := newController(t)
	g, n := start(t, c, nil)
	m := manage(t, n, "pm", pubsub.Feature_FEATURE_ROOM_LOG)
	d := resumer(t, g, "u", "", at(10))
	m.following(12)
	c.stop()
	d.say(`{"type":"join","room_id":"r"}`)
	of := only(t, g, "u")
	eventually(t, "it waits for the Controller", func() bool { return of.member.In("r") })
	m.wantAck(m.deliver(logged(13, "r", "x", "u")), ack{})
	time.Sleep(4 * wheelStep) // longer than a node gathers reads
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.reads) > 0 {
		t.Errorf("the node has read %v", m.reads)
	}
}

// TestAPositionWaitsForTheController: a client is told none while the Controller has not let it into one of its rooms, which is read
// from the position with which it has come.
func TestAPositionWaitsForTheController(t *testing.T) {
	t.Parallel() // it waits most of the time
	c := newController(t)
	g, n := start(t, c, nil)
	m := manage(t, n, "pm", pubsub.Feature_FEATURE_ROOM_LOG)
	d, other := resumer(t, g, "u", "", at(10)), resumer(t, g, "other", "", at(10))
	fail := func(code codes.Code) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.failing = code
	}
	fail(codes.Unavailable)
	d.say(`{"type":"join","room_id":"r"}`)
	of := only(t, g, "u")
	eventually(t, "it waits for the Controller", func() bool { return of.member.In("r") })
	m.following(12)
	other.wantPosition(12)
	fail(codes.OK)
	d.want(`{"type":"joined","room_id":"r"}`)
	if read := m.logRead(1); read.GetAfter()[0] != 10 {
		t.Errorf("the node asks for %v", read)
	}
}

// TestWhoHasJoinedAnewIsNotPutOutByAnEarlierRefusal, the word of which may come later.
func TestWhoHasJoinedAnewIsNotPutOutByAnEarlierRefusal(t *testing.T) {
	g, _ := start(t, newController(t), nil)
	d := resumer(t, g, "u", "r", "")
	of := only(t, g, "u")
	of.Refused("r", "no")
	d.want(`{"type":"error","message":"room_id: no","room_id":"r"}`)
	live := &node.Message{RoomID: "r", Timestamp: 1, Data: []byte("x"), Options: &node.Options{ID: "m", Key: 1, Log: &node.LogPlace{Seq: 1}}}
	if out := of.DeliverLasting(live, nil); out != node.Delivered {
		t.Errorf("a message of the room is %v", out)
	}
}
