package refcontroller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/plain"
	"github.com/push-manager/push-manager/internal/slots"
	pubsub "github.com/push-manager/push-manager/proto"
)

// The limits, which are those of the push API by default.
const (
	maxIDBytes         = ids.MaxScopedBytes
	maxNameBytes       = ids.MaxBytes
	maxMetadataEntries = 32
	maxMetadataBytes   = 8 << 10
	maxBatch           = 10_000
	maxLeaseMs         = 10_000
)

// service answers ControllerService from a Store.
type service struct {
	pubsub.UnimplementedControllerServiceServer
	store  Store
	hub    *hub
	roster *roster
	shared Shared // store, if others work on it, too
	// Closed when the server drains.
	draining chan struct{}
	// panicked turns a panic into an error.
	panicked  func(method string, p any) error
	log       *slog.Logger
	impostors rate.Sometimes // of what log says about them
	// Those who hear followers; waited for by the Server.
	readers sync.WaitGroup
}

// JoinRoom implements ControllerService.
func (s *service) JoinRoom(ctx context.Context, in *pubsub.JoinRoomRequest) (*pubsub.JoinRoomResponse, error) {
	err := firstOf(checkID("user_id", in.GetUserId()), checkID("room_id", in.GetRoomId()), checkID("node_id", in.GetNodeId()),
		checkName(in.GetUserName()), checkMetadata(in.GetMetadata()))
	if err != nil {
		return nil, err
	}
	by := Reporter{Node: in.GetNodeId(), Boot: in.GetBootId(), Seq: in.GetSeq()}
	if err := s.checkReporter(ctx, by); err != nil {
		return nil, err
	}
	joined, err := s.store.Join(ctx, Join{
		Reporter: by, User: in.GetUserId(), Room: in.GetRoomId(), Name: in.GetUserName(), Metadata: in.GetMetadata(),
		WithoutUsers: in.GetWithoutUsers(),
	})
	if err != nil {
		return nil, storeError("join", err)
	}
	if err := s.answerable(ctx, by, "join"); err != nil {
		return nil, err
	}
	if joined.Full {
		return &pubsub.JoinRoomResponse{Message: fmt.Sprintf("room %q is full", in.GetRoomId()), RoomInfo: joined.Room}, nil
	}
	return &pubsub.JoinRoomResponse{Success: true, RoomInfo: joined.Room}, nil
}

// LeaveRoom implements ControllerService. With a node and nothing else all
// memberships of that node end: a node that starts forgets its predecessor.
func (s *service) LeaveRoom(ctx context.Context, in *pubsub.LeaveRoomRequest) (*pubsub.LeaveRoomResponse, error) {
	by := Reporter{Node: in.GetNodeId(), Boot: in.GetBootId(), Seq: in.GetSeq()}
	if by.Node != "" {
		if err := firstOf(checkID("node_id", by.Node), s.checkReporter(ctx, by)); err != nil {
			return nil, err
		}
		if in.GetUserId() == "" && in.GetRoomId() == "" {
			n, err := s.store.Begin(ctx, by)
			if err != nil {
				return nil, storeError("leave", err)
			}
			if err := s.settle(ctx); err != nil {
				return nil, storeError("leave", err)
			}
			return &pubsub.LeaveRoomResponse{Success: true, Message: fmt.Sprintf("%d memberships of node %q ended", n, by.Node)}, nil
		}
	} else {
		by = Reporter{} // On all nodes: the numbers of one mean nothing there.
		if err := s.speaksFor(ctx, ""); err != nil {
			return nil, err
		}
	}
	if err := firstOf(checkID("user_id", in.GetUserId()), checkID("room_id", in.GetRoomId())); err != nil {
		return nil, err
	}
	left, err := s.store.Leave(ctx, Leave{Reporter: by, User: in.GetUserId(), Room: in.GetRoomId()})
	if err != nil {
		return nil, storeError("leave", err)
	}
	if err := s.answerable(ctx, by, "leave"); err != nil {
		return nil, err
	}
	if !left {
		return &pubsub.LeaveRoomResponse{Message: fmt.Sprintf("user %q is not in room %q", in.GetUserId(), in.GetRoomId())}, nil
	}
	return &pubsub.LeaveRoomResponse{Success: true}, nil
}

