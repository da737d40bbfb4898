package conformance

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/compression"
)

func sizeChecks() []check {
	return []check{
		{name: "size/16-MiB", expect: "a frame of nearly 16 MiB is taken", run: largeFrame},
		{name: "size/misses", expect: "misses that do not fit into a frame of 1 MiB are split by delivery, and one that does not fit alone is refused", run: largeMisses},
		{name: "size/max-unacked", expect: "as many deliveries as max_unacked allows, 10,000 at most here, may be on their way", run: manyUnacked},
		{name: "size/compression", expect: "frames compressed with the codec that was picked are what they hold; a wrong length or no codec ends the stream with FAILED_PRECONDITION", run: compressed},
	}
}

func largeFrame(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	const content = 256 << 10
	var deliveries []*pubsub.Delivery
	for range maxManagerFrame/content - 1 {
		deliveries = append(deliveries, &pubsub.Delivery{Content: &pubsub.MessageContent{Data: make([]byte, content)}, UserIds: []string{t.cfg.Absent}})
	}
	if t.unacked > 0 {
		deliveries = deliveries[:min(len(deliveries), int(t.unacked))]
	}
	if _, err := l.deliver(deliveries...); err != nil {
		return err
	}
	return l.all(ctx)
}

func largeMisses(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	half := t.strangers(2500, 240) // 600 KB
	d1, _ := t.to(half...)
	d2, _ := t.to(half...)
	if _, err := l.deliver(d1, d2); err != nil {
		return err
	}
	if err := l.all(ctx); err != nil {
		return fmt.Errorf("two misses of 600 KB: %w", err)
	}
	d3, _ := t.to(t.strangers(5000, 240)...)
	o, err := l.ask(ctx, d3)
	if err == nil && !o.refused {
		err = errors.New("not refused")
	}
	if err != nil {
		return fmt.Errorf("a miss of 1.2 MB: %w", err)
	}
	return nil
}

func manyUnacked(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	n := 10_000
	if t.unacked > 0 {
		n = min(n, int(t.unacked))
	}
	for l.next <= uint64(n) {
		var frame []*pubsub.Delivery
		for range min(1000, n-int(l.next)+1) {
			d, _ := t.to(t.cfg.Absent)
			frame = append(frame, d)
		}
		if _, err := l.deliver(frame...); err != nil {
			return err
		}
	}
	return l.all(ctx)
}

// packed is a frame compressed.
func packed(f *pubsub.DeliverRequest, codec pubsub.Codec) (*pubsub.DeliverRequest, error) {
	b, err := proto.Marshal(f)
	if err != nil {
		return nil, err
	}
	encoder, err := compression.NewEncoder()
	if err != nil {
		return nil, err
	}
	return &pubsub.DeliverRequest{Compressed: encoder.Append(nil, b, codec), RawBytes: uint32(len(b))}, nil
}

func compressed(ctx context.Context, t *tester) error {
	none := true
	for _, codec := range []pubsub.Codec{pubsub.Codec_S2, pubsub.Codec_ZSTD} {
		hello := t.helloOf()
		hello.Codecs = []pubsub.Codec{codec}
		l, err := t.open(ctx, hello)
		if err != nil {
			return err
		}
		defer l.close()
		switch l.hello.GetCodec() {
		case pubsub.Codec_NONE:
			continue
		case codec:
			none = false
		default:
			return fmt.Errorf("%v was offered, and it picked %v", codec, l.hello.GetCodec())
		}
		if err := l.packedAndPlain(ctx, codec); err != nil {
			return fmt.Errorf("%v: %w", codec, err)
		}
		if err := t.badlyPacked(ctx, codec); err != nil {
			return fmt.Errorf("%v: %w", codec, err)
		}
	}
	d, _ := t.to(t.cfg.Absent)
	f, err := packed(&pubsub.DeliverRequest{FirstSeq: 1, Deliveries: []*pubsub.Delivery{d}}, pubsub.Codec_S2)
	if err != nil {
		return err
	}
	if err := t.breaks(ctx, &pubsub.DeliverRequest{Hello: t.helloOf()}, f); err != nil {
		return fmt.Errorf("a compressed frame without a codec: %w", err)
	}
	if none {
		return &skipped{"the node picks no codec; it ends a stream with a compressed frame, which is right"}
	}
	return nil
}

// packedAndPlain sends both kinds in turns.
func (l *link) packedAndPlain(ctx context.Context, codec pubsub.Codec) error {
	for i := range 4 {
		d, _ := l.t.to(l.t.strangers(20, 100)...)
		f := l.frame(d)
		if i%2 == 0 {
			var err error
			if f, err = packed(f, codec); err != nil {
				return err
			}
		}
		if err := l.write(f); err != nil {
			return err
		}
	}
	if err := l.all(ctx); err != nil {
		return err
	}
	f, err := packed(&pubsub.DeliverRequest{Heartbeat: 9}, codec)
	if err != nil {
		return err
	}
	if err := l.write(f); err != nil {
		return err
	}
	return l.until(ctx, "the answer to a compressed heartbeat", func() bool { return l.beat == 9 })
}

func (t *tester) badlyPacked(ctx context.Context, codec pubsub.Codec) error {
	d, _ := t.to(t.strangers(20, 100)...)
	good, err := packed(&pubsub.DeliverRequest{FirstSeq: 1, Deliveries: []*pubsub.Delivery{d}}, codec)
	if err != nil {
		return err
	}
	twice, err := packed(good, codec)
	if err != nil {
		return err
	}
	hello, err := packed(&pubsub.DeliverRequest{Hello: t.helloOf()}, codec)
	if err != nil {
		return err
	}
	frame, size := good.GetCompressed(), good.GetRawBytes()
	for what, bad := range map[string]*pubsub.DeliverRequest{
		"raw_bytes one too low":    {Compressed: frame, RawBytes: size - 1},
		"raw_bytes one too high":   {Compressed: frame, RawBytes: size + 1},
		"raw_bytes of 0":           {Compressed: frame},
		"raw_bytes over 16 MiB":    {Compressed: frame, RawBytes: maxManagerFrame + 1},
		"bytes that are no frame":  {Compressed: []byte("\xff\xff\xff\xffconformance"), RawBytes: size},
		"a heartbeat beside it":    {Compressed: frame, RawBytes: size, Heartbeat: 1},
		"a hello in it":            hello,
		"a compressed frame in it": twice,
	} {
		hello := t.helloOf()
		hello.Codecs = []pubsub.Codec{codec}
		if err := t.breaks(ctx, &pubsub.DeliverRequest{Hello: hello}, bad); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	return nil
}
