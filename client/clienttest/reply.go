package clienttest

import (
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/push-manager/push-manager/client"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Reply is how the server answers a push.
type Reply struct {
	what   func(Push) client.Result
	status *status.Status // an error; nil for none
	breaks bool
	hangs  bool
}

// With answers with a Result as it is.
func With(r client.Result) Reply { return Reply{what: func(Push) client.Result { return r }} }

// Delivered reaches all targets. A room and a broadcast have one; With has others.
func Delivered() Reply {
	return Reply{what: func(p Push) client.Result {
		n := p.targets()
		return client.Result{Success: true, Message: "delivered", Targets: n, Delivered: n, MessageID: p.MessageID}
	}}
}

// Offline finds nobody connected. With StoreIfOffline the message is stored.
func Offline() Reply {
	return Reply{what: func(p Push) client.Result {
		n := p.targets()
		r := client.Result{Message: "offline", Targets: n, Offline: n, MessageID: p.MessageID}
		if p.StoreIfOffline {
			r.Success, r.Message, r.Stored = true, "offline; stored", n
		}
		return r
	}}
}

// Failed reaches nobody, for a reason of a node.
func Failed(node, reason string) Reply {
	return Reply{what: func(p Push) client.Result {
		n := p.targets()
		return client.Result{
			Message: "failed", Targets: n, Failed: n, MessageID: p.MessageID,
			Failures: []client.Failure{{Node: node, Outcome: client.Failed, Reason: "failed: " + reason, Users: n}},
		}
	}}
}

// Unknown has sent it, and heard nothing from a node.
func Unknown(node string) Reply {
	return Reply{what: func(p Push) client.Result {
		n := p.targets()
		return client.Result{
			Message: "unknown", Targets: n, Unknown: n, MessageID: p.MessageID,
			Failures: []client.Failure{{Node: node, Outcome: client.Unknown, Reason: "unknown: no acknowledgement", Users: n}},
		}
	}}
}

// Refused is an error of Push-Manager's: nothing was sent. With a delay above 0 the push may be repeated after it.
func Refused(code codes.Code, reason string, retryAfter time.Duration) Reply {
	return Reply{status: refusal(code, reason, retryAfter)}
}

func refusal(code codes.Code, reason string, retryAfter time.Duration) *status.Status {
	s, err := status.New(code, "refused").WithDetails(&errdetails.ErrorInfo{Domain: "push-manager", Reason: reason})
	if err == nil && retryAfter > 0 {
		s, err = s.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(retryAfter)})
	}
	if err != nil {
		panic(err) // codes.OK carries no details
	}
	return s
}

// Error is an error that says nothing of what became of the push, as those of proxies do.
func Error(code codes.Code, message string) Reply { return Reply{status: status.New(code, message)} }

// Broken cuts all connections, and so the push is unknown.
func Broken() Reply { return Reply{breaks: true} }

// Hanging never answers.
func Hanging() Reply { return Reply{hangs: true} }

func summary(r client.Result) *pubsub.DeliverySummary {
	s := &pubsub.DeliverySummary{
		Targets: int32(r.Targets), Delivered: int32(r.Delivered), Offline: int32(r.Offline), Failed: int32(r.Failed), Unknown: int32(r.Unknown),
		Stored: int32(r.Stored), Unsure: int32(r.Unsure), Acked: int32(r.Acked), Duplicates: int32(r.Duplicates), Filtered: int32(r.Filtered),
		MessageId: r.MessageID, Position: r.Position,
	}
	for _, f := range r.Failures {
		s.NodeFailures = append(s.NodeFailures, &pubsub.NodeFailure{NodeId: f.Node, Reason: f.Reason, Users: int32(f.Users)})
	}
	return s
}
