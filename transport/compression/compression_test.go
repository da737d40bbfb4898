package compression

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	pubsub "github.com/push-manager/push-manager/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const maxFrame = 1 << 20

func codecs() []pubsub.Codec { return []pubsub.Codec{pubsub.Codec_S2, pubsub.Codec_ZSTD} }

func newPair(t testing.TB) (*Encoder, *Decoder) {
	t.Helper()
	e, err := NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	d, err := NewDecoder(maxFrame)
	if err != nil {
		t.Fatal(err)
	}
	return e, d
}

func TestParse(t *testing.T) {
	for _, tc := range []struct {
		names string
		want  []pubsub.Codec
		err   string
	}{
		{names: ""},
		{names: "off"},
		{names: "s2", want: []pubsub.Codec{pubsub.Codec_S2}},
		{names: "zstd s2", want: []pubsub.Codec{pubsub.Codec_ZSTD, pubsub.Codec_S2}},
		{names: "gzip", err: `"gzip" is none of off, s2, zstd`},
		{names: "S2", err: `"S2" is none of`},
		{names: "s2 off", err: `"off" is none of`},
		{names: "s2 s2", err: "twice"},
	} {
		got, err := Parse(strings.Fields(tc.names))
		if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
			t.Errorf("%q: %v, want %q", tc.names, err, tc.err)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%q: %v, want %v", tc.names, got, tc.want)
		}
	}
	if all, err := Parse(Names()); err != nil || !slices.Equal(all, codecs()) {
		t.Errorf("%v, %v", all, err)
	}
}

func TestWhatIsCompressedComesBack(t *testing.T) {
	e, d := newPair(t)
	c := newChat(2)
	var dst []byte // reused, as a link's writer does
	for name, frame := range map[string][]byte{
		"one byte": {7}, "one push": c.frame(1, 256), "many": c.frame(64, 1<<10), "beyond the window": c.frame(50, 8<<10),
		"random": c.random(100_000), "zeros": make([]byte, maxFrame), "random and large": c.random(maxFrame),
	} {
		for _, codec := range codecs() {
			dst = e.Append(append(dst[:0], "before"...), frame, codec)
			if string(dst[:6]) != "before" {
				t.Fatalf("%s, %v: wrote over what was there", name, codec)
			}
			got, err := d.Decode(dst[6:], uint32(len(frame)), codec)
			if err != nil || !bytes.Equal(got, frame) {
				t.Errorf("%s, %v: %d bytes came back of %d, %v", name, codec, len(got), len(frame), err)
			}
			if slack := len(dst) - len(frame) - len(frame)/64; slack > 64 {
				t.Errorf("%s, %v: %d bytes became %d", name, codec, len(frame), len(dst))
			}
		}
	}
}

func TestAnyBytesComeBack(t *testing.T) {
	e, d := newPair(t)
	rapid.Check(t, func(t *rapid.T) {
		parts := rapid.SliceOfN(rapid.SliceOfN(rapid.Byte(), 1, 64), 1, 8).Draw(t, "parts")
		var frame []byte
		for range rapid.IntRange(1, 200).Draw(t, "length") {
			frame = append(frame, parts[rapid.IntRange(0, len(parts)-1).Draw(t, "part")]...)
		}
		codec := rapid.SampledFrom(codecs()).Draw(t, "codec")
		got, err := d.Decode(e.Append(nil, frame, codec), uint32(len(frame)), codec)
		if err != nil || !bytes.Equal(got, frame) {
			t.Fatalf("%v", err)
		}
	})
}

