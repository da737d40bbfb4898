package ingress_test

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	"github.com/push-manager/push-manager/internal/auth/jwt"
	"github.com/push-manager/push-manager/internal/refcontroller"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/shard"
	"github.com/push-manager/push-manager/transport/controller"
	"github.com/push-manager/push-manager/transport/ingress"
	"github.com/push-manager/push-manager/transport/link"
	"github.com/push-manager/push-manager/transport/node"
	"github.com/push-manager/push-manager/transport/node/membership"
)

// estate is Push-Manager, two Connect-Nodes and a Controller over loopback, with two tenants that use
// the same ids, and somebody who belongs to none.
type estate struct {
	t       testing.TB
	client  pubsub.PushManagerServiceClient
	tokens  map[string]string // by tenant
	devices []*device
	nodes   []*node.Server

	mu    sync.Mutex
	got   map[string][]*device // by the text of the push; guarded by mu
	wrong []string             // guarded by mu
}

// device is a client on a node. It is a user of its own.
type device struct {
	e      *estate
	tenant node.Tenant
	user   string
	member *membership.Member
	told   chan string
	rooms  map[string]bool // by the name that its tenant gives them
}

func (d *device) Deliver(m *node.Message) node.Outcome {
	if m.RoomID != "" && !d.member.In(m.RoomID) {
		return node.NotHere
	}
	text := string(m.Data)
	tenant, room, _ := strings.Cut(text, "|")
	_, room, _ = strings.Cut(room, "|")
	d.e.mu.Lock()
	defer d.e.mu.Unlock()
	d.e.got[text] = append(d.e.got[text], d)
	if tenant != string(d.tenant) || d.tenant.Plain(m.RoomID) != room {
		d.e.wrong = append(d.e.wrong, fmt.Sprintf("%q of %q got %q in room %q", d.user, d.tenant, text, d.tenant.Plain(m.RoomID)))
	}
	return node.Delivered
}

func (d *device) Joined(room string)     { d.told <- "joined " + room }
func (d *device) Left(room string)       { d.told <- "left " + room }
func (d *device) Refused(room, _ string) { d.told <- "refused " + room }

