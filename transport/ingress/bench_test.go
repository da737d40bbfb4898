package ingress

import (
	"context"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

func BenchmarkDecode(b *testing.B) {
	d := newDecoder(testLimits)
	users := make([]string, 100)
	for i := range users {
		users[i] = fmt.Sprintf("user-%06d", i)
	}
	c := &pubsub.MessageContent{Data: make([]byte, 128), Metadata: map[string]string{"trace": "abc"}}
	for name, test := range map[string]struct {
		api  api
		wire []byte
	}{
		"api=user":             {toUser, marshal(b, &pubsub.PushToUserRequest{UserId: "user-000001", Content: c})},
		"api=user/id":          {toUser, marshal(b, &pubsub.PushToUserRequest{UserId: "user-000001", Content: c, Options: named("message-000001")})},
		"api=users/users=100":  {toUsers, marshal(b, &pubsub.PushToUsersRequest{UserIds: users, Content: c})},
		"api=room":             {toRoom, marshal(b, &pubsub.PushToRoomRequest{RoomId: "room", Content: c})},
		"api=rooms/rooms=200":  {toRooms, marshal(b, &pubsub.PushToRoomsRequest{RoomIds: manyRooms(200), Content: c})},
		"api=room/exclude=100": {toRoom, marshal(b, &pubsub.PushToRoomRequest{RoomId: "room", Content: c, ExcludeUserIds: users})},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p := new(engine.Push)
				if _, err := d.decode(test.api, roomy(test.wire), p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkReply(b *testing.B) {
	p := &engine.Push{Request: engine.Request{User: "user-000001", Room: "room-1"}}
	usual := engine.Result{Found: true, Targets: 1, Delivered: 1}
	partial := engine.Result{Found: true, Targets: 100, Delivered: 98, Offline: 1, Failed: 1}
	s := &Server{usual: newReply(toUser, new(engine.Push), &usual)}
	for name, reply := range map[string]func(){
		"api=unary/user":  func() { s.reply(toUser, p, &usual) },
		"api=unary/room":  func() { s.reply(toRoom, p, &partial) },
		"api=stream/user": func() { s.newStreamReply(1<<30, toUser, p, &usual) },
		"api=stream/room": func() { s.newStreamReply(1<<30, toRoom, p, &partial) },
		"api=batch/user":  func() { s.appendStreamReply(make([]byte, 0, 128), 1<<30, toUser, p, &usual) },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				reply()
			}
		})
	}
}

// BenchmarkMessageIDs is what a push with an id of its own pays for being remembered, with the memory full.
func BenchmarkMessageIDs(b *testing.B) {
	m := newMessageIDs(idsMost, metrics.NewSet())
	p := &engine.Push{Request: engine.Request{Kind: engine.ToUser, User: "user-000001", Arrived: time.Now()}}
	res := engine.Result{Found: true, Targets: 1, Delivered: 1}
	id := make([]byte, 16)
	n := 0
	push := func() {
		n++
		binary.LittleEndian.PutUint64(id, uint64(n))
		p.Options = &engine.Options{MessageID: string(id)}
		v, err := m.begin(p, nil)
		if err != nil {
			b.Fatal(err)
		}
		m.finish(v.claim, res, nil)
	}
	for range idsMost {
		push()
	}
	b.ReportAllocs()
	for b.Loop() {
		push()
	}
}

func BenchmarkRecord(b *testing.B) {
	m := newInstruments(metrics.NewSet())
	p, res := new(engine.Push), engine.Result{Found: true, Targets: 1, Delivered: 1}
	b.Run("callers=1", func(b *testing.B) {
		for b.Loop() {
			m.record(toUser, p, &res, nil, time.Millisecond)
		}
	})
	b.Run("callers=cores", func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				m.record(toUser, p, &res, nil, time.Millisecond)
			}
		})
	})
}

