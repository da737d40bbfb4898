package presence

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/push-manager/push-manager/internal/plain"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/link"
)

const (
	// nodesAtOnce is how many nodes one call asks at a time.
	nodesAtOnce = 8
	// nodeTime is how long a node may take: the reply says which one did not answer, and gives what the others have said.
	nodeTime = time.Second
	// maxReason bounds what is told of a node's error, which the node may have written.
	maxReason = 256
)

// Users are where users are. sees tells which rooms the caller may be shown, by its own name for them.
func (s *Service) Users(ctx context.Context, scope string, users []string, connections bool, sees func(room string) bool) (*pubsub.GetUsersResponse, error) {
	leave, err := s.enter(ctx, scope)
	if err != nil {
		return nil, err
	}
	defer leave()
	scoped := make([]string, len(users))
	for i, user := range users {
		scoped[i] = scope + user
	}
	found, err := s.cfg.Controller.Whereabouts(ctx, scoped)
	if err != nil {
		return nil, err //nolint:wrapcheck // it says what was asked
	}
	shown := func(rooms []string) []string {
		var list []string
		for _, room := range rooms {
			if name := shownRoom(room, scope); name != "" && sees(name) {
				list = append(list, name)
			}
		}
		slices.Sort(list)
		return slices.Compact(list)
	}
	out := &pubsub.GetUsersResponse{Users: make([]*pubsub.UserPresence, len(users))}
	onNode := map[string][]string{} // users, each once
	for i, user := range users {
		at := found[i]
		out.Users[i] = &pubsub.UserPresence{UserId: user, Online: at.GetFound(), NodeIds: at.GetNodeIds(), RoomIds: shown(at.GetRoomIds())}
		for _, node := range at.GetNodeIds() {
			onNode[node] = append(onNode[node], scoped[i])
		}
	}
	if connections {
		said := s.ask(ctx, onNode, out)
		for i := range users {
			p := out.Users[i]
			for _, node := range p.GetNodeIds() {
				of, answered := said[node][scoped[i]]
				p.Incomplete = p.GetIncomplete() || !answered || of.GetMore()
				for _, c := range of.GetConnections() {
					rooms := shown(c.GetRoomIds())
					conn := &pubsub.UserConnection{NodeId: node, ConnectionId: c.GetConnectionId(), DeviceId: c.GetDeviceId(), Attributes: c.GetAttributes(), RoomIds: rooms}
					if at := c.GetConnectedAt(); at > 0 {
						conn.ConnectTime = &timestamppb.Timestamp{Seconds: at}
					}
					p.Connections = append(p.Connections, conn)
					p.RoomIds = append(p.RoomIds, rooms...) // a Controller need not tell rooms
				}
			}
			slices.Sort(p.RoomIds)
			p.RoomIds = slices.Compact(p.RoomIds)
		}
	}
	if proto.Size(out) > replyBytes {
		return nil, ErrTooLarge
	}
	return out, nil
}

// ask asks nodes for the connections of their users. What a node does not answer stands among the failures of out.
func (s *Service) ask(ctx context.Context, onNode map[string][]string, out *pubsub.GetUsersResponse) map[string]map[string]*pubsub.UserConnections {
	var mu sync.Mutex
	said := map[string]map[string]*pubsub.UserConnections{}
	var wg sync.WaitGroup
	places := make(chan struct{}, nodesAtOnce)
	for node, users := range onNode {
		slices.Sort(users)
		users = slices.Compact(users)
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			answers, err := s.askNode(ctx, node, users)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				out.NodeFailures = append(out.NodeFailures, &pubsub.NodeFailure{NodeId: node, Reason: reasonOf(err), Users: int32(len(users))})
				return
			}
			said[node] = answers
		})
	}
	wg.Wait()
	slices.SortFunc(out.NodeFailures, func(a, b *pubsub.NodeFailure) int { return strings.Compare(a.GetNodeId(), b.GetNodeId()) })
	return said
}

func (s *Service) askNode(ctx context.Context, node string, users []string) (answers map[string]*pubsub.UserConnections, err error) {
	defer s.recovered("connections", &err)
	ctx, cancel := context.WithTimeout(ctx, nodeTime)
	defer cancel()
	said, err := s.cfg.Connections(ctx, node, users)
	if err != nil {
		return nil, err
	}
	answers = make(map[string]*pubsub.UserConnections, len(users))
	for i, user := range users {
		answers[user] = said[i]
	}
	return answers, nil
}

func reasonOf(err error) string {
	switch {
	case errors.Is(err, link.ErrNoConnections):
		return link.ErrNoConnections.Error()
	case errors.Is(err, link.ErrNotConnected):
		return link.ErrNotConnected.Error()
	case errors.Is(err, context.DeadlineExceeded):
		return "the node did not answer in time"
	default:
		return plain.Line(err.Error(), maxReason)
	}
}
