package ingress

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/internal/auth/apikey"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	"github.com/push-manager/push-manager/internal/auth/jwt"
	pubsub "github.com/push-manager/push-manager/proto"
)

// access is what Config.Auth is made of.
type access struct {
	*authtest.Files

	t        testing.TB
	policies *auth.Policies
	keys     *apikey.Store
	auth     *auth.Authenticator
}

func newAccess(t testing.TB, files *authtest.Files) *access {
	t.Helper()
	a := &access{Files: files, t: t}
	var err error
	a.policies, err = auth.OpenPolicies(auth.PoliciesConfig{File: files.Policy})
	ok(t, err)
	t.Cleanup(a.policies.Close)
	a.keys, err = apikey.Open(apikey.Config{File: files.Keys})
	ok(t, err)
	t.Cleanup(a.keys.Close)
	tokens, err := jwt.New(jwt.Config{Issuers: files.Issuers()})
	ok(t, err)
	t.Cleanup(tokens.Close)
	a.auth, err = auth.New(auth.Config{Policies: a.policies, Keys: a.keys, Tokens: tokens})
	ok(t, err)
	return a
}

// set is a change of newWorld that asks who calls.
func (a *access) set(c *Config, _ *engine.Config) { c.Auth = a.auth }

// reload has the files read, inside of a bubble.
func (a *access) reload() {
	a.policies.Reload()
	a.keys.Reload()
	synctest.Wait()
}

// caller is one of a policy, found by a token of its name.
func caller(name, allow string, more ...string) string {
	return fmt.Sprintf("- {name: %s, match: [{jwt: {issuer: %q, subject: %s}}], allow: [%s]%s}\n", name, authtest.Issuer, name, allow, strings.Join(more, ""))
}

func policyOf(callers ...string) string { return "version: 1\ncallers:\n" + strings.Join(callers, "") }

// as is a context with a bearer of a call.
func (w *world) as(bearer string) context.Context {
	return metadata.AppendToOutgoingContext(w.context(), "authorization", "Bearer "+bearer)
}

// nothingSent fails if a node has got anything, or a Controller was asked.
func (w *world) nothingSent() {
	w.t.Helper()
	for _, n := range w.network.nodes {
		if sent := n.payloads(); len(sent) > 0 {
			w.t.Errorf("node %s got %d deliveries", n.id, len(sent))
		}
	}
	if n := w.source.count(); n > 0 {
		w.t.Errorf("the Controller was asked %d times", n)
	}
}

const refusedText = "no credentials, or none that are valid here"

// wantDenied checks a refusal for rights, which names no value.
func wantDenied(t testing.TB, st *status.Status, method, field, value string) {
	t.Helper()
	wantStatus(t, st, codes.PermissionDenied, "PERMISSION_DENIED", "")
	if value != "" && strings.Contains(st.String(), value) {
		t.Errorf("the value is told: %v", st)
	}
	for _, d := range st.Details() {
		if info, is := d.(*errdetails.ErrorInfo); is && (info.Metadata["method"] != method || info.Metadata["field"] != field) {
			t.Errorf("method %q, field %q, want %q and %q", info.Metadata["method"], info.Metadata["field"], method, field)
		}
	}
}