// answerable returns once who watches knows of what is reported so far. During the
// warm-up nobody watches, and old routes serve as if they were good: the client must not
// be told before that is over. A node that does not number its reports re-reports by
// them, and the warm-up waits for that.
func (s *service) answerable(ctx context.Context, by Reporter, doing string) error {
	if by.Seq != 0 {
		if _, err := s.warm(ctx); err != nil {
			return err
		}
	}
	if err := s.settle(ctx); err != nil {
		return storeError(doing, err)
	}
	return nil
}

// settle returns once who watches, at any Controller, knows of what is reported so far.
func (s *service) settle(ctx context.Context) error {
	if err := s.hub.settle(ctx); err != nil || s.shared == nil {
		return err
	}
	return s.shared.Settle(ctx)
}

// SyncNode implements ControllerService. It never waits for the warm-up, which waits for it.
func (s *service) SyncNode(ctx context.Context, in *pubsub.SyncNodeRequest) (*pubsub.SyncNodeResponse, error) {
	by := Reporter{Node: in.GetNodeId(), Boot: in.GetBootId()}
	if err := firstOf(checkID("node_id", by.Node), checkID("boot_id", by.Boot), checkSlots(in), s.checkReporter(ctx, by)); err != nil {
		return nil, err
	}
	if _, err := s.store.Begin(ctx, by); err != nil {
		return nil, storeError("sync", err)
	}
	out := &pubsub.SyncNodeResponse{StoreId: s.store.ID()}
	for _, slot := range in.GetSlots() {
		members := make([]Join, len(slot.GetMemberships()))
		for i, m := range slot.GetMemberships() {
			members[i] = Join{User: m.GetUserId(), Room: m.GetRoomId(), Name: m.GetUserName(), Metadata: m.GetMetadata()}
		}
		by.Seq = slot.GetSeq()
		switch err := s.store.SetSlot(ctx, by, int(slot.GetSlot()), members); {
		case errors.Is(err, ErrOld):
			out.Differing = append(out.Differing, slot.GetSlot())
		case err != nil:
			return nil, storeError("sync", err)
		}
	}
	differing, err := s.store.Differing(ctx, by, in.GetDigests())
	if err != nil {
		return nil, storeError("sync", err)
	}
	for _, slot := range differing {
		if !slices.Contains(out.Differing, slot) {
			out.Differing = append(out.Differing, slot)
		}
	}
	if err := s.heard(ctx, by, in.GetReportedTo()); err != nil {
		return nil, storeError("sync", err)
	}
	if len(in.GetSlots()) > 0 {
		settled := s.settle(ctx)
		err := s.heard(ctx, by, in.GetReportedTo()) // While it waited it was not silent.
		if err := cmp.Or(settled, err); err != nil {
			return nil, storeError("sync", err)
		}
	}
	return out, nil
}

// heard notes that a node has called, for all Controllers.
func (s *service) heard(ctx context.Context, by Reporter, told string) error {
	s.roster.heard(by.Node, by.Boot, told, time.Now())
	if s.shared == nil {
		return nil
	}
	return s.shared.Hear(ctx, by, told)
}

// checkSlots refuses what does not keep to the rules of SyncNode.
func checkSlots(in *pubsub.SyncNodeRequest) error {
	if n := len(in.GetDigests()); n != 0 && n != slots.Count {
		return invalid("digests", fmt.Sprintf("has %d, not %d", n, slots.Count))
	}
	if n := len(in.GetSlots()); n > slots.Count {
		return invalid("slots", fmt.Sprintf("has %d, there are %d", n, slots.Count))
	}
	var listed [slots.Count]bool
	for _, slot := range in.GetSlots() {
		if slot.GetSlot() >= slots.Count {
			return invalid("slots.slot", fmt.Sprintf("is %d, there are %d", slot.GetSlot(), slots.Count))
		}
		if listed[slot.GetSlot()] {
			return invalid("slots.slot", fmt.Sprintf("is %d, a second time", slot.GetSlot()))
		}
		listed[slot.GetSlot()] = true
		for _, m := range slot.GetMemberships() {
			err := firstOf(checkID("slots.memberships.user_id", m.GetUserId()), checkID("slots.memberships.room_id", m.GetRoomId()),
				checkName(m.GetUserName()), checkMetadata(m.GetMetadata()))
			if err != nil {
				return err
			}
			if slots.Of(slots.Hash(m.GetUserId(), m.GetRoomId())) != int(slot.GetSlot()) {
				return invalid("slots.memberships", fmt.Sprintf("has one in slot %d that belongs into another", slot.GetSlot()))
			}
		}
	}
	return nil
}

