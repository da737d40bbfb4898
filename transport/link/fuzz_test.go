package link

import (
	"math"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// FuzzAcks has a node answer three pushes with any two frames there can be. Whatever
// it claims: each push ends, its books balance, and nothing is delivered that the node
// has not acknowledged.
func FuzzAcks(f *testing.F) {
	honest := &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1, 3, 3}}}}
	for _, r := range []*pubsub.DeliverResponse{
		{},
		honest,
		{Acks: []*pubsub.AckRange{{First: 3, Delivered: []uint32{3}}, {First: 1, Delivered: []uint32{1, 3}}}},                                               // out of order
		{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{2, 4, 1000}}}},                                                                             // more than was asked for
		{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{math.MaxUint32, 1 << 31, math.MaxInt32}}}},                                                 // overflow
		{Acks: []*pubsub.AckRange{{First: 0, Delivered: []uint32{1}}, {First: 4, Delivered: []uint32{1}}, {First: math.MaxUint64, Delivered: []uint32{1}}}}, // not owed
		{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1}}, {First: 1, Delivered: []uint32{1}}}},                                                  // twice
		{Acks: []*pubsub.AckRange{{First: 2, Delivered: []uint32{0}}}, Misses: []*pubsub.Miss{{Seq: 2, NotHere: []string{"u1", "u2", "u3"}}}},
		{Acks: []*pubsub.AckRange{{First: 2, Delivered: []uint32{1}}}, Misses: []*pubsub.Miss{{Seq: 2, NotHere: []string{"u1", "u1"}, Failed: []string{"u1"}}}},
		{Acks: []*pubsub.AckRange{{First: 2, Delivered: []uint32{2}}}, Misses: []*pubsub.Miss{{Seq: 2, Failed: []string{"nobody"}}}},
		{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1}}}, Misses: []*pubsub.Miss{{Seq: 1, Refused: true}}},
		{Acks: []*pubsub.AckRange{{First: 3, Delivered: []uint32{0}}}, Misses: []*pubsub.Miss{{Seq: 3, FailedUsers: math.MaxUint32}}},
		{Misses: []*pubsub.Miss{{Seq: 1, Refused: true}}}, // without its ack
		{Heartbeat: math.MaxUint64, OnlineUsers: math.MaxUint32},
		{Drain: true},
		{Hello: &pubsub.HelloReply{ProtocolVersion: 1, NodeId: "A"}},
		{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1, 3, 3}, Duplicates: []uint32{1, 0, 0}, Pending: []uint32{0, 3, 0}}},
			Receipts: []*pubsub.Receipt{{Seq: 2, Acked: 2, Unacked: []string{"u3"}, Final: true}}},
		{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1, 3, 3}, Pending: []uint32{0, 2, 0}}},
			Receipts: []*pubsub.Receipt{{Seq: 2, Acked: 1}, {Seq: 2, Acked: math.MaxUint32}, {Seq: 2, Final: true}}},
		{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1, 3, 3}, Duplicates: []uint32{2, 4, 1 << 31}, Pending: []uint32{1, 4, 1}}}},
		{Receipts: []*pubsub.Receipt{{Seq: 1, Acked: 1, Final: true}, {Seq: 2, Unacked: []string{"u1", "u1"}}, {Seq: math.MaxUint64}, {}}}, // before the ack
		{Acks: []*pubsub.AckRange{{First: 2, Delivered: []uint32{1}}}, Misses: []*pubsub.Miss{{Seq: 2, Reused: []string{"u1", "u2"}}}},
		{Catchups: []*pubsub.Catchup{{UserId: "u1", Gate: 1}, {UserId: "u1", Gate: 1}, {UserId: "\x00", Gate: 2}, {}},
			ReplayTaken: []*pubsub.ReplayTaken{{Gate: 1, Seq: 1}, {}}, NudgesTaken: []uint64{0, 1, math.MaxUint64}},
		{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1, 1, 1}, Filtered: []uint32{0, 2, 2}}}},
		{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1, 3, 3}, Filtered: []uint32{1, math.MaxUint32, math.MaxUint32}}},
			Misses: []*pubsub.Miss{{Seq: 2, Filtered: []string{"u1", "u1", "nobody"}}}},
		{Disconnected: []*pubsub.Disconnected{{Token: 1, Connections: 1 << 31}, {Token: math.MaxUint64}, {}}},
		{LogFollow: &pubsub.LogFollow{Epoch: 5, After: []uint64{1, math.MaxUint64}}, LogReads: []*pubsub.LogRead{{RoomId: "r", Gate: 1, Epoch: 5, After: []uint64{0, 3}}}},
		{LogReads: []*pubsub.LogRead{{RoomId: "r", Gate: 1}, {RoomId: "r", Gate: 1}, {RoomId: "\x00", Gate: 2}, {}, {RoomId: "r", After: make([]uint64, 65)}}, LogFollow: &pubsub.LogFollow{}},
	} {
		first, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		second, err := proto.Marshal(honest)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(first, second)
	}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		var frames []*pubsub.DeliverResponse
		for _, b := range [][]byte{first, second} {
			r := &pubsub.DeliverResponse{}
			if proto.Unmarshal(b, r) != nil {
				return // malformed bytes are FuzzResponse's
			}
			frames = append(frames, r)
		}
		bubble(t, func(t *testing.T) { answerWith(t, frames) })
	})
}

