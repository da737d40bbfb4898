package compression

import (
	"fmt"
	"slices"
	"testing"

	pubsub "github.com/push-manager/push-manager/proto"
)

// BenchmarkFrame is what a codec costs each side and what it leaves of a push, in
// frames of realistic JSON. codec=none copies the frame, which both sides do anyway.
//
//	go test -run='^$' -bench=Frame -benchtime=100ms ./transport/compression
func BenchmarkFrame(b *testing.B) {
	for _, body := range []int{256, 1 << 10, 8 << 10} {
		for _, pushes := range []int{1, 8, 64} {
			for _, codec := range []pubsub.Codec{pubsub.Codec_NONE, pubsub.Codec_S2, pubsub.Codec_ZSTD} {
				for _, side := range []string{"manager", "node"} {
					name := fmt.Sprintf("body=%d/pushes=%d/codec=%v/side=%s", body, pushes, codec, side)
					b.Run(name, func(b *testing.B) { benchmarkFrame(b, body, pushes, codec, side) })
				}
			}
		}
	}
}

// benchmarkFrame goes through different frames, so that a codec does not meet the one it
// has just seen, which its tables remember.
func benchmarkFrame(b *testing.B, body, pushes int, codec pubsub.Codec, side string) {
	b.Helper()
	e, d := newPair(b)
	c := newChat(1)
	plain := make([][]byte, 32)
	sent := make([][]byte, len(plain))
	total := 0
	for i := range plain {
		plain[i] = c.frame(pushes, body)
		sent[i] = plain[i]
		if codec != pubsub.Codec_NONE {
			sent[i] = e.Append(nil, plain[i], codec)
		}
		total += len(sent[i])
	}
	var dst []byte
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		at := i % len(plain)
		i++
		switch {
		case codec == pubsub.Codec_NONE && side == "manager":
			dst = append(dst[:0], plain[at]...)
		case codec == pubsub.Codec_NONE:
			dst = slices.Clone(plain[at])
		case side == "manager":
			dst = e.Append(dst[:0], plain[at], codec)
		default:
			if _, err := d.Decode(sent[at], uint32(len(plain[at])), codec); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*pushes), "ns/push")
	b.ReportMetric(float64(total)/float64(len(plain)*pushes), "B/push")
}