func (d *device) move(room string, join bool) {
	var err error
	word := "left "
	if join {
		word = "joined "
		err = d.member.Join(room)
	} else {
		err = d.member.Leave(room)
	}
	if err != nil {
		d.e.t.Fatal(err)
	}
	patience, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	select {
	case said := <-d.told:
		if said != word+room {
			d.e.t.Fatalf("told %q, want %q", said, word+room)
		}
	case <-patience.Done():
		d.e.t.Fatalf("nobody said %q", word+room)
	}
	if room != "" {
		d.rooms[room] = join
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	return must(new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0"))
}

// newEstate starts all of it. scopes says whether each of the nodes can tell tenants apart.
func newEstate(t testing.TB, scopes ...bool) *estate {
	t.Helper()
	e := &estate{t: t, got: map[string][]*device{}, tokens: map[string]string{}}
	rc := must(refcontroller.New(refcontroller.Config{}))
	lis := listen(t)
	controllerAddr := lis.Addr().String()
	var serving sync.WaitGroup
	serving.Go(func() { _ = rc.Serve(lis) })
	t.Cleanup(serving.Wait)
	t.Cleanup(rc.Close)

	var registered []link.Node
	var users []*node.Users[*device]
	var reports []*membership.Reporter
	for i, can := range scopes {
		u := node.NewUsers[*device]()
		var sessions node.Sessions = u
		if !can {
			sessions = unscoped{u}
		}
		id := "node-" + strconv.Itoa(i+1)
		srv := must(node.New(node.Config{NodeID: id, Sessions: sessions}))
		gs := grpc.NewServer(node.ServerOptions()...)
		srv.Attach(gs)
		lis := listen(t)
		serving.Go(func() { _ = gs.Serve(lis) })
		t.Cleanup(srv.Close)
		t.Cleanup(gs.Stop)
		r := must(membership.New(membership.Config{NodeID: id, BootID: srv.BootID(), Controller: controllerAddr}))
		r.Start()
		t.Cleanup(r.Close)
		users, reports = append(users, u), append(reports, r)
		e.nodes = append(e.nodes, srv)
		registered = append(registered, link.Node{ID: id, Addr: lis.Addr().String()})
	}
	for i, who := range [][2]string{{"a", "u1"}, {"a", "u2"}, {"a", "b/u1"}, {"a", "b"}, {"b", "u1"}, {"b", "u3"}, {"b", "a"}, {"", "w"}} {
		d := &device{e: e, tenant: node.Tenant(who[0]), user: who[1], told: make(chan string, 8), rooms: map[string]bool{}}
		at := i % len(scopes)
		d.member = reports[at].TenantMember(who[0], who[1], "", d)
		users[at].Add(d.tenant.ID(d.user), d)
		d.move("", true)
		e.devices = append(e.devices, d)
	}

	shards := must(shard.New(shard.Config{Count: 2}))
	t.Cleanup(func() { _ = shards.Close(context.Background()) })
	shardOf := func(key string) int { return shards.For(key).Index() }
	goOn := func(i int, task func()) error { return shards.At(i).Go(task) }
	source := must(controller.New(controller.Config{Address: controllerAddr}))
	t.Cleanup(func() { _ = source.Close() })
	directory := must(route.New(route.Config{Source: source, Shards: shards.Len(), Shard: shardOf, Go: goOn}))
	t.Cleanup(directory.Close)
	source.Start(directory)
	links := must(link.New(link.Config{ManagerID: "pm", Shards: shards.Len(), Go: goOn}))
	t.Cleanup(links.Close)
	if err := links.Update(registered); err != nil {
		t.Fatal(err)
	}
	eng := must(engine.New(engine.Config{Shards: shards, Directory: directory, Network: links, Timeout: time.Minute}))

	const all = `allow: [{methods: ["*"], users: ["*"], rooms: ["*"]}]`
	policy := "version: 1\ntenants: {a: , b: }\ncallers:\n"
	for _, tenant := range []string{"a", "b"} {
		policy += fmt.Sprintf("- {name: of-%s, tenant: %s, match: [{jwt: {issuer: %q, subject: %s}}], %s}\n", tenant, tenant, authtest.Issuer, tenant, all)
	}
	files := authtest.New(t, policy)
	policies := must(auth.OpenPolicies(auth.PoliciesConfig{File: files.Policy}))
	t.Cleanup(policies.Close)
	tokens := must(jwt.New(jwt.Config{Issuers: files.Issuers()}))
	t.Cleanup(tokens.Close)
	api := must(ingress.New(ingress.Config{Engine: eng, Auth: must(auth.New(auth.Config{Policies: policies, Tokens: tokens}))}))
	apiLis := listen(t)
	serving.Go(func() { _ = api.Serve(apiLis) })
	t.Cleanup(func() { _ = api.Close() })
	conn := must(grpc.NewClient(apiLis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials())))
	t.Cleanup(func() { _ = conn.Close() })
	e.client = pubsub.NewPushManagerServiceClient(conn)
	for _, tenant := range []string{"a", "b"} {
		e.tokens[tenant] = files.Token(tenant, time.Hour)
	}
	for deadline := time.Now().Add(time.Minute); links.Reachable() < len(registered); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the nodes are not reached")
		}
	}
	return e
}

// unscoped is a gateway of before.
type unscoped struct{ sessions node.Sessions }

func (u unscoped) Deliver(user string, m *node.Message) node.Outcome {
	return u.sessions.Deliver(user, m)
}
func (u unscoped) Broadcast(m *node.Message) (delivered, failed int) { return u.sessions.Broadcast(m) }
func (u unscoped) Online() int                                       { return u.sessions.Online() }

func (e *estate) as(tenant string) context.Context {
	return metadata.AppendToOutgoingContext(e.t.Context(), "authorization", "Bearer "+e.tokens[tenant])
}

// ask is one push and what must become of it if its tenant were alone in the world.
type ask struct {
	tenant, id, text string
	push             *pubsub.PushStreamRequest
	reached          []*device
	targets          int
	found            bool
	field            string // that is wrong
}

// answer is what all replies have.
type answer interface {
	GetSuccess() bool
	GetMessage() string
	GetSummary() *pubsub.DeliverySummary
}

