package web_test

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pubsub "github.com/push-manager/push-manager/proto"
)

// TestPresenceOfAWholeDeployment asks by the short paths, and watches a client that comes and goes.
func TestPresenceOfAWholeDeployment(t *testing.T) {
	w := newWorld(t)
	resp, got := post(t, clients["HTTP/1.1"], w.url+"/v1/rooms/lobby/members/query", `{"page_size": 10}`)
	var page struct {
		Members   []struct{ UserID, NodeID string }
		UserCount int
	}
	if err := json.Unmarshal([]byte(got), &page); err != nil || resp.StatusCode != http.StatusOK || page.UserCount != 2 || len(page.Members) != 2 {
		t.Fatalf("%d %s", resp.StatusCode, got)
	}
	node := page.Members[0].NodeID
	resp, got = post(t, clients["HTTP/1.1"], w.url+"/v1/users/query", `{"user_ids": ["alice", "nobody"]}`)
	var users struct {
		Users []struct {
			UserID      string
			Online      bool
			RoomIDs     []string
			Connections []struct {
				NodeID, ConnectionID string
				RoomIDs              []string
				ConnectTime          time.Time
			}
		}
		NodeFailures []any
	}
	if err := json.Unmarshal([]byte(got), &users); err != nil || resp.StatusCode != http.StatusOK || len(users.Users) != 2 || len(users.NodeFailures) > 0 {
		t.Fatalf("%d %s", resp.StatusCode, got)
	}
	alice := users.Users[0]
	if !alice.Online || !slices.Equal(alice.RoomIDs, []string{"lobby"}) || len(alice.Connections) != 1 || users.Users[1].Online {
		t.Fatal(got)
	}
	if c := alice.Connections[0]; c.NodeID != node || c.ConnectionID == "" || !slices.Equal(c.RoomIDs, []string{"lobby"}) || c.ConnectTime.IsZero() {
		t.Error(got)
	}
	for _, body := range []string{`{"page_size": "x"}`, `{"room_id": "other"}`, `{"page_token": "x"}`, `{"page_token": "x/1"}`, `[]`} {
		if resp, got := post(t, clients["HTTP/1.1"], w.url+"/v1/rooms/lobby/members/query", body); resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %d %s", body, resp.StatusCode, got)
		}
	}

	conn, err := grpc.NewClient(w.stack.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	// What is named is looked at at once, and what is not after ten seconds.
	ctx, cancel := context.WithTimeout(t.Context(), 9*time.Second)
	defer cancel()
	stream, err := pubsub.NewPresenceServiceClient(conn).WatchPresence(ctx, &pubsub.WatchPresenceRequest{RoomId: "hall"})
	if err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil || !m.GetSnapshot().GetLast() || len(m.GetSnapshot().GetEntries()) > 0 {
		t.Fatal(m, err)
	}
	client, _, _, err := ws.Dial(ctx, "ws://"+w.stack.Nodes()[0].HTTP+"/ws?room_id=hall&user_id=carol")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []pubsub.PresenceChangeKind{pubsub.PresenceChangeKind_JOINED, pubsub.PresenceChangeKind_LEFT} {
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(want, err)
		}
		changes := m.GetChanges().GetChanges()
		if len(changes) != 1 || changes[0].GetKind() != want || changes[0].GetEntry().GetUserId() != "carol" || m.GetPosition() == "" {
			t.Fatal(m)
		}
		_ = client.Close()
	}
}
