package node

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"pgregory.net/rapid"

	pubsub "github.com/push-manager/push-manager/proto"
)

// tagged is a connection with attributes.
type tagged struct {
	attributes Attributes
	rooms      []string
	space      int
	got        []string
}

func (c *tagged) Attributes() Attributes { return c.attributes }
func (c *tagged) IsFor(m *Message) bool {
	return slices.ContainsFunc(c.rooms, func(room string) bool {
		if m.Rooms == nil {
			return room == m.RoomID
		}
		_, is := m.Rooms.Place(room)
		return is
	})
}
func (c *tagged) Deliver(m *Message) Outcome { return c.DeliverLasting(m, nil) }
func (c *tagged) DeliverLasting(m *Message, _ *Confirmation) Outcome {
	switch {
	case (m.RoomID != "" || m.Rooms != nil) && !c.IsFor(m):
		return NotHere
	case len(c.got) == c.space:
		return Failed
	}
	c.got = append(c.got, string(m.Data))
	return Delivered
}

var _ Filtering = (*Users[*tagged])(nil)

func mustAttributes(t testing.TB, given map[string]string) Attributes {
	t.Helper()
	a, err := NewAttributes(given)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAttributesThatAreRefusedAreNamed(t *testing.T) {
	many := map[string]string{}
	for i := range 17 {
		many[fmt.Sprint(i)] = "x"
	}
	for want, given := range map[string]map[string]string{
		"attr: 17 attributes, more than 16":      many,
		"attr: key \"\": must not be empty":      {"": "x"},
		"attr: key \"a\\nb\": must be valid":     {"a\nb": "x"},
		"attr.platform: must not be empty":       {"platform": ""},
		"attr.platform: too long: 65 bytes":      {"platform": strings.Repeat("x", 65)},
		"attr.platform: must be valid UTF-8":     {"platform": "\xff"},
		"attr: key \"" + strings.Repeat("k", 64): {strings.Repeat("k", 65): "x"},
	} {
		if _, err := NewAttributes(given); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v: %v, want %s", given, err, want)
		}
	}
	delete(many, "0")
	a := mustAttributes(t, many)
	if _, err := a.With(mustAttributes(t, map[string]string{"another": "x"})); err == nil {
		t.Error("17 attributes together are taken")
	}
	b, err := a.With(mustAttributes(t, map[string]string{"1": "y"}))
	if value, _ := b.Get("1"); err != nil || value != "y" || b.Len() != 16 {
		t.Errorf("%v, %v: the later ones do not win", b.Map(), err)
	}
}

// drawAttributes draws a few, with values that filters ask for.
func drawAttributes(t *rapid.T, label string) map[string]string {
	return rapid.MapOfN(rapid.SampledFrom([]string{"platform", "app_version", "device_id"}), rapid.SampledFrom([]string{"ios", "web", "1", "2"}), 0, 3).Draw(t, label)
}

// holds is what a filter means, in other words than those of Filter.
func holds(filter []*pubsub.Match, attributes map[string]string) bool {
	for _, m := range filter {
		one := false
		for _, value := range m.GetValues() {
			has, there := attributes[m.GetKey()]
			one = one || there && has == value
		}
		if one == m.GetNot() {
			return false
		}
	}
	return true
}

