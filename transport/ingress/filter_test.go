package ingress

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// platform is a filter that no connection of a world matches, as they have no attributes. Its contrary is for all.
func platform(not bool) *pubsub.PushOptions {
	return &pubsub.PushOptions{Filter: []*pubsub.Match{{Key: "platform", Values: []string{"ios", "android"}, Not: not}}}
}

func TestFiltersReachTheNodesAndTheBooks(t *testing.T) {
	w := newWorld(t, nil)
	room, err := w.client.PushToRoom(w.context(), &pubsub.PushToRoomRequest{RoomId: "r", Content: content("x"), Options: platform(false)})
	ok(t, err)
	if s := room.GetSummary(); !room.GetSuccess() || s.GetTargets() != 3 || s.GetOffline() != 3 || s.GetFiltered() != 2 {
		t.Errorf("room: %v", room)
	}
	user, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "d", Content: content("x"), Options: platform(false)})
	ok(t, err)
	if user.GetSuccess() || user.GetSummary().GetFiltered() != 1 || user.GetMessage() != `no connection of user "d" matches the filter` {
		t.Errorf("user: %v", user)
	}
	users, err := w.client.PushToUsers(w.context(), &pubsub.PushToUsersRequest{UserIds: []string{"a", "b"}, Content: content("x"), Options: platform(true)})
	ok(t, err)
	if s := users.GetSummary(); s.GetDelivered() != 2 || s.GetFiltered() != 0 {
		t.Errorf("users: %v", users)
	}
	all, err := w.client.BroadcastMessage(w.context(), &pubsub.BroadcastMessageRequest{Content: content("x"), Options: platform(false)})
	ok(t, err)
	if s := all.GetSummary(); s.GetTargets() != 6 || s.GetFiltered() != 6 {
		t.Errorf("everybody: %v", all)
	}
	if got := w.metric("push_manager_push_filtered_total"); got != "9" {
		t.Errorf("filtered users are counted as %q", got)
	}
}

func TestRefusedFiltersNameTheirField(t *testing.T) {
	w := newWorld(t, nil)
	good := &pubsub.Match{Key: "k", Values: []string{"v"}}
	for field, o := range map[string]*pubsub.PushOptions{
		"options.filter":              {Filter: slices.Repeat([]*pubsub.Match{good}, 9)},
		"options.filter[1].key":       {Filter: []*pubsub.Match{good, {Values: []string{"v"}}}},
		"options.filter[1].values":    {Filter: []*pubsub.Match{good, {Key: "k"}}},
		"options.filter[0].values":    {Filter: []*pubsub.Match{{Key: "k", Values: strings.Split(strings.Repeat("v,", 33)+"v", ",")}}},
		"options.filter[0].values[1]": {Filter: []*pubsub.Match{{Key: "k", Values: []string{"v", strings.Repeat("v", 65)}}}},
	} {
		_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "a", Content: content("x"), Options: o})
		if err == nil {
			t.Errorf("%s: taken", field)
			continue
		}
		reason := map[string]string{"options.filter": engine.CodeTooMany, "options.filter[0].values": engine.CodeTooMany, "options.filter[0].values[1]": engine.CodeIDTooLong}[field]
		if reason == "" {
			reason = engine.CodeRequired
		}
		wantError(t, err, codes.InvalidArgument, reason, field)
	}
	// What generated code cannot write.
	request := func(match []byte) []byte {
		b := marshal(t, &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
		return protowire.AppendBytes(protowire.AppendTag(b, 20, protowire.BytesType), protowire.AppendBytes(protowire.AppendTag(nil, 9, protowire.BytesType), match))
	}
	for field, match := range map[string][]byte{
		"options.filter[0].key":       {1<<3 | 2, 1, 0xff},
		"options.filter[0].values[0]": {2<<3 | 2, 1, 0xff},
		"options.filter[0]":           {2<<3 | 2, 9},
	} {
		_, err := w.raw(pubsub.PushManagerService_PushToUser_FullMethodName, request(match))
		wantError(t, err, codes.InvalidArgument, engine.CodeMalformed, field)
	}
}

// However many matches and values a request has, what is kept of it is little.
func TestHugeFiltersAreNotKept(t *testing.T) {
	values := make([]string, 100_000)
	o := &pubsub.PushOptions{Filter: slices.Repeat([]*pubsub.Match{{Key: "k", Values: values[:1000]}}, 100)}
	o.Filter[0] = &pubsub.Match{Key: "k", Values: values}
	p, err := decodeOne(toUser, marshal(t, &pubsub.PushToUserRequest{UserId: "u", Content: content("x"), Options: o}))
	ok(t, err)
	if n := len(p.Options.Filter); n != engine.MaxFilterMatches+1 {
		t.Errorf("%d matches are kept", n)
	}
	for _, m := range p.Options.Filter {
		if len(m.Values) != engine.MaxFilterValues+1 {
			t.Errorf("%d values are kept", len(m.Values))
		}
	}
}

// Who has got a message through one filter has not got it through another: a retry with another filter is no retry.
func TestAMessageIDIsAnsweredForItsFilter(t *testing.T) {
	w := newWorld(t, nil)
	push := func(o *pubsub.PushOptions) *pubsub.DeliverySummary {
		o = proto.CloneOf(o)
		o.MessageId = "m"
		r, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "a", Content: content("x"), Options: o})
		ok(t, err)
		return r.GetSummary()
	}
	if s := push(platform(true)); s.GetDelivered() != 1 || s.GetDuplicates() != 0 {
		t.Errorf("first: %v", s)
	}
	if s := push(platform(true)); s.GetDuplicates() != 1 {
		t.Errorf("a retry: %v", s)
	}
	if s := push(platform(false)); s.GetFiltered() != 1 {
		t.Errorf("with another filter: %v", s)
	}
	other := &pubsub.PushOptions{Filter: []*pubsub.Match{{Key: "platform", Values: []string{"ios"}, Not: true}, {Key: "android", Values: []string{"x"}, Not: true}}}
	if s := push(other); s.GetDelivered() != 1 || s.GetDuplicates() != 0 {
		t.Errorf("with one that has the same words: %v", s)
	}
}

func TestExplainTellsTheFilter(t *testing.T) {
	w := newWorld(t, nil)
	o := platform(true)
	x, err := w.client.Explain(w.context(), &pubsub.ExplainRequest{Push: &pubsub.ExplainRequest_ToRoom{ToRoom: &pubsub.PushToRoomRequest{RoomId: "r", Content: content("x"), Options: o}}})
	ok(t, err)
	if x.GetTargets() != 3 || len(x.GetFilter()) != 1 || !proto.Equal(x.GetFilter()[0], o.GetFilter()[0]) {
		t.Errorf("%v", x)
	}
}
