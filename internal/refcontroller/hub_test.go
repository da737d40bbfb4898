package refcontroller

import (
	"fmt"
	"slices"
	"testing"

	"github.com/VictoriaMetrics/metrics"
)

func newHub(most int) *hub {
	set := metrics.NewSet()
	return &hub{
		most: most, overflows: set.NewCounter("overflows"), changes: set.NewCounter("changes"), lapses: set.NewCounter("lapses"), watchers: map[*watcher]struct{}{},
	}
}

func TestPendingNamesCoalesce(t *testing.T) {
	h := newHub(100)
	w := h.join(0, false)
	for range 1000 {
		h.tell(Change{Rooms: []string{"r"}, Users: []string{"u", "v"}})
	}
	<-w.wake
	frames := w.take()
	if len(frames) != 1 || !slices.Equal(frames[0].GetRoomIds(), []string{"r"}) || len(frames[0].GetUserIds()) != 2 || frames[0].GetAll() {
		t.Fatalf("got %v", frames)
	}
	if frames := w.take(); len(frames) != 0 {
		t.Fatalf("sent twice: %v", frames)
	}
	select {
	case <-w.wake:
		t.Fatal("woken for nothing")
	default:
	}
}

func TestOverflowBecomesAll(t *testing.T) {
	h := newHub(10)
	slow, quick := h.join(0, false), h.join(0, false)
	for i := range 11 {
		h.tell(Change{Users: []string{fmt.Sprint(i)}})
		<-quick.wake
		if frames := quick.take(); len(frames) != 1 || frames[0].GetAll() {
			t.Fatalf("the quick watcher got %v", frames)
		}
	}
	h.tell(Change{Users: []string{"later"}})
	frames := slow.take()
	if len(frames) != 1 || !frames[0].GetAll() || len(frames[0].GetUserIds()) != 0 {
		t.Fatalf("the slow watcher got %v", frames)
	}
	if n := h.overflows.Get(); n != 1 {
		t.Fatalf("%d overflows", n)
	}
	// After that it gets names again.
	h.tell(Change{Users: []string{"x"}})
	if frames := slow.take(); len(frames) != 1 || frames[0].GetAll() || !slices.Equal(frames[0].GetUserIds(), []string{"x"}) {
		t.Fatalf("got %v", frames)
	}
}

func TestFramesAreBounded(t *testing.T) {
	h := newHub(10 * frameNames)
	w := h.join(0, false)
	var c Change
	for i := range 2*frameNames + 10 {
		c.Rooms = append(c.Rooms, fmt.Sprint("r", i))
		c.Users = append(c.Users, fmt.Sprint("u", i))
	}
	h.tell(c)
	rooms, users := 0, 0
	for _, f := range w.take() {
		if n := len(f.GetRoomIds()) + len(f.GetUserIds()); n == 0 || n > frameNames {
			t.Fatalf("a message with %d names", n)
		}
		rooms += len(f.GetRoomIds())
		users += len(f.GetUserIds())
	}
	if rooms != len(c.Rooms) || users != len(c.Users) {
		t.Fatal(rooms, users)
	}
}

func TestWhoHasLeftIsNotTold(t *testing.T) {
	h := newHub(10)
	w := h.join(0, false)
	h.leave(w)
	h.tell(Change{Users: []string{"u"}})
	if len(w.take()) != 0 || h.len() != 0 {
		t.Fatal("told")
	}
}

func TestPendingMovesAreTheLastOfEachPlace(t *testing.T) {
	h := newHub(10)
	deltas, names := h.join(0, true), h.join(0, false)
	for i, m := range []Move{
		{Room: "r", User: "u", Node: "n"}, {Room: "r", User: "u", Node: "m"}, {Room: "r", User: "u", Node: "n", Left: true}, {Room: "s", User: "u", Node: "n"},
	} {
		h.tell(Change{Moves: []Move{m}, Revision: uint64(i + 1)})
	}
	got := map[string]bool{}
	frames := deltas.take()
	for _, d := range frames[0].GetDeltas() {
		got[fmt.Sprint(d.GetRoomId(), d.GetUserId(), d.GetNodeId(), d.GetLeft(), d.GetRevision())] = true
	}
	if len(frames) != 1 || len(got) != 3 || !got[fmt.Sprint("r", "u", "n", true, 3)] || !got[fmt.Sprint("r", "u", "m", false, 2)] || !got[fmt.Sprint("s", "u", "n", false, 4)] {
		t.Errorf("got %v", frames)
	}
	if len(frames[0].GetRoomIds())+len(frames[0].GetUserIds()) > 0 {
		t.Errorf("moves are named, too: %v", frames)
	}
	if frames := names.take(); len(frames) != 1 || len(frames[0].GetDeltas()) > 0 || len(frames[0].GetRoomIds()) != 2 || !slices.Equal(frames[0].GetUserIds(), []string{"u"}) {
		t.Errorf("who takes no deltas got %v", frames)
	}
}

func TestTooManyMovesBecomeAll(t *testing.T) {
	h := newHub(10)
	w := h.join(0, true)
	move := func(i int) Change {
		return Change{Moves: []Move{{Room: "r", User: fmt.Sprint(i), Node: "n"}}, Revision: uint64(i)}
	}
	for i := range 12 {
		h.tell(move(i + 1))
	}
	if frames := w.take(); len(frames) != 1 || !frames[0].GetAll() || len(frames[0].GetDeltas()) > 0 {
		t.Fatalf("got %v", frames)
	}
	h.tell(move(20))
	if frames := w.take(); len(frames) != 1 || frames[0].GetAll() || len(frames[0].GetDeltas()) != 1 || frames[0].GetDeltas()[0].GetRevision() != 20 {
		t.Fatalf("after that: %v", frames)
	}
	h.tell(move(21))
	h.tell(Change{All: true})
	if frames := w.take(); len(frames) != 1 || !frames[0].GetAll() || len(frames[0].GetDeltas()) > 0 {
		t.Fatalf("with All: %v", frames)
	}
}