// TestEveryWayInAsksWhoCalls, and before anything of a request has been read: none of these calls sends a message.
func TestEveryWayInAsksWhoCalls(t *testing.T) {
	a := newAccess(t, authtest.New(t, policyOf(caller("a", `{methods: ["*"], users: ["*"], rooms: ["*"]}`))))
	w := newWorld(t, a.set)
	good := a.Token("a", time.Hour)
	ways := []string{
		"/pubsub.PushManagerService/PushStream", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List",
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
	}
	for m := range methods {
		switch {
		case m == apis:
		case m == disconnect:
			ways = append(ways, "/pubsub.PresenceService/"+m.String())
		case m.ofJobs():
			ways = append(ways, "/pubsub.BroadcastJobService/"+m.String())
		case m.ofPresence():
			ways = append(ways, "/pubsub.PresenceService/"+m.String())
		default:
			ways = append(ways, "/pubsub.PushManagerService/"+m.String())
		}
	}
	// What is served and not in the list would not be tried.
	for service, info := range w.server.grpc.GetServiceInfo() {
		for _, m := range info.Methods {
			if !slices.Contains(ways, "/"+service+"/"+m.Name) {
				t.Errorf("/%s/%s is not tried", service, m.Name)
			}
		}
	}
	call := func(way string, headers ...string) error {
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), headers...), 20*time.Second)
		defer cancel()
		st, err := w.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, way)
		ok(t, err)
		return st.RecvMsg(&healthpb.HealthCheckResponse{})
	}
	for _, way := range ways {
		for name, headers := range map[string][]string{
			"nothing": nil, "a token of nobody": {"authorization", "Bearer " + a.Token("b", time.Hour)}, "garbage": {"authorization", "Bearer x.y.z"},
			"two tokens": {"authorization", "Bearer " + good, "authorization", "Bearer " + good},
			"claims":     {"x-user", "a", "x_user", "a", "x.user", "a", "x-tenant", "a", "x-caller", "a", "x-forwarded-for", "127.0.0.1", "x-forwarded-client-cert", "URI=spiffe://prod.example/a", "proxy-authorization", "Bearer " + good},
		} {
			err := call(way, headers...)
			wantError(t, err, codes.Unauthenticated, "UNAUTHENTICATED", "")
			if text := status.Convert(err).Message(); text != refusedText {
				t.Errorf("%s, %s: %q", way, name, text)
			}
		}
	}
	w.nothingSent()
	if n := w.metric(`push_manager_auth_failures_total{reason="no_credential"}`); n != strconv.Itoa(2*len(ways)) {
		t.Errorf("%s calls without a credential are counted", n)
	}
	// With a token all of them are served.
	_, err := w.client.PushToUser(w.as(good), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
	ok(t, err)
	_, err = healthpb.NewHealthClient(w.conn).Check(w.as(good), &healthpb.HealthCheckRequest{})
	ok(t, err)
	watch, err := healthpb.NewHealthClient(w.conn).Watch(w.as(good), &healthpb.HealthCheckRequest{})
	ok(t, err)
	_, err = watch.Recv()
	ok(t, err)
	reflection, err := reflectionpb.NewServerReflectionClient(w.conn).ServerReflectionInfo(w.as(good))
	ok(t, err)
	ok(t, reflection.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}))
	_, err = reflection.Recv()
	ok(t, err)
	st := w.stream(w.as(good))
	ok(t, st.Send(userPush(1, "d", "x")))
	if r := recv(t, st); r.Error != nil {
		t.Error(r.Error)
	}
}

// A path that is not quite a method's is nobody's, with a good token and without.
func TestAPathIsAMethodOrNothing(t *testing.T) {
	a := newAccess(t, authtest.New(t, policyOf(caller("a", `{methods: ["*"], users: ["*"], rooms: ["*"]}`))))
	w := newWorld(t, a.set)
	for _, path := range []string{
		"pubsub.PushManagerService/PushToUser", "//pubsub.PushManagerService/PushToUser", "/pubsub.PushManagerService//PushToUser",
		"/pubsub.pushmanagerservice/pushtouser", "/PUBSUB.PUSHMANAGERSERVICE/PUSHTOUSER", "/pubsub.PushManagerService/PushToUser/", "/pubsub.PushManagerService/%50ushToUser",
		"/pubsub.PushManagerService%2FPushToUser", "/pubsub.PushManagerService/../pubsub.PushManagerService/PushToUser", "/", "",
	} {
		header := h2call(t, w, map[string]string{":path": path})
		if s := header["grpc-status"]; s != "12" && s != "" {
			t.Errorf("%q: answered %v", path, header)
		}
	}
	if header := h2call(t, w, map[string]string{":path": methodUser}); header["grpc-status"] != strconv.Itoa(int(codes.Unauthenticated)) {
		t.Errorf("a good path: answered %v", header)
	}
	w.nothingSent()
}