// checkReporter refuses a report of a process that is not the one registered: one
// that has come late, or a second process with the same id. And one of a node that is one
// too many, or that the certificate is not for.
func (s *service) checkReporter(ctx context.Context, by Reporter) error {
	if err := s.speaksFor(ctx, by.Node); err != nil {
		return err
	}
	if by.Boot == "" {
		return s.roster.admit(by.Node, time.Now())
	}
	if err := checkID("boot_id", by.Boot); err != nil {
		return err
	}
	if boot := s.roster.boot(by.Node); boot != "" && boot != by.Boot {
		return status.Errorf(codes.Aborted, "node %q is registered in etcd with another boot_id", by.Node)
	}
	return s.roster.admit(by.Node, time.Now())
}

// speaksFor refuses a report about a node, "" for all of them, that the certificate of the connection is not for. Without
// TLS everybody is believed. The node tries again: somebody may renew its certificate.
func (s *service) speaksFor(ctx context.Context, node string) error {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil
	}
	if len(info.State.PeerCertificates) == 0 {
		return status.Error(codes.Unauthenticated, "node_id: reports need a certificate")
	}
	err := certs.SpeaksFor(info.State.PeerCertificates[0], node)
	if err == nil {
		return nil
	}
	s.impostors.Do(func() {
		s.log.Warn("refused a report about a node that the certificate is not for", "node", plain.Line(node, maxIDBytes), "peer", p.Addr.String(), "error", err)
	})
	return status.Error(codes.Unauthenticated, "node_id: "+err.Error())
}

// GetRoomInfo implements ControllerService.
func (s *service) GetRoomInfo(ctx context.Context, in *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
	if err := firstOf(checkID("room_id", in.GetRoomId()), s.roster.believed()); err != nil {
		return nil, err
	}
	info, at, err := s.store.Room(ctx, in.GetRoomId())
	if err != nil {
		return nil, storeError("get room", err)
	}
	if err := s.roster.believed(); err != nil {
		return nil, err // The store has been lost meanwhile, and this may be what is left.
	}
	return &pubsub.GetRoomInfoResponse{RoomInfo: info, Revision: at.Number, StoreId: at.Store}, nil
}

// maxPage is how many members a page has at most.
const maxPage = 1000

// ListMembers implements ControllerService.
func (s *service) ListMembers(ctx context.Context, in *pubsub.ListMembersRequest) (*pubsub.ListMembersResponse, error) {
	var from Cursor
	token := in.GetPageToken()
	if token != "" {
		var found bool
		if from.Store, from.At, found = strings.Cut(token, "/"); !found || from.Store == "" {
			return nil, invalid("page_token", ErrCursor.Error())
		}
	}
	if in.GetPageSize() > maxPage {
		return nil, invalid("page_size", fmt.Sprintf("is %d, the limit is %d", in.GetPageSize(), maxPage))
	}
	if err := firstOf(checkID("room_id", in.GetRoomId()), s.roster.believed()); err != nil {
		return nil, err
	}
	page, err := s.store.Members(ctx, in.GetRoomId(), from, cmp.Or(int(in.GetPageSize()), maxPage))
	switch {
	case errors.Is(err, ErrOtherStore):
		return nil, status.Error(codes.OutOfRange, "page_token: "+err.Error())
	case errors.Is(err, ErrCursor):
		return nil, invalid("page_token", err.Error())
	case err != nil:
		return nil, storeError("list members", err)
	}
	if err := s.roster.believed(); err != nil {
		return nil, err
	}
	// Metadata is left out: what there is may be more than a message holds.
	out := &pubsub.ListMembersResponse{Members: make([]*pubsub.UserInfo, len(page.Members)), UserCount: int32(min(page.Users, math.MaxInt32))}
	for i, m := range page.Members {
		if out.Members[i] = m; len(m.GetMetadata()) == 0 { // nobody changes it
			continue
		}
		out.Members[i] = &pubsub.UserInfo{UserId: m.GetUserId(), UserName: m.GetUserName(), NodeId: m.GetNodeId(), JoinedAt: m.GetJoinedAt()}
	}
	if page.Next != (Cursor{}) {
		out.NextPageToken = page.Next.Store + "/" + page.Next.At
	}
	return out, nil
}

