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
