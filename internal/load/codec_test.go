package load

import (
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
)

// FuzzReply holds the reading by hand against the generated code: what that takes,
// this takes as well, with the same figures.
func FuzzReply(f *testing.F) {
	for _, r := range []*pubsub.PushStreamResponse{
		{Id: 7, Result: &pubsub.PushStreamResponse_ToRoom{ToRoom: &pubsub.PushToRoomResponse{
			Success: true, DeliveredCount: 3, Message: "x", Summary: &pubsub.DeliverySummary{Targets: 3, Delivered: 3},
		}}},
		{Id: 1 << 63, Result: &pubsub.PushStreamResponse_ToUser{ToUser: &pubsub.PushToUserResponse{
			Message: "x", Summary: &pubsub.DeliverySummary{Targets: 1, Unknown: 1, NodeFailures: []*pubsub.NodeFailure{{NodeId: "n", Users: 1}}},
		}}},
	} {
		wire, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(wire)
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		var got streamReply
		err := codec{}.Unmarshal(mem.BufferSlice{mem.SliceBuffer(wire)}, &got)
		var want pubsub.PushStreamResponse
		if proto.Unmarshal(wire, &want) != nil {
			return
		}
		if err != nil {
			t.Fatalf("%v, and the generated code takes it", err)
		}
		if got.id != want.GetId() {
			t.Errorf("id %d, want %d", got.id, want.GetId())
		}
		// A message that comes twice is merged or replaced: only one that comes once compares.
		again, err := proto.Marshal(&want)
		ok(t, err)
		if len(again) != len(wire) {
			return
		}
		if r := want.GetToRoom(); r != nil {
			s := r.GetSummary()
			if got.success != r.GetSuccess() || got.targets.Delivered != int64(s.GetDelivered()) || got.nodes != len(s.GetNodeFailures()) {
				t.Errorf("got %+v, want %v", got.reply, &want)
			}
		}
	})
}

func TestPatterns(t *testing.T) {
	for text, want := range map[string]string{"u%d": "u42", "%06d": "000042", "a%03db": "a042b", "%01d": "42"} {
		p, err := parsePattern(text)
		ok(t, err)
		if got := string(p.append(nil, 42)); got != want || p.size(42) != len(want) {
			t.Errorf("%q gives %q of %d, want %q", text, got, p.size(42), want)
		}
	}
	for _, text := range []string{"", "u", "%", "%s", "%5d", "%d%d", "%0d", "u%x", string([]byte{0xff}) + "%d", "%0999d"} {
		if err := CheckPattern(text); err == nil {
			t.Errorf("%q is taken", text)
		}
	}
}