// GetUserNode implements ControllerService.
func (s *service) GetUserNode(ctx context.Context, in *pubsub.GetUserNodeRequest) (*pubsub.GetUserNodeResponse, error) {
	if err := firstOf(checkID("user_id", in.GetUserId()), s.roster.believed()); err != nil {
		return nil, err
	}
	presences, err := s.store.Users(ctx, []string{in.GetUserId()}, in.GetWithRooms())
	if err != nil {
		return nil, storeError("get user", err)
	}
	if err := s.roster.believed(); err != nil {
		return nil, err
	}
	return s.presence(presences[0]), nil
}

// GetUserNodes implements ControllerService.
func (s *service) GetUserNodes(ctx context.Context, in *pubsub.GetUserNodesRequest) (*pubsub.GetUserNodesResponse, error) {
	if n := len(in.GetUserIds()); n > maxBatch {
		return nil, invalid("user_ids", fmt.Sprintf("has %d, the limit is %d", n, maxBatch))
	}
	for _, id := range in.GetUserIds() {
		if err := checkID("user_ids", id); err != nil {
			return nil, err
		}
	}
	if err := s.roster.believed(); err != nil {
		return nil, err
	}
	presences, err := s.store.Users(ctx, in.GetUserIds(), in.GetWithRooms())
	if err != nil {
		return nil, storeError("get users", err)
	}
	if err := s.roster.believed(); err != nil {
		return nil, err
	}
	out := &pubsub.GetUserNodesResponse{Users: make([]*pubsub.GetUserNodeResponse, len(presences))}
	for i, p := range presences {
		out.Users[i] = s.presence(p)
	}
	return out, nil
}

func (s *service) presence(p Presence) *pubsub.GetUserNodeResponse {
	if len(p.Nodes) == 0 {
		return &pubsub.GetUserNodeResponse{}
	}
	return &pubsub.GetUserNodeResponse{
		Found: true, NodeId: p.Nodes[0], NodeIds: p.Nodes, NodeAddress: s.roster.address(p.Nodes[0]), RoomId: p.Room, RoomIds: p.Rooms,
	}
}

// GetRoomStats implements ControllerService.
func (s *service) GetRoomStats(ctx context.Context, _ *pubsub.GetRoomStatsRequest) (*pubsub.GetRoomStatsResponse, error) {
	if err := s.roster.believed(); err != nil {
		return nil, err
	}
	rooms, err := s.store.Rooms(ctx)
	if err != nil {
		return nil, storeError("get stats", err)
	}
	users := min(s.store.Counts().Users, 1<<31-1)
	return &pubsub.GetRoomStatsResponse{TotalRooms: int32(len(rooms)), TotalUsers: int32(users), Rooms: rooms}, nil
}

