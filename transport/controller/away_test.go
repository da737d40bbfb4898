package controller

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine/route"
	pubsub "github.com/push-manager/push-manager/proto"
)

// TestWhoIsAwayAndWhoIsSlow: an old route that is known to have changed serves for the
// one and not for the other.
func TestWhoIsAwayAndWhoIsSlow(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error // nil: no answer at all
		away bool
	}{
		{"says that it is not available", status.Error(codes.Unavailable, "warming up"), true},
		{"does not answer", nil, false},
		{"fails", status.Error(codes.Internal, "a bug"), false},
		{"has too much to do", status.Error(codes.ResourceExhausted, "later"), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fail := func(ctx context.Context) error {
					if c.err == nil {
						<-ctx.Done()
						return ctx.Err()
					}
					return c.err
				}
				v := serve(t, &script{
					room: func(ctx context.Context, _ *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
						return nil, fail(ctx)
					},
					users: func(ctx context.Context, _ *pubsub.GetUserNodesRequest) (*pubsub.GetUserNodesResponse, error) {
						return nil, fail(ctx)
					},
				})
				con := connect(t, v, Config{})
				con.Start(nil)
				synctest.Wait()
				look := func(when string, away bool) {
					t.Helper()
					ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
					defer cancel()
					_, _, roomErr := con.Room(ctx, "r", func([]byte, []byte) {})
					usersErr := con.Users(ctx, []string{"u", "v"}, make([][]string, 2))
					for what, err := range map[string]error{"room": roomErr, "users": usersErr} {
						if !errors.Is(err, route.ErrUnavailable) || errors.Is(err, route.ErrAway) != away {
							t.Errorf("%s, %s: %v; away should be %v", when, what, err, away)
						}
					}
				}
				look("connected", c.away)
				v.down()
				synctest.Wait()
				look("without a connection", true)
				_ = con.Close()
			})
		})
	}
}

func TestNewConnectionIsNotedWithoutAChangeStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := serve(t, &script{})
		c := connect(t, v, Config{})
		c.Start(nil)
		time.Sleep(time.Minute)
		v.down()
		time.Sleep(time.Second)
		v.up()
		time.Sleep(5 * time.Second)
		if ago := time.Since(c.Renewed()); ago > 5*time.Second {
			t.Errorf("a new connection was made within 5 s, it says %s ago", ago)
		}
		_ = c.Close()
		v.down()
	})
}

func TestNewConnectionsAndChangeStreamsAreNoted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		end := make(chan struct{})
		v := serve(t, &script{watch: func(s grpc.ServerStreamingServer[pubsub.WatchRoutesResponse]) error {
			_ = s.Send(&pubsub.WatchRoutesResponse{Synced: true})
			select {
			case <-end:
				return errors.New("over")
			case <-s.Context().Done():
				return nil
			}
		}})
		c := connect(t, v, Config{})
		c.Start(&ledger{})
		time.Sleep(time.Minute)
		if at := c.Renewed(); !at.IsZero() {
			t.Errorf("the first connection counts as one made anew, %s ago", time.Since(at))
		}
		v.down()
		time.Sleep(time.Second)
		v.up()
		time.Sleep(10 * time.Second)
		if ago := time.Since(c.Renewed()); ago < 8*time.Second || ago > 10*time.Second {
			t.Errorf("a new connection was made within 10 s, it says %s ago", ago)
		}
		time.Sleep(time.Minute)
		end <- struct{}{}
		time.Sleep(2 * time.Second)
		if ago := time.Since(c.Renewed()); ago > 2*time.Second {
			t.Errorf("a new change stream was opened within 2 s, it says %s ago", ago)
		}
		_ = c.Close()
		v.down()
	})
}