// Over memory and with nodes that ack at once: what the API itself costs.
func BenchmarkPushToUser(b *testing.B) {
	w := newWorld(b, nil)
	w.network.discard()
	req := &pubsub.PushToUserRequest{UserId: "d", Content: &pubsub.MessageContent{Data: make([]byte, 128)}}
	b.Run("way=unary", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if _, err := w.client.PushToUser(context.Background(), req); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
	push := &pubsub.PushStreamRequest{Push: &pubsub.PushStreamRequest_ToUser{ToUser: req}}
	b.Run("way=stream", func(b *testing.B) { benchmarkStream(b, w, push, 1) })
	batch := &pubsub.PushStreamRequest{}
	for range 100 {
		batch.Batch = append(batch.Batch, push)
	}
	b.Run("way=batch", func(b *testing.B) { benchmarkStream(b, w, batch, 100) })
}

// wireCodec passes requests that are encoded already, and looks at no reply.
type wireCodec struct{}

func (wireCodec) Name() string { return "proto" }

func (wireCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil //nolint:forcetypeassert // ours
}
func (wireCodec) Unmarshal(mem.BufferSlice, any) error { return nil }

// BenchmarkPushToRooms is a unary push to a room of 10,000, and to 200 rooms with the same 10,000, each in ten of them, from the bytes of the
// request to the reply, with nodes that ack at once. They take turns, so that what else runs on the machine meets both: ratio is the
// time of the second in that of the first.
func BenchmarkPushToRooms(b *testing.B) {
	const rooms, users, each, turn = 200, 10_000, 10, 200
	w := newWorld(b, nil)
	w.network.discard()
	list := manyRooms(rooms)
	for i := range users {
		m := member{fmt.Sprintf("user-%07d", i), []string{"n1", "n2"}[i%2]}
		w.source.rooms["all"] = append(w.source.rooms["all"], m)
		for k := range each {
			room := list[(i+k*(rooms/each))%rooms]
			w.source.rooms[room] = append(w.source.rooms[room], m)
		}
	}
	c := &pubsub.MessageContent{Data: make([]byte, 128)}
	calls := [2]struct {
		method  string
		request []byte
		spent   time.Duration
	}{
		{pubsub.PushManagerService_PushToRoom_FullMethodName, marshal(b, &pubsub.PushToRoomRequest{RoomId: "all", Content: c}), 0},
		{pubsub.PushManagerService_PushToRooms_FullMethodName, marshal(b, &pubsub.PushToRoomsRequest{RoomIds: list, Content: c}), 0},
	}
	call := func(i int) {
		if err := w.conn.Invoke(context.Background(), calls[i].method, calls[i].request, nil, grpc.ForceCodecV2(wireCodec{})); err != nil {
			b.Fatal(err)
		}
	}
	for i := range calls {
		call(i)
		call(i)
	}
	for b.Loop() {
		for i := range calls {
			begin := time.Now()
			for range turn {
				call(i)
			}
			calls[i].spent += time.Since(begin)
		}
	}
	b.ReportMetric(float64(calls[0].spent.Nanoseconds())/float64(b.N*turn), "room-ns/push")
	b.ReportMetric(float64(calls[1].spent.Nanoseconds())/float64(b.N*turn), "rooms-ns/push")
	b.ReportMetric(float64(calls[1].spent)/float64(calls[0].spent), "ratio")
}

// benchmarkStream sends messages of so many pushes.
func benchmarkStream(b *testing.B, w *world, m *pubsub.PushStreamRequest, pushes int) {
	b.Helper()
	b.ReportAllocs()
	st := w.stream(b.Context())
	messages := (b.N + pushes - 1) / pushes
	go func() {
		for range messages {
			if st.Send(m) != nil {
				return
			}
		}
		_ = st.CloseSend()
	}()
	b.ResetTimer()
	for answered := 0; answered < messages*pushes; {
		r, err := st.Recv()
		if err != nil {
			b.Fatal(err)
		}
		answered += max(len(r.Batch), 1)
	}
}
