package link

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/plain"
	pubsub "github.com/push-manager/push-manager/proto"
)

// protocolVersion is the version of Deliver that we speak; the one before it is
// accepted, too.
const protocolVersion = 1

var (
	errUnimplemented = errors.New("the node has no Deliver")
	errWrongNode     = errors.New("the address belongs to another node")
	errVersion       = errors.New("the node speaks another protocol version")
	errCodec         = errors.New("the node wants a codec that was not offered")
)

// wrongNodeError is errWrongNode with what the node there says that it is.
type wrongNodeError struct{ said string }

func (e *wrongNodeError) Error() string {
	return fmt.Sprintf("%v: it says that it is %q", errWrongNode, plain.Line(e.said, textMax))
}
func (*wrongNodeError) Unwrap() error { return errWrongNode }

// open says hello on a new stream and judges the node's answer. The timer ends ctx.
func (l *Link) open(ctx context.Context, timer *time.Timer, conn *grpc.ClientConn) (*stream, error) {
	rpc, err := conn.NewStream(ctx, &pubsub.ConnectNodeService_ServiceDesc.Streams[0],
		pubsub.ConnectNodeService_Deliver_FullMethodName, l.set.call...)
	var h *pubsub.HelloReply
	if err == nil {
		h, err = l.greet(rpc)
	}
	if !timer.Stop() {
		return nil, errDialTimeout
	}
	switch {
	case err != nil:
		return nil, err
	case h.GetProtocolVersion() < max(protocolVersion-1, 1) || h.GetProtocolVersion() > protocolVersion:
		return nil, fmt.Errorf("%w: %d", errVersion, h.GetProtocolVersion())
	case h.GetNodeId() != l.node.id:
		return nil, &wrongNodeError{said: h.GetNodeId()}
	case h.GetCodec() != pubsub.Codec_NONE && !slices.Contains(l.set.compressor.codecs, h.GetCodec()):
		return nil, fmt.Errorf("%w: %d", errCodec, h.GetCodec())
	case int(h.GetOnlineUsers()) > l.set.cfg.NodeUsers:
		l.set.meters.strikes.Inc()
		return nil, fmt.Errorf("%w: %d users, link.node_users is %d", errViolation, h.GetOnlineUsers(), l.set.cfg.NodeUsers)
	}
	l.node.unscoped.Store(!hasScopes(h))
	if l.node.booted(h.GetBootId()) {
		l.set.meters.restarts.Inc()
	}
	return newStream(l, rpc, h), nil
}

// greet sends hello and receives the reply.
func (l *Link) greet(rpc grpc.ClientStream) (*pubsub.HelloReply, error) {
	hello, err := (&pubsub.DeliverRequest{Hello: &pubsub.Hello{
		ProtocolVersion: protocolVersion,
		ManagerId:       l.set.cfg.ManagerID,
		InstanceId:      l.set.instance,
		Attempt:         l.set.hellos.Add(1),
		Shard:           uint32(l.shard),
		Shards:          uint32(l.set.cfg.Shards),
		NodeId:          l.node.id,
		Codecs:          l.set.compressor.codecs,
		Features:        l.set.offers,
	}}).MarshalVT()
	if err != nil {
		return nil, fmt.Errorf("hello: %w", err)
	}
	buf := l.set.buffers.take()
	*buf = append(*buf, hello...)
	// An error of SendMsg says less than the status that RecvMsg then returns.
	_ = rpc.SendMsg(&outFrame{mem.NewBuffer(buf, &l.set.buffers)})
	var in inFrame
	if err := rpc.RecvMsg(&in); err != nil {
		if status.Code(err) == codes.Unimplemented {
			return nil, errUnimplemented
		}
		return nil, fmt.Errorf("hello: %w", err)
	}
	var r response
	if err := r.decode(in.b, 0); err != nil {
		return nil, fmt.Errorf("hello: %w", err)
	}
	if r.hello == nil {
		return nil, fmt.Errorf("hello: %w: the first frame has no hello", errWire)
	}
	return r.hello, nil
}

// hasScopes tells whether a node can tell the users of a scope apart.
func hasScopes(hello *pubsub.HelloReply) bool {
	return featuresOf(hello.GetFeatures()).has(pubsub.Feature_FEATURE_SCOPE)
}

// offers are the features that our hello names. Replays and logs of rooms need somebody who reads the store.
func offers(cfg *Config) []pubsub.Feature {
	list := []pubsub.Feature{
		pubsub.Feature_FEATURE_SCOPE, pubsub.Feature_FEATURE_DEDUPE, pubsub.Feature_FEATURE_CLIENT_ACK,
		pubsub.Feature_FEATURE_EXPIRY, pubsub.Feature_FEATURE_COLLAPSE, pubsub.Feature_FEATURE_ROOMS, pubsub.Feature_FEATURE_FILTER,
		pubsub.Feature_FEATURE_DISCONNECT,
	}
	if cfg.Replayer != nil {
		list = append(list, pubsub.Feature_FEATURE_REPLAY)
	}
	if cfg.RoomLogs != nil {
		list = append(list, pubsub.Feature_FEATURE_ROOM_LOG)
	}
	return list
}

// features is a set of them.
type features uint32

// featuresOf makes the set of a list, in which those that are unknown are left out.
func featuresOf(list []pubsub.Feature) (f features) {
	for _, x := range list {
		if x > pubsub.Feature_FEATURE_UNSPECIFIED && x < 32 {
			f |= 1 << x
		}
	}
	return f
}

// featureName is how people read of it.
func featureName(f pubsub.Feature) string { return strings.TrimPrefix(f.String(), "FEATURE_") }

func (f features) has(x pubsub.Feature) bool { return f>>x&1 == 1 }