// answerWith has a node answer one push of each kind with frames.
func answerWith(t *testing.T, frames []*pubsub.DeliverResponse) {
	w := newWorld(t, Config{Replayer: &replayer{then: func(a Asker, gate uint64) { a.End(gate, 1, "") }}, RoomLogs: &roomLogs{then: func(a LogAsker, read LogRead) {
		a.Mark(&LogMark{Epoch: read.Epoch, Seq: 1, Rooms: []LogRoom{{read.Room, []uint64{1}}}})
		a.Page(&LogPage{Gate: read.Gate, Seq: 1, Entries: []LogEntry{logEntry(1, 1, time.Minute)}})
	}}})
	n := scripted(append(slices.Clone(lasting), pubsub.Feature_FEATURE_ROOM_LOG, pubsub.Feature_FEATURE_FILTER)...).fakeNode
	answered, seqs := make(chan struct{}), map[string]uint64{}
	n.deliver = func(st deliverStream) error {
		if _, err := n.greet(st); err != nil {
			return err
		}
		for {
			f, err := st.Recv()
			if err != nil {
				return err
			}
			for i, d := range f.GetDeliveries() {
				seqs[string(d.GetContent().GetData())] = f.GetFirstSeq() + uint64(i)
			}
			if len(seqs) < 3 || frames == nil {
				continue
			}
			for _, r := range frames {
				if err := st.Send(r); err != nil {
					return err
				}
			}
			frames = nil // a stream that is opened anew is silent
			close(answered)
		}
	}
	w.start("a:1", n)
	w.register("A", "a:1")
	w.up(1)
	w.room("r", "A", "u1", "u2", "u3")
	claimed := frames
	texts := []string{"x", "y", "z"}
	list := []*engine.Push{w.toUser("u1", texts[0]), w.toRoom("r", texts[1]), w.toAll(texts[2])}
	list[0].Options = &engine.Options{MessageID: "m", TTL: time.Minute}
	list[1].Options = &engine.Options{ClientAck: true, AckTimeout: time.Second, Filter: []engine.Match{{Key: "platform", Values: []string{"ios"}}}}
	var pushes []*pending
	for _, p := range list {
		pushes = append(pushes, w.begin(p))
	}
	synctest.Wait()
	<-answered
	for i, f := range pushes {
		r := w.end(f)
		acks, clients := uint64(0), uint64(0)
		for _, frame := range claimed {
			acks += claims(frame, seqs[texts[i]])
			for _, receipt := range frame.GetReceipts() {
				if receipt.GetSeq() == seqs[texts[i]] {
					clients += uint64(receipt.GetAcked())
				}
			}
		}
		if uint64(r.Acked) > clients || r.Acked > r.Delivered || r.Duplicates > r.Delivered || r.Filtered > r.Offline {
			t.Errorf("push %d: %d acked by clients of %d: %+v", i, r.Acked, clients, r)
		}
		if uint64(r.Delivered) > acks {
			t.Errorf("push %d: %d delivered, the node has acknowledged %d: %v", i, r.Delivered, acks, claimed)
		}
		if limit := []int{1, 3, math.MaxInt32}[i]; r.Targets > limit || min(r.Delivered, r.Offline, r.Failed, r.Unknown) < 0 {
			t.Errorf("push %d: %+v", i, r)
		}
	}
}

// claims is how many users a frame says that it has reached with a delivery.
func claims(r *pubsub.DeliverResponse, seq uint64) uint64 {
	sum := uint64(0)
	for _, a := range r.GetAcks() {
		if seq >= a.GetFirst() && seq-a.GetFirst() < uint64(len(a.GetDelivered())) {
			sum += uint64(a.GetDelivered()[seq-a.GetFirst()])
		}
	}
	return sum
}
