package client_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"reflect"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/push-manager/push-manager/client"
	pubsub "github.com/push-manager/push-manager/proto"
)

// presence keeps what it is asked for, and answers what a test says.
type presence struct {
	pubsub.UnimplementedPresenceServiceServer

	asked []*pubsub.DisconnectRequest

	pages   map[string]*pubsub.GetRoomMembersResponse // by page token
	users   *pubsub.GetUsersResponse
	watch   []*pubsub.WatchPresenceResponse
	ends    error // of the watch; nil: it goes on until the caller leaves
	watched []*pubsub.WatchPresenceRequest
}

func (p *presence) GetRoomMembers(_ context.Context, r *pubsub.GetRoomMembersRequest) (*pubsub.GetRoomMembersResponse, error) {
	page, ok := p.pages[r.GetRoomId()+r.GetPageToken()]
	if !ok {
		return nil, status.Error(codes.NotFound, "no such page")
	}
	return page, nil
}

func (p *presence) GetUsers(_ context.Context, r *pubsub.GetUsersRequest) (*pubsub.GetUsersResponse, error) {
	if len(r.GetUserIds()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "nobody")
	}
	return p.users, nil
}

func (p *presence) WatchPresence(r *pubsub.WatchPresenceRequest, stream grpc.ServerStreamingServer[pubsub.WatchPresenceResponse]) error {
	p.watched = append(p.watched, r)
	for _, m := range p.watch {
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	if p.ends == nil {
		<-stream.Context().Done()
	}
	return p.ends
}

// newPresence serves p, and dials it.
func newPresence(t *testing.T, p *presence) *client.Client {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	pubsub.RegisterPresenceServiceServer(server, p)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(lis) }()
	t.Cleanup(func() {
		server.Stop()
		<-ended
	})
	c, err := client.New(lis.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func (p *presence) Disconnect(_ context.Context, r *pubsub.DisconnectRequest) (*pubsub.DisconnectResponse, error) {
	p.asked = append(p.asked, r)
	return &pubsub.DisconnectResponse{
		Disconnected: 4, Nodes: 2, Message: "1 of 3", NodeFailures: []*pubsub.NodeFailure{{NodeId: "n", Reason: "unknown: no acknowledgement in time"}},
	}, nil
}

func TestDisconnectAsksAndTellsWhatThereIs(t *testing.T) {
	p := new(presence)
	c := newPresence(t, p)
	got, err := c.Disconnect(t.Context(), client.Disconnect{User: "u", Device: "d", Code: 4200, Reason: "why", RefuseFor: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if got.Success || got.Connections != 4 || got.Nodes != 2 || got.Message != "1 of 3" || len(got.Failures) != 1 || got.Failures[0].Outcome != client.Unknown {
		t.Errorf("%+v", got)
	}
	if _, err := c.Disconnect(t.Context(), client.Disconnect{Room: "r"}); err != nil {
		t.Error(err)
	}
	if _, err := c.AllowAgain(t.Context(), client.Disconnect{User: "u", Code: 4200}); err != nil {
		t.Error(err)
	}
	for i, want := range []*pubsub.DisconnectRequest{
		{UserId: "u", DeviceId: "d", Code: 4200, Reason: "why", RefuseFor: durationpb.New(time.Hour)}, {RoomId: "r"}, {UserId: "u", AllowAgain: true},
	} {
		if !proto.Equal(p.asked[i], want) {
			t.Errorf("asked for %v, want %v", p.asked[i], want)
		}
	}
}

func TestRoomMembersReadsAllPagesAndGivesEachMemberOnce(t *testing.T) {
	joined := time.Unix(1_800_000_000, 0)
	bob := &pubsub.RoomMember{UserId: "bob", NodeId: "n1"}
	p := &presence{pages: map[string]*pubsub.GetRoomMembersResponse{
		"r":    {Members: []*pubsub.RoomMember{{UserId: "alice", UserName: "Alice", NodeId: "n1", JoinTime: timestamppb.New(joined)}, bob}, NextPageToken: "2"},
		"r2":   {NextPageToken: "3"},
		"r3":   {Members: []*pubsub.RoomMember{bob, {UserId: "bob", NodeId: "n2"}}},
		"gone": {Members: []*pubsub.RoomMember{bob}, NextPageToken: "2"},
	}}
	c := newPresence(t, p)
	var got []client.RoomMember
	for m, err := range c.RoomMembers(within(t), "r") {
		if err != nil {
			t.Fatal(err)
		}
		m.Joined = m.Joined.Local()
		got = append(got, m)
	}
	want := []client.RoomMember{{User: "alice", Name: "Alice", Node: "n1", Joined: joined}, {User: "bob", Node: "n1", Joined: time.Time{}.Local()}, {User: "bob", Node: "n2", Joined: time.Time{}.Local()}}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	var said []string
	for m, err := range c.RoomMembers(within(t), "gone") { // the error comes behind what was read
		said = append(said, m.User+" "+status.Code(err).String())
	}
	if !slices.Equal(said, []string{"bob OK", " NotFound"}) {
		t.Errorf("got %q", said)
	}
	for range c.RoomMembers(within(t), "r") {
		break // whoever has seen enough asks for no other page
	}
}

func TestPresenceTellsOfEachUserWhatTheReplySays(t *testing.T) {
	since := time.Unix(1_800_000_000, 0)
	c := newPresence(t, &presence{users: &pubsub.GetUsersResponse{Users: []*pubsub.UserPresence{
		{UserId: "a", Online: true, NodeIds: []string{"n"}, RoomIds: []string{"r"}, Incomplete: true, Connections: []*pubsub.UserConnection{
			{NodeId: "n", ConnectionId: "c", DeviceId: "d", Attributes: map[string]string{"k": "v"}, RoomIds: []string{"r"}, ConnectTime: timestamppb.New(since)}, {NodeId: "n"},
		}},
		{UserId: "b"},
	}}})
	got, err := c.Presence(within(t), "a", "b")
	if err != nil {
		t.Fatal(err)
	}
	want := []client.Presence{
		{User: "a", Online: true, Nodes: []string{"n"}, Rooms: []string{"r"}, Incomplete: true, Connections: []client.Connection{
			{Node: "n", ID: "c", Device: "d", Attributes: map[string]string{"k": "v"}, Rooms: []string{"r"}, Since: since.UTC()}, {Node: "n"},
		}},
		{User: "b"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if _, err := c.Presence(within(t)); status.Code(err) != codes.InvalidArgument {
		t.Errorf("of nobody: %v", err)
	}
}

func TestAWatchOfPresenceGivesWhatComesAndItsErrorLast(t *testing.T) {
	p := &presence{ends: status.Error(codes.Unavailable, "this instance stops"), watch: []*pubsub.WatchPresenceResponse{
		{What: &pubsub.WatchPresenceResponse_Snapshot{Snapshot: &pubsub.PresenceSnapshot{First: true}}},
		{Position: "p.1", What: &pubsub.WatchPresenceResponse_Changes{Changes: &pubsub.PresenceChanges{Changes: []*pubsub.PresenceChange{{Kind: pubsub.PresenceChangeKind_JOINED}}}}},
	}}
	c := newPresence(t, p)
	said := func(events iter.Seq2[client.PresenceEvent, error]) (all []string) {
		for e, err := range events {
			all = append(all, fmt.Sprintf("%q snapshot %v, %d changes, %v", e.Position, e.Snapshot != nil, len(e.Changes), status.Code(err)))
		}
		return all
	}
	want := []string{`"" snapshot true, 0 changes, OK`, `"p.1" snapshot false, 1 changes, OK`, `"" snapshot false, 0 changes, Unavailable`}
	if got := said(c.WatchRoom(within(t), "r", "p.0")); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	p.ends = nil
	ctx, leave := context.WithCancel(within(t))
	n := 0
	for _, err := range c.WatchUser(ctx, "u", "") {
		if n++; n == len(p.watch) {
			leave()
		}
		if n > len(p.watch) && !errors.Is(err, context.Canceled) {
			t.Errorf("after the caller has left: %v", err)
		}
	}
	leave()
	if n != len(p.watch)+1 {
		t.Errorf("%d events", n)
	}
	for range c.WatchUser(within(t), "u", "") {
		break // the stream ends with it, or the server would not stop
	}
	for i, want := range []*pubsub.WatchPresenceRequest{{RoomId: "r", Position: "p.0"}, {UserId: "u"}, {UserId: "u"}} {
		if !proto.Equal(p.watched[i], want) {
			t.Errorf("asked for %v, want %v", p.watched[i], want)
		}
	}
}
