package ingress

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

// nodesThat answer what a test says, and note what they were asked.
type nodesThat struct {
	asked   []Disconnect
	answers []NodeDisconnected
	err     error
}

func (n *nodesThat) Disconnect(_ context.Context, d *Disconnect) ([]NodeDisconnected, error) {
	n.asked = append(n.asked, *d)
	return n.answers, n.err
}

func withNodes(t *testing.T, change func(*Config)) (*world, *nodesThat, pubsub.PresenceServiceClient) {
	t.Helper()
	n := &nodesThat{}
	w := newWorld(t, func(c *Config, _ *engine.Config) {
		c.Disconnector = n
		if change != nil {
			change(c)
		}
	})
	return w, n, pubsub.NewPresenceServiceClient(w.conn)
}

func TestDisconnectCountsConnectionsAndNamesNodesThatHaveNotDoneIt(t *testing.T) {
	w, n, client := withNodes(t, nil)
	n.answers = []NodeDisconnected{
		{Node: "n1", Connections: 2}, {Node: "n2", Connections: 3}, {Node: "n3", Failure: "node not reachable"},
		{Node: "n4", Failure: "no acknowledgement in time", MayBeDone: true},
	}
	r, err := client.Disconnect(w.context(), &pubsub.DisconnectRequest{UserId: "u", DeviceId: "d", Code: 4200, Reason: "why", RefuseFor: durationpb.New(1500 * time.Millisecond)})
	ok(t, err)
	want := []Disconnect{{User: "u", Device: "d", Code: 4200, Reason: "why", RefuseFor: 2 * time.Second}}
	if !slices.Equal(n.asked, want) {
		t.Errorf("asked for %+v, want %+v", n.asked, want)
	}
	var failures []string
	for _, f := range r.GetNodeFailures() {
		failures = append(failures, f.GetNodeId()+" "+f.GetReason())
	}
	if r.GetSuccess() || r.GetDisconnected() != 5 || r.GetNodes() != 2 ||
		!slices.Equal(failures, []string{"n3 failed: node not reachable", "n4 unknown: no acknowledgement in time"}) {
		t.Errorf("%v", r)
	}
	n.answers = n.answers[:2]
	for _, c := range []struct {
		request *pubsub.DisconnectRequest
		code    uint16
	}{
		{&pubsub.DisconnectRequest{RoomId: "r"}, 4000},
		{&pubsub.DisconnectRequest{RoomId: "r", RefuseFor: durationpb.New(time.Hour)}, 4410},
	} {
		r, err = client.Disconnect(w.context(), c.request)
		ok(t, err)
		if last := n.asked[len(n.asked)-1]; !r.GetSuccess() || last.Code != c.code || last.Room != "r" {
			t.Errorf("%v: %v, asked for %+v", c.request, r, last)
		}
	}
	n.answers = nil
	r, err = client.Disconnect(w.context(), &pubsub.DisconnectRequest{UserId: "u"})
	ok(t, err)
	if r.GetSuccess() {
		t.Errorf("without a node: %v", r)
	}
}