// Whoever a delivery is for (users, a room's audience without some, everybody, a tenant), each user gets it on the connections that match and are
// in the room, and counts as delivered, filtered, or not here as the model says.
func TestADeliveryWithAFilterReachesWhomTheModelSays(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		users := NewUsers[*tagged]()
		st := newStream(t, users)
		st.server.does.rooms = true
		type conn struct {
			*tagged
			attributes map[string]string
		}
		names := []string{"u0", "u1", "u2", "shop/u3", "shop/u4", "u5"}
		here := map[string][]conn{}
		for _, user := range names {
			for i := range rapid.IntRange(0, 3).Draw(rt, user) {
				label := fmt.Sprint(user, " ", i)
				given := drawAttributes(rt, label)
				c := conn{&tagged{
					attributes: mustAttributes(t, given), space: 1,
					rooms: rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"r", "s"}), 0, 2, rapid.ID[string]).Draw(rt, label+" rooms"),
				}, given}
				here[user] = append(here[user], c)
				users.Add(user, c.tagged)
			}
		}
		filter := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) *pubsub.Match {
			return &pubsub.Match{
				Key:    rapid.SampledFrom([]string{"platform", "app_version", "absent"}).Draw(t, "key"),
				Values: rapid.SliceOfN(rapid.SampledFrom([]string{"ios", "web", "1", "3"}), 1, 3).Draw(t, "values"),
				Not:    rapid.Bool().Draw(t, "not"),
			}
		}), 1, 3).Draw(rt, "filter")
		d := &pubsub.Delivery{Content: text("x"), Filter: filter, NameFiltered: rapid.Bool().Draw(rt, "named")}
		var rooms []string // the connections in one of them, or all
		asked := names
		switch rapid.IntRange(0, 5).Draw(rt, "target") {
		case 0:
			d.UserIds = names
		case 1:
			d.UserIds, d.RoomId, rooms = names, "r", []string{"r"}
		case 2:
			rooms = []string{"s", "t", "r"}
			d.UserIds, d.RoomIds = names, rooms
		case 3:
			d.Audience, d.ExceptUserIds = &pubsub.Audience{Id: 1, Version: 1, Join: names}, []string{"u1"}
			if rapid.Bool().Draw(rt, "several rooms") {
				rooms = []string{"t", "s"}
				d.Audience.RoomIds = rooms
			} else {
				rooms = []string{"r"}
				d.Audience.RoomId = "r"
			}
			asked = slices.DeleteFunc(slices.Clone(names), func(user string) bool { return user == "u1" })
		case 4:
			d.Everybody = true
		default:
			d.Scope = "shop/"
			asked = []string{"shop/u3", "shop/u4"}
		}
		frame, err := (&pubsub.DeliverRequest{FirstSeq: 1, Deliveries: []*pubsub.Delivery{d}}).MarshalVT()
		if err != nil {
			rt.Fatal(err)
		}
		if err := st.take(frame); err != nil {
			rt.Fatal(err)
		}

		delivered, want := 0, &pubsub.Miss{Seq: 1}
		filtered := 0
		for _, user := range asked {
			isHere, reached := false, false
			for _, c := range here[user] {
				in := rooms == nil || slices.ContainsFunc(c.rooms, func(room string) bool { return slices.Contains(rooms, room) })
				gets := in && holds(filter, c.attributes)
				if gets != (len(c.got) == 1) {
					rt.Fatalf("%s with %v in %v got %v, filter %v", user, c.attributes, c.rooms, c.got, filter)
				}
				isHere, reached = isHere || in, reached || gets
			}
			switch {
			case reached:
				delivered++
			case isHere:
				filtered++
				if d.GetNameFiltered() && len(d.GetUserIds())+len(d.GetAudience().GetJoin()) > 0 {
					want.Filtered = append(want.Filtered, user)
				}
			case !d.GetEverybody() && d.GetScope() == "":
				want.NotHere = append(want.NotHere, user)
			}
		}
		for user, conns := range here {
			for _, c := range conns {
				if !slices.Contains(asked, user) && len(c.got) > 0 {
					rt.Fatalf("%s was not asked for and got it", user)
				}
			}
		}
		var out outgoing
		if !st.acks.take(&out) {
			rt.Fatal("no ack")
		}
		acks := out.response.GetAcks()[0]
		got := &pubsub.Miss{}
		if list := out.response.GetMisses(); len(list) > 0 {
			got = list[0]
		}
		n := 0
		if len(acks.GetFiltered()) > 0 {
			n = int(acks.GetFiltered()[0])
		}
		if int(acks.GetDelivered()[0]) != delivered || n != filtered || !slices.Equal(got.GetNotHere(), want.GetNotHere()) ||
			!slices.Equal(got.GetFiltered(), want.GetFiltered()) || len(got.GetFailed()) > 0 {
			rt.Fatalf("ack %v, miss %v; want %d delivered, %d filtered, %v", acks, got, delivered, filtered, want)
		}
		if (d.GetEverybody() || d.GetScope() != "") && int(out.reached) != delivered+filtered {
			rt.Fatalf("a broadcast to %d is bounded by %d", delivered+filtered, out.reached)
		}
	})
}

