package ingress

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/link"
	"github.com/push-manager/push-manager/transport/presence"
)

// whereabouts is a Controller as presence asks it: everybody is on n1, in the rooms that stand here.
type whereabouts struct {
	rooms map[string][]string // by user
	err   error
}

func (w *whereabouts) ListMembers(_ context.Context, room, token string, size int) (*pubsub.ListMembersResponse, error) {
	if w.err != nil {
		return nil, w.err
	}
	out := &pubsub.ListMembersResponse{}
	for _, user := range []string{"a", "b", "shop/a", "shop/b", "shop-2/c"} {
		out.Members = append(out.Members, &pubsub.UserInfo{UserId: user, UserName: room, NodeId: "n1", JoinedAt: 7})
	}
	out.UserCount = int32(len(out.Members))
	out.NextPageToken = fmt.Sprint(token, "+", size)
	return out, nil
}

func (w *whereabouts) Whereabouts(_ context.Context, users []string) ([]*pubsub.GetUserNodeResponse, error) {
	var out []*pubsub.GetUserNodeResponse
	for _, user := range users {
		rooms := w.rooms[user]
		r := &pubsub.GetUserNodeResponse{Found: len(rooms) > 0, RoomIds: rooms}
		if r.GetFound() {
			r.NodeIds = []string{"n1"}
		}
		out = append(out, r)
	}
	return out, w.err
}
func (w *whereabouts) Watched() bool    { return true }
func (*whereabouts) Renewed() time.Time { return time.Time{} }

// withPresence has presence, for which the node n1 answers.
func withPresence(t *testing.T, c *whereabouts, change func(*Config, *engine.Config)) (*world, pubsub.PresenceServiceClient) {
	t.Helper()
	w := newWorld(t, func(cfg *Config, ec *engine.Config) {
		if change != nil {
			change(cfg, ec)
		}
		e, err := engine.New(*ec)
		ok(t, err)
		cfg.Presence, err = presence.New(presence.Config{
			Controller: c, Room: e.Room,
			Connections: func(_ context.Context, node string, users []string) (said []*pubsub.UserConnections, err error) {
				if node != "n1" {
					return nil, link.ErrNotConnected
				}
				for _, user := range users {
					said = append(said, &pubsub.UserConnections{Connections: []*pubsub.Connection{{ConnectionId: "7", DeviceId: "phone of " + user, RoomIds: c.rooms[user], ConnectedAt: 9}}})
				}
				return said, nil
			},
		})
		ok(t, err)
		t.Cleanup(cfg.Presence.Close)
	})
	return w, pubsub.NewPresenceServiceClient(w.conn)
}

func TestPresenceOverTheAPI(t *testing.T) {
	c := &whereabouts{rooms: map[string][]string{"a": {"r2", "@node:n1", "r1"}}}
	w, client := withPresence(t, c, nil)
	page, err := client.GetRoomMembers(w.context(), &pubsub.GetRoomMembersRequest{RoomId: "r", PageToken: "t", PageSize: 10})
	ok(t, err)
	if m := page.GetMembers(); len(m) != 5 || m[0].GetUserId() != "a" || m[0].GetNodeId() != "n1" || m[0].GetUserName() != "r" || m[0].GetJoinTime().GetSeconds() != 7 ||
		page.GetNextPageToken() != "t+10" || page.GetUserCount() != 5 {
		t.Errorf("%v", page)
	}
	users, err := client.GetUsers(w.context(), &pubsub.GetUsersRequest{UserIds: []string{"b", "a"}})
	ok(t, err)
	b, a := users.GetUsers()[0], users.GetUsers()[1]
	if b.GetUserId() != "b" || b.GetOnline() || len(b.GetConnections()) > 0 || b.GetIncomplete() {
		t.Errorf("%v", b)
	}
	if !a.GetOnline() || fmt.Sprint(a.GetNodeIds(), a.GetRoomIds()) != "[n1] [r1 r2]" || len(a.GetConnections()) != 1 || a.GetConnections()[0].GetDeviceId() != "phone of a" ||
		fmt.Sprint(a.GetConnections()[0].GetRoomIds()) != "[r1 r2]" || a.GetConnections()[0].GetConnectTime().GetSeconds() != 9 {
		t.Errorf("%v", a)
	}

	// A watch begins with all there is, and ends when the server drains.
	watch, err := client.WatchPresence(w.context(), &pubsub.WatchPresenceRequest{RoomId: "r"})
	ok(t, err)
	first, err := watch.Recv()
	ok(t, err)
	if s := first.GetSnapshot(); !s.GetFirst() || !s.GetLast() || s.GetReason() != pubsub.SnapshotReason_SNAPSHOT_INITIAL || len(s.GetEntries()) != 3 || first.GetPosition() == "" {
		t.Errorf("%v", first)
	}
	if n := w.metric("push_manager_presence_watchers"); n != "1" {
		t.Errorf("%s watchers", n)
	}
	w.server.startDraining()
	_, err = watch.Recv()
	wantError(t, err, codes.Unavailable, "DRAINING", "")
	w.noDelivery(t)
}