func TestDisconnectRefusesWhatCannotBeMeant(t *testing.T) {
	w, n, client := withNodes(t, func(c *Config) { c.RefuseMax = time.Hour })
	hour := durationpb.New(time.Hour)
	for want, r := range map[string]*pubsub.DisconnectRequest{
		"REQUIRED user_id":          {},
		"MALFORMED room_id":         {UserId: "u", RoomId: "r"},
		"MALFORMED device_id":       {RoomId: "r", DeviceId: "d"},
		"ID_MALFORMED user_id":      {UserId: "a\nb"},
		"ID_MALFORMED device_id":    {UserId: "u", DeviceId: strings.Repeat("d", 65)},
		"MALFORMED reason":          {UserId: "u", Reason: strings.Repeat("x", 121)},
		"OUT_OF_RANGE code":         {UserId: "u", Code: 1000},
		"OUT_OF_RANGE refuse_for":   {UserId: "u", RefuseFor: durationpb.New(time.Hour + time.Second)},
		"OUT_OF_RANGE  refuse_for":  {UserId: "u", RefuseFor: durationpb.New(time.Millisecond)},
		"OUT_OF_RANGE   refuse_for": {UserId: "u", RefuseFor: &durationpb.Duration{Seconds: 1, Nanos: -5}},
		"MALFORMED code":            {UserId: "u", Code: 4000, AllowAgain: true},
		"MALFORMED refuse_for":      {UserId: "u", RefuseFor: hour, AllowAgain: true},
	} {
		_, err := client.Disconnect(w.context(), r)
		reason, field, _ := strings.Cut(want, " ")
		wantError(t, err, codes.InvalidArgument, reason, strings.TrimSpace(field))
	}
	if len(n.asked) > 0 {
		t.Errorf("nodes were asked: %+v", n.asked)
	}
	for want, err := range map[string]error{"REFUSALS_UNAVAILABLE": ErrRefusalsAway, "TOO_MANY_REFUSALS": ErrManyRefusals} {
		n.err = fmt.Errorf("etcd: %w", err)
		_, err = client.Disconnect(w.context(), &pubsub.DisconnectRequest{UserId: "u", RefuseFor: hour})
		code := codes.Unavailable
		if want == "TOO_MANY_REFUSALS" {
			code = codes.ResourceExhausted
		}
		wantError(t, err, code, want, "")
	}
	n.err = ErrRefusalOpen // it may have been done: no ErrorInfo
	_, err := client.Disconnect(w.context(), &pubsub.DisconnectRequest{UserId: "u", RefuseFor: hour})
	wantError(t, err, codes.Unavailable, "", "")
}

func TestDisconnectIsARightOfItsOwnAndATenantsIDsAreItsOwn(t *testing.T) {
	a := newAccess(t, authtest.New(t, "version: 1\ntenants: {shop: {daily_pushes: 100}}\ncallers:\n"+
		caller("users", `{methods: [Disconnect], users: ["u-*"]}`, ", tenant: shop")+
		caller("rooms", `{methods: [DisconnectRoom], rooms: ["r-*"]}`, ", tenant: shop")+
		caller("pusher", `{methods: [PushToUser, PushToRoom], users: ["*"], rooms: ["*"]}`, ", tenant: shop")))
	file := filepath.Join(t.TempDir(), "audit")
	log, err := audit.Open(audit.Config{File: file})
	ok(t, err)
	w, n, client := withNodes(t, func(c *Config) { c.Auth, c.Audit = a.auth, log })
	n.answers = []NodeDisconnected{{Node: "n1", Connections: 4}}
	as := func(name string) context.Context { return w.as(a.Token(name, time.Hour)) }
	user, room := &pubsub.DisconnectRequest{UserId: "u-1", RefuseFor: durationpb.New(time.Hour)}, &pubsub.DisconnectRequest{RoomId: "r-1"}
	_, err = client.Disconnect(as("users"), user)
	ok(t, err)
	_, err = client.Disconnect(as("rooms"), room)
	ok(t, err)
	_, err = client.Disconnect(as("users"), &pubsub.DisconnectRequest{UserId: "u-1", AllowAgain: true})
	ok(t, err)
	if len(n.asked) != 3 || n.asked[0].Scope != "shop/" || n.asked[0].User != "shop/u-1" || n.asked[1].Room != "shop/r-1" || n.asked[2].User != "shop/u-1" {
		t.Errorf("asked for %+v", n.asked)
	}
	for name, c := range map[string]struct {
		as    string
		r     *pubsub.DisconnectRequest
		field string
	}{
		"another user": {"users", &pubsub.DisconnectRequest{UserId: "v"}, "user_id or room_id"},
		"a room":       {"users", room, "user_id or room_id"},
		"a user":       {"rooms", user, "user_id or room_id"},
		"none at all":  {"pusher", user, "method"},
	} {
		_, err := client.Disconnect(as(c.as), c.r)
		t.Log(name)
		wantDenied(t, status.Convert(err), "Disconnect", c.field, "")
	}
	if len(n.asked) != 3 {
		t.Errorf("asked for %+v", n.asked[3:])
	}
	ok(t, log.Close(t.Context()))
	text, err := os.ReadFile(file)
	ok(t, err)
	lines := string(text)
	for _, want := range []string{
		`"connections.closed"`, `"refusal.lifted"`, `"target_kind":"user","target":"u-1"`, `"target_kind":"room","target":"r-1"`, `"connections":4`, `"refused_for_seconds":3600`,
	} {
		if !strings.Contains(lines, want) {
			t.Errorf("the audit log has no %s:\n%s", want, lines)
		}
	}
}
