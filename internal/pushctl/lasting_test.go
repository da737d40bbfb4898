package pushctl

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	pubsub "github.com/push-manager/push-manager/proto"
)

func (s *server) ForgetUser(_ context.Context, r *pubsub.ForgetUserRequest) (*pubsub.ForgetUserResponse, error) {
	return &pubsub.ForgetUserResponse{Messages: 3}, s.keep(r)
}

func (s *server) Replay(_ context.Context, r *pubsub.ReplayRequest) (*pubsub.ReplayResponse, error) {
	return &pubsub.ReplayResponse{Messages: 1}, s.keep(r)
}

// WatchReceipts sends one receipt and ends.
func (s *server) WatchReceipts(r *pubsub.WatchReceiptsRequest, st grpc.ServerStreamingServer[pubsub.WatchReceiptsResponse]) error {
	if err := s.keep(r); err != nil {
		return err
	}
	return st.Send(&pubsub.WatchReceiptsResponse{Position: "e-1", Receipt: &pubsub.PushReceipt{
		MessageId: "m\x1b[31m", Target: "room:r", Summary: &pubsub.DeliverySummary{Targets: 3, Delivered: 2, Acked: 2, Unknown: 1}, Final: true,
		UnackedUserIds: []string{"bob"}, At: timestamppb.New(time.Unix(1, 0)),
	}})
}

func TestCommandsOfLastingDelivery(t *testing.T) {
	off, err := status.New(codes.FailedPrecondition, "there is no store").WithDetails(&errdetails.ErrorInfo{Reason: "STORE_OFF"})
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		err  error
		args []string
		code int
		want []string // in what is printed
	}{
		"forget":         {nil, []string{"forget", "alice"}, exitOK, []string{`user "alice": erased 3 messages`}},
		"forget, JSON":   {nil, []string{"forget", "alice", "--json"}, exitOK, []string{`"messages"`, "3"}},
		"no store":       {off.Err(), []string{"forget", "alice"}, exitError, []string{"there is no store [STORE_OFF]"}},
		"replay":         {nil, []string{"replay", "alice", "n1"}, exitOK, []string{`user "alice": 1 message taken by "n1"`}},
		"receipts":       {nil, []string{"receipts"}, exitOK, []string{`m\x1b[31m room:r: delivered to 2 of 3 (2 acknowledged by clients, 1 unknown: may have arrived)`, "\n  not acknowledged by bob\n"}},
		"receipts, JSON": {nil, []string{"receipts", "-o", "json", "--after=e-0"}, exitOK, []string{`"position"`, `"e-1"`}},
		"receipts gone":  {status.Error(codes.OutOfRange, "not kept any more"), []string{"receipts", "--after=x"}, exitError, []string{"not kept any more"}},
		"a ttl below 0":  {nil, []string{"user", "alice", "x", "--ttl=-1s"}, exitUsage, []string{"--ttl: -1s"}},
		"a ttl of years": {nil, []string{"user", "alice", "x", "--ttl=9999h"}, exitUsage, []string{"--ttl: 9999h"}},
		"an ack of none": {nil, []string{"user", "alice", "x", "--ack=nobody"}, exitUsage, []string{"--ack"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := &server{err: tc.err, success: true, summary: &pubsub.DeliverySummary{}}
			code, out, errOut := pushctl(t, "", append(tc.args, "--address", serve(t, s))...)
			if code != tc.code {
				t.Errorf("exit %d, want %d", code, tc.code)
			}
			for _, want := range tc.want {
				if !strings.Contains(out+errOut, want) {
					t.Errorf("%q is not in %q, %q", want, out, errOut)
				}
			}
		})
	}
}
