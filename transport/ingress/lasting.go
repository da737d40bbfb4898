package ingress

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/wire"
)

// Lasting serves what is stored for users. Users are named with the tenant before them. Its methods return by the end of
// ctx. An error that is or wraps engine.ErrSpoolDown, engine.ErrOverloaded, engine.ErrDraining or ErrNotTaken is told to
// the caller as that, and so is an *engine.InvalidError.
type Lasting interface {
	// Forget erases everything of a user, and says how many messages it was.
	Forget(ctx context.Context, user string) (messages int, err error)
	// Replay sends a node what is stored for a user, and says how many messages the node has taken when
	// the first of them are with it.
	Replay(ctx context.Context, user, node string) (messages int, err error)
}

// ErrNotTaken is an error of Lasting.Replay: the node has not the user, cannot be reached or refuses. Its text is for the
// caller.
var ErrNotTaken = errors.New("the connect-node has not taken it")

var (
	// errStoreOff refuses what needs a store.
	errStoreOff = errors.New("there is no store")
	// errLastingOpen ends a call whose deadline has passed while the store was at work.
	errLastingOpen = errors.New("the deadline passed, and some of it may have been done")
)

// callHandler serves a unary call that is no push. It is let in, paid for and told to the audit log as a push is. do gives the reply and
// completes the line of the audit log, of which none without an event is written.
func (s *Server) callHandler(a api, do func(ctx context.Context, info *callInfo, line *audit.Entry) ([]byte, error)) grpc.MethodHandler {
	return func(_ any, ctx context.Context, _ func(any) error, _ grpc.UnaryServerInterceptor) (_ any, err error) {
		info, err := s.admit(ctx, a)
		if err != nil {
			s.metrics.apis[a].requests[refused].Inc()
			if s.cfg.Audit != nil {
				s.auditRefusal(info.auditEntry(ctx, a.String()), nil, err)
			}
			return nil, s.reject(ctx, a.String(), info.priority, err)
		}
		defer s.leave(&info)
		line := info.auditEntry(ctx, a.String())
		bytes, err := func() (_ []byte, err error) {
			defer func() {
				if v := recover(); v != nil {
					s.panicked(a.String(), v)
					err = errMayBeSent
				}
			}()
			return do(ctx, &info, &line)
		}()
		took := time.Since(info.call.Began)
		if err != nil {
			s.metrics.recordCall(a, refused, took)
			info.unsent = !errors.Is(err, errLastingOpen)
			if s.cfg.Audit != nil {
				s.auditRefusal(info.auditEntry(ctx, a.String()), nil, err)
			}
			return nil, s.reject(ctx, a.String(), info.priority, err)
		}
		s.metrics.recordCall(a, success, took)
		if s.cfg.Audit != nil && line.Event != "" {
			s.cfg.Audit.Write(line)
		}
		r := new(reply)
		r.set(bytes)
		return r, nil
	}
}

// forget serves ForgetUser.
func (s *Server) forget(ctx context.Context, info *callInfo, line *audit.Entry) ([]byte, error) {
	line.Event = audit.UserForgotten
	return s.lasting(ctx, info, forgetUser, line)
}

// replayUser serves Replay.
func (s *Server) replayUser(ctx context.Context, info *callInfo, line *audit.Entry) ([]byte, error) {
	line.Event = audit.UserReplayed
	return s.lasting(ctx, info, replay, line)
}

// lasting does what a call asks for.
func (s *Server) lasting(ctx context.Context, info *callInfo, a api, line *audit.Entry) ([]byte, error) {
	b, err := s.readSmall(info)
	if err != nil {
		return nil, err
	}
	var id, node string
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsBytes(1):
			id = string(m.Bytes)
		case m.IsBytes(2) && a == replay:
			node = string(m.Bytes)
		}
	}
	if m.Err != nil {
		return nil, malformed("request")
	}
	limits := s.cfg.Engine.Limits()
	// An id is what it is in a push, and content is not asked for.
	if err := limits.Check(&engine.Request{Kind: engine.ToUser, User: id, Content: engine.Content{Present: true}}); err != nil {
		return nil, err
	}
	if err := ids.Check(node, ids.MaxBytes); err != nil && a == replay {
		return nil, &engine.InvalidError{Field: "node_id", Code: engine.CodeIDMalformed, Description: err.Error()}
	}
	if err := s.stillMay(ctx, info, a); err != nil {
		return nil, err
	}
	if s.cfg.Auth != nil && !info.principal.Allows(a.method(), id) {
		return nil, deniedError{api: a}
	}
	line.TargetKind, line.Target = "user", id
	if s.cfg.Lasting == nil {
		return nil, errStoreOff
	}
	ctx, cancel := context.WithDeadline(ctx, info.call.Began.Add(s.cfg.Engine.Timeout()))
	defer cancel()
	var messages int
	scoped := scopeOf(info.tenant()) + id
	if a == replay {
		messages, err = s.cfg.Lasting.Replay(ctx, scoped, node)
	} else {
		messages, err = s.cfg.Lasting.Forget(ctx, scoped)
		s.messageIDs.erase() // some may be gone, whatever is said
	}
	switch {
	case err == nil:
		return wire.AppendUint(nil, 1, int32Of(messages)), nil
	case ctx.Err() != nil:
		return nil, errLastingOpen
	default:
		return nil, fmt.Errorf("%s: %w", a, err)
	}
}

// stillMay asks again for the right to a method, if the policy or keys have changed since the call was let in: its caller
// decides when the request comes.
func (s *Server) stillMay(ctx context.Context, info *callInfo, a api) error {
	if s.cfg.Auth == nil || s.cfg.Auth.Valid(info.principal, time.Now()) {
		return nil
	}
	if err := s.authenticate(ctx, info); err != nil {
		return err
	}
	if !a.allowedTo(info.principal) {
		return deniedError{api: a, method: true}
	}
	return nil
}
