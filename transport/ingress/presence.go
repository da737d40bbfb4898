package ingress

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/presence"
)

const presenceServiceName = "pubsub.PresenceService"

// fieldUserIDs is GetUsersRequest.user_ids.
const fieldUserIDs = 1

var errPresenceOff = errors.New("nobody is told here who is connected")

// presenceDesc is the generated description of PresenceService with handlers that take the bytes of a request.
func (s *Server) presenceDesc() *grpc.ServiceDesc {
	d := &grpc.ServiceDesc{
		ServiceName: presenceServiceName,
		HandlerType: (*any)(nil),
		Streams:     []grpc.StreamDesc{{StreamName: watchPresence.String(), Handler: s.watchPresence, ServerStreams: true}},
		Metadata:    pubsub.PresenceService_ServiceDesc.Metadata,
	}
	for a, do := range map[api]func(context.Context, *callInfo, *audit.Entry) ([]byte, error){
		getRoomMembers: s.getRoomMembers, getUsers: s.getUsers, disconnect: s.disconnect,
	} {
		d.Methods = append(d.Methods, grpc.MethodDesc{MethodName: a.String(), Handler: s.callHandler(a, do)})
	}
	return d
}

// sees tells which rooms a caller may be shown: those that it may list the members of.
func (s *Server) sees(who *auth.Principal) func(room string) bool {
	return func(room string) bool { return s.cfg.Auth == nil || who.Allows(auth.GetRoomMembers, room) }
}

// getRoomMembers serves GetRoomMembers. It is no push: quotas get theirs back.
func (s *Server) getRoomMembers(ctx context.Context, info *callInfo, _ *audit.Entry) ([]byte, error) {
	info.unsent = true
	b, err := s.readSmall(info)
	if err != nil {
		return nil, err
	}
	var r pubsub.GetRoomMembersRequest
	if err := r.UnmarshalVT(b); err != nil {
		return nil, malformed("request")
	}
	if err := s.checkTarget(r.GetRoomId(), ""); err != nil {
		return nil, err
	}
	switch n := r.GetPageSize(); {
	case n < 0 || n > presence.PageMost:
		return nil, &engine.InvalidError{Field: "page_size", Code: engine.CodeOutOfRange, Description: fmt.Sprintf("must be between 0 and %d", presence.PageMost)}
	case !utf8.ValidString(r.GetPageToken()):
		return nil, &engine.InvalidError{Field: "page_token", Code: engine.CodeMalformed, Description: presence.ErrPageToken.Error()}
	}
	if err := s.stillMay(ctx, info, getRoomMembers); err != nil {
		return nil, err
	}
	if s.cfg.Auth != nil && !info.principal.Allows(auth.GetRoomMembers, r.GetRoomId()) {
		return nil, deniedError{api: getRoomMembers}
	}
	if s.cfg.Presence == nil {
		return nil, errPresenceOff
	}
	ctx, cancel := context.WithDeadline(ctx, info.call.Began.Add(s.cfg.Engine.Timeout()))
	defer cancel()
	page, err := s.cfg.Presence.Members(ctx, scopeOf(info.tenant()), r.GetRoomId(), r.GetPageToken(), int(r.GetPageSize()))
	if err != nil {
		return nil, presenceError(err)
	}
	return marshalPresence(page)
}

// checkTarget checks the id of a room or of a user, as a push would.
func (s *Server) checkTarget(room, user string) error {
	kind := engine.ToRoom
	if user != "" {
		kind = engine.ToUser
	}
	limits := s.cfg.Engine.Limits()
	return limits.Check(&engine.Request{Kind: kind, Room: room, User: user, Content: engine.Content{Present: true}}) //nolint:wrapcheck // it names its field
}

