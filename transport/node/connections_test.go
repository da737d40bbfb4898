package node

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// described is a connection that says what it is.
type described struct {
	silent

	of Connection
}

func (c *described) Describe() Connection { return c.of }

func TestListConnectionsTellsOfEachUserInTheOrderOfTheRequest(t *testing.T) {
	users := NewUsers[*described]()
	phone := Connection{ID: "7", Device: "phone", Attributes: map[string]string{"platform": "ios", "bad": "\xff"}, Rooms: []string{"shop/r"}, Since: time.Unix(9, 0)}
	users.Add("a", &described{of: phone})
	users.Add("a", &described{})
	for range 120 {
		users.Add("many", &described{})
	}
	s := listingNode(t, users)
	r, err := s.ListConnections(t.Context(), &pubsub.ListConnectionsRequest{UserIds: []string{"many", "nobody", "a"}})
	if err != nil {
		t.Fatal(err)
	}
	u := r.GetUsers()
	if len(u) != 3 || len(u[0].GetConnections()) != 100 || !u[0].GetMore() || len(u[1].GetConnections()) != 0 || u[1].GetMore() || len(u[2].GetConnections()) != 2 {
		t.Fatalf("%v", r)
	}
	c := u[2].GetConnections()[0]
	if c.GetConnectionId() != "7" || c.GetDeviceId() != "phone" || c.GetAttributes()["platform"] != "ios" || c.GetAttributes()["bad"] != "�" ||
		fmt.Sprint(c.GetRoomIds()) != "[shop/r]" || c.GetConnectedAt() != 9 {
		t.Errorf("%v", c)
	}
	// Of a connection that does not describe itself only that it is there is told.
	mute := NewUsers[*silent]()
	mute.Add("a", &silent{})
	r, err = listingNode(t, mute).ListConnections(t.Context(), &pubsub.ListConnectionsRequest{UserIds: []string{"a"}})
	if err != nil || len(r.GetUsers()[0].GetConnections()) != 1 {
		t.Errorf("%v, %v", r, err)
	}
}

// An answer fits into a frame. Who has no place in it is asked for again, and one user who would fill it alone is cut.
func TestListOfConnectionsFitsIntoAFrame(t *testing.T) {
	users := NewUsers[*described]()
	var rooms []string
	for i := range 200 {
		rooms = append(rooms, strings.Repeat("r", 250)+fmt.Sprint(i)) // 50 KiB
	}
	var ids []string
	for i := range 30 {
		ids = append(ids, fmt.Sprint("u", i))
		users.Add(ids[i], &described{of: Connection{Rooms: rooms}})
	}
	for range 50 {
		users.Add("large", &described{of: Connection{Rooms: rooms}})
	}
	s := listingNode(t, users)
	got := 0
	for got < len(ids) {
		r, err := s.ListConnections(t.Context(), &pubsub.ListConnectionsRequest{UserIds: ids[got:]})
		if err != nil || len(r.GetUsers()) == 0 || r.SizeVT() > 1<<20 {
			t.Fatalf("%d users in %d bytes: %v", len(r.GetUsers()), r.SizeVT(), err)
		}
		for _, u := range r.GetUsers() {
			if len(u.GetConnections()) != 1 || u.GetMore() {
				t.Errorf("%d connections, more %v", len(u.GetConnections()), u.GetMore())
			}
		}
		got += len(r.GetUsers())
	}
	r, err := s.ListConnections(t.Context(), &pubsub.ListConnectionsRequest{UserIds: []string{"large", "u0"}})
	if err != nil || len(r.GetUsers()) != 1 || !r.GetUsers()[0].GetMore() || len(r.GetUsers()[0].GetConnections()) < 10 || r.SizeVT() > 1<<20 {
		t.Errorf("%d users, %d bytes: %v", len(r.GetUsers()), r.SizeVT(), err)
	}
}

func TestListConnectionsRefuses(t *testing.T) {
	s := listingNode(t, nameless{NewUsers[*silent]()})
	if _, err := s.ListConnections(t.Context(), &pubsub.ListConnectionsRequest{UserIds: []string{"a"}}); status.Code(err) != codes.Unimplemented {
		t.Errorf("%v", err)
	}
	s = listingNode(t, NewUsers[*silent]())
	for _, n := range []int{0, 1001} {
		if _, err := s.ListConnections(t.Context(), &pubsub.ListConnectionsRequest{UserIds: make([]string, n)}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%d: %v", n, err)
		}
	}
	s = listingNode(t, panicking{NewUsers[*silent]()})
	if _, err := (guarded{s}).ListConnections(t.Context(), &pubsub.ListConnectionsRequest{UserIds: []string{"a"}}); status.Code(err) != codes.Internal {
		t.Errorf("%v", err)
	}
}

func (panicking) Describe(string) []Connection { panic("a bug of the gateway") }
