package conformance

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
)

func helloChecks() []check {
	return []check{
		{name: "hello/reply", expect: "hello is answered in time with version 1, the node's id, a boot id that stays, no codec unasked", run: helloReply},
		{name: "hello/version", expect: "a newer manager gets a version that both speak; one that speaks neither gets FAILED_PRECONDITION", run: helloVersion},
		{name: "hello/first", expect: "a first frame that is not hello alone, and a second hello, end the stream with FAILED_PRECONDITION", run: helloFirst},
		{name: "hello/unknown-fields", expect: "fields of later versions are ignored, wherever they stand", run: unknownFields},
	}
}

func helloReply(ctx context.Context, t *tester) error {
	var boot string
	for range 2 {
		l, err := t.open(ctx, nil)
		if err != nil {
			return err
		}
		defer l.close()
		switch h := l.hello; {
		case h.GetProtocolVersion() != 1:
			return fmt.Errorf("protocol_version is %d", h.GetProtocolVersion())
		case h.GetNodeId() == "":
			return errors.New("node_id is empty")
		case t.cfg.NodeID != "" && h.GetNodeId() != t.cfg.NodeID:
			return fmt.Errorf("node_id is %q instead of %q", h.GetNodeId(), t.cfg.NodeID)
		case h.GetBootId() == "":
			return errors.New("boot_id is empty")
		case boot != "" && h.GetBootId() != boot:
			return fmt.Errorf("boot_id is %q on one stream and %q on the next", boot, h.GetBootId())
		case h.GetCodec() != pubsub.Codec_NONE:
			return fmt.Errorf("codec is %v, and none was offered", h.GetCodec())
		}
		boot = l.hello.GetBootId()
	}
	return nil
}

func helloVersion(ctx context.Context, t *tester) error {
	hello := t.helloOf()
	hello.ProtocolVersion = 2
	l, err := t.open(ctx, hello)
	if err != nil {
		return fmt.Errorf("version 2 is offered, so 1 will do: %w", err)
	}
	l.close()
	if v := l.hello.GetProtocolVersion(); v != 1 && v != 2 {
		return fmt.Errorf("offered version 2, answered %d", v)
	}
	hello = t.helloOf()
	hello.ProtocolVersion = 1000
	l, err = t.open(ctx, hello)
	if err == nil {
		l.close()
		return fmt.Errorf("offered version 1000, answered %d", l.hello.GetProtocolVersion())
	}
	if status.Code(err) != codes.FailedPrecondition {
		return fmt.Errorf("offered version 1000: %w", err)
	}
	return nil
}

func helloFirst(ctx context.Context, t *tester) error {
	for what, frames := range map[string][]*pubsub.DeliverRequest{
		"a heartbeat first":         {{Heartbeat: 1}},
		"a heartbeat beside hello":  {{Hello: t.helloOf(), Heartbeat: 1}},
		"a drain beside hello":      {{Hello: t.helloOf(), Drain: true}},
		"a second hello":            {{Hello: t.helloOf()}, {Hello: t.helloOf()}},
		"a forget before the hello": {{ForgetAudiences: []uint32{1}}},
	} {
		if err := t.breaks(ctx, frames...); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	return nil
}

// breaks sends frames on a stream of their own, which the node must then end.
func (t *tester) breaks(ctx context.Context, frames ...*pubsub.DeliverRequest) error {
	l, err := t.dial(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	for _, f := range frames {
		if err := l.write(f); err != nil {
			return err
		}
	}
	return l.ends(ctx, codes.FailedPrecondition)
}

// later adds fields to a message that no version has yet.
func later[M proto.Message](m M) M {
	b := protowire.AppendTag(nil, 100_001, protowire.VarintType)
	b = protowire.AppendVarint(b, 1)
	b = protowire.AppendTag(b, 100_002, protowire.BytesType)
	b = protowire.AppendString(b, "later")
	m.ProtoReflect().SetUnknown(b)
	return m
}

func unknownFields(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, later(t.helloOf()))
	if err != nil {
		return err
	}
	defer l.close()
	content, _ := t.content()
	f := later(l.frame(later(&pubsub.Delivery{Content: later(content), UserIds: []string{t.cfg.Absent}})))
	if err := l.write(f); err != nil {
		return err
	}
	if err := l.all(ctx); err != nil {
		return err
	}
	return l.fence(ctx)
}
