package controller

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/push-manager/push-manager/engine/route"
	pubsub "github.com/push-manager/push-manager/proto"
)

// slowly takes its time to apply moves, and looks whether they are acknowledged meanwhile.
type slowly struct {
	ledger

	t     *testing.T
	f     *follower
	moves []route.Move
}

func (s *slowly) Moved(moves []route.Move) {
	time.Sleep(time.Second)
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	if len(s.f.acks) > 0 {
		s.t.Error("acknowledged before they are applied")
	}
	s.moves = append(s.moves, moves...)
}

func TestDeltasAreAcknowledgedOnceTheyAreApplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFollower()
		v := serve(t, &script{follow: f.follow})
		changes := &slowly{t: t, f: f}
		c := connect(t, v, Config{})
		c.Start(changes)
		synctest.Wait()
		f.send <- &pubsub.FollowRoutesResponse{Seq: 1, Changes: &pubsub.WatchRoutesResponse{Deltas: []*pubsub.MemberDelta{
			{RoomId: "r", UserId: "u", NodeId: "n", Left: true, Revision: 7},
			{RoomId: "s", UserId: "v", NodeId: "", Revision: 8},
			{RoomId: "t", UserId: "w", NodeId: "n"},
		}}}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if want := []route.Move{{Room: "r", User: "u", Node: "n", Left: true, Revision: 7}}; !slices.Equal(changes.moves, want) {
			t.Errorf("moved: %v", changes.moves)
		}
		var names ledger // Those without a node, or a revision, are told as names.
		names.Invalidate([]string{"s"}, []string{"v"})
		names.Invalidate([]string{"t"}, []string{"w"})
		changes.mu.Lock()
		for _, line := range names.lines {
			if !slices.Contains(changes.lines, line) {
				t.Errorf("%q is not among %q", line, changes.lines)
			}
		}
		changes.mu.Unlock()
		f.mu.Lock()
		if !slices.Equal(f.acks, []uint64{1}) {
			t.Errorf("acknowledged: %v", f.acks)
		}
		f.mu.Unlock()
		_ = c.Close()
		v.down()
	})
}

func TestRevisionIsThatOfTheStoreWhichIsFollowed(t *testing.T) {
	for _, test := range []struct {
		followed, answers string
		want              uint64
	}{
		{"s", "s", 7},
		{"s", "other", 0},
		{"s", "", 0}, // a Controller from before deltas answers
		{"", "", 0},
		{"", "s", 0}, // and one tells of changes
	} {
		synctest.Test(t, func(t *testing.T) {
			f := newFollower()
			f.store = test.followed
			v := serve(t, &script{follow: f.follow, room: func(context.Context, *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
				return &pubsub.GetRoomInfoResponse{RoomInfo: &pubsub.RoomInfo{RoomId: "r"}, Revision: 7, StoreId: test.answers}, nil
			}})
			c := connect(t, v, Config{})
			c.Start(&ledger{})
			synctest.Wait()
			found, revision, err := c.Room(t.Context(), "r", func(_, _ []byte) {})
			if !found || revision != test.want || err != nil {
				t.Errorf("%v: %v, %d, %v", test, found, revision, err)
			}
			_ = c.Close()
			v.down()
		})
	}
}
