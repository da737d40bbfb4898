package ingress

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/plain"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Close codes of a Disconnect that names none.
const (
	closeDisconnected = 4000 // come again after a pause
	closeRefused      = 4410 // do not
)

// Bounds of a Disconnect.
const (
	codeMin, codeMax = 4000, 4999
	deviceMax        = 64  // bytes of a device_id, as gateways take it
	reasonMax        = 120 // bytes: a close frame has 125, two of them for the code
)

// Errors of a Disconnector.
var (
	// ErrRefusalsAway says that nobody could be refused, and nothing else was done.
	ErrRefusalsAway = errors.New("those who are refused cannot be written")
	// ErrManyRefusals says that as many are refused as may be, in all or for one tenant.
	ErrManyRefusals = errors.New("too many are refused already, in all or for one tenant")
	// ErrRefusalOpen says that somebody may be refused from now on, and nothing else was done.
	ErrRefusalOpen = errors.New("whoever is to be refused may be by now")
)

// errDisconnectOff is for a Server without a Disconnector.
var errDisconnectOff = errors.New("nobody can be disconnected here")

// Disconnector closes connections on all nodes. Its methods return by the end of ctx, or once etcd has answered. An error is or wraps one of those above.
type Disconnector interface {
	Disconnect(ctx context.Context, d *Disconnect) ([]NodeDisconnected, error)
}

// Disconnect says which connections are to be closed: those of User, those of User with a Device, or those in Room. Ids have the tenant
// before them.
type Disconnect struct {
	Scope              string // what ids of its tenant begin with
	User, Device, Room string
	Code               uint16
	Reason             string
	// RefuseFor is in whole seconds, 0: they may come back. AllowAgain ends that, and closes nothing.
	RefuseFor  time.Duration
	AllowAgain bool
}

// NodeDisconnected is what became of it on one node.
type NodeDisconnected struct {
	Node        string
	Connections int
	Failure     string // "": it was done
	MayBeDone   bool   // in spite of Failure
}

// disconnect serves Disconnect. It is no push: quotas get theirs back.
func (s *Server) disconnect(ctx context.Context, info *callInfo, line *audit.Entry) ([]byte, error) {
	info.unsent = true
	b, err := s.readSmall(info)
	if err != nil {
		return nil, err
	}
	var r pubsub.DisconnectRequest
	if err := r.UnmarshalVT(b); err != nil {
		return nil, malformed("request")
	}
	d, err := s.decodeDisconnect(&r)
	if err != nil {
		return nil, err
	}
	if err := s.stillMay(ctx, info, disconnect); err != nil {
		return nil, err
	}
	if s.cfg.Auth != nil {
		// A room is a right of its own: it concerns users whom the caller may not know.
		right, id := auth.Disconnect, d.User
		if d.Room != "" {
			right, id = auth.DisconnectRoom, d.Room
		}
		if !info.principal.Allows(right, id) {
			return nil, deniedError{api: disconnect}
		}
	}
	line.Event = audit.Disconnected
	if d.AllowAgain {
		line.Event = audit.RefusalLifted
	}
	line.RefusedFor = d.RefuseFor
	switch {
	case d.Room != "":
		line.TargetKind, line.Target = "room", d.Room
	case d.Device != "":
		line.TargetKind, line.Target = "device", d.User
	default:
		line.TargetKind, line.Target = "user", d.User
	}
	if s.cfg.Disconnector == nil {
		return nil, errDisconnectOff
	}
	d.Scope = scopeOf(info.tenant())
	if d.Room != "" {
		d.Room = d.Scope + d.Room
	} else {
		d.User = d.Scope + d.User
	}
	ctx, cancel := context.WithDeadline(ctx, info.call.Began.Add(s.cfg.Engine.Timeout()))
	defer cancel()
	nodes, err := s.cfg.Disconnector.Disconnect(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("disconnect: %w", err)
	}
	reply := new(pubsub.DisconnectResponse)
	for _, n := range nodes {
		if n.Failure == "" {
			reply.Nodes++
			reply.Disconnected += int32(min(n.Connections, math.MaxInt32))
			continue
		}
		outcome := "failed: "
		if n.MayBeDone {
			outcome = "unknown: "
		}
		reply.NodeFailures = append(reply.NodeFailures, &pubsub.NodeFailure{NodeId: n.Node, Reason: plain.Line(outcome+n.Failure, maxReason)})
	}
	switch failed := len(reply.GetNodeFailures()); {
	case len(nodes) == 0:
		reply.Message = "no connect-node is known"
	case failed > 0:
		reply.Message = fmt.Sprintf("%d of %d connect-nodes have not done it", failed, len(nodes))
	default:
		reply.Success = true
		if reply.GetDisconnected() == 0 && !d.AllowAgain {
			reply.Message = "there was no such connection"
		}
	}
	line.Connections, line.Outcome = int(reply.GetDisconnected()), resultNames[success]
	if !reply.GetSuccess() {
		line.Outcome = resultNames[partial]
	}
	b, err = reply.MarshalVT()
	if err != nil {
		return nil, fmt.Errorf("disconnect: %w", err)
	}
	return b, nil
}