func TestAFilterTakesTheBestOfAUsersConnections(t *testing.T) {
	ios, web := mustAttributes(t, map[string]string{"platform": "ios"}), mustAttributes(t, map[string]string{"platform": "web"})
	for name, tt := range map[string]struct {
		conns []*tagged
		room  string
		want  Outcome
	}{
		"nobody":                             {nil, "", NotHere},
		"none matches":                       {[]*tagged{{attributes: web}, {}}, "", Filtered},
		"one matches":                        {[]*tagged{{attributes: web}, {attributes: ios, space: 1}}, "", Delivered},
		"the one that matches is full":       {[]*tagged{{attributes: ios}, {attributes: web}}, "", Failed},
		"none is in the room":                {[]*tagged{{attributes: web}, {attributes: ios}}, "r", NotHere},
		"the one that matches is not in it":  {[]*tagged{{attributes: web, rooms: []string{"r"}}, {attributes: ios}}, "r", Filtered},
		"the one in the room does not match": {[]*tagged{{attributes: ios}, {attributes: web, rooms: []string{"r"}}}, "r", Filtered},
		"one matches and is in the room":     {[]*tagged{{attributes: web}, {attributes: ios, space: 1, rooms: []string{"r"}}}, "r", Delivered},
	} {
		t.Run(name, func(t *testing.T) {
			users := NewUsers[*tagged]()
			for _, c := range tt.conns {
				users.Add("u", c)
			}
			filter, err := filterOf([]wireMatch{{key: "platform", values: []string{"android", "ios"}}})
			if err != nil {
				t.Fatal(err)
			}
			if got := users.DeliverFiltered("u", filter, &Message{RoomID: tt.room}, nil); got != tt.want {
				t.Errorf("outcome %d, want %d", got, tt.want)
			}
		})
	}
}

func TestFiltersThatBreakTheStream(t *testing.T) {
	good := func() []*pubsub.Match { return []*pubsub.Match{{Key: "k", Values: []string{"v"}}} }
	values := strings.Split(strings.Repeat("v,", 32)+"v", ",")
	for name, d := range map[string]*pubsub.Delivery{
		"no key":           {UserIds: []string{"u"}, Filter: []*pubsub.Match{{Values: []string{"v"}}}},
		"no values":        {UserIds: []string{"u"}, Filter: []*pubsub.Match{{Key: "k"}}},
		"too many matches": {UserIds: []string{"u"}, Filter: slices.Repeat(good(), 9)},
		"too many values":  {UserIds: []string{"u"}, Filter: []*pubsub.Match{{Key: "k", Values: values}}},
		"beside replay":    {UserIds: []string{"u"}, Filter: good(), Replay: &pubsub.ReplayPlace{Gate: 1, Seq: 1}},
		"beside a log":     {UserIds: []string{"u"}, Filter: good(), Log: &pubsub.LogPosition{Seq: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			d.Content = text("x")
			users := NewUsers[*tagged]()
			c := &tagged{space: 1}
			users.Add("u", c)
			m := serve(t, Config{Sessions: users}).mustOpen(t)
			m.deliver(d)
			_ = m.wantEnd(codes.FailedPrecondition)
			if len(c.got) > 0 {
				t.Error("somebody got it")
			}
		})
	}
	t.Run("at a node that cannot filter", func(t *testing.T) {
		g := newGateway()
		m := serve(t, Config{Sessions: g}).mustOpen(t)
		if slices.Contains(m.reply.GetFeatures(), pubsub.Feature_FEATURE_FILTER) {
			t.Error("it says that it can")
		}
		m.deliver(&pubsub.Delivery{Content: text("x"), UserIds: []string{"alice"}, Filter: good()})
		_ = m.wantEnd(codes.FailedPrecondition)
	})
}

// A filter and options of lasting delivery go together: who is left out is waited for by nobody.
func TestAFilterBesideAcknowledgements(t *testing.T) {
	users := NewLastingUsers[*taggedPhone](everyFeature...)
	b := serve(t, Config{Sessions: users})
	m := b.mustOpen(t)
	if !slices.Contains(m.reply.GetFeatures(), pubsub.Feature_FEATURE_FILTER) {
		t.Fatalf("features %v", m.reply.GetFeatures())
	}
	for user, platform := range map[string]string{"in": "ios", "out": "web"} {
		p := &taggedPhone{phone: &phone{user: user, server: b.server, answer: true, desk: newDesk(true)}, attributes: mustAttributes(t, map[string]string{"platform": platform})}
		users.Add(user, p)
	}
	d := wantAck(lasting("a", "in", "out"), time.Second)
	d.Filter = []*pubsub.Match{{Key: "platform", Values: []string{"ios"}}}
	m.deliver(d)
	f := m.recv()
	wantFrame(t, &pubsub.DeliverResponse{Acks: f.GetAcks()}, &pubsub.DeliverResponse{
		Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1}, Pending: []uint32{1}, Filtered: []uint32{1}}},
	})
	for len(f.GetReceipts()) == 0 {
		f = m.recv()
	}
	if r := f.GetReceipts()[0]; r.GetAcked() != 1 || !r.GetFinal() {
		t.Errorf("receipt %v", r)
	}
}

