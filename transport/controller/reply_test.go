package controller

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/internal/ids"
	pubsub "github.com/push-manager/push-manager/proto"
)

// The walk finds what an ordinary unmarshal finds.
func TestWalkAgreesWithUnmarshal(t *testing.T) {
	id := rapid.SampledFrom([]string{"", "u1", "u2", "ü", "a\nb", "n1", "n2", strings.Repeat("x", 256), strings.Repeat("x", 257), "\u0085"})
	rapid.Check(t, func(t *rapid.T) {
		reply := &pubsub.GetRoomInfoResponse{}
		if rapid.Bool().Draw(t, "found") {
			reply.RoomInfo = &pubsub.RoomInfo{RoomId: "r", CreatedAt: 5, Metadata: &pubsub.RoomMetadata{Name: "n"}}
			for range rapid.IntRange(0, 50).Draw(t, "members") {
				reply.RoomInfo.Users = append(reply.RoomInfo.Users, &pubsub.UserInfo{
					UserId: id.Draw(t, "user"), NodeId: id.Draw(t, "node"), UserName: "name", JoinedAt: 7,
					Metadata: map[string]string{"k": "v"},
				})
			}
		}
		b, err := proto.Marshal(reply)
		if err != nil {
			t.Fatal(err)
		}
		var want, got []string
		for _, u := range reply.GetRoomInfo().GetUsers() {
			node := u.GetNodeId()
			if !valid(node) {
				node = ""
			}
			if valid(u.GetUserId()) {
				want = append(want, u.GetUserId()+"@"+node)
			}
		}
		w := walk{maxMembers: 1000, add: func(user, node []byte) { got = append(got, string(user)+"@"+string(node)) }}
		if err := w.response(b); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, want) || w.found != (reply.RoomInfo != nil) {
			t.Fatalf("found %v, got %q, want %q", w.found, got, want)
		}
	})
}

func valid(id string) bool {
	return id != "" && len(id) <= ids.MaxScopedBytes && utf8.ValidString(id) && !strings.ContainsFunc(id, unicode.IsControl)
}

func TestWalkSkipsInvalidUTF8(t *testing.T) {
	member := protowire.AppendTag(nil, fieldUserID, protowire.BytesType)
	member = protowire.AppendBytes(member, []byte("\xff\xfe"))
	room := protowire.AppendTag(nil, fieldUsers, protowire.BytesType)
	room = protowire.AppendBytes(room, member)
	b := protowire.AppendTag(nil, fieldRoomInfo, protowire.BytesType)
	b = protowire.AppendBytes(b, room)
	w := walk{maxMembers: 1, add: func([]byte, []byte) { t.Error("added") }}
	if err := w.response(b); err != nil || w.skipped != 1 || !w.found {
		t.Fatalf("%v, %d skipped", err, w.skipped)
	}
}

func FuzzWalk(f *testing.F) {
	for _, r := range []*pubsub.GetRoomInfoResponse{
		{},
		{RoomInfo: &pubsub.RoomInfo{}},
		{RoomInfo: &pubsub.RoomInfo{Users: []*pubsub.UserInfo{{UserId: "u", NodeId: "n"}}}},
		{RoomInfo: &pubsub.RoomInfo{RoomId: "r", CreatedAt: -1, Metadata: &pubsub.RoomMetadata{Name: "n"}, Users: []*pubsub.UserInfo{
			{UserId: "u", NodeId: "n", UserName: "x", JoinedAt: 7, Metadata: map[string]string{"k": "v"}}, {UserId: "u"}, {NodeId: "n"}, {},
			{UserId: "a\nb", NodeId: "\u0085"}, {UserId: strings.Repeat("x", 257)},
		}}},
	} {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(append(b, b...)) // a message that comes twice is merged
		f.Add(b[:len(b)/2])
	}
	f.Add([]byte{1<<3 | 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		w := walk{maxMembers: 100, add: func(user, node []byte) {
			if !valid(string(user)) || (len(node) > 0 && !valid(string(node))) {
				t.Fatalf("added %q on %q", user, node)
			}
		}}
		_ = w.response(b) // malformed is fine, a panic is not
	})
}

// A room of a million costs nothing of its own: there is no tree of messages, and who
// is told the ids copies them.
func BenchmarkWalk(b *testing.B) {
	for _, members := range []int{10, 1000, 1_000_000} {
		b.Run(fmt.Sprintf("members=%d", members), func(b *testing.B) {
			reply := &pubsub.GetRoomInfoResponse{RoomInfo: &pubsub.RoomInfo{}}
			for i := range members {
				reply.RoomInfo.Users = append(reply.RoomInfo.Users, &pubsub.UserInfo{
					UserId: fmt.Sprintf("user-%07d", i), UserName: "somebody", NodeId: fmt.Sprintf("connect-node-%d", i%3),
				})
			}
			wire, err := proto.Marshal(reply)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				n := 0
				w := walk{maxMembers: members, add: func([]byte, []byte) { n++ }}
				if err := w.response(wire); err != nil || n != members {
					b.Fatal(n, err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(members), "ns/member")
		})
	}
}
