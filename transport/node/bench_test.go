package node

import (
	"fmt"
	"testing"

	pubsub "github.com/push-manager/push-manager/proto"
)

// BenchmarkTake measures one frame of 100 deliveries from the wire to the acks,
// with a gateway that does nothing.
func BenchmarkTake(b *testing.B) {
	for _, members := range []int{0, 1, 100, 1000} {
		b.Run(fmt.Sprintf("members=%d", members), func(b *testing.B) {
			st := newStream(b, everyone{})
			st.acks.maxUnacked = 1 << 40
			data := framesOf(b, st, members)
			b.ReportAllocs()
			for b.Loop() {
				st.next = 1
				if err := st.take(data); err != nil {
					b.Fatal(err)
				}
				st.acks.counts = st.acks.counts[:0]
			}
		})
	}
}

// framesOf returns a frame of 100 pushes of 128 bytes: to one user each, or to an
// audience that st knows already.
func framesOf(tb testing.TB, st *stream, members int) []byte {
	tb.Helper()
	r := &pubsub.DeliverRequest{FirstSeq: 1}
	content := &pubsub.MessageContent{Data: make([]byte, 128), Timestamp: 1}
	if members == 0 {
		for i := range 100 {
			r.Deliveries = append(r.Deliveries, &pubsub.Delivery{Content: content, UserIds: []string{fmt.Sprint("user-", i)}})
		}
	} else {
		var join []string
		for i := range members {
			join = append(join, fmt.Sprint("user-", i))
		}
		define := &delivery{id: 1, version: 1, audRoom: "r", join: join}
		if _, err := st.aud.apply(define); err != nil {
			tb.Fatal(err)
		}
		for range 100 {
			r.Deliveries = append(r.Deliveries, &pubsub.Delivery{Content: content, Audience: &pubsub.Audience{Id: 1, Version: 1}})
		}
	}
	data, err := r.MarshalVT()
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

// TestAllocationsPerFrame: the messages, and nothing per delivery or user.
func TestAllocationsPerFrame(t *testing.T) {
	for _, members := range []int{0, 1000} {
		st := newStream(t, everyone{})
		data := framesOf(t, st, members)
		allocs := testing.AllocsPerRun(100, func() {
			st.next = 1
			if err := st.take(data); err != nil {
				t.Fatal(err)
			}
			st.acks.counts = st.acks.counts[:0]
		})
		if allocs > 2 {
			t.Errorf("%d members: %v allocations for 100 deliveries", members, allocs)
		}
	}
}

// BenchmarkRing looks for an id that is not there, the usual case.
func BenchmarkRing(b *testing.B) {
	for _, ids := range []int{8, 64} {
		b.Run(fmt.Sprintf("ids=%d", ids), func(b *testing.B) {
			var r ring
			for i := range ids {
				r.add(uint64(i)+1, 1)
			}
			for b.Loop() {
				if r.find(1<<40) >= 0 {
					b.Fatal("found")
				}
			}
		})
	}
}

// BenchmarkLasting measures one frame of 100 deliveries with ids from the wire to the acks, for a user who acknowledges
// what wants it.
func BenchmarkLasting(b *testing.B) {
	for _, acks := range []bool{false, true} {
		b.Run(fmt.Sprintf("acks=%t", acks), func(b *testing.B) {
			users := NewLastingUsers[*phone](everyFeature...)
			st := newStream(b, users)
			p := call(st.server, users, "u", true)
			p.answer, p.desk.inbox.Books = true, nil
			r := &pubsub.DeliverRequest{FirstSeq: 1}
			for i := range 100 {
				d := lasting(fmt.Sprint(i), "u")
				d.WantAck = acks
				r.Deliveries = append(r.Deliveries, d)
			}
			data, err := r.MarshalVT()
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				st.next = 1
				p.desk.inbox.seen, p.desk.wire = ring{}, p.desk.wire[:0]
				if err := st.take(data); err != nil {
					b.Fatal(err)
				}
				st.acks.counts, st.acks.pending = st.acks.counts[:0], st.acks.pending[:0]
				st.acks.receipts.open, st.acks.receipts.due = nil, nil
			}
		})
	}
}
