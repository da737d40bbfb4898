//go:build unix

package compression

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

// BenchmarkFrame is what a codec costs each side and what it leaves of a push, in
// frames of realistic JSON. codec=NONE is a copy of the frame. Both sides work in memory
// that they have: that of a frame costs a node the same, whether it came compressed or
// not. The time is that of the CPU: what else runs on the machine is not in it.
//
//	go test -run='^$' -bench=Frame -benchtime=20ms -count=5 ./transport/compression
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
	plain, sent := make([][]byte, 32), make([][]byte, 32)
	total, most := 0, 0
	for i := range plain {
		plain[i] = c.frame(pushes, body)
		sent[i] = plain[i]
		if codec != pubsub.Codec_NONE {
			sent[i] = e.Append(nil, plain[i], codec)
		}
		total += len(sent[i])
		most = max(most, len(plain[i]))
	}
	dst := make([]byte, 0, 2*most)
	b.ReportAllocs()
	start, i := cpuTime(b), 0
	for b.Loop() {
		at := i % len(plain)
		i++
		switch {
		case codec == pubsub.Codec_NONE:
			dst = append(dst[:0], plain[at]...)
		case side == "manager":
			dst = e.Append(dst[:0], plain[at], codec)
		default:
			if _, err := d.decode(dst[:0:len(plain[at])], sent[at], codec); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(cpuTime(b)-start)/float64(i*pushes), "cpu-ns/push")
	b.ReportMetric(float64(total)/float64(len(plain)*pushes), "B/push")
}

// BenchmarkNoise is what it costs to find out that a frame cannot be compressed.
func BenchmarkNoise(b *testing.B) {
	e, _ := newPair(b)
	for _, size := range []int{1 << 10, 64 << 10} {
		for _, codec := range codecs() {
			b.Run(fmt.Sprintf("size=%d/codec=%v", size, codec), func(b *testing.B) {
				frame, dst := newChat(1).random(size), make([]byte, 0, 2*size)
				b.ReportAllocs()
				start, n := cpuTime(b), 0
				for b.Loop() {
					dst = e.Append(dst[:0], frame, codec)
					n++
				}
				b.ReportMetric(float64(cpuTime(b)-start)/float64(n), "cpu-ns/frame")
			})
		}
	}
}

// cpuTime is what this process has used so far.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
