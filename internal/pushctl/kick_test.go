package pushctl

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pubsub "github.com/push-manager/push-manager/proto"
)

// presence answers with what a test says.
type presence struct {
	pubsub.UnimplementedPresenceServiceServer

	reply *pubsub.DisconnectResponse
	got   *pubsub.DisconnectRequest

	pages   map[string]*pubsub.GetRoomMembersResponse // by page token
	users   *pubsub.GetUsersResponse
	watches [][]*pubsub.WatchPresenceResponse // each ends with UNAVAILABLE, and a watch behind them with PERMISSION_DENIED
	asked   []*pubsub.WatchPresenceRequest
}

func (p *presence) Disconnect(_ context.Context, r *pubsub.DisconnectRequest) (*pubsub.DisconnectResponse, error) {
	p.got = r
	return p.reply, nil
}

func TestKickSaysHowManyConnectionsWereClosedAndWhichNodesHaveNotDoneIt(t *testing.T) {
	done := &pubsub.DisconnectResponse{Success: true, Disconnected: 5, Nodes: 3}
	failed := &pubsub.DisconnectResponse{Disconnected: 1, Nodes: 1, NodeFailures: []*pubsub.NodeFailure{{NodeId: "n2", Reason: "failed: node not reachable"}}}
	unknown := &pubsub.DisconnectResponse{NodeFailures: []*pubsub.NodeFailure{{NodeId: "n3\x1b", Reason: "unknown: no acknowledgement in time"}, {NodeId: "n2", Reason: "failed: x"}}}
	for name, tc := range map[string]struct {
		reply *pubsub.DisconnectResponse
		args  []string
		code  int
		want  string
		asked *pubsub.DisconnectRequest // nil: nobody is asked
	}{
		"a user": {done, []string{"alice"}, exitOK, `user "alice": 5 connections closed on 3 nodes`, &pubsub.DisconnectRequest{UserId: "alice"}},
		"a device, for an hour": {done, []string{"alice", "--device=d", "--refuse-for=1h", "--reason=lost", "--code=4500"}, exitOK, `user "alice", device "d": 5 connections closed on 3 nodes, refused for 1h0m0s`,
			&pubsub.DisconnectRequest{UserId: "alice", DeviceId: "d", Code: 4500, Reason: "lost", RefuseFor: durationpb.New(time.Hour)}},
		"a room":          {done, []string{"--room=r"}, exitOK, `room "r": 5 connections`, &pubsub.DisconnectRequest{RoomId: "r"}},
		"allowed again":   {done, []string{"alice", "--allow-again"}, exitOK, `user "alice": may come back`, &pubsub.DisconnectRequest{UserId: "alice", AllowAgain: true}},
		"a node is away":  {failed, []string{"alice"}, exitFailed, "1 connection closed on 1 node\n  n2: failed: node not reachable", &pubsub.DisconnectRequest{UserId: "alice"}},
		"in doubt":        {unknown, []string{"alice"}, exitUnknown, `n3\x1b: unknown: no acknowledgement in time`, &pubsub.DisconnectRequest{UserId: "alice"}},
		"no node":         {&pubsub.DisconnectResponse{Message: "no connect-node is known"}, []string{"alice"}, exitFailed, "no connect-node is known", &pubsub.DisconnectRequest{UserId: "alice"}},
		"JSON":            {done, []string{"alice", "--json"}, exitOK, `"disconnected"`, &pubsub.DisconnectRequest{UserId: "alice"}},
		"nobody":          {done, nil, exitUsage, "give a user or --room", nil},
		"both":            {done, []string{"alice", "--room=r"}, exitUsage, "give a user or --room", nil},
		"a room's device": {done, []string{"--room=r", "--device=d"}, exitUsage, "--device", nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := &server{presence: presence{reply: tc.reply}}
			code, out, errOut := pushctl(t, "", append(append([]string{"kick"}, tc.args...), "--address", serve(t, s))...)
			p := &s.presence
			if code != tc.code || !strings.Contains(out+errOut, tc.want) {
				t.Errorf("exit %d, want %d; %q is not in %q, %q", code, tc.code, tc.want, out, errOut)
			}
			if !proto.Equal(p.got, tc.asked) && (p.got != nil || tc.asked != nil) {
				t.Errorf("asked for %v, want %v", p.got, tc.asked)
			}
		})
	}
}