func TestPresenceThatCannotBeToldIsRefused(t *testing.T) {
	c := &whereabouts{}
	w, client := withPresence(t, c, nil)
	long := make([]string, presence.UsersMost+1)
	for i := range long {
		long[i] = fmt.Sprint("u", i)
	}
	members := func(r *pubsub.GetRoomMembersRequest) error {
		_, err := client.GetRoomMembers(w.context(), r)
		return err
	}
	users := func(ids ...string) error {
		_, err := client.GetUsers(w.context(), &pubsub.GetUsersRequest{UserIds: ids})
		return err
	}
	watch := func(r *pubsub.WatchPresenceRequest) error {
		stream, err := client.WatchPresence(w.context(), r)
		ok(t, err)
		_, err = stream.Recv()
		return err
	}
	wantError(t, members(&pubsub.GetRoomMembersRequest{}), codes.InvalidArgument, "REQUIRED", "room_id")
	wantError(t, members(&pubsub.GetRoomMembersRequest{RoomId: "r", PageSize: 1001}), codes.InvalidArgument, "OUT_OF_RANGE", "page_size")
	wantError(t, members(&pubsub.GetRoomMembersRequest{RoomId: "r", PageSize: -1}), codes.InvalidArgument, "OUT_OF_RANGE", "page_size")
	wantError(t, users(), codes.InvalidArgument, "REQUIRED", "user_ids")
	wantError(t, users(long...), codes.InvalidArgument, "TOO_MANY", "user_ids")
	wantError(t, users("a", ""), codes.InvalidArgument, "REQUIRED", "user_ids[1]")
	wantError(t, watch(&pubsub.WatchPresenceRequest{}), codes.InvalidArgument, "REQUIRED", "room_id")
	wantError(t, watch(&pubsub.WatchPresenceRequest{RoomId: "r", UserId: "u"}), codes.InvalidArgument, "MALFORMED", "user_id")
	wantError(t, watch(&pubsub.WatchPresenceRequest{UserId: strings.Repeat("u", 257)}), codes.InvalidArgument, "ID_TOO_LONG", "user_id")
	wantError(t, watch(&pubsub.WatchPresenceRequest{UserId: "u", Position: "nowhere"}), codes.InvalidArgument, "MALFORMED", "position")
	for err, want := range map[error]struct {
		code          codes.Code
		reason, field string
	}{
		presence.ErrNoPages:   {codes.FailedPrecondition, "MEMBERS_UNSUPPORTED", ""},
		presence.ErrPageGone:  {codes.OutOfRange, "PAGE_TOKEN_GONE", ""},
		presence.ErrPageToken: {codes.InvalidArgument, "MALFORMED", "page_token"},
		engine.ErrUnavailable: {codes.Unavailable, "CONTROLLER_UNAVAILABLE", ""},
	} {
		c.err = err
		wantError(t, members(&pubsub.GetRoomMembersRequest{RoomId: "r"}), want.code, want.reason, want.field)
	}
	c.err = nil
	c.rooms = map[string][]string{}
	for _, user := range long[:1000] {
		for i := range 20 {
			c.rooms[user] = append(c.rooms[user], strings.Repeat("x", 200)+fmt.Sprint(i))
		}
	}
	wantError(t, users(long[:1000]...), codes.InvalidArgument, "REPLY_TOO_LARGE", "user_ids")

	w = newWorld(t, nil)
	client = pubsub.NewPresenceServiceClient(w.conn)
	wantError(t, members(&pubsub.GetRoomMembersRequest{RoomId: "r"}), codes.FailedPrecondition, "PRESENCE_OFF", "")
	wantError(t, users("a"), codes.FailedPrecondition, "PRESENCE_OFF", "")
	wantError(t, watch(&pubsub.WatchPresenceRequest{UserId: "a"}), codes.FailedPrecondition, "PRESENCE_OFF", "")
}