type taggedPhone struct {
	*phone
	attributes Attributes
}

func (p *taggedPhone) Attributes() Attributes { return p.attributes }
func (*taggedPhone) IsFor(*Message) bool      { return true }

// fuzzFilters has a node that filters take a frame: whatever it says, each user counts once.
func fuzzFilters(t *testing.T, b []byte) {
	t.Helper()
	users := NewUsers[*tagged]()
	st := newStream(t, users)
	for user, given := range map[string]map[string]string{"u": {"platform": "ios"}, "v": {"app_version": "1"}, "shop/w": nil} {
		users.Add(user, &tagged{attributes: mustAttributes(t, given), space: 1 << 20, rooms: []string{"r"}})
	}
	_ = st.take(b)
	var out outgoing
	for st.acks.take(&out) {
		for _, r := range out.response.GetAcks() {
			if n := len(r.GetFiltered()); n != 0 && n != len(r.GetDelivered()) {
				t.Errorf("%d counts of filtered beside %d", n, len(r.GetDelivered()))
			}
		}
		for _, miss := range out.response.GetMisses() {
			for _, user := range miss.GetFiltered() {
				if slices.Contains(miss.GetNotHere(), user) || slices.Contains(miss.GetFailed(), user) {
					t.Errorf("user %q is named twice in %v", user, miss)
				}
			}
		}
	}
}

// BenchmarkFilter measures a delivery to a room of 10,000 from the wire to the ack: without a filter, with one of three matches that lets
// everybody pass, and with one that leaves everybody out. ns/conn is what to compare.
func BenchmarkFilter(b *testing.B) {
	const members = 10_000
	pass := []*pubsub.Match{
		{Key: "platform", Values: []string{"ios", "android"}}, {Key: "app_version", Values: []string{"1.0", "1.1"}, Not: true}, {Key: "country", Values: []string{"de", "fr", "at"}},
	}
	out := []*pubsub.Match{pass[0], pass[1], {Key: "country", Values: []string{"us", "ca"}}}
	for name, filter := range map[string][]*pubsub.Match{"none": nil, "pass": pass, "out": out} {
		b.Run("filter="+name, func(b *testing.B) {
			users := NewUsers[*sink]()
			server, err := New(Config{NodeID: "n", Sessions: users})
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(server.Close)
			st := &stream{
				server: server, acks: newAcks(1<<40, server.online, &server.count), next: 1,
				aud: audiences{byID: map[uint32]*audience{}, maxMembers: members},
			}
			join := make([]string, members)
			for i := range join {
				join[i] = fmt.Sprintf("user-%05d", i)
				users.Add(join[i], &sink{attributes: mustAttributes(b, map[string]string{
					"device_id": fmt.Sprintf("device-%05d", i), "platform": "ios", "app_version": "2.3", "country": "at",
				})})
			}
			if _, err := st.aud.apply(&delivery{id: 1, version: 1, audRoom: "r", join: join}); err != nil {
				b.Fatal(err)
			}
			data, err := (&pubsub.DeliverRequest{FirstSeq: 1, Deliveries: []*pubsub.Delivery{
				{Content: text("x"), Audience: &pubsub.Audience{Id: 1, Version: 1}, Filter: filter},
			}}).MarshalVT()
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				st.next = 1
				if err := st.take(data); err != nil {
					b.Fatal(err)
				}
				st.acks.counts, st.acks.filtered = st.acks.counts[:0], st.acks.filtered[:0]
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/members, "ns/conn")
		})
	}
}

// sink is a connection in every room that takes everything.
type sink struct {
	attributes Attributes
	got        int
}

func (c *sink) Attributes() Attributes { return c.attributes }
func (c *sink) IsFor(*Message) bool    { return true }
func (c *sink) Deliver(*Message) Outcome {
	c.got++
	return Delivered
}