// draw makes a push, and asks the model who gets it.
func (e *estate) draw(t *rapid.T, n int) *ask {
	ids := []string{"u1", "u2", "u3", "r1", "r2", "b/r1", "b/u1", "a/u1", "../b/r1", "b", "a", "a/", "/", "w", "b/", strings.Repeat("a/", 128), "a/" + strings.Repeat("x", 254), strings.Repeat("x", 257)}
	id := rapid.SampledFrom(ids)
	a := &ask{tenant: rapid.SampledFrom([]string{"a", "b"}).Draw(t, "tenant")}
	fits := func(field string, ids ...string) {
		for i, id := range ids {
			if len(id) > 256 && a.field == "" {
				a.field = strings.ReplaceAll(field, "#", strconv.Itoa(i))
			}
		}
	}
	var own []*device
	for _, d := range e.devices {
		if string(d.tenant) == a.tenant {
			own = append(own, d)
		}
	}
	room := ""
	kind := rapid.IntRange(0, 3).Draw(t, "kind")
	if kind == 0 {
		a.id = id.Draw(t, "room")
		room = a.id
	}
	a.text = fmt.Sprintf("%s|%d|%s", a.tenant, n, room)
	content := &pubsub.MessageContent{Data: []byte(a.text)}
	a.push = &pubsub.PushStreamRequest{Id: uint64(n)}
	switch kind {
	case 0:
		exclude := rapid.SliceOfN(id, 0, 3).Draw(t, "exclude")
		fits("room_id", a.id)
		fits("exclude_user_ids[#]", exclude...)
		for _, d := range own {
			if d.rooms[a.id] {
				a.found = true
				if !slices.Contains(exclude, d.user) {
					a.reached = append(a.reached, d)
				}
			}
		}
		a.targets = len(a.reached)
		a.push.Push = &pubsub.PushStreamRequest_ToRoom{ToRoom: &pubsub.PushToRoomRequest{RoomId: a.id, ExcludeUserIds: exclude, Content: content}}
	case 1:
		a.id = id.Draw(t, "user")
		fits("user_id", a.id)
		a.targets = 1
		for _, d := range own {
			if d.user == a.id {
				a.found, a.reached = true, []*device{d}
			}
		}
		a.push.Push = &pubsub.PushStreamRequest_ToUser{ToUser: &pubsub.PushToUserRequest{UserId: a.id, Content: content}}
	case 2:
		users := rapid.SliceOfN(id, 1, 6).Draw(t, "users")
		fits("user_ids[#]", users...)
		distinct := map[string]bool{}
		for _, user := range users {
			distinct[user] = true
		}
		a.targets = len(distinct)
		for _, d := range own {
			if distinct[d.user] {
				a.found, a.reached = true, append(a.reached, d)
			}
		}
		a.push.Push = &pubsub.PushStreamRequest_ToUsers{ToUsers: &pubsub.PushToUsersRequest{UserIds: users, Content: content}}
	default:
		a.found, a.reached, a.targets = true, own, len(own)
		a.push.Push = &pubsub.PushStreamRequest_Broadcast{Broadcast: &pubsub.BroadcastMessageRequest{Content: content}}
	}
	return a
}