// warm waits until look-ups are answered, and returns of which store. A change stream does: who is
// in sync forgets the routes it has, and not before there are better ones. A report does: see answerable.
func (s *service) warm(ctx context.Context) (*warmth, error) {
	for {
		w := s.roster.warmth.Load()
		warm := w.warm
		if w.isWarm() {
			if w.store == s.store.ID() {
				return w, nil
			}
			warm = nil
		}
		select {
		case <-warm:
		case <-w.cold: // Another one has taken its place, and this one never gets warm.
		case <-s.draining:
			return nil, status.Error(codes.Unavailable, "the controller is going")
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
}

var errCold = status.Error(codes.Unavailable, "the controller's store was lost: it waits for the nodes")

// WatchRoutes implements ControllerService.
func (s *service) WatchRoutes(_ *pubsub.WatchRoutesRequest, stream grpc.ServerStreamingServer[pubsub.WatchRoutesResponse]) error {
	warmth, err := s.warm(stream.Context())
	if err != nil {
		return err
	}
	w := s.hub.join(0, false)
	defer s.hub.leave(w)
	if err := s.vouch(stream.Context(), warmth, 0); err != nil {
		return err
	}
	if err := stream.Send(&pubsub.WatchRoutesResponse{Synced: true}); err != nil {
		return err
	}
	for {
		select {
		case <-s.draining:
			return status.Error(codes.Unavailable, "the controller is going")
		case <-warmth.cold:
			return errCold
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		case <-w.wake:
			for _, frame := range w.take() {
				if err := stream.Send(frame); err != nil {
					return err
				}
			}
		}
	}
}

// vouch has the other Controllers know that somebody here trusts what is answered of a store. It
// fails if that has been lost meanwhile: a caller that was in sync for a moment would take the next
// stream for that of a Controller that has just started, and not believe its answers at first.
func (s *service) vouch(ctx context.Context, of *warmth, leaseMs uint32) error {
	if s.shared == nil {
		return nil
	}
	if err := s.shared.Vouch(ctx, time.Duration(leaseMs)*time.Millisecond); err != nil {
		return storeError("watch", err)
	}
	select {
	case <-of.cold:
		return errCold
	default:
		return nil
	}
}

// FollowRoutes implements ControllerService.
func (s *service) FollowRoutes(stream grpc.BidiStreamingServer[pubsub.FollowRoutesRequest, pubsub.FollowRoutesResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if ms := first.GetLeaseMs(); ms == 0 || ms > maxLeaseMs {
		return invalid("lease_ms", fmt.Sprintf("is %d, and has to be 1 to %d", ms, maxLeaseMs))
	}
	warmth, err := s.warm(stream.Context())
	if err != nil {
		return err
	}
	w := s.hub.join(time.Duration(first.GetLeaseMs())*time.Millisecond, first.GetDeltas())
	defer s.hub.leave(w)
	if err := s.vouch(stream.Context(), warmth, first.GetLeaseMs()); err != nil {
		return err
	}
	// The stream's end, which this method's return is at the latest, ends the reader.
	ended := make(chan error, 1)
	s.readers.Go(func() { ended <- s.readFollower(stream, w) })
	synced := &pubsub.WatchRoutesResponse{Synced: true}
	if first.GetDeltas() {
		synced.StoreId = warmth.store // if it is another one by now, cold is closed
	}
	if err := stream.Send(&pubsub.FollowRoutesResponse{Changes: synced}); err != nil {
		return err
	}
	for {
		select {
		case <-s.draining:
			return status.Error(codes.Unavailable, "the controller is going")
		case <-warmth.cold:
			return errCold
		case err := <-ended:
			return err
		case <-w.wake:
			for _, frame := range w.follow(time.Now(), s.hub.toldUntil(time.Now())) {
				if err := stream.Send(frame); err != nil {
					return err
				}
			}
		}
	}
}

// readFollower hears a follower to the end.
func (s *service) readFollower(stream grpc.BidiStreamingServer[pubsub.FollowRoutesRequest, pubsub.FollowRoutesResponse], w *watcher) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = s.panicked(pubsub.ControllerService_FollowRoutes_FullMethodName, p)
		}
	}()
	for {
		in, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		if err := w.hear(in, time.Now()); err != nil {
			return err
		}
	}
}

// storeError is for a Store that cannot answer; Memory always can.
func storeError(doing string, err error) error {
	if errors.Is(err, ErrOld) || errors.Is(err, ErrOtherBoot) {
		return status.Error(codes.Aborted, err.Error())
	}
	return status.Error(codes.Unavailable, fmt.Sprintf("%s: %v", doing, err))
}

func invalid(field, description string) error {
	st := status.New(codes.InvalidArgument, field+" "+description)
	detailed, err := st.WithDetails(&errdetails.BadRequest{
		FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: field, Description: description}},
	})
	if err != nil {
		return st.Err()
	}
	return detailed.Err()
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func checkID(field, id string) error {
	if err := ids.Check(id, maxIDBytes); err != nil {
		return invalid(field, err.Error())
	}
	return nil
}

func checkName(name string) error {
	if len(name) > maxNameBytes {
		return invalid("user_name", fmt.Sprintf("has %d bytes, the limit is %d", len(name), maxNameBytes))
	}
	return nil
}

func checkMetadata(metadata map[string]string) error {
	if len(metadata) > maxMetadataEntries {
		return invalid("metadata", fmt.Sprintf("has %d entries, the limit is %d", len(metadata), maxMetadataEntries))
	}
	size := 0
	for k, v := range metadata {
		size += len(k) + len(v)
	}
	if size > maxMetadataBytes {
		return invalid("metadata", fmt.Sprintf("has %d bytes, the limit is %d", size, maxMetadataBytes))
	}
	return nil
}