// A caller sees the rooms and users that it may, and one of a tenant sees what is the tenant's, by its own names.
func TestPresenceIsShownByRights(t *testing.T) {
	a := newAccess(t, authtest.New(t, "version: 1\ntenants: {shop: {}}\ncallers:\n"+
		caller("some", `{methods: [GetRoomMembers, WatchRoomPresence], rooms: ["r1"]}, {methods: [GetUsers, WatchPresence], users: ["a*"]}`, `, tenant: "*"`)+
		caller("pusher", `{methods: [PushToUser], users: ["*"]}`, `, tenant: "*"`)+
		caller("seller", `{methods: ["*"], users: ["*"], rooms: ["*"]}`, ", tenant: shop")))
	c := &whereabouts{rooms: map[string][]string{"a": {"r1", "r2"}, "shop/a": {"shop/r1", "@node:n1", "r2"}}}
	w, client := withPresence(t, c, a.set)
	w.source.rooms["shop/r"] = []member{{"shop/a", "n1"}, {"b", "n1"}}
	some, seller := w.as(a.Token("some", time.Hour)), w.as(a.Token("seller", time.Hour))
	watch := func(ctx context.Context, r *pubsub.WatchPresenceRequest) (*pubsub.WatchPresenceResponse, error) {
		stream, err := client.WatchPresence(ctx, r)
		ok(t, err)
		return stream.Recv()
	}

	_, err := client.GetRoomMembers(some, &pubsub.GetRoomMembersRequest{RoomId: "r1"})
	ok(t, err)
	_, err = client.GetRoomMembers(some, &pubsub.GetRoomMembersRequest{RoomId: "r2"})
	wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")
	_, err = client.GetUsers(some, &pubsub.GetUsersRequest{UserIds: []string{"a", "b"}})
	wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")
	users, err := client.GetUsers(some, &pubsub.GetUsersRequest{UserIds: []string{"a"}})
	ok(t, err)
	if u := users.GetUsers()[0]; fmt.Sprint(u.GetRoomIds(), u.GetConnections()[0].GetRoomIds()) != "[r1] [r1]" {
		t.Errorf("%v", u)
	}
	_, err = watch(some, &pubsub.WatchPresenceRequest{RoomId: "r2"})
	wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")
	_, err = watch(some, &pubsub.WatchPresenceRequest{UserId: "b"})
	wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")
	seen, err := watch(some, &pubsub.WatchPresenceRequest{UserId: "a"})
	ok(t, err)
	if e := seen.GetSnapshot().GetEntries(); len(e) != 2 || e[1].GetRoomId() != "r1" {
		t.Errorf("%v", e)
	}
	_, err = client.GetUsers(w.as(a.Token("pusher", time.Hour)), &pubsub.GetUsersRequest{UserIds: []string{"a"}})
	wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")

	page, err := client.GetRoomMembers(seller, &pubsub.GetRoomMembersRequest{RoomId: "r"})
	ok(t, err)
	if m := page.GetMembers(); len(m) != 2 || m[0].GetUserId() != "a" || m[0].GetUserName() != "shop/r" || m[1].GetUserId() != "b" {
		t.Errorf("%v", m)
	}
	users, err = client.GetUsers(seller, &pubsub.GetUsersRequest{UserIds: []string{"a"}})
	ok(t, err)
	if u := users.GetUsers()[0]; u.GetUserId() != "a" || fmt.Sprint(u.GetRoomIds(), u.GetConnections()[0].GetRoomIds()) != "[r1] [r1]" {
		t.Errorf("%v", u)
	}
	seen, err = watch(seller, &pubsub.WatchPresenceRequest{RoomId: "r"})
	ok(t, err)
	if e := seen.GetSnapshot().GetEntries(); len(e) != 1 || e[0].GetUserId() != "a" || e[0].GetRoomId() != "r" {
		t.Errorf("%v", e)
	}
}

// What changes is not told to who may not watch it any more, or is of another tenant by now: the stream ends within seconds, although
// nothing changes.
func TestAWatchOfPresenceEndsWithTheRightToIt(t *testing.T) {
	policy := func(watcher string) string {
		return "version: 1\ntenants: {shop: {}, news: {}}\ncallers:\n" + caller("other", `{methods: ["*"]}`, ", tenant: shop") + watcher
	}
	const both = `{methods: [WatchPresence], users: ["u"]}, {methods: [WatchRoomPresence], rooms: ["r"]}`
	for name, c := range map[string]struct {
		watch *pubsub.WatchPresenceRequest
		then  string
	}{
		"the right to a user":    {&pubsub.WatchPresenceRequest{UserId: "u"}, caller("watcher", `{methods: [WatchRoomPresence], rooms: ["*"]}`, ", tenant: shop")},
		"the right to this user": {&pubsub.WatchPresenceRequest{UserId: "u"}, caller("watcher", `{methods: [WatchPresence], users: ["v"]}`, ", tenant: shop")},
		"the right to a room":    {&pubsub.WatchPresenceRequest{RoomId: "r"}, caller("watcher", `{methods: [WatchPresence], users: ["*"]}`, ", tenant: shop")},
		"its tenant":             {&pubsub.WatchPresenceRequest{UserId: "u"}, caller("watcher", both, ", tenant: news")},
		"the right to all of it": {&pubsub.WatchPresenceRequest{RoomId: "r"}, caller("watcher", `{methods: [PushToUser], users: ["*"]}`, ", tenant: shop")},
		"who it was":             {&pubsub.WatchPresenceRequest{RoomId: "r"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAccess(t, authtest.New(t, policy(caller("watcher", both, ", tenant: shop"))))
			w, client := withPresence(t, &whereabouts{rooms: map[string][]string{"shop/u": {"shop/r"}}}, a.set)
			w.source.rooms["shop/r"] = []member{{"shop/u", "n1"}}
			stream, err := client.WatchPresence(w.as(a.Token("watcher", time.Hour)), c.watch)
			ok(t, err)
			_, err = stream.Recv()
			ok(t, err)
			a.WritePolicy(policy(c.then))
			a.policies.Reload()
			for err == nil {
				_, err = stream.Recv()
			}
			if code := status.Code(err); code != codes.PermissionDenied && code != codes.Unauthenticated {
				t.Error(err)
			}
		})
	}
}