// TestAPushIsDeniedAsAWhole: one id that is not allowed has nothing sent, and nobody asked.
func TestAPushIsDeniedAsAWhole(t *testing.T) {
	a := newAccess(t, authtest.New(t, policyOf(caller("a", `{methods: [PushToUser, PushToUsers], users: ["u-*", d]}, {methods: [PushToRoom], rooms: ["order-*"]}`))))
	w := newWorld(t, a.set)
	as := w.as(a.Token("a", time.Hour))
	const secret = "secret-9"
	user := func(id string) error {
		_, err := w.client.PushToUser(as, &pubsub.PushToUserRequest{UserId: id, Content: content("x")})
		return err
	}
	room := func(id string) error {
		_, err := w.client.PushToRoom(as, &pubsub.PushToRoomRequest{RoomId: id, Content: content("x")})
		return err
	}
	users := func(ids ...string) error {
		_, err := w.client.PushToUsers(as, &pubsub.PushToUsersRequest{UserIds: ids, Content: content("x")})
		return err
	}
	_, broadcast := w.client.BroadcastMessage(as, &pubsub.BroadcastMessageRequest{Content: content("x")})
	for name, c := range map[string]struct {
		err                  error
		method, field, value string
	}{
		"a user":                  {user(secret), "PushToUser", "user_id", secret},
		"a room":                  {room(secret), "PushToRoom", "room_id", secret},
		"a room, upper case":      {room("Order-1"), "PushToRoom", "room_id", "Order-1"},
		"a room that is a user":   {room("d"), "PushToRoom", "room_id", ""},
		"a star":                  {user("*"), "PushToUser", "user_id", ""},
		"nobody":                  {user(""), "PushToUser", "user_id", ""},
		"in the middle of a list": {users("u-1", secret, "u-2"), "PushToUsers", "user_ids", secret},
		"at the end of a list":    {users(append(slices.Repeat([]string{"u-1"}, 9999), secret)...), "PushToUsers", "user_ids", secret},
		"a method":                {broadcast, "BroadcastMessage", "method", ""},
	} {
		t.Run(name, func(t *testing.T) { wantDenied(t, status.Convert(c.err), c.method, c.field, c.value) })
	}
	w.nothingSent()
	if n := w.metric(`push_manager_auth_failures_total{reason="permission"}`); n != "9" {
		t.Errorf("%s are counted", n)
	}

	// The second message of a stream, and one in the middle of a batch. The others are not touched.
	st := w.stream(as)
	ok(t, st.Send(userPush(1, "d", "x")))
	if r := recv(t, st); r.Error != nil {
		t.Errorf("the first: %v", r.Error)
	}
	sent := len(w.network.nodes[0].payloads())
	ok(t, st.Send(userPush(2, secret, "x")))
	wantDenied(t, status.FromProto(recv(t, st).Error), "PushToUser", "user_id", secret)
	ok(t, st.Send(&pubsub.PushStreamRequest{Id: 3, Push: &pubsub.PushStreamRequest_Broadcast{Broadcast: &pubsub.BroadcastMessageRequest{Content: content("x")}}}))
	wantDenied(t, status.FromProto(recv(t, st).Error), "BroadcastMessage", "method", "")
	if got := len(w.network.nodes[0].payloads()); got != sent {
		t.Errorf("%d deliveries, want %d", got, sent)
	}
	ok(t, st.Send(batchOf(userPush(4, "d", "x"), userPush(5, secret, "x"), userPush(6, "d", "x"))))
	replies := recvBatched(t, st, 3)
	slices.SortFunc(replies, func(a, b *pubsub.PushStreamResponse) int { return int(a.Id) - int(b.Id) })
	if replies[0].Error != nil || replies[2].Error != nil {
		t.Errorf("the others of the batch: %v, %v", replies[0].Error, replies[2].Error)
	}
	wantDenied(t, status.FromProto(replies[1].Error), "PushToUser", "user_id", secret)
	if got := len(w.network.nodes[0].payloads()); got != sent+2 {
		t.Errorf("%d deliveries, want %d", got, sent+2)
	}

	// Whom a push leaves out is nobody's right.
	_, err := w.client.PushToRoom(as, &pubsub.PushToRoomRequest{RoomId: "order-1", ExcludeUserIds: []string{secret}, Content: content("x")})
	ok(t, err)
}

