package wire_test

import (
	"bytes"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

// TestWhatIsWrittenIsWhatGeneratedCodeWrites, and what is measured is its length.
func TestWhatIsWrittenIsWhatGeneratedCodeWrites(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.OneOf(rapid.Just(""), rapid.StringN(1, 20, 60), rapid.StringN(100, 300, -1))
		d := &pubsub.Delivery{
			Content:   &pubsub.MessageContent{Data: []byte(text.Draw(t, "data")), Timestamp: rapid.Int64().Draw(t, "timestamp")},
			RoomId:    text.Draw(t, "room"),
			UserIds:   rapid.SliceOfN(text, 0, 5).Draw(t, "users"),
			Everybody: rapid.Bool().Draw(t, "everybody"),
		}
		data, timestamp := d.GetContent().GetData(), uint64(d.GetContent().GetTimestamp())
		everybody := uint64(0)
		if d.GetEverybody() {
			everybody = 1
		}
		size := wire.SizeString(2, string(data)) + wire.SizeUint(3, timestamp)
		b := wire.AppendLen(nil, 1, size)
		b = wire.AppendString(b, 2, string(data))
		b = wire.AppendUint(b, 3, timestamp)
		b = wire.AppendString(b, 2, d.GetRoomId())
		b = wire.AppendStrings(b, 3, d.GetUserIds())
		b = wire.AppendUint(b, 5, everybody)
		want, err := proto.MarshalOptions{Deterministic: true}.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, want) {
			t.Fatalf("got  %x\nwant %x", b, want)
		}
		if n := wire.SizeLen(1, size) + wire.SizeString(2, d.GetRoomId()) + wire.SizeStrings(3, d.GetUserIds()) + wire.SizeUint(5, everybody); n != len(b) {
			t.Fatalf("measured %d, written %d", n, len(b))
		}
	})
}

func TestFixed64(t *testing.T) {
	for _, v := range []uint64{0, 1, math.MaxUint64} {
		want, err := proto.Marshal(&pubsub.LogFollow{Epoch: v})
		if err != nil {
			t.Fatal(err)
		}
		b := wire.AppendFixed64(nil, 1, v)
		if !bytes.Equal(b, want) || wire.SizeFixed64(1, v) != len(want) {
			t.Errorf("got %x, measured %d, want %x", b, wire.SizeFixed64(1, v), want)
		}
		m := wire.Reader{Rest: b}
		if m.Next() != (v != 0) || v != 0 && (!m.IsFixed64(1) || m.IsUint(1) || m.Uint != v) || m.Next() || m.Err != nil {
			t.Errorf("%d came back as %d, %v", v, m.Uint, m.Err)
		}
		if m := (wire.Reader{Rest: b[:len(b)/2]}); v != 0 && (m.Next() || m.Err == nil) {
			t.Errorf("half of %x is read", b)
		}
	}
}

func TestLargeNumbersOfFieldsAndLengths(t *testing.T) {
	for _, number := range []protowire.Number{1, 15, 16, 2047, 2048, protowire.MaxValidNumber} {
		for _, n := range []int{0, 1, 127, 128, 1 << 15} {
			text := strings.Repeat("x", n)
			b := wire.AppendBytes(nil, number, text)
			want := protowire.AppendString(protowire.AppendTag(nil, number, protowire.BytesType), text)
			if !bytes.Equal(b, want) || wire.SizeLen(number, n) != len(want) {
				t.Errorf("field %d of %d bytes: %x, measured %d", number, n, b, wire.SizeLen(number, n))
			}
			b = wire.AppendUint(nil, number, uint64(n))
			if n > 0 {
				want = protowire.AppendVarint(protowire.AppendTag(nil, number, protowire.VarintType), uint64(n))
			} else {
				want = nil
			}
			if !bytes.Equal(b, want) || wire.SizeUint(number, uint64(n)) != len(want) {
				t.Errorf("field %d of value %d: %x", number, n, b)
			}
		}
	}
}

func TestBytesOfAFieldEndWithIt(t *testing.T) {
	b := append(wire.AppendBytes(nil, 1, "first"), wire.AppendBytes(nil, 2, strings.Repeat("x", 200))...)
	m := wire.Reader{Rest: b}
	for m.Next() {
		_ = append(m.Bytes, 0xff)
	}
	if m = (wire.Reader{Rest: b}); !m.Next() || !bytes.HasPrefix(m.Rest, []byte{0x12}) {
		t.Errorf("appending to one field has changed the next: %x", m.Rest)
	}
}

func TestPackedNumbers(t *testing.T) {
	want := []uint64{0, 1, 127, 128, math.MaxUint64}
	var list []byte
	for _, v := range want {
		list = protowire.AppendVarint(list, v)
	}
	var got []uint64
	keep := func(v uint64) error { got = append(got, v); return nil }
	if err := wire.Uints(list, keep); err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	if wire.Uints(list[:len(list)-1], keep) == nil {
		t.Error("a list that is cut off was read")
	}
	enough := errors.New("enough")
	if err := wire.Uints(list, func(uint64) error { return enough }); !errors.Is(err, enough) {
		t.Error(err)
	}
}

// FuzzReader: what is read is what protowire reads, and refused is what generated code refuses.
func FuzzReader(f *testing.F) {
	for _, m := range []proto.Message{
		&pubsub.DeliverRequest{FirstSeq: 1 << 40, Deliveries: []*pubsub.Delivery{{UserIds: []string{"u", strings.Repeat("v", 200)}}}, Drain: true},
		&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1, 2, 300}}}, Heartbeat: math.MaxUint64},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	for _, b := range []string{"\x00\x01", "\x0a\x05", "\x0b\x10\x01\x0c", "\x0c", "\x81\x01abcdefgh", "\x0d1234", "\xf8\xff\xff\xff\x7f\x00"} {
		f.Add([]byte(b))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		f, rest := wire.Reader{Rest: b}, b
		for f.Next() {
			number, kind, n := protowire.ConsumeTag(rest)
			m := protowire.ConsumeFieldValue(number, kind, rest[n:])
			if n < 0 || m < 0 || f.Number() != number || f.Type() != kind {
				t.Fatalf("field %d of type %d of %x, protowire: %d, %d", f.Number(), f.Type(), rest, number, kind)
			}
			value := rest[n : n+m]
			switch kind {
			case protowire.VarintType:
				if v, _ := protowire.ConsumeVarint(value); v != f.Uint || !f.IsUint(number) || f.IsBytes(number) {
					t.Fatalf("%d of %x", f.Uint, value)
				}
			case protowire.BytesType:
				v, _ := protowire.ConsumeBytes(value)
				if !bytes.Equal(v, f.Bytes) || cap(f.Bytes) != len(f.Bytes) || wire.String(f.Bytes) != string(v) || !f.IsBytes(number) || f.IsUint(number) {
					t.Fatalf("%x of %x", f.Bytes, value)
				}
			}
			rest = rest[n+m:]
			if !bytes.Equal(f.Rest, rest) {
				t.Fatalf("%x is left of %x", f.Rest, b)
			}
		}
		err := proto.Unmarshal(b, new(emptypb.Empty))
		if (f.Err == nil) != (err == nil) {
			t.Fatalf("%x: %v, generated code: %v", b, f.Err, err)
		}
		if f.Err == nil && len(f.Rest) > 0 {
			t.Fatalf("%x: %x was not read", b, f.Rest)
		}
	})
}