// judge holds a reply, or an error, against the model.
func (e *estate) judge(t *rapid.T, a *ask, r answer, st *status.Status) {
	whole := fmt.Sprint(r, st.Proto()) // with all details
	if st.Code() != codes.OK {
		if a.field == "" || st.Code() != codes.InvalidArgument || !strings.Contains(st.Message(), a.field+": too long: 257 bytes, more than 256") {
			t.Fatalf("%v: %v, wrong is %q", a.push, st.Proto(), a.field)
		}
		return
	}
	var message string
	s := r.GetSummary()
	switch a.push.GetPush().(type) {
	case *pubsub.PushStreamRequest_ToRoom:
		if message = fmt.Sprintf("room %q not found", a.id); a.found {
			message = ""
		}
	case *pubsub.PushStreamRequest_ToUser:
		if message = fmt.Sprintf("user %q is offline", a.id); a.found {
			message = "delivered"
		}
	}
	switch {
	case a.field != "":
		t.Fatalf("%v is taken: %v", a.push, whole)
	case message != "" && r.GetMessage() != message:
		t.Fatalf("%v: %q, want %q", a.push, r.GetMessage(), message)
	case r.GetSuccess() != a.found, int(s.GetTargets()) != a.targets, int(s.GetDelivered()) != len(a.reached), int(s.GetOffline()) != a.targets-len(a.reached), len(s.GetNodeFailures()) > 0:
		t.Fatalf("%v: %v, want found %v, %d targets, %d delivered", a.push, whole, a.found, a.targets, len(a.reached))
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	got := map[*device]int{}
	for _, d := range e.got[a.text] {
		got[d]++
	}
	want := map[*device]int{}
	for _, d := range a.reached {
		want[d] = 1
	}
	delete(e.got, a.text)
	if !maps.Equal(got, want) || len(e.wrong) > 0 {
		t.Fatalf("%v reached %d devices, want %d; frames that crossed: %q", a.push, len(got), len(want), e.wrong)
	}
}

// unary makes the push as a call of its own.
func (e *estate) unary(a *ask) (r answer, st *status.Status) {
	var err error
	ctx := e.as(a.tenant)
	switch p := a.push.GetPush().(type) {
	case *pubsub.PushStreamRequest_ToRoom:
		r, err = e.client.PushToRoom(ctx, p.ToRoom)
	case *pubsub.PushStreamRequest_ToUser:
		r, err = e.client.PushToUser(ctx, p.ToUser)
	case *pubsub.PushStreamRequest_ToUsers:
		r, err = e.client.PushToUsers(ctx, p.ToUsers)
	case *pubsub.PushStreamRequest_Broadcast:
		r, err = e.client.BroadcastMessage(ctx, p.Broadcast)
	}
	return r, status.Convert(err)
}

// answerOf is the result in a reply of a PushStream.
func answerOf(r *pubsub.PushStreamResponse) (answer, *status.Status) {
	switch res := r.GetResult().(type) {
	case *pubsub.PushStreamResponse_ToRoom:
		return res.ToRoom, nil
	case *pubsub.PushStreamResponse_ToUser:
		return res.ToUser, nil
	case *pubsub.PushStreamResponse_ToUsers:
		return res.ToUsers, nil
	case *pubsub.PushStreamResponse_Broadcast:
		return res.Broadcast, nil
	}
	return nil, status.FromProto(r.GetError())
}

// pushesOfACheck is how many pushes one check of the property makes.
const pushesOfACheck = 40

// TestTenantsWithTheSameIDsNeverMeet: whatever one tenant pushes becomes what it would if the other one
// were not there, for its clients and in its replies. By default that is 4,000 pushes;
// -rapid.checks=2500 makes 100,000, in some minutes.
func TestTenantsWithTheSameIDsNeverMeet(t *testing.T) {
	e := newEstate(t, true, true)
	n := 0
	rapid.Check(t, func(t *rapid.T) {
		// Rooms of the same names come and go.
		for range rapid.IntRange(0, 3).Draw(t, "moves") {
			d := rapid.SampledFrom(e.devices[:len(e.devices)-1]).Draw(t, "device")
			room := rapid.SampledFrom([]string{"r1", "r2", "b/r1", "a", "b"}).Draw(t, "room")
			d.move(room, !d.rooms[room])
		}
		way := rapid.SampledFrom([]string{"unary", "stream", "batch"}).Draw(t, "way")
		asked := map[uint64]*ask{}
		frames := map[string][]*pubsub.PushStreamRequest{}
		for range pushesOfACheck {
			n++
			a := e.draw(t, n)
			if way == "unary" {
				r, st := e.unary(a)
				e.judge(t, a, r, st)
				continue
			}
			asked[a.push.GetId()] = a
			frames[a.tenant] = append(frames[a.tenant], a.push)
		}
		streams := map[string]pubsub.PushManagerService_PushStreamClient{}
		for tenant, pushes := range frames {
			streams[tenant] = must(e.client.PushStream(e.as(tenant)))
			if way == "batch" {
				pushes = []*pubsub.PushStreamRequest{{Batch: pushes}}
			}
			for _, p := range pushes {
				if err := streams[tenant].Send(p); err != nil {
					t.Fatal(err)
				}
			}
			if err := streams[tenant].CloseSend(); err != nil {
				t.Fatal(err)
			}
		}
		for tenant, pushes := range frames {
			for left := len(pushes); left > 0; {
				r, err := streams[tenant].Recv()
				if err != nil {
					t.Fatal(err)
				}
				replies := r.GetBatch()
				if len(replies) == 0 {
					replies = []*pubsub.PushStreamResponse{r}
				}
				for _, r := range replies {
					a := asked[r.GetId()]
					if a == nil || a.tenant != tenant {
						t.Fatalf("%q got the reply %v", tenant, r)
					}
					delete(asked, r.GetId())
					got, st := answerOf(r)
					e.judge(t, a, got, st)
					left--
				}
			}
		}
	})
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.got) > 0 || len(e.wrong) > 0 {
		t.Errorf("nobody pushed %v; frames that crossed: %q", e.got, e.wrong)
	}
	t.Logf("%d pushes", n)
}