// TestARevokedCallerIsRefusedWithItsNextMessage of a PushStream that is open, and with its next call. Others go on.
func TestARevokedCallerIsRefusedWithItsNextMessage(t *testing.T) {
	const all = `{methods: ["*"], users: ["*"], rooms: ["*"]}`
	for name, revoke := range map[string]func(a *access, id, rest string){
		"a caller is removed from the policy": func(a *access, _, rest string) {
			a.WritePolicy(policyOf(rest))
			a.reload()
		},
		"its key is removed": func(a *access, id, _ string) {
			a.DropKey(id)
			a.reload()
		},
		"its key ends":                   func(*access, string, string) { time.Sleep(time.Hour + time.Second) },
		"a caller is removed, no signal": func(a *access, _, rest string) { a.WritePolicy(policyOf(rest)); time.Sleep(11 * time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				files := authtest.New(t, "")
				key, id := files.NewKey(time.Now().Add(time.Hour))
				rest := caller("other", all)
				files.WritePolicy(policyOf(rest, fmt.Sprintf("- {name: k, match: [{key: %s}], allow: [%s]}\n", id, all)))
				a := newAccess(t, files)
				w := newWorld(t, a.set)
				mine, others := w.stream(forever(t, key)), w.stream(forever(t, a.Token("other", 2*time.Hour)))
				pushes := func(st pushStream, id uint64) *pubsub.PushStreamResponse {
					t.Helper()
					ok(t, st.Send(userPush(id, "d", "x")))
					return recv(t, st)
				}
				if r := pushes(mine, 1); r.Error != nil {
					t.Fatal(r.Error)
				}
				if r := pushes(others, 1); r.Error != nil {
					t.Fatal(r.Error)
				}
				revoke(a, id, rest)
				for id := range uint64(3) {
					wantStatus(t, status.FromProto(pushes(mine, id+2).Error), codes.Unauthenticated, "UNAUTHENTICATED", "")
					if r := pushes(others, id+2); r.Error != nil {
						t.Errorf("the other caller: %v", r.Error)
					}
				}
				_, err := w.client.PushToUser(w.as(key), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
				wantError(t, err, codes.Unauthenticated, "UNAUTHENTICATED", "")
				if n := len(w.network.nodes[0].payloads()); n != 5 {
					t.Errorf("%d deliveries, want 5", n)
				}
			})
		})
	}
}

// forever is a context with a bearer that lives as long as the test.
func forever(t *testing.T, bearer string) context.Context {
	return metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+bearer)
}

func TestATokenThatEndsIsRefusedInAnOpenStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAccess(t, authtest.New(t, policyOf(caller("a", `{methods: [PushToUser], users: ["*"]}`))))
		w := newWorld(t, a.set)
		st := w.stream(forever(t, a.Token("a", time.Minute)))
		push := func() *pubsub.PushStreamResponse {
			t.Helper()
			ok(t, st.Send(userPush(1, "d", "x")))
			return recv(t, st)
		}
		if r := push(); r.Error != nil {
			t.Fatal(r.Error)
		}
		time.Sleep(time.Minute + 31*time.Second) // 30 s are between two clocks
		wantStatus(t, status.FromProto(push().Error), codes.Unauthenticated, "UNAUTHENTICATED", "")
		if n := w.metric(`push_manager_auth_failures_total{reason="expired"}`); n != "1" {
			t.Errorf("%s are counted", n)
		}
	})
}

// New rights hold for the next message of an open stream, wider ones as well as narrower ones, and so does the priority.
func TestNewRightsHoldInAnOpenStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAccess(t, authtest.New(t, policyOf(caller("a", "{methods: [PushToUser], users: [a]}"))))
		var priorities []engine.Priority
		w := newWorld(t, func(c *Config, ec *engine.Config) {
			a.set(c, ec)
			c.Trace = func(context.Context, string) (engine.Trace, func(engine.Result, error)) { return nil, nil }
		})
		st := w.stream(metadata.AppendToOutgoingContext(forever(t, a.Token("a", time.Hour)), "x-priority", "critical"))
		push := func(user string) *status.Status {
			t.Helper()
			w.network.nodes[0].setKeep(true)
			ok(t, st.Send(userPush(1, user, "x")))
			synctest.Wait()
			for _, d := range w.network.nodes[0].take() {
				priorities = append(priorities, d.Priority())
				ack(d)
			}
			return status.FromProto(recv(t, st).Error)
		}
		wantStatus(t, push("a"), codes.OK, "", "")
		wantDenied(t, push("d"), "PushToUser", "user_id", "")
		a.WritePolicy(policyOf(caller("a", "{methods: [PushToUser], users: [d]}", ", priority_max: low")))
		a.reload()
		wantStatus(t, push("d"), codes.OK, "", "")
		wantDenied(t, push("a"), "PushToUser", "user_id", "")
		if !slices.Equal(priorities, []engine.Priority{engine.Critical, engine.Low}) {
			t.Errorf("the priorities are %v", priorities)
		}
	})
}