// getUsers serves GetUsers. It is no push: quotas get theirs back.
func (s *Server) getUsers(ctx context.Context, info *callInfo, _ *audit.Entry) ([]byte, error) {
	c := s.takeCall(toUsers) // may have as long a list
	info.allow(c)
	defer func() {
		s.space.release(info.conn, c.held)
		info.unsent = true
	}()
	if err := s.read(ctx, info.wire, info.conn, c); err != nil {
		return nil, err
	}
	users := 0
	for m := (wire.Reader{Rest: c.in.wire}); m.Next(); {
		if m.IsBytes(fieldUserIDs) {
			users++
		}
	}
	if users > presence.UsersMost {
		return nil, &engine.InvalidError{Field: "user_ids", Code: engine.CodeTooMany, Description: fmt.Sprintf("more than %d entries", presence.UsersMost)}
	}
	var r pubsub.GetUsersRequest
	if err := r.UnmarshalVT(c.in.wire); err != nil {
		return nil, malformed("request")
	}
	limits := s.cfg.Engine.Limits()
	if err := limits.Check(&engine.Request{Kind: engine.ToUsers, Users: r.GetUserIds(), Content: engine.Content{Present: true}}); err != nil {
		return nil, err //nolint:wrapcheck // it names its field
	}
	if err := s.stillMay(ctx, info, getUsers); err != nil {
		return nil, err
	}
	if s.cfg.Auth != nil && slices.ContainsFunc(r.GetUserIds(), func(id string) bool { return !info.principal.Allows(auth.GetUsers, id) }) {
		return nil, deniedError{api: getUsers}
	}
	if s.cfg.Presence == nil {
		return nil, errPresenceOff
	}
	ctx, cancel := context.WithDeadline(ctx, info.call.Began.Add(s.cfg.Engine.Timeout()))
	defer cancel()
	found, err := s.cfg.Presence.Users(ctx, scopeOf(info.tenant()), r.GetUserIds(), !r.GetWithoutConnections(), s.sees(info.principal))
	if err != nil {
		return nil, presenceError(err)
	}
	return marshalPresence(found)
}

// watchPresence serves WatchPresence.
func (s *Server) watchPresence(_ any, ss grpc.ServerStream) error {
	return s.serveWatch(ss, watchPresence, &s.metrics.presences, func(ctx context.Context, info *callInfo) error {
		b, err := s.readSmall(info)
		if err != nil {
			return err
		}
		var r pubsub.WatchPresenceRequest
		if err := r.UnmarshalVT(b); err != nil {
			return malformed("request")
		}
		switch {
		case r.GetRoomId() == "" && r.GetUserId() == "":
			return &engine.InvalidError{Field: "room_id", Code: engine.CodeRequired, Description: "is missing, and so is user_id: one of them is wanted"}
		case r.GetRoomId() != "" && r.GetUserId() != "":
			return &engine.InvalidError{Field: "user_id", Code: engine.CodeMalformed, Description: "stands beside room_id, and one of them is wanted"}
		}
		if err := s.checkTarget(r.GetRoomId(), r.GetUserId()); err != nil {
			return err
		}
		right, id, field := auth.WatchPresence, r.GetUserId(), "user_id"
		if r.GetRoomId() != "" {
			right, id, field = auth.WatchRoomPresence, r.GetRoomId(), "room_id"
		}
		may := func() error {
			if s.cfg.Auth != nil && !info.principal.Allows(right, id) {
				return deniedError{api: watchPresence, field: field}
			}
			return nil
		}
		if err := may(); err != nil {
			return err
		}
		if s.cfg.Presence == nil {
			return errPresenceOff
		}
		tenant := info.tenant()
		return presenceError(s.cfg.Presence.Watch(ctx, &presence.Watcher{
			Scope: scopeOf(tenant), Room: r.GetRoomId(), User: r.GetUserId(), Position: r.GetPosition(),
			Sees: func(room string) bool { return s.sees(info.principal)(room) }, // the principal may become another one
			May: func() error {
				if s.cfg.Auth == nil || s.cfg.Auth.Valid(info.principal, time.Now()) {
					return nil
				}
				if err := s.stillMay(ctx, info, watchPresence); err != nil {
					return err
				}
				if info.tenant() != tenant {
					return deniedError{api: watchPresence, method: true}
				}
				return may()
			},
			Send: func(m *pubsub.WatchPresenceResponse) error {
				b, err := marshalPresence(m)
				if err != nil {
					return err
				}
				out := new(reply)
				out.set(b)
				return ss.SendMsg(out)
			},
		}))
	})
}

// presenceError names the field that is wrong, where one is.
func presenceError(err error) error {
	switch {
	case errors.Is(err, presence.ErrPageToken):
		return &engine.InvalidError{Field: "page_token", Code: engine.CodeMalformed, Description: presence.ErrPageToken.Error()}
	case errors.Is(err, presence.ErrTooLarge):
		return &engine.InvalidError{Field: "user_ids", Code: "REPLY_TOO_LARGE", Description: presence.ErrTooLarge.Error()}
	case errors.Is(err, presence.ErrPosition):
		return &engine.InvalidError{Field: "position", Code: engine.CodeMalformed, Description: presence.ErrPosition.Error()}
	}
	return err
}

func marshalPresence(m interface{ MarshalVT() ([]byte, error) }) ([]byte, error) {
	b, err := m.MarshalVT()
	if err != nil {
		return nil, fmt.Errorf("encode presence: %w", err)
	}
	return b, nil
}
