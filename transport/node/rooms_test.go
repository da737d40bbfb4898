package node

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

// hotel is a gateway that takes several rooms.
type hotel struct{ *gateway }

func (hotel) Features() []pubsub.Feature { return []pubsub.Feature{pubsub.Feature_FEATURE_ROOMS} }

func (h hotel) DeliverLasting(user string, m *Message, _ *Confirmation) Outcome {
	return h.Deliver(user, m)
}

func TestPushToSeveralRoomsNamesThem(t *testing.T) {
	g := newGateway()
	b := serve(t, Config{Sessions: hotel{g}})
	m := b.mustOpen(t)
	if !slices.Contains(m.reply.GetFeatures(), pubsub.Feature_FEATURE_ROOMS) {
		t.Fatalf("features %v", m.reply.GetFeatures())
	}
	content := &pubsub.MessageContent{Data: []byte("x")}
	rooms := []string{"r", "s", "r"}
	m.deliver(
		&pubsub.Delivery{Content: content, UserIds: []string{"u1"}, RoomIds: rooms},
		&pubsub.Delivery{Content: content, Audience: &pubsub.Audience{Id: 1, Version: 1, RoomIds: rooms, Join: []string{"u1", "u2"}}},
		&pubsub.Delivery{Content: content, Audience: &pubsub.Audience{Id: 1, Version: 2, Leave: []string{"u2"}}},
		&pubsub.Delivery{Content: content, UserIds: []string{"u1"}, RoomId: "r"},
	)
	m.answers(4)
	got := g.got["u1"]
	if len(got) != 4 || len(g.got["u2"]) != 1 {
		t.Fatalf("%d and %d messages", len(got), len(g.got["u2"]))
	}
	for i, m := range got[:3] {
		if m.RoomID != "" || !slices.Equal(m.Rooms.List(), rooms) {
			t.Errorf("message %d: room %q, rooms %v", i, m.RoomID, m.Rooms)
		}
	}
	if place, is := got[1].Rooms.Place("s"); place != 1 || !is || got[1].Rooms != got[2].Rooms {
		t.Errorf("s has place %d, %v", place, is)
	}
	if place, is := got[1].Rooms.Place("r"); place != 0 || !is {
		t.Errorf("r has place %d, %v", place, is)
	}
	if _, is := got[1].Rooms.Place("x"); is {
		t.Error("x is one of the rooms")
	}
	if last := got[3]; last.RoomID != "r" || last.Rooms != nil {
		t.Errorf("of one room: %q, %v", last.RoomID, last.Rooms)
	}
}

func TestSeveralRoomsThatCannotBeBreakTheStream(t *testing.T) {
	rooms := []string{"r", "s"}
	join := []string{"u"}
	for name, test := range map[string]struct {
		delivery *pubsub.Delivery
		cannot   bool // the node has not said that it can
	}{
		"beside a room":            {delivery: &pubsub.Delivery{UserIds: join, RoomId: "r", RoomIds: rooms}},
		"for everybody":            {delivery: &pubsub.Delivery{Everybody: true, RoomIds: rooms}},
		"beside an audience":       {delivery: &pubsub.Delivery{Audience: &pubsub.Audience{Id: 1, Version: 1, RoomId: "r", Join: join}, RoomIds: rooms}},
		"an audience of both":      {delivery: &pubsub.Delivery{Audience: &pubsub.Audience{Id: 1, Version: 1, RoomId: "r", RoomIds: rooms, Join: join}}},
		"unasked":                  {delivery: &pubsub.Delivery{UserIds: join, RoomIds: rooms}, cannot: true},
		"unasked, for an audience": {delivery: &pubsub.Delivery{Audience: &pubsub.Audience{Id: 1, Version: 1, RoomIds: rooms, Join: join}}, cannot: true},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGateway()
			var s Sessions = hotel{g}
			if test.cannot {
				s = g
			}
			m := serve(t, Config{Sessions: s}).mustOpen(t)
			test.delivery.Content = &pubsub.MessageContent{Data: []byte("x")}
			m.deliver(test.delivery)
			_, err := m.stream.Recv()
			if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "room_id") {
				t.Errorf("ended with %v", err)
			}
			if len(g.got) > 0 {
				t.Errorf("handed over: %v", g.got)
			}
		})
	}
}

func TestRoomsOfAMessageShareNoMemoryWithItsFrame(t *testing.T) {
	frame := []byte("rsu")
	d := &delivery{rooms: []string{wire.String(frame[:1]), wire.String(frame[1:2])}, users: []string{wire.String(frame[2:])}}
	var m Message
	if _, _, err := (&stream{server: &Server{does: lastingParts{rooms: true}}}).targets(d, &m); err != nil {
		t.Fatal(err)
	}
	copy(frame, "xyz")
	if got := m.Rooms.List(); !slices.Equal(got, []string{"r", "s"}) {
		t.Errorf("rooms %q", got)
	}
}
