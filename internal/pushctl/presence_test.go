package pushctl

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	pubsub "github.com/push-manager/push-manager/proto"
)

func (p *presence) GetRoomMembers(_ context.Context, r *pubsub.GetRoomMembersRequest) (*pubsub.GetRoomMembersResponse, error) {
	page, ok := p.pages[r.GetPageToken()]
	if !ok || r.GetRoomId() != "lobby" {
		return nil, status.Error(codes.InvalidArgument, "no such page\x1b")
	}
	return page, nil
}

func (p *presence) GetUsers(_ context.Context, r *pubsub.GetUsersRequest) (*pubsub.GetUsersResponse, error) {
	if !slices.Equal(r.GetUserIds(), []string{"alice", "bob"}) {
		return nil, status.Error(codes.PermissionDenied, "no")
	}
	return p.users, nil
}

func (p *presence) WatchPresence(r *pubsub.WatchPresenceRequest, stream grpc.ServerStreamingServer[pubsub.WatchPresenceResponse]) error {
	p.asked = append(p.asked, r)
	if len(p.asked) > len(p.watches) {
		return status.Error(codes.PermissionDenied, "not any more")
	}
	for _, m := range p.watches[len(p.asked)-1] {
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	return status.Error(codes.Unavailable, "this instance stops")
}

func TestMembersListsEachMemberOnceOverAllPages(t *testing.T) {
	since := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	member := func(user, node string) *pubsub.RoomMember { return &pubsub.RoomMember{UserId: user, NodeId: node} }
	named := member("alice", "n1")
	named.UserName, named.JoinTime = "Alice\x1b[31m", timestamppb.New(since)
	s := &server{presence: presence{pages: map[string]*pubsub.GetRoomMembersResponse{
		"":  {Members: []*pubsub.RoomMember{named, member("bob", "n1")}, NextPageToken: "2"},
		"2": {NextPageToken: "3"}, // a page may be empty
		"3": {Members: []*pubsub.RoomMember{member("bob", "n1"), member("bob", "n2")}},
	}}}
	addr := serve(t, s)
	alice := []string{"alice", "n1", since.Local().Format(time.DateTime), `Alice\x1b[31m`}
	for name, tc := range map[string]struct {
		args []string
		want []string // fields of lines
	}{
		"all":     {nil, []string{"USER NODE SINCE NAME", strings.Join(alice, " "), "bob n1 -", "bob n2 -"}},
		"limited": {[]string{"--limit=2"}, []string{"USER NODE SINCE NAME", strings.Join(alice, " "), "bob n1 -"}},
	} {
		code, out, errOut := pushctl(t, "", append([]string{"members", "lobby", "--address", addr}, tc.args...)...)
		var lines []string
		for line := range strings.Lines(out) {
			lines = append(lines, strings.Join(strings.Fields(line), " "))
		}
		if code != exitOK || !slices.Equal(lines, tc.want) {
			t.Errorf("%s: exit %d, %q\nwant %q; %s", name, code, lines, tc.want, errOut)
		}
	}
	if code, out, errOut := pushctl(t, "", "members", "lobby", "--json", "--address", addr); code != exitOK || strings.Count(out, "userId")+strings.Count(out, "user_id") != 3 {
		t.Errorf("JSON: exit %d, %s %s", code, out, errOut)
	}
	if code, out, errOut := pushctl(t, "", "members", "elsewhere", "--address", addr); code != exitError || !strings.Contains(errOut, `no such page\x1b`) {
		t.Errorf("an error: exit %d, %q %q", code, out, errOut)
	}
}

func TestWhereTellsOfEachUserWhatTheNodesSay(t *testing.T) {
	since := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	online := &pubsub.UserPresence{
		UserId: "alice", Online: true, NodeIds: []string{"n1", "n2"}, RoomIds: []string{"lobby", "r\x1b"}, Incomplete: true,
		Connections: []*pubsub.UserConnection{
			{NodeId: "n1", ConnectionId: "c", DeviceId: "phone", Attributes: map[string]string{"v": "2", "os": "a\nb"}, RoomIds: []string{"lobby"}, ConnectTime: timestamppb.New(since)},
			{NodeId: "n1", ConnectionId: "d"},
		},
	}
	offline := &pubsub.UserPresence{UserId: "bob"}
	s := &server{presence: presence{users: &pubsub.GetUsersResponse{
		Users: []*pubsub.UserPresence{online, offline}, NodeFailures: []*pubsub.NodeFailure{{NodeId: "n2", Reason: "the node did not answer in time", Users: 1}},
	}}}
	addr := serve(t, s)
	code, out, errOut := pushctl(t, "", "where", "alice", "bob", "--address", addr)
	want := "alice: online on n1, n2\n  rooms  lobby, r\\x1b\n" +
		"  n1 c device phone os=a\\nb v=2 since " + since.Local().Format(time.DateTime) + " in lobby\n  n1 d\n  (some connections are missing)\n" +
		"bob: offline\nn2: the node did not answer in time (1 user)\n"
	if code != exitOK || out != want {
		t.Errorf("exit %d\n%s\nwant\n%s%s", code, out, want, errOut)
	}
	s.presence.users = &pubsub.GetUsersResponse{Users: []*pubsub.UserPresence{{UserId: "alice"}, offline}}
	if code, out, _ := pushctl(t, "", "where", "alice", "bob", "--address", addr); code != exitOffline || out != "alice: offline\nbob: offline\n" {
		t.Errorf("nobody is online: exit %d, %q", code, out)
	}
	if code, _, errOut := pushctl(t, "", "where", "carol", "--address", addr); code != exitError || !strings.Contains(errOut, "no") {
		t.Errorf("an error: exit %d, %q", code, errOut)
	}
}

func TestPresenceGoesOnWhereItWasWhenAnInstanceStops(t *testing.T) {
	entry := func(user string, nodes ...string) *pubsub.PresenceEntry {
		return &pubsub.PresenceEntry{UserId: user, RoomId: "lobby", NodeIds: nodes}
	}
	s := &server{presence: presence{watches: [][]*pubsub.WatchPresenceResponse{
		{
			{What: &pubsub.WatchPresenceResponse_Snapshot{Snapshot: &pubsub.PresenceSnapshot{First: true, Reason: pubsub.SnapshotReason_SNAPSHOT_POSITION_GONE, Entries: []*pubsub.PresenceEntry{entry("a\x1b", "n1", "n2")}}}},
			{Position: "p.7", What: &pubsub.WatchPresenceResponse_Snapshot{Snapshot: &pubsub.PresenceSnapshot{Last: true}}},
		},
		{{Position: "p.8", What: &pubsub.WatchPresenceResponse_Changes{Changes: &pubsub.PresenceChanges{Changes: []*pubsub.PresenceChange{
			{Kind: pubsub.PresenceChangeKind_JOINED, Entry: entry("b", "n3")}, {Kind: pubsub.PresenceChangeKind_LEFT, Entry: entry("c")},
		}}}}},
	}}}
	code, out, errOut := pushctl(t, "", "presence", "--room=lobby", "--position=p.1", "--address", serve(t, s))
	var lines []string
	for line := range strings.Lines(out) {
		_, text, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ") // the time of day
		lines = append(lines, strings.Join(strings.Fields(text), " "))
	}
	want := []string{"all there is (position_gone):", `is here a\x1b in lobby on n1, n2`, "joined b in lobby on n3", "left c in lobby"}
	if code != exitError || !slices.Equal(lines, want) || !strings.Contains(errOut, "not any more") {
		t.Errorf("exit %d, %q, want %q; %s", code, lines, want, errOut)
	}
	var positions []string
	for _, r := range s.presence.asked {
		positions = append(positions, r.GetPosition())
	}
	if !slices.Equal(positions, []string{"p.1", "p.7", "p.8"}) || s.presence.asked[0].GetRoomId() != "lobby" {
		t.Errorf("asked for %q", positions)
	}
	if code, _, _ := pushctl(t, "", "presence", "--room=r", "--user=u"); code != exitUsage {
		t.Errorf("a room and a user: exit %d", code)
	}
}