// TestTenantReachesNothingOfAnother is attack 20: names of others, however they are written, are names of
// rooms that do not exist.
func TestTenantReachesNothingOfAnother(t *testing.T) {
	e := newEstate(t, true)
	for _, d := range e.devices {
		if d.tenant == "b" {
			d.move("x", true)
			d.move("b/x", true)
			d.move("a", true)
		}
	}
	for _, room := range []string{"b/x", "../b/x", "/b/x", "b//x", "a/../b/x", "b", "x", "a", "b/b/x", "a/" + strings.Repeat("x", 254), "B/x", "b\u2215x", "no such room"} {
		r, err := e.client.PushToRoom(e.as("a"), &pubsub.PushToRoomRequest{RoomId: room, Content: &pubsub.MessageContent{Data: []byte("a|0|")}})
		if err != nil {
			t.Errorf("%q: %v", room, err)
			continue
		}
		want := &pubsub.PushToRoomResponse{Message: fmt.Sprintf("room %q not found", room), Summary: &pubsub.DeliverySummary{}}
		if fmt.Sprint(r) != fmt.Sprint(want) {
			t.Errorf("%q: %v, want %v", room, r, want)
		}
	}
	_, err := e.client.PushToRoom(e.as("a"), &pubsub.PushToRoomRequest{RoomId: "a/" + strings.Repeat("x", 255), Content: &pubsub.MessageContent{}})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "257 bytes, more than 256") {
		t.Errorf("257 bytes: %v", err)
	}
	for _, room := range []string{"x", "b/x", "a"} { // they are there, for their tenant
		r, err := e.client.PushToRoom(e.as("b"), &pubsub.PushToRoomRequest{RoomId: room, Content: &pubsub.MessageContent{Data: []byte("b|0|" + room)}})
		if err != nil || r.GetDeliveredCount() != 3 {
			t.Errorf("%q of its own tenant: %v, %v", room, r, err)
		}
	}
	if len(e.wrong) > 0 {
		t.Errorf("frames that crossed: %q", e.wrong)
	}
}

// TestBroadcastOfATenantIsRefusedWhereANodeCannotTellTenantsApart, and nothing is sent, nor widened.
func TestBroadcastOfATenantIsRefusedWhereANodeCannotTellTenantsApart(t *testing.T) {
	e := newEstate(t, true, false)
	_, err := e.client.BroadcastMessage(e.as("a"), &pubsub.BroadcastMessageRequest{Content: &pubsub.MessageContent{Data: []byte("a|0|")}})
	st := status.Convert(err)
	if st.Code() != codes.FailedPrecondition || !strings.Contains(fmt.Sprint(st.Details()), "TENANT_BROADCAST_UNSUPPORTED") {
		t.Errorf("%v %v", st, st.Details())
	}
	if len(e.got) > 0 {
		t.Errorf("sent: %v", e.got)
	}
	if r, err := e.client.PushToUser(e.as("a"), &pubsub.PushToUserRequest{UserId: "u1", Content: &pubsub.MessageContent{Data: []byte("a|1|")}}); err != nil || !r.GetSuccess() {
		t.Errorf("all else goes on: %v, %v", r, err)
	}
}