// TestRatesAreOfCallers, and not of the address that they share.
func TestRatesAreOfCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAccess(t, authtest.New(t, policyOf(caller("a", `{methods: [PushToUser], users: ["*"]}`), caller("b", `{methods: [PushToUser], users: ["*"]}`))))
		w := newWorld(t, func(c *Config, ec *engine.Config) {
			a.set(c, ec)
			c.Rate, c.RateBurst = 1, 4
		})
		push := func(name string, lives time.Duration) error {
			_, err := w.client.PushToUser(w.as(a.Token(name, lives)), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
			return err
		}
		ok(t, push("a", time.Hour))
		ok(t, push("a", 2*time.Hour)) // another token is the same caller
		wantError(t, push("a", 3*time.Hour), codes.ResourceExhausted, "RATE_LIMITED", "")
		ok(t, push("b", time.Hour))
	})
}

// TestCallersOnOneConnectionAreNotMixed: many at once, each with its token and its right to one user.
func TestCallersOnOneConnectionAreNotMixed(t *testing.T) {
	const callers = 8
	pushes := 4_000
	if os.Getenv("LONG") != "" {
		pushes = 1_000_000
	}
	policy := make([]string, callers)
	for i := range policy {
		policy[i] = caller(fmt.Sprintf("c%d", i), fmt.Sprintf("{methods: [PushToUser], users: [u%d]}", i))
	}
	a := newAccess(t, authtest.New(t, policyOf(policy...)))
	w := newWorld(t, a.set)
	w.network.discard()
	w.source.users = map[string][]string{}
	for i := range callers {
		w.source.users[fmt.Sprintf("u%d", i)] = []string{"n1"}
	}
	var all sync.WaitGroup
	for i := range callers {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+a.Token(fmt.Sprintf("c%d", i), time.Hour))
		all.Go(func() {
			for n := range pushes / callers {
				id := (i + n) % callers
				_, err := w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: fmt.Sprintf("u%d", id), Content: content("x")})
				want := codes.PermissionDenied
				if id == i {
					want = codes.OK
				}
				if got := status.Code(err); got != want {
					t.Errorf("caller %d to user %d: %v", i, id, err)
					return
				}
			}
		})
	}
	all.Wait()
	if n := a.policies.Generation(); n != 0 {
		t.Fatalf("the policy has changed %d times", n)
	}
}