func TestManyStreamsShareOneEncoder(t *testing.T) {
	e, d := newPair(t)
	var wg sync.WaitGroup
	for i := range 4 * runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			c, codec := newChat(uint64(i)), codecs()[i%2]
			for range 20 {
				frame := c.frame(1+c.r.IntN(20), 256)
				got, err := d.Decode(e.Append(nil, frame, codec), uint32(len(frame)), codec)
				if err != nil || !bytes.Equal(got, frame) {
					t.Errorf("stream %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()
}

// TestLiesAreErrors: a length that is not allowed or not true, and bytes that are no
// block, whatever the codec.
func TestLiesAreErrors(t *testing.T) {
	e, d := newPair(t)
	frame := newChat(3).frame(8, 256)
	n := uint32(len(frame))
	for _, codec := range codecs() {
		good := e.Append(nil, frame, codec)
		bomb := e.Append(nil, make([]byte, maxFrame), codec)
		for name, tc := range map[string]struct {
			data   []byte
			size   uint32
			isSize bool
		}{
			"no length":               {good, 0, true},
			"one byte less":           {good, n - 1, true},
			"one byte more":           {good, n + 1, true},
			"above the bound":         {good, maxFrame + 1, true},
			"far above the bound":     {good, math.MaxUint32, true},
			"a bomb":                  {bomb, n, true},
			"a bomb above the bound":  {e.Append(nil, make([]byte, maxFrame+1), codec), maxFrame + 1, true},
			"nothing":                 {nil, n, codec == pubsub.Codec_ZSTD},
			"cut short":               {good[:len(good)/2], n, false},
			"only the first bytes":    {good[:3], n, false},
			"text":                    {[]byte(`{"type":"message.created"}`), n, codec == pubsub.Codec_S2},
			"bytes of the other kind": {e.Append(nil, frame, pubsub.Codec_S2+pubsub.Codec_ZSTD-codec), n, codec == pubsub.Codec_S2},
			"twice":                   {append(slices.Clone(good), good...), n, codec == pubsub.Codec_ZSTD},
		} {
			got, err := d.Decode(tc.data, tc.size, codec)
			if err == nil || got != nil || errors.Is(err, ErrSize) != tc.isSize {
				t.Errorf("%v, %s: %d bytes, %v", codec, name, len(got), err)
			}
		}
		if got, err := d.Decode(good, n, codec); err != nil || !bytes.Equal(got, frame) {
			t.Errorf("%v: does not decode any more after lies: %v", codec, err)
		}
	}
	if _, err := d.Decode(frame, n, 3); !errors.Is(err, ErrCodec) {
		t.Errorf("a codec of a later version: %v", err)
	}
	if _, err := d.Decode(frame, n, pubsub.Codec_NONE); !errors.Is(err, ErrCodec) {
		t.Errorf("no codec: %v", err)
	}
}

// TestABombCostsWhatItDeclares: 1 MiB that stand in a few hundred bytes and are
// declared as fewer are not unpacked to find out.
func TestABombCostsWhatItDeclares(t *testing.T) {
	e, d := newPair(t)
	// Frames that do not say how long they are, one after the other.
	var stream bytes.Buffer
	w, err := zstd.NewWriter(&stream, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(window))
	if err != nil {
		t.Fatal(err)
	}
	for range 4 {
		_, _ = w.Write(make([]byte, maxFrame))
		_ = w.Flush()
	}
	_ = w.Close()
	for name, bomb := range map[string]struct {
		data  []byte
		codec pubsub.Codec
	}{
		"s2":                {e.Append(nil, make([]byte, maxFrame), pubsub.Codec_S2), pubsub.Codec_S2},
		"s2 of 4 GiB":       {binary.AppendUvarint(nil, math.MaxUint32), pubsub.Codec_S2},
		"zstd":              {e.Append(nil, make([]byte, maxFrame), pubsub.Codec_ZSTD), pubsub.Codec_ZSTD},
		"zstd without size": {stream.Bytes(), pubsub.Codec_ZSTD},
	} {
		const declared = 64 << 10
		_, _ = d.Decode(bomb.data, declared, bomb.codec) // what is kept is made
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range 10 {
			if _, err := d.Decode(bomb.data, declared, bomb.codec); !errors.Is(err, ErrSize) {
				t.Errorf("%s: %v", name, err)
			}
		}
		runtime.ReadMemStats(&after)
		if each := (after.TotalAlloc - before.TotalAlloc) / 10; each > 512<<10 {
			t.Errorf("%s: %d bytes of memory for %d that were declared", name, each, declared)
		}
	}
}

// TestSnappyBlocksAreS2 is what proto/README.md promises to nodes in other languages:
// the format is a superset.
func TestSnappyBlocksAreS2(t *testing.T) {
	_, d := newPair(t)
	frame := newChat(4).frame(8, 256)
	got, err := d.Decode(s2.EncodeSnappy(nil, frame), uint32(len(frame)), pubsub.Codec_S2)
	if err != nil || !bytes.Equal(got, frame) {
		t.Error(err)
	}
}

func TestSteadyStateDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("pools drop things at random under the race detector")
	}
	e, d := newPair(t)
	frame := newChat(5).frame(64, 256)
	for _, codec := range codecs() {
		var dst []byte
		if n := testing.AllocsPerRun(100, func() { dst = e.Append(dst[:0], frame, codec) }); n >= 1 {
			t.Errorf("%v: %v allocations to compress", codec, n)
		}
		if n := testing.AllocsPerRun(100, func() {
			if _, err := d.Decode(dst, uint32(len(frame)), codec); err != nil {
				t.Fatal(err)
			}
		}); n >= 2 {
			t.Errorf("%v: %v allocations to decompress, beside the frame", codec, n)
		}
	}
}

// FuzzDecode: no bytes crash a Decoder, and it returns what was declared or an error.
func FuzzDecode(f *testing.F) {
	e, d := newPair(f)
	frame := newChat(6).frame(3, 256)
	for _, codec := range codecs() {
		good := e.Append(nil, frame, codec)
		f.Add(good, uint32(len(frame)), int32(codec))
		f.Add(good[:len(good)-1], uint32(len(frame)), int32(codec))
		f.Add(e.Append(nil, make([]byte, 1<<16), codec), uint32(1<<16), int32(codec))
		f.Add([]byte{}, uint32(1), int32(codec))
	}
	f.Fuzz(func(t *testing.T, data []byte, size uint32, codec int32) {
		got, err := d.Decode(data, size, pubsub.Codec(codec))
		if err == nil && (len(got) != int(size) || size > maxFrame) || err != nil && got != nil {
			t.Errorf("%d bytes of %d, %v", len(got), size, err)
		}
	})
}
