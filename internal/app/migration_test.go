package app_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/app/connectnode"
	pubsub "github.com/push-manager/push-manager/proto"
)

// TestPlainNodesChangeToTLSOneByOneWithoutAFailedPush: as docs/securing.md tells it.
func TestPlainNodesChangeToTLSOneByOneWithoutAFailedPush(t *testing.T) {
	f := newFleet(t, "50ms")
	m := f.startPushManager(map[string]string{"LINK_TLS_MIGRATE": "true"})
	users := map[string]string{"n1": "alice", "n2": "bob"}
	nodes := map[string]*connectnode.ConnectNode{}
	for id, user := range users {
		nodes[id] = f.node(id, true)
		f.join(nodes[id], user)
	}
	_, creds := f.caller()
	delivered := func(user string) {
		t.Helper()
		eventually(t, user+" gets pushes", func() bool {
			got := make(chan struct{}, 100)
			l := startLoad(m.GRPCAddr(), creds, 40, []string{user}, func(r *pubsub.PushToUserResponse, err error) string {
				if r.GetSummary().GetDelivered() == 1 {
					got <- struct{}{}
				}
				return ""
			})
			time.Sleep(200 * time.Millisecond)
			l.end()
			l.all.Wait()
			return len(got) > 0
		})
	}
	plain := func(n int) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d nodes are plain", n), func() bool {
			return strings.Contains(metricsOf(t, m), fmt.Sprintf("push_manager_link_plain_nodes %d\n", n))
		})
	}
	delivered("alice")
	delivered("bob")
	plain(2)
	if !strings.Contains(metricsOf(t, m), "push_manager_insecure 1\n") {
		t.Error("a migration is not called insecure")
	}

	// A user who is between two nodes is offline for so long, and no push fails.
	l := startLoad(m.GRPCAddr(), creds, 40, []string{"alice", "bob"}, func(r *pubsub.PushToUserResponse, err error) string {
		if s := r.GetSummary(); err != nil || s.GetFailed()+s.GetUnknown() > 0 || len(s.GetNodeFailures()) > 0 {
			return fmt.Sprint(r, err)
		}
		return ""
	})
	left := len(users)
	for id, user := range users {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		if err := nodes[id].Drain(ctx); err != nil {
			t.Error(err)
		}
		cancel()
		f.join(f.node(id, false), user)
		delivered(user)
		left--
		plain(left)
	}
	l.stop(t)

	// The end of it: a Push-Manager that speaks plain text to nobody.
	last := f.startPushManager(map[string]string{"MANAGER_ID": "pm-2"})
	eventually(t, "both nodes are reached", func() bool { return last.Reachable() == 2 })
	f.node("n3", true)
	eventually(t, "a plain node is refused", func() bool {
		return strings.Contains(metricsOf(t, last), `push_manager_node_connections{node_id="n3"} 0`) && !strings.Contains(metricsOf(t, last), "push_manager_link_dial_failures_total 0\n")
	})
	if text := metricsOf(t, last); !strings.Contains(text, "push_manager_insecure 0\n") {
		t.Error("it says that it is insecure")
	}
}