// TestBadTokensStarveNobody: who floods a connection with tokens is told to wait, and callers on others are served.
func TestBadTokensStarveNobody(t *testing.T) {
	a := newAccess(t, authtest.New(t, policyOf(caller("a", `{methods: [PushToUser], users: ["*"]}`))))
	w := newWorld(t, a.set)
	flood := w.connect()
	defer func() { _ = flood.Close() }()
	ctx, stop := context.WithCancel(t.Context())
	var floods sync.WaitGroup
	for i := range 4 {
		floods.Go(func() {
			client := pubsub.NewPushManagerServiceClient(flood)
			for n := 0; ctx.Err() == nil; n++ {
				ctx := metadata.AppendToOutgoingContext(ctx, "authorization", fmt.Sprintf("Bearer %s%d.%d", a.Token("a", time.Hour), i, n))
				_, err := client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
				if code := status.Code(err); code != codes.Unauthenticated && code != codes.ResourceExhausted && code != codes.Canceled {
					t.Errorf("a bad token: %v", err)
				}
			}
		})
	}
	for range 200 {
		_, err := w.client.PushToUser(w.as(a.Token("a", time.Hour)), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
		ok(t, err)
	}
	stop()
	floods.Wait()
}

// TestAKnownCallerCostsACallNothing: admission takes as much memory as without authentication, that of a unary call and that
// of each push of a PushStream, and a rate of the caller's own changes nothing.
func TestAKnownCallerCostsACallNothing(t *testing.T) {
	allocations := func(change func(*Config, *engine.Config), headers metadata.MD) (unary, push float64) {
		w := newWorld(t, change)
		_, server := net.Pipe()
		conn, info, err := w.server.throttle.Credentials(insecure.NewCredentials()).ServerHandshake(server)
		ok(t, err)
		defer func() { _ = conn.Close() }()
		ctx := grpc.NewContextWithServerTransportStream(metadata.NewIncomingContext(context.Background(), headers), quiet{})
		ctx = peer.NewContext(ctx, &peer.Peer{AuthInfo: info})
		p := new(engine.Push)
		p.User = "d"
		unary = testing.AllocsPerRun(1000, func() {
			info, err := w.server.admit(w.server.throttle.Tap(ctx, headers), toUser)
			ok(t, err)
			ok(t, w.server.authorize(info.principal, toUser, p))
			w.server.leave(&info)
		})
		st := &stream{srv: w.server}
		st.info, err = w.server.admit(ctx, apis)
		ok(t, err)
		defer w.server.leave(&st.info)
		body := marshal(t, &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
		c := new(call)
		c.api, c.stream = toUser, st
		push = testing.AllocsPerRun(1000, func() {
			c.push.Reset()
			c.push.Arrived = time.Now()
			ok(t, st.prepare(ctx, c, body))
			if c.account != nil {
				c.account.leave(false)
			}
		})
		return unary, push
	}
	const may = `{methods: [PushToUser], users: ["x-*", d]}`
	a := newAccess(t, authtest.New(t, policyOf(caller("a", may), caller("b", may, ", rate: 100000"))))
	unary, push := allocations(nil, metadata.MD{"x-priority": {"high"}})
	for _, name := range []string{"a", "b"} {
		u, p := allocations(a.set, metadata.MD{"x-priority": {"high"}, "authorization": {"Bearer " + a.Token(name, time.Hour)}})
		if u > unary || p > push {
			t.Errorf("%s: %v and %v allocations, %v and %v without authentication", name, u, p, unary, push)
		}
	}
}

// A call that no connection of ours has brought is from nobody.
func TestWithoutASessionNobodyIsLetIn(t *testing.T) {
	a := newAccess(t, authtest.New(t, policyOf(caller("a", `{methods: ["*"], users: ["*"], rooms: ["*"]}`))))
	w := newWorld(t, a.set)
	for name, err := range map[string]error{
		"unary": func() error {
			_, err := w.server.guardUnary(t.Context(), "x", func() (any, error) { return nil, io.EOF })
			return err
		}(),
		"authorize": w.server.authorize(nil, toAll, &engine.Push{}),
	} {
		if err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRightsAreThoseOfWhenTheBodyComes: a caller decides when that is. Calls that it opens in advance are of no use when its
// rights are gone.
func TestRightsAreThoseOfWhenTheBodyComes(t *testing.T) {
	const all = `{methods: ["*"], users: ["*"], rooms: ["*"]}`
	for name, c := range map[string]struct {
		change func(*access)
		want   func(*testing.T, error)
	}{
		"nothing has changed": {func(*access) {}, func(t *testing.T, err error) { wantError(t, err, codes.OK, "", "") }},
		"the policy has changed for others": {
			func(a *access) { a.WritePolicy(policyOf(caller("a", all), caller("b", all))); a.reload() },
			func(t *testing.T, err error) { wantError(t, err, codes.OK, "", "") },
		},
		"the caller is gone": {
			func(a *access) { a.WritePolicy(policyOf(caller("b", all))); a.reload() },
			func(t *testing.T, err error) { wantError(t, err, codes.Unauthenticated, "UNAUTHENTICATED", "") },
		},
		"the right is gone": {
			func(a *access) {
				a.WritePolicy(policyOf(caller("a", "{methods: [PushToUser], users: [b]}")))
				a.reload()
			},
			func(t *testing.T, err error) { wantDenied(t, status.Convert(err), "PushToUser", "user_id", "") },
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAccess(t, authtest.New(t, policyOf(caller("a", all))))
				w := newWorld(t, a.set)
				call, err := w.conn.NewStream(forever(t, a.Token("a", 2*time.Hour)), &grpc.StreamDesc{ClientStreams: true}, methodUser)
				ok(t, err)
				synctest.Wait() // its headers are there
				if n := w.metric("push_manager_api_inflight"); n != "1" {
					t.Fatalf("%s calls wait for their bodies", n)
				}
				c.change(a)
				ok(t, call.SendMsg(&pubsub.PushToUserRequest{UserId: "d", Content: content("x")}))
				ok(t, call.CloseSend())
				err = call.RecvMsg(new(pubsub.PushToUserResponse))
				c.want(t, err)
				if sent := len(w.network.nodes[0].payloads()) > 0; sent != (err == nil) {
					t.Errorf("sent: %v, answered: %v", sent, err)
				}
			})
		})
	}
}

// TestFieldsThatComeTwiceCheatNobody: of a field that comes again, and of members of a oneof, the right is asked for what is
// pushed.
func TestFieldsThatComeTwiceCheatNobody(t *testing.T) {
	a := newAccess(t, authtest.New(t, policyOf(caller("a", `{methods: [PushToUser, PushToUsers], users: [d]}`))))
	w := newWorld(t, a.set)
	as := w.as(a.Token("a", time.Hour))
	text := func(n protowire.Number, s string) string {
		return string(protowire.AppendString(protowire.AppendTag(nil, n, protowire.BytesType), s))
	}
	group := func(n protowire.Number, s string) string {
		return string(protowire.AppendTag(nil, n, protowire.StartGroupType)) + s + string(protowire.AppendTag(nil, n, protowire.EndGroupType))
	}
	body := text(2, text(2, "x"))
	mine, others := text(1, "d")+body, text(1, "a")+body
	for name, c := range map[string]struct {
		method, field, request string
		sent                   bool
	}{
		"mine, then another":         {"PushToUser", "user_id", text(1, "d") + others, false},
		"another, then mine":         {"PushToUser", "user_id", text(1, "a") + mine, true},
		"a list behind the content":  {"PushToUsers", "user_ids", mine + text(1, "a"), false},
		"a list with an empty id":    {"PushToUsers", "user_ids", mine + text(1, ""), false},
		"mine in a group of unknown": {"PushToUser", "user_id", others + group(30, text(1, "d")), false},
		"no id at all":               {"PushToUser", "user_id", body, false},

		"stream: mine, then another":           {"PushToUser", "user_id", text(3, mine) + text(3, text(1, "a")), false},
		"stream: another, then mine":           {"PushToUser", "user_id", text(3, others) + text(3, text(1, "d")), true},
		"stream: mine, then a broadcast":       {"BroadcastMessage", "method", text(3, mine) + text(4, text(1, text(2, "x"))), false},
		"stream: a broadcast, then mine":       {"PushToUser", "", text(4, text(1, text(2, "x"))) + text(3, mine), true},
		"stream: mine, a room, another":        {"PushToUser", "user_id", text(3, mine) + text(2, text(1, "r")+body) + text(3, others), false},
		"stream: a room in a group, then mine": {"PushToUser", "", group(2, text(1, "r")+body) + text(3, mine), true},
	} {
		t.Run(name, func(t *testing.T) {
			before := len(w.network.nodes[0].payloads())
			var st *status.Status
			if strings.HasPrefix(name, "stream: ") {
				stream, err := w.conn.NewStream(as, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, pushStreamMethod, grpc.ForceCodecV2(rawCodec{}))
				ok(t, err)
				request := []byte(c.request)
				ok(t, stream.SendMsg(&request))
				var reply []byte
				ok(t, stream.RecvMsg(&reply))
				ok(t, stream.CloseSend())
				r := new(pubsub.PushStreamResponse)
				ok(t, proto.Unmarshal(reply, r))
				st = status.FromProto(r.Error)
			} else {
				request, reply := []byte(c.request), []byte(nil)
				st = status.Convert(w.conn.Invoke(as, "/"+serviceName+"/"+c.method, &request, &reply, grpc.ForceCodecV2(rawCodec{})))
			}
			if sent := len(w.network.nodes[0].payloads()) - before; sent != map[bool]int{true: 1}[c.sent] {
				t.Errorf("%d sent", sent)
			}
			if c.sent {
				wantStatus(t, st, codes.OK, "", "")
			} else {
				wantDenied(t, st, c.method, c.field, "")
			}
		})
	}
	if n := w.source.count(); n != 1 { // for d
		t.Errorf("the Controller was asked %d times", n)
	}
}
