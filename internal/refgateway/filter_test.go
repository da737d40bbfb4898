package refgateway

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	pubsub "github.com/push-manager/push-manager/proto"
)

// filtered is a stream of a manager on which deliveries with a filter come.
type filtered struct {
	t      *testing.T
	stream pubsub.ConnectNodeService_DeliverClient
	seq    uint64
}

func openFiltered(t *testing.T, n pubsub.ConnectNodeServiceClient) *filtered {
	t.Helper()
	stream, err := n.Deliver(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&pubsub.DeliverRequest{Hello: &pubsub.Hello{ProtocolVersion: 1}}); err != nil {
		t.Fatal(err)
	}
	if r, err := stream.Recv(); err != nil || !slices.Contains(r.GetHello().GetFeatures(), pubsub.Feature_FEATURE_FILTER) {
		t.Fatal(r, err)
	}
	return &filtered{t: t, stream: stream}
}

// wants delivers to users, or to everybody for none, and compares the counts of the ack.
func (f *filtered) wants(room, text string, filter *pubsub.Match, delivered, filtered uint32, users ...string) {
	f.t.Helper()
	f.seq++
	d := &pubsub.Delivery{
		RoomId: room, UserIds: users, Everybody: len(users) == 0, Filter: []*pubsub.Match{filter}, Content: &pubsub.MessageContent{Data: []byte(text), Timestamp: 1},
	}
	if err := f.stream.Send(&pubsub.DeliverRequest{FirstSeq: f.seq, Deliveries: []*pubsub.Delivery{d}}); err != nil {
		f.t.Fatal(err)
	}
	r, err := f.stream.Recv()
	if err != nil {
		f.t.Fatal(err)
	}
	left := uint32(0)
	if list := r.GetAcks()[0].GetFiltered(); len(list) > 0 {
		left = list[0]
	}
	if n := r.GetAcks()[0].GetDelivered()[0]; n != delivered || left != filtered {
		f.t.Fatalf("%q: %d delivered and %d filtered instead of %d and %d", text, n, left, delivered, filtered)
	}
}

func of(platforms ...string) *pubsub.Match { return &pubsub.Match{Key: "platform", Values: platforms} }

func TestAFilterChoosesAmongAUsersDevices(t *testing.T) {
	g, n := start(t, newController(t), nil)
	phone, _ := dial(t, g, "user_id=u&room_id=r&attr.platform=ios&attr.app_version=2", nil)
	phone.want(`{"type":"joined","room_id":"r"}`)
	laptop, _ := dial(t, g, "user_id=u&room_id=r&attr.platform=web", nil)
	laptop.want(`{"type":"joined","room_id":"r"}`)
	plain := connect(t, g, "v", "")
	m := openFiltered(t, n)
	m.wants("r", "1", of("ios", "android"), 1, 0, "u")
	phone.want(textFrame("r", "u", "1"))
	m.wants("", "2", of("web"), 1, 1, "u", "v")
	laptop.want(textFrame("", "u", "2"))
	m.wants("", "3", of("tv"), 0, 2)
	m.wants("", "4", &pubsub.Match{Key: "platform", Values: []string{"web"}, Not: true}, 2, 0)
	phone.want(broadcastFrame("u", "4"))
	plain.want(broadcastFrame("v", "4"))
	laptop.say(`{"type":"leave","room_id":"r"}`)
	laptop.want(`{"type":"left","room_id":"r"}`)
	m.wants("r", "5", of("web"), 0, 1, "u") // the phone is in it
	phone.say(`{"type":"leave","room_id":"r"}`)
	phone.want(`{"type":"left","room_id":"r"}`)
	m.wants("r", "6", of("web"), 0, 0, "u") // nobody is: the route is out of date
	for _, d := range []*device{phone, laptop, plain} {
		d.wantNothing()
	}
}

func TestAttributesThatAreRefused(t *testing.T) {
	g, _ := start(t, newController(t), nil)
	many := url.Values{"user_id": {"u"}}
	for i := range 17 {
		many.Set(fmt.Sprint("attr.", i), "x")
	}
	for query, want := range map[string]string{
		many.Encode(): "attr: 17 attributes, more than 16",
		"user_id=u&attr.platform=" + strings.Repeat("x", 65): "attr.platform: too long: 65 bytes, more than 64",
		"user_id=u&attr.platform=ios&attr.platform=web":      `attr: key "platform": given 2 times`,
		"user_id=u&attr.platform=%00":                        "attr.platform: must be valid UTF-8 without control characters",
		"user_id=u&attr.=x":                                  `attr: key "": must not be empty`,
	} {
		resp, err := http.Get("http://" + g.HTTPAddr().String() + "/ws?" + query)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest || strings.TrimSpace(string(body)) != want {
			t.Errorf("%.60s: %d %s, want %s", query, resp.StatusCode, body, want)
		}
	}
}

func TestTheTokenKnowsAttributesBetter(t *testing.T) {
	g, p := startWithTokens(t, newController(t), nil)
	d := admitted(t, g, "attr.platform=ios&attr.plan=gold", p.token("alice", map[string]any{"attrs": map[string]string{"plan": "free"}}))
	attributes := func() map[string]string { return g.users.Of("alice")[0].Attributes().Map() }
	if got := attributes(); len(got) != 2 || got["platform"] != "ios" || got["plan"] != "free" {
		t.Errorf("attributes %v", got)
	}
	d.say(say(map[string]string{"type": "refresh", "token": p.token("alice", map[string]any{"attrs": map[string]string{"plan": "silver"}})}))
	if got := d.next(); !strings.Contains(got, "refreshed") {
		t.Fatal(got)
	}
	if got := attributes(); got["plan"] != "silver" || got["platform"] != "ios" {
		t.Errorf("after a refresh: %v", got)
	}
	d.say(say(map[string]string{"type": "refresh", "token": p.token("alice", nil)}))
	if got := d.next(); !strings.Contains(got, "refreshed") {
		t.Fatal(got)
	}
	if got := attributes(); got["plan"] != "gold" {
		t.Errorf("after a refresh without any: %v", got)
	}
}

func TestTokensWithAttributesThatAreNone(t *testing.T) {
	g, p := startWithTokens(t, newController(t), nil)
	for i, attrs := range []any{"x", []string{"platform"}, map[string]any{"platform": 1}, map[string]string{"platform": ""}, map[string]string{"k": strings.Repeat("x", 65)}} {
		d, _ := dial(t, g, "", nil)
		d.say(showing(p.token("alice", map[string]any{"attrs": attrs})))
		d.wantClose(closeToken)
		wantDenied(t, g, deniedClaim, uint64(i+1))
	}
	// Too many together are nobody's fault alone: the client is told.
	query := url.Values{}
	attrs := map[string]string{}
	for i := range 10 {
		query.Set(fmt.Sprint("attr.q", i), "x")
		attrs[fmt.Sprint("t", i)] = "x"
	}
	d, _ := dial(t, g, query.Encode(), nil)
	d.say(showing(p.token("alice", map[string]any{"attrs": attrs})))
	d.wantError("attr")
	d.wantClose(closeToken)
}
