package presence

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine/route"
	pubsub "github.com/push-manager/push-manager/proto"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		goleak.IgnoreCurrent(), // what libraries start for the process
		goleak.IgnoreAnyFunction("github.com/VictoriaMetrics/metrics.summariesSwapCron"),
		// go-redis keeps one for the process (redis/go-redis#3620).
		goleak.IgnoreAnyFunction("github.com/redis/go-redis/v9/internal/pool.startGlobalTimeCache.func1"))
}

// ledger is what a caller keeps of a room or user: by room and user, the nodes.
type ledger map[string]string

func (l ledger) put(e *pubsub.PresenceEntry) {
	l[e.GetRoomId()+"|"+e.GetUserId()] = strings.Join(e.GetNodeIds(), ",")
}

// apply takes a change over, and says what is wrong with it.
func (l ledger) apply(c *pubsub.PresenceChange) error {
	e := c.GetEntry()
	key := e.GetRoomId() + "|" + e.GetUserId()
	was, known := l[key]
	switch c.GetKind() {
	case pubsub.PresenceChangeKind_JOINED, pubsub.PresenceChangeKind_CONNECTED:
		if known {
			return fmt.Errorf("%v, and it was there", c)
		}
		l.put(e)
	case pubsub.PresenceChangeKind_LEFT, pubsub.PresenceChangeKind_DISCONNECTED:
		if !known || len(e.GetNodeIds()) > 0 {
			return fmt.Errorf("%v, and it was not there", c)
		}
		delete(l, key)
	default:
		if l.put(e); !known || was == l[key] {
			return fmt.Errorf("%v, and it was %q", c, was)
		}
	}
	return nil
}

func drawRoom(t *rapid.T) roomState {
	users, nodes := []string{"a", "b", "c", "d", "e"}, []string{"n1", "n2", "n3"}
	s := &route.Snapshot{}
	all, count := map[string]int{}, 0
	for _, node := range nodes {
		list := rapid.SliceOfDistinct(rapid.SampledFrom(users), rapid.ID).Draw(t, node)
		if slices.Sort(list); len(list) > 0 {
			s.Groups = append(s.Groups, &route.Group{Node: node, Users: list})
		}
		for _, user := range list {
			all[user]++
		}
	}
	for _, user := range rapid.SliceOfDistinct(rapid.SampledFrom(users), rapid.ID).Draw(t, "unplaced") {
		if all[user] == 0 {
			s.Unplaced = append(s.Unplaced, user)
			count++
		}
	}
	slices.Sort(s.Unplaced)
	for user, n := range all {
		if n > 1 {
			s.Shared = append(s.Shared, user)
		}
	}
	slices.Sort(s.Shared)
	s.Users, s.Found = len(all)+count, len(all)+count > 0
	return roomState{s}
}

func drawUser(t *rapid.T) userState {
	list := func(name string) []string {
		l := rapid.SliceOfDistinct(rapid.SampledFrom([]string{"1", "2", "3"}), rapid.ID).Draw(t, name)
		slices.Sort(l)
		return l
	}
	if rapid.Bool().Draw(t, "offline") {
		return userState{}
	}
	return userState{append([]string{"0"}, list("nodes")...), list("rooms")}
}

func entriesOf(s state, of target) ledger {
	l := ledger{}
	s.entries(of, func(e *pubsub.PresenceEntry) bool {
		if _, twice := l[e.GetRoomId()+"|"+e.GetUserId()]; twice {
			panic(fmt.Sprint("twice: ", e))
		}
		l.put(e)
		return true
	})
	return l
}

// What has changed makes the state after out of the state before, with nothing left out and nothing told that was so already.
func TestChangesMakeOneStateOutOfAnother(t *testing.T) {
	room, user := target{true, "r"}, target{false, "u"}
	rapid.Check(t, func(t *rapid.T) {
		var of target
		var before, after state
		if rapid.Bool().Draw(t, "of a room") {
			of, before, after = room, drawRoom(t), drawRoom(t)
		} else {
			of, before, after = user, drawUser(t), drawUser(t)
		}
		l := entriesOf(before, of)
		if len(l) > 0 != (before.size() > 0) {
			t.Fatalf("a size of %d, and %v", before.size(), l)
		}
		changes, fits := before.to(after, of, 100)
		if !fits {
			t.Fatal("too many changes")
		}
		for _, c := range changes {
			if err := l.apply(c); err != nil {
				t.Fatal(err)
			}
		}
		if want := entriesOf(after, of); !maps.Equal(l, want) {
			t.Fatalf("%v, want %v", l, want)
		}
		if again, _ := after.to(after, of, 100); len(again) > 0 {
			t.Fatalf("nothing has changed, and it is told %v", again)
		}
	})
}
