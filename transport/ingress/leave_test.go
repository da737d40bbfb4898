package ingress

import (
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// TestDrainTakesPushesWhileBalancersNotice: nobody is refused who has had no chance to
// know better.
func TestDrainTakesPushesWhileBalancersNotice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const notice = 2 * time.Second
		w := newWorld(t, func(c *Config, _ *engine.Config) { c.DrainNotice = notice })
		push := func(user string) error {
			_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: user, Content: content("x")})
			return err
		}
		ok(t, push("b"))
		st := w.stream(w.context())
		ok(t, st.Send(userPush(1, "b", "x")))
		recv(t, st)

		begin := time.Now()
		w.server.Announce()
		drained := make(chan error, 1)
		go func() { drained <- w.server.Drain(w.context()) }()
		time.Sleep(notice / 2)
		r, err := w.server.health.Check(w.context(), &healthpb.HealthCheckRequest{})
		if err != nil || r.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
			t.Errorf("health is %v, %v", r.GetStatus(), err)
		}
		ok(t, push("b"))
		ok(t, st.Send(userPush(2, "b", "x")))
		if got := recv(t, st); !got.GetToUser().GetSuccess() {
			t.Errorf("on the stream: %v", got)
		}

		// One push is under way when the clients are told to go.
		w.network.nodes[0].setKeep(true)
		late := make(chan error, 1)
		go func() { late <- push("d") }()
		time.Sleep(notice/2 + time.Millisecond)
		wantEnd(t, st, codes.Unavailable, "DRAINING", "")
		synctest.Wait()
		if state := w.conn.GetState(); state == connectivity.Ready {
			t.Errorf("the client still counts on its connection: %v", state)
		}
		select {
		case err := <-drained:
			t.Fatalf("drained with a push in flight: %v", err)
		default:
		}
		time.Sleep(2 * goAwayBound)
		w.network.ackAll()
		ok(t, <-late)
		ok(t, <-drained)
		if took := time.Since(begin); took < notice || took > notice+3*goAwayBound {
			t.Errorf("drained after %v", took)
		}
	})
}

// TestDrainOfAServerThatNeverServedIsOverAtOnce: nobody knows of it who could be told.
func TestDrainOfAServerThatNeverServedIsOverAtOnce(t *testing.T) {
	w := newWorld(t, nil)
	synctest.Test(t, func(t *testing.T) {
		s, err := New(Config{Engine: w.engine, DrainNotice: time.Hour})
		ok(t, err)
		begin := time.Now()
		ok(t, s.Drain(t.Context()))
		if took := time.Since(begin); took != 0 {
			t.Errorf("drained after %v", took)
		}
	})
}

// TestDrainIsOverOnceEverybodyHasGone: nobody waits for clients who left.
func TestDrainIsOverOnceEverybodyHasGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const notice = time.Second
		w := newWorld(t, func(c *Config, _ *engine.Config) { c.DrainNotice = notice })
		_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "b", Content: content("x")})
		ok(t, err)
		begin := time.Now()
		ok(t, w.server.Drain(w.context()))
		if took := time.Since(begin); took != notice {
			t.Errorf("drained after %v", took)
		}
	})
}