// decodeDisconnect checks a request. Ids are as its caller names them.
func (s *Server) decodeDisconnect(r *pubsub.DisconnectRequest) (*Disconnect, error) {
	invalid := func(field, code, description string) error {
		return &engine.InvalidError{Field: field, Code: code, Description: description}
	}
	d := &Disconnect{
		User: r.GetUserId(), Device: r.GetDeviceId(), Room: r.GetRoomId(), Reason: r.GetReason(), AllowAgain: r.GetAllowAgain(),
		RefuseFor: r.GetRefuseFor().AsDuration(),
	}
	// An id is what it is in a push, and content is not asked for.
	push := engine.Request{Kind: engine.ToUser, User: d.User, Content: engine.Content{Present: true}}
	if d.Room != "" {
		push.Kind, push.Room = engine.ToRoom, d.Room
	}
	switch {
	case d.User == "" && d.Room == "":
		return nil, invalid("user_id", engine.CodeRequired, "is missing, and so is room_id: one of them is wanted")
	case d.User != "" && d.Room != "":
		return nil, invalid("room_id", engine.CodeMalformed, "stands beside user_id, and one of them is wanted")
	case d.Device != "" && d.Room != "":
		return nil, invalid("device_id", engine.CodeMalformed, "is for a user, and there is a room_id")
	}
	if err := s.cfg.Engine.Limits().Check(&push); err != nil {
		return nil, err
	}
	if err := ids.Check(d.Device, deviceMax); err != nil && d.Device != "" {
		return nil, invalid("device_id", engine.CodeIDMalformed, err.Error())
	}
	if err := ids.Check(d.Reason, reasonMax); err != nil && d.Reason != "" {
		return nil, invalid("reason", engine.CodeMalformed, err.Error())
	}
	if d.AllowAgain {
		for field, given := range map[string]bool{"code": r.GetCode() != 0, "reason": d.Reason != "", "refuse_for": r.RefuseFor != nil} {
			if given {
				return nil, invalid(field, engine.CodeMalformed, "stands beside allow_again, which disconnects nobody")
			}
		}
		d.Code = closeDisconnected // of no use
		return d, nil
	}
	if r.RefuseFor != nil && (!r.GetRefuseFor().IsValid() || d.RefuseFor < time.Second || d.RefuseFor > s.cfg.RefuseMax) {
		return nil, invalid("refuse_for", engine.CodeOutOfRange, fmt.Sprintf("must be from 1s to %v, or left out", s.cfg.RefuseMax))
	}
	d.RefuseFor = (d.RefuseFor + time.Second - 1).Truncate(time.Second)
	code := uint32(closeDisconnected)
	if d.RefuseFor > 0 {
		code = closeRefused
	}
	if code = cmp.Or(r.GetCode(), code); code < codeMin || code > codeMax {
		return nil, invalid("code", engine.CodeOutOfRange, fmt.Sprintf("must be from %d to %d, or left out", codeMin, codeMax))
	}
	d.Code = uint16(code)
	return d, nil
}
