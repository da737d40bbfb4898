package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine/route"
	pubsub "github.com/push-manager/push-manager/proto"
)

func TestPagesOfARoom(t *testing.T) {
	var reply *pubsub.ListMembersResponse
	var failure error
	asked := 0
	v := serve(t, &script{members: func() (*pubsub.ListMembersResponse, error) { asked++; return reply, failure }})
	c := connect(t, v, Config{})
	reply = &pubsub.ListMembersResponse{NextPageToken: "2", UserCount: 3, Members: []*pubsub.UserInfo{
		{UserId: "a", NodeId: "n"}, {UserId: "", NodeId: "n"}, {UserId: "b", NodeId: "\x00"}, {UserId: "c"},
	}}
	page, err := c.ListMembers(t.Context(), "r", "1", 10)
	if err != nil || len(page.GetMembers()) != 2 || page.GetMembers()[1].GetUserId() != "c" || page.GetNextPageToken() != "2" || page.GetUserCount() != 3 {
		t.Errorf("%v, %v", page, err)
	}
	if _, err := c.ListMembers(t.Context(), "r", strings.Repeat("1", 513), 10); !errors.Is(err, ErrPageToken) || asked != 1 {
		t.Errorf("%v, asked %d times", err, asked)
	}
	reply = &pubsub.ListMembersResponse{NextPageToken: strings.Repeat("1", 513)}
	if _, err := c.ListMembers(t.Context(), "r", "", 10); !errors.Is(err, route.ErrUnavailable) {
		t.Errorf("a token that is too long: %v", err)
	}
	for code, want := range map[codes.Code]error{
		codes.OutOfRange: ErrPageGone, codes.InvalidArgument: ErrPageToken, codes.Unavailable: route.ErrAway, codes.PermissionDenied: route.ErrUnavailable,
	} {
		failure = status.Error(code, "no")
		if _, err := c.ListMembers(t.Context(), "r", "", 10); !errors.Is(err, want) {
			t.Errorf("%v: %v", code, err)
		}
	}
	failure, asked = errNone, 0
	for range 3 {
		if _, err := c.ListMembers(t.Context(), "r", "", 10); !errors.Is(err, ErrNoPages) || asked != 1 {
			t.Errorf("%v, asked %d times", err, asked)
		}
	}
}

// Rooms are asked for, one by one where the Controller has no GetUserNodes, and what no push could name is left out.
func TestWhereaboutsOfUsers(t *testing.T) {
	where := func(user string, rooms bool) *pubsub.GetUserNodeResponse {
		if user == "nobody" || !rooms {
			return &pubsub.GetUserNodeResponse{RoomIds: []string{"r"}}
		}
		return &pubsub.GetUserNodeResponse{Found: true, NodeId: "n1", NodeIds: []string{"n1", "", "n2", "n1"}, RoomIds: []string{"r of " + user, "", "\x00"}}
	}
	one := func(_ context.Context, in *pubsub.GetUserNodeRequest) (*pubsub.GetUserNodeResponse, error) {
		if in.GetUserId() == "u7" {
			return nil, status.Error(codes.NotFound, "nobody")
		}
		return where(in.GetUserId(), in.GetWithRooms()), nil
	}
	many := func(_ context.Context, in *pubsub.GetUserNodesRequest) (*pubsub.GetUserNodesResponse, error) {
		out := &pubsub.GetUserNodesResponse{}
		for _, user := range in.GetUserIds() {
			r, err := one(t.Context(), &pubsub.GetUserNodeRequest{UserId: user, WithRooms: in.GetWithRooms()})
			if err != nil {
				r = &pubsub.GetUserNodeResponse{}
			}
			out.Users = append(out.Users, r)
		}
		return out, nil
	}
	for name, s := range map[string]*script{"in batches": {user: one, users: many}, "one by one": {user: one}} {
		c := connect(t, serve(t, s), Config{})
		users := []string{"nobody"}
		for i := range 250 {
			users = append(users, fmt.Sprint("u", i))
		}
		answers, err := c.Whereabouts(t.Context(), users)
		if err != nil || len(answers) != len(users) {
			t.Fatal(name, len(answers), err)
		}
		for i, a := range answers {
			if users[i] == "nobody" || users[i] == "u7" {
				if a.GetFound() || len(a.GetRoomIds()) > 0 {
					t.Errorf("%s: %v", name, a)
				}
			} else if fmt.Sprint(a.GetNodeIds(), a.GetRoomIds()) != "[n1 n2] [r of "+users[i]+"]" {
				t.Errorf("%s: %v", name, a)
			}
		}
	}
	c := connect(t, serve(t, &script{user: func(context.Context, *pubsub.GetUserNodeRequest) (*pubsub.GetUserNodeResponse, error) {
		return nil, status.Error(codes.Unavailable, "cold")
	}}), Config{})
	if _, err := c.Whereabouts(t.Context(), []string{"a"}); !errors.Is(err, route.ErrUnavailable) {
		t.Errorf("%v", err)
	}
}
