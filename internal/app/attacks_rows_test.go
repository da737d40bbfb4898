package app_test

import (
	"bufio"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/app/connectnode"
	"github.com/push-manager/push-manager/internal/app/controller"
	"github.com/push-manager/push-manager/internal/app/pushmanager"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/config"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/discovery"
	"github.com/push-manager/push-manager/transport/node"
)

// The rows of TestAttacksAreDeniedAndOthersServed.

func attackWithoutTLS(t *testing.T, r *target) {
	before := metric(t, r.m, `push_manager_tls_handshake_failures_total{role="api"}`)
	conn, err := net.Dial("tcp", r.m.GRPCAddr())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if speaks(conn) {
		t.Error("plain text is spoken")
	}
	for name, change := range map[string]func(*tls.Config){
		"TLS 1.2": func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
		"no ALPN": func(c *tls.Config) { c.NextProtos = nil },
		"HTTP/1":  func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} },
	} {
		cfg := as(t, r.authority.issue(t, "spiffe://test/honest"))
		change(cfg)
		if _, letIn := knock(r.m.GRPCAddr(), cfg); letIn {
			t.Errorf("%s is let in", name)
		}
	}
	eventually(t, "the failures are counted", func() bool {
		return metric(t, r.m, `push_manager_tls_handshake_failures_total{role="api"}`) >= before+3
	})
}

func attackWithBadCertificates(t *testing.T, r *target) {
	const name = "spiffe://test/push-manager/pm" // which all ports let in but for what is wrong
	bad := map[string]certs.Pair{
		"another authority": newAuthority(t).issue(t, name),
		"expired":           r.authority.issue(t, name, func(c *certs.Request) { c.NotAfter = time.Now().Add(-time.Minute) }),
		"not yet valid": r.authority.issue(t, name, func(c *certs.Request) {
			c.NotBefore, c.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
		}),
		"for servers": r.authority.issue(t, name, func(c *certs.Request) { c.Client = false }),
		"none":        {},
	}
	for port, addr := range map[string]string{"push API": r.m.GRPCAddr(), "node": r.n.GRPCAddr().String(), "Controller": r.controller.GRPCAddr()} {
		for what, pair := range bad {
			if _, letIn := knock(addr, as(t, pair)); letIn && !(what == "none" && port == "push API") { // it may have a token
				t.Errorf("%s: %s is let in", port, what)
			}
		}
		if _, letIn := knock(addr, as(t, r.authority.issue(t, name))); !letIn {
			t.Errorf("%s: a good one is not let in", port)
		}
	}
	_, err := r.anybody(t).PushToUser(with(t), toUser("alice"))
	refused(t, "no certificate and no token", err)
}

func attackWithACommonName(t *testing.T, r *target) {
	const honest = "spiffe://test/honest"
	_, err := r.connect(t, credentials.NewTLS(as(t, r.authority.named(t, honest, "spiffe://test/nobody")))).PushToUser(with(t), toUser("alice"))
	refused(t, "a common name", err)
	_, err = r.connect(t, credentials.NewTLS(as(t, r.authority.issue(t, "spiffe://test/honest/")))).PushToUser(with(t), toUser("alice"))
	refused(t, "nearly the name", err)
}

func attackWithAnOldSession(t *testing.T, r *target) {
	pair := r.next.issue(t, "spiffe://test/honest")
	sessions := tls.NewLRUClientSessionCache(4)
	letIn := func() bool {
		cfg := as(t, pair)
		cfg.ClientSessionCache = sessions
		_, ok := knock(r.m.GRPCAddr(), cfg)
		return ok
	}
	r.write("api.ca", slices.Concat(r.authority.pair.Cert, r.next.pair.Cert))
	eventually(t, "the second authority is trusted", letIn)
	letIn() // what there is to resume is in sessions
	r.write("api.ca", r.authority.pair.Cert)
	eventually(t, "the second authority is trusted no more", func() bool {
		_, ok := knock(r.m.GRPCAddr(), as(t, pair))
		return !ok
	})
	if letIn() {
		t.Error("a session is resumed whose authority has gone")
	}
}

func attackInSilence(t *testing.T, r *target) {
	var hello [300]byte
	ours, theirs := net.Pipe()
	go func() { _ = tls.Client(ours, as(t, certs.Pair{})).HandshakeContext(t.Context()) }()
	_, err := io.ReadFull(theirs, hello[:100])
	_ = theirs.Close()
	_ = ours.Close()
	if err != nil {
		t.Fatal(err)
	}
	var conns []net.Conn
	for i := range 300 {
		conn, err := net.Dial("tcp", r.m.GRPCAddr())
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 1 {
			_, _ = conn.Write(hello[:50])
		}
		conns = append(conns, conn)
	}
	r.serves(t)
	if open := metric(t, r.m, "push_manager_api_handshakes"); open > 100+2 { // and those of others that begin just now
		t.Errorf("%v handshakes at a time, the bound is 100", open)
	}
	for i, end := 50, time.Now().Add(time.Minute); len(conns) > 0; i = min(i+1, 99) {
		conns = slices.DeleteFunc(conns, func(conn net.Conn) bool {
			_, _ = conn.Write(hello[i : i+1])
			_ = conn.SetReadDeadline(time.Now().Add(time.Millisecond))
			_, err := io.Copy(io.Discard, conn)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return false
			}
			_ = conn.Close()
			return true
		})
		if time.Now().After(end) {
			t.Fatalf("%d are open after a minute", len(conns))
		}
		time.Sleep(300 * time.Millisecond)
	}
}

// registers puts a node into etcd with an address and a user into the Controller, whom a push then must not reach. noticed is
// what Push-Manager says of it.
func (r *target) registers(t *testing.T, id, addr string, noticed func() bool) {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"https://" + r.etcd.Endpoint()}, TLS: as(t, r.authority.issue(t, "spiffe://test/etcd-writer")), DialTimeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	if _, err := client.Put(with(t), discovery.ConnectNodePrefix+id, fmt.Sprintf(`{"Op":0,"Addr":%q}`, addr)); err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient(r.controller.GRPCAddr(), grpc.WithTransportCredentials(credentials.NewTLS(as(t, r.authority.issue(t, "spiffe://test/connect-node/"+id)))))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	eventually(t, "the Controller has the node", func() bool {
		_, err := pubsub.NewControllerServiceClient(conn).JoinRoom(with(t), &pubsub.JoinRoomRequest{UserId: "victim-" + id, RoomId: "r", NodeId: id})
		return err == nil
	})
	eventually(t, "another is found at the address of "+id, noticed)
	reply, err := r.honest.PushToUser(with(t), toUser("victim-"+id))
	if err != nil || reply.GetSummary().GetDelivered() != 0 || reply.GetSummary().GetFailed() != 1 {
		t.Errorf("a push to a user of %s: %v, %v", id, reply, err)
	}
	if _, err := client.Delete(with(t), discovery.ConnectNodePrefix+id); err != nil {
		t.Fatal(err)
	}
}

// counts are the sessions of a node that nothing must reach.
type counts struct{ delivered atomic.Int64 }

func (c *counts) Deliver(string, *node.Message) node.Outcome {
	c.delivered.Add(1)
	return node.Delivered
}
func (c *counts) Broadcast(*node.Message) (delivered, failed int) {
	c.delivered.Add(1)
	return 1, 0
}
func (c *counts) Online() int { return 1 }

// impostor is a node of an id with a certificate, and how much has reached it.
func impostor(t *testing.T, id string, pair certs.Pair) (addr string, got *atomic.Int64) {
	t.Helper()
	sessions := &counts{}
	n, err := node.New(node.Config{NodeID: id, Sessions: sessions})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	cert, err := tls.X509KeyPair(pair.Cert, pair.Key)
	if err != nil {
		t.Fatal(err)
	}
	begun := func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		sessions.delivered.Add(1)
		return handler(srv, ss)
	}
	creds := credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS13})
	server := grpc.NewServer(append(node.ServerOptions(), grpc.Creds(creds), grpc.ChainStreamInterceptor(begun))...)
	n.Attach(server)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) })
	t.Cleanup(func() { server.Stop(); serving.Wait() })
	return listener.Addr().String(), &sessions.delivered
}

func attackWithAnAddress(t *testing.T, r *target) {
	before := r.m.Reachable()
	r.registers(t, "n3", r.n.GRPCAddr().String(), func() bool { return metric(t, r.m, `push_manager_link_wrong_node_total{node_id="n3",found="n1"}`) > 0 })
	addr, got := impostor(t, "n4", newAuthority(t).issue(t, "spiffe://test/connect-node/n4"))
	r.registers(t, "n4", addr, func() bool {
		for line := range strings.Lines(r.log.String()) {
			if strings.Contains(line, `"n4"`) && strings.Contains(line, "certificate") {
				return true
			}
		}
		return false
	})
	if got.Load() != 0 || r.m.Reachable() != before {
		t.Errorf("a stranger got %d streams or deliveries, %d nodes are reached", got.Load(), r.m.Reachable())
	}
}

func attackWithAHello(t *testing.T, r *target) {
	addr, got := impostor(t, "n5", r.authority.issue(t, "spiffe://test/connect-node/n6"))
	r.registers(t, "n5", addr, func() bool {
		return strings.Contains(metricsOf(t, r.m), `push_manager_link_wrong_node_total{node_id="n5"`)
	})
	if got.Load() != 0 {
		t.Errorf("%d streams or deliveries", got.Load())
	}
}

func attackWithForgedTokens(t *testing.T, r *target) {
	encode := base64.RawURLEncoding.EncodeToString
	claims := fmt.Sprintf(`{"iss":%q,"aud":%q,"sub":"billing","exp":%d}`, r.a.name, authtest.Audience, time.Now().Add(time.Hour).Unix())
	der, err := x509.MarshalPKIXPublicKey(r.a.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	hs := func(secret []byte) string {
		text := encode([]byte(`{"alg":"HS256","kid":"k1"}`)) + "." + encode([]byte(claims))
		mac := hmac.New(sha256.New, secret)
		mac.Write([]byte(text))
		return text + "." + encode(mac.Sum(nil))
	}
	good := r.a.token(t, nil, nil)
	api := r.anybody(t)
	for name, token := range map[string]string{
		"none":                encode([]byte(`{"alg":"none"}`)) + "." + encode([]byte(claims)) + ".",
		"nOnE":                encode([]byte(`{"alg":"nOnE","kid":"k1"}`)) + "." + encode([]byte(claims)) + ".eA",
		"HS256, PEM":          hs(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})),
		"HS256, DER":          hs(der),
		"HS256, nothing":      hs(nil),
		"RS256":               r.a.token(t, nil, map[string]any{"alg": "RS256"}),
		"crit":                r.a.token(t, nil, map[string]any{"crit": []string{"exp"}}),
		"another signature":   good[:strings.LastIndexByte(good, '.')] + r.b.token(t, nil, nil)[strings.LastIndexByte(good, '.'):],
		"expired":             r.a.token(t, map[string]any{"exp": time.Now().Add(-time.Minute).Unix()}, nil),
		"for ever":            r.a.token(t, map[string]any{"exp": time.Now().AddDate(10, 0, 0).Unix()}, nil),
		"a name of no caller": r.a.token(t, map[string]any{"sub": "nobody"}, nil),
		"a key changed":       r.key[:len(r.key)-8] + string(r.key[len(r.key)-8]^1) + r.key[len(r.key)-7:],
	} {
		_, err := api.PushToUser(bearer(t, token), toUser("alice"))
		refused(t, name, err)
	}
	_, err = api.PushToUser(with(t, "authorization", "Bearer "+good, "authorization", "Bearer "+good), toUser("alice"))
	refused(t, "two credentials", err)
	if _, err := api.PushToUser(bearer(t, good), toUser("u-0")); err != nil {
		t.Errorf("a good one: %v", err)
	}
}

func attackWithoutAudience(t *testing.T, r *target) {
	api := r.anybody(t)
	for _, aud := range []any{nil, "", "other", []string{}, []string{authtest.Audience + " "}} {
		_, err := api.PushToUser(bearer(t, r.a.token(t, map[string]any{"aud": aud}, nil)), toUser("alice"))
		refused(t, fmt.Sprintf("audience %q", aud), err)
	}
	for _, audience := range []string{"", "audience: '', "} {
		err := cli.Fill(&pushmanager.Config{}, map[string]string{
			"AUTH_MODE": "required", "AUTH_POLICY_FILE": r.files.Policy, "AUTH_JWT": fmt.Sprintf("[{issuer: i, %shs_secret_file: %q}]", audience, r.files.Secret),
		})
		if err == nil || !strings.Contains(err.Error(), "audience") {
			t.Errorf("a configuration without audience: %v", err)
		}
	}
}

func attackWithAKidOfTwo(t *testing.T, r *target) {
	api := r.anybody(t)
	for _, c := range []struct {
		by issuing
		of string
	}{{r.a, r.b.name}, {r.b, r.a.name}} {
		_, err := api.PushToUser(bearer(t, c.by.token(t, map[string]any{"iss": c.of}, nil)), toUser("alice"))
		refused(t, "by the key of another", err)
		if _, err := api.PushToUser(bearer(t, c.by.token(t, nil, nil)), toUser("u-0")); err != nil {
			t.Errorf("by its own: %v", err)
		}
	}
}

func attackWithURLs(t *testing.T, r *target) {
	var connections atomic.Int64
	bait := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(r.a.set(t)) }))
	bait.Config.ConnState = func(net.Conn, http.ConnState) { connections.Add(1) }
	bait.Start()
	defer bait.Close()
	api := r.anybody(t)
	for _, text := range []string{bait.URL, bait.URL + "/{{.iss}}/${iss}/%s", "../../" + r.files.Policy, "file://" + r.files.Keys, "' OR 1=1 --", "k1\x00"} {
		for name, token := range map[string]string{
			"kid":                         r.a.token(t, nil, map[string]any{"kid": text, "jku": bait.URL, "x5u": bait.URL, "x5c": []string{bait.URL}}),
			"iss":                         r.a.token(t, map[string]any{"iss": text}, map[string]any{"jku": bait.URL, "x5u": bait.URL}),
			"of the issuer that is asked": r.a.token(t, map[string]any{"iss": r.b.name}, map[string]any{"kid": text, "jku": bait.URL}),
		} {
			_, err := api.PushToUser(bearer(t, token), toUser("alice"))
			refused(t, name+" "+text, err)
		}
	}
	if n := connections.Load(); n > 0 {
		t.Errorf("%d connections to where a token points", n)
	}
}

func attackWithRandomKids(t *testing.T, r *target) {
	const most = 2 // in a minute: one for any that comes first
	began, before := time.Now(), r.asked.Load()
	shared := r.anybody(t)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for n := range 250 {
				token := r.b.token(t, nil, map[string]any{"kid": fmt.Sprint(i, "-", n)})
				if _, err := shared.PushToUser(bearer(t, token), toUser("alice")); status.Code(err) != codes.Unauthenticated {
					t.Errorf("a random kid: %v", err)
					return
				}
			}
		})
	}
	// Others of the same connection have tokens that nobody has seen before: with one of a balancer, they are others indeed.
	for i := range 20 {
		for _, issuer := range []issuing{r.a, r.b} {
			if _, err := shared.PushToUser(bearer(t, issuer.token(t, map[string]any{"n": i}, nil)), toUser("u-0")); err != nil {
				t.Errorf("a good token on the same connection: %v", err)
			}
		}
	}
	r.serves(t)
	all.Wait()
	if n, took := r.asked.Load()-before, time.Since(began); n > most+int64(took/(30*time.Second)) {
		t.Errorf("its issuer was asked %d times in %v", n, took)
	}
}

func attackOfTheRevoked(t *testing.T, r *target) {
	api := r.anybody(t)
	extra, id := r.files.NewKey(time.Time{})
	withKey := func() string {
		return r.policy() + fmt.Sprintf("- {name: extra, tenant: \"*\", match: [{key: %s}], allow: [{methods: [PushToUser], users: [\"u-*\"]}]}\n", id)
	}
	r.files.WritePolicy(withKey())
	for _, c := range []struct {
		what, credential string
		revoke, restore  func()
	}{
		{"a key of an issuer", r.a.token(t, nil, nil), func() { r.write("a.jwks", []byte(`{"keys":[]}`)) }, func() { r.write("a.jwks", r.a.set(t)) }},
		{"a caller", r.b.token(t, nil, nil), func() { r.files.WritePolicy(r.policy("billing")) }, func() { r.files.WritePolicy(withKey()) }},
		{"an API key", extra, func() { r.files.DropKey(id) }, func() { r.files.WritePolicy(r.policy()) }},
	} {
		eventually(t, c.what+" is good", func() bool {
			_, err := api.PushToUser(bearer(t, c.credential), toUser("u-0"))
			return err == nil
		})
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+c.credential)
		stream, err := api.PushStream(ctx)
		if err != nil {
			t.Fatal(err)
		}
		number := uint64(0)
		push := func() codes.Code {
			t.Helper()
			number++
			if err := stream.Send(&pubsub.PushStreamRequest{Id: number, Push: &pubsub.PushStreamRequest_ToUser{ToUser: toUser("u-0")}}); err != nil {
				t.Fatal(err)
			}
			reply, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			return codes.Code(reply.GetError().GetCode())
		}
		if code := push(); code != codes.OK {
			t.Fatalf("%s in a stream: %v", c.what, code)
		}
		c.revoke()
		eventually(t, c.what+" is refused in the stream", func() bool { return push() == codes.Unauthenticated })
		_, err = api.PushToUser(bearer(t, c.credential), toUser("u-0"))
		refused(t, c.what, err)
		if code := push(); code != codes.Unauthenticated {
			t.Errorf("%s, once more in the stream: %v", c.what, code)
		}
		_ = stream.CloseSend()
		c.restore()
	}
}

func attackWithLargeTokens(t *testing.T, r *target) {
	for name, token := range map[string]string{"1 MiB": r.a.token(t, map[string]any{"x": strings.Repeat("x", 1<<20)}, nil), "10^5 dots": strings.Repeat(".", 100_000)} {
		if _, err := r.anybody(t).PushToUser(bearer(t, token), toUser("alice")); err == nil {
			t.Errorf("%s: is served", name)
		}
		if got := r.speak(t, call(pathToUser, "authorization", "Bearer "+token)...); got != nil && (got["grpc-status"] == "0" || got["grpc-status"] == "") && got[":status"] == "200" {
			t.Errorf("%s, by hand: %v", name, got)
		}
	}
	_, err := r.anybody(t).PushToUser(bearer(t, strings.Repeat(".", 6000)), toUser("alice"))
	refused(t, "6000 dots", err)
}

func attackWithSettings(t *testing.T, r *target) {
	for program, made := range map[string]func() cli.Settings{
		"serve": func() cli.Settings { return &pushmanager.Config{} }, "controller": func() cli.Settings { return &controller.Config{} }, "connect-node": func() cli.Settings { return &connectnode.Config{} },
	} {
		set := config.New()
		made().Bind(set)
		for _, key := range set.Keys() {
			for _, word := range []string{"skip", "insecure", "verify", "disable", "unsafe", "trust_all"} {
				if strings.Contains(key.Name(), word) && key.Name() != "allow_insecure" {
					t.Errorf("%s has a key %s", program, key.Name())
				}
			}
		}
		if err := cli.Fill(made(), map[string]string{"LISTEN_ADDRESS": "0.0.0.0"}); err == nil || !strings.Contains(err.Error(), "ALLOW_INSECURE") {
			t.Errorf("%s where others reach it: %v", program, err)
		}
	}
	for name, env := range map[string]map[string]string{
		"credentials that nobody asks for":        {"AUTH_POLICY_FILE": r.files.Policy, "AUTH_API_KEYS_FILE": r.files.Keys},
		"no way to show them":                     {"AUTH_MODE": "required", "AUTH_POLICY_FILE": r.files.Policy},
		"no policy":                               {"AUTH_MODE": "required", "AUTH_API_KEYS_FILE": r.files.Keys},
		"certificates of callers, no authorities": {"TLS_CLIENT_AUTH": "require"},
	} {
		if err := cli.Fill(&pushmanager.Config{}, env); err == nil {
			t.Errorf("%s: starts", name)
		}
	}
	if n := metric(t, r.m, "push_manager_insecure"); n != 0 {
		t.Errorf("what runs here is insecure: %v", n)
	}
}

func attackWithPaths(t *testing.T, r *target) {
	good := "Bearer " + r.a.token(t, nil, nil)
	for _, path := range []string{
		"pubsub.PushManagerService/PushToUser", "//pubsub.PushManagerService/PushToUser", "/pubsub.PushManagerService//PushToUser", "/PUBSUB.PUSHMANAGERSERVICE/PUSHTOUSER",
		"/pubsub.pushmanagerservice/pushtouser", "/pubsub.PushManagerService%2FPushToUser", "/pubsub.PushManagerService/%50ushToUser", "/pubsub.PushManagerService/PushToUser/",
		"/x/../pubsub.PushManagerService/PushToUser", "*", "/", "",
	} {
		for _, more := range [][]string{nil, {"authorization", good}} {
			if got := r.speak(t, call(path, more...)...); got != nil && got["grpc-status"] != "12" && got[":status"] == "200" {
				t.Errorf("%q: %v", path, got)
			}
		}
	}
	without := slices.DeleteFunc(call(pathToUser, "authorization", good), func(h hpack.HeaderField) bool { return h.Name == ":authority" })
	if got := r.speak(t, without...); got[":status"] == "200" {
		t.Errorf("no :authority: %v", got)
	}
}

func attackEveryWayIn(t *testing.T, r *target) {
	conn := r.dial(t, credentials.NewTLS(as(t, certs.Pair{})))
	message := &pubsub.PushStreamRequest{Id: 1, Batch: []*pubsub.PushStreamRequest{{Id: 2, Push: &pubsub.PushStreamRequest_ToUser{ToUser: toUser("alice")}}}}
	ways := []string{
		"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
		"/grpc.channelz.v1.Channelz/GetTopChannels", "/grpc.admin.v1.Admin/x",
	}
	for _, method := range pubsub.PushManagerService_ServiceDesc.Methods {
		ways = append(ways, "/pubsub.PushManagerService/"+method.MethodName)
	}
	for _, stream := range pubsub.PushManagerService_ServiceDesc.Streams {
		ways = append(ways, "/pubsub.PushManagerService/"+stream.StreamName)
	}
	for _, way := range ways {
		stream, err := conn.NewStream(with(t), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, way)
		if err == nil {
			_ = stream.SendMsg(message) // the answer tells
			err = stream.RecvMsg(new(pubsub.PushStreamResponse))
		}
		if served := strings.Contains(way, "channelz") || strings.Contains(way, "admin"); !served || status.Code(err) != codes.Unimplemented {
			refused(t, way, err)
		}
	}
	for _, kind := range []string{"application/json", "application/grpc-web", "application/grpc-web+proto", "application/connect+proto", "application/proto"} {
		headers := call(pathToUser)
		for i := range headers {
			if headers[i].Name == "content-type" {
				headers[i].Value = kind
			}
		}
		if got := r.speak(t, headers...); got != nil && got[":status"] == "200" && got["grpc-status"] != "16" {
			t.Errorf("%s: %v", kind, got)
		}
	}
}

func attackBehindAllowedIDs(t *testing.T, r *target) {
	api, billing := r.anybody(t), r.a.token(t, nil, nil)
	_, err := api.PushToUsers(bearer(t, billing), &pubsub.PushToUsersRequest{UserIds: []string{"alice", "u-1", "bank/alice", "u-2"}, Content: evil})
	denied(t, "in a list", err)
	_, err = api.PushToRoom(bearer(t, billing), &pubsub.PushToRoomRequest{RoomId: "secret", Content: evil})
	denied(t, "a room", err)
	_, err = api.BroadcastMessage(bearer(t, billing), &pubsub.BroadcastMessageRequest{Content: evil})
	denied(t, "a broadcast", err)
	stream, err := api.PushStream(bearer(t, billing))
	if err != nil {
		t.Fatal(err)
	}
	to := func(id uint64, user string) *pubsub.PushStreamRequest {
		return &pubsub.PushStreamRequest{Id: id, Push: &pubsub.PushStreamRequest_ToUser{ToUser: toUser(user)}}
	}
	for _, message := range []*pubsub.PushStreamRequest{to(1, "u-1"), to(2, "bank/alice"), {Batch: []*pubsub.PushStreamRequest{to(3, "u-1"), to(4, "bank/alice"), to(5, "u-2")}}} {
		if err := stream.Send(message); err != nil {
			t.Fatal(err)
		}
	}
	got := map[uint64]codes.Code{}
	for len(got) < 5 {
		reply, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range append(reply.GetBatch(), reply) {
			if one.GetId() != 0 {
				got[one.GetId()] = codes.Code(one.GetError().GetCode())
			}
		}
	}
	for id, code := range got {
		if want := map[bool]codes.Code{true: codes.PermissionDenied}[id == 2 || id == 4]; code != want {
			t.Errorf("message %d of a stream: %v, want %v", id, code, want)
		}
	}
}

func attackWithHeaders(t *testing.T, r *target) {
	names := []string{
		"x-tenant", "bank", "x-user", "honest", "x.user", "honest", "x_user", "honest", "x-caller", "honest", "x-forwarded-client-cert", "URI=spiffe://test/honest", "x-forwarded-for", "127.0.0.1",
		"x-forwarded-user", "honest", "forwarded", "for=127.0.0.1", "proxy-authorization", "Bearer " + r.key, "x-api-key", r.key, "cookie", "token=" + r.key, "tenant", "bank",
	}
	api := r.anybody(t)
	_, err := api.PushToUser(with(t, names...), toUser("alice"))
	refused(t, "nothing but headers", err)
	_, err = api.PushToUser(with(t, append(names, "authorization", "Bearer "+r.a.token(t, nil, nil))...), toUser("bank/alice"))
	denied(t, "headers beside a token of few rights", err)
	reply, err := api.PushToUser(with(t, append(names, "authorization", "Bearer "+r.key)...), toUser("alice"))
	if err != nil || reply.GetSummary().GetDelivered() != 0 {
		t.Errorf("headers beside a key of another tenant: %v, %v", reply, err)
	}
	// By hand, in upper case, which HTTP/2 forbids.
	if got := r.speak(t, call(pathToUser, "X-User", "honest", "Authorization", "Bearer "+r.key)...); got != nil && got["grpc-status"] == "0" {
		t.Errorf("upper case: %v", got)
	}
}

func attackTenants(t *testing.T, r *target) {
	api := r.anybody(t)
	unknown, err := api.PushToRoom(bearer(t, r.key), &pubsub.PushToRoomRequest{RoomId: "nothing-there", Content: evil})
	if err != nil {
		t.Fatal(err)
	}
	for _, room := range []string{"bank/lobby", "../bank/lobby", "/bank/lobby", "bank//lobby", "bank", "lobby", "bank/" + strings.Repeat("x", 251), "shop/../bank/lobby", "b\u0430nk/lobby"} {
		reply, err := api.PushToRoom(bearer(t, r.key), &pubsub.PushToRoomRequest{RoomId: room, Content: evil})
		if err != nil || reply.GetSummary().GetDelivered() != 0 {
			t.Errorf("%q: %v, %v", room, reply, err)
			continue
		}
		if len(room) < 64 && strings.ReplaceAll(reply.GetMessage(), room, "nothing-there") != unknown.GetMessage() {
			t.Errorf("%q: %q, an unknown room: %q", room, reply.GetMessage(), unknown.GetMessage())
		}
		user, err := api.PushToUser(bearer(t, r.key), toUser(strings.ReplaceAll(room, "lobby", "alice")))
		if err != nil || user.GetSummary().GetDelivered() != 0 {
			t.Errorf("user: %v, %v", user, err)
		}
	}
	if _, err := api.PushToRoom(bearer(t, r.key), &pubsub.PushToRoomRequest{RoomId: "a/" + strings.Repeat("x", 255), Content: evil}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("257 bytes: %v", err)
	}
	reply, err := api.BroadcastMessage(bearer(t, r.key), &pubsub.BroadcastMessageRequest{Content: evil})
	if err != nil || reply.GetSummary().GetDelivered() != 0 {
		t.Errorf("a broadcast of a tenant without users: %v, %v", reply, err)
	}
}

func attackPatterns(t *testing.T, r *target) {
	api, billing := r.anybody(t), r.a.token(t, nil, nil)
	for room, want := range map[string]codes.Code{
		"order": codes.PermissionDenied, "Order-1": codes.PermissionDenied, "\u043erder-7": codes.PermissionDenied, "*": codes.PermissionDenied, "o*": codes.PermissionDenied, " order-7": codes.PermissionDenied,
		"xorder-7": codes.PermissionDenied, "bank/order-7": codes.PermissionDenied, "": codes.PermissionDenied,
		"order-\x00": codes.InvalidArgument, "order-" + strings.Repeat("7", 251): codes.InvalidArgument,
		"order-": codes.OK, "order-*": codes.OK, "order-\u0667": codes.OK, // rooms of these names, in which nobody is
	} {
		reply, err := api.PushToRoom(bearer(t, billing), &pubsub.PushToRoomRequest{RoomId: room, Content: evil})
		if status.Code(err) != want || reply.GetSummary().GetDelivered() != 0 {
			t.Errorf("%q: %v, %v, want %v", room, reply, err, want)
		}
	}
}

func attackOnOneConnection(t *testing.T, r *target) {
	api := r.anybody(t)
	var all sync.WaitGroup
	for name, own := range map[string]string{"one": "u-1", "two": "u-2"} {
		token := r.a.token(t, map[string]any{"sub": name}, nil)
		for range 2 {
			all.Go(func() {
				for i := range 250 {
					user, want := own, codes.OK
					if i%2 == 0 {
						user, want = map[string]string{"u-1": "u-2", "u-2": "u-1"}[own], codes.PermissionDenied
					}
					if _, err := api.PushToUser(bearer(t, token), toUser(user)); status.Code(err) != want {
						t.Errorf("%s to %s: %v", name, user, err)
						return
					}
				}
			})
		}
	}
	all.Wait()
}

func attackWebSockets(t *testing.T, r *target) {
	addr := r.n.HTTPAddr().String()
	shake := func(headers string) (net.Conn, *bufio.Reader, int) {
		t.Helper()
		cfg := as(t, certs.Pair{})
		cfg.NextProtos = nil
		conn, err := tls.Dial("tcp", addr, cfg)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(time.Minute))
		_, _ = fmt.Fprintf(conn, "GET /ws HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n%s\r\n", addr, headers)
		reader := bufio.NewReader(conn)
		resp, err := http.ReadResponse(reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(resp.Header.Get("Sec-WebSocket-Extensions"), "deflate") {
			t.Error("compression is agreed to")
		}
		return conn, reader, resp.StatusCode
	}
	for name, frame := range map[string]string{
		"2^63":            "\x81\xff\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		"2^63-1":          "\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00",
		"1 GiB":           "\x81\xff\x00\x00\x00\x00\x40\x00\x00\x00\x00\x00\x00\x00",
		"not masked":      "\x81\x01x",
		"compressed":      "\xc1\x85\x00\x00\x00\x00\xcaH\xcd\xc9\xc9",
		"no token":        "\x81\x82\x00\x00\x00\x00{}",
		"another's token": "\x81\xfe\x00\x80\x00\x00\x00\x00" + fmt.Sprintf("%-128s", `{"type":"connect","token":"`+"a.b.c"+`"}`),
	} {
		for _, headers := range []string{"", "Sec-WebSocket-Extensions: permessage-deflate\r\n"} {
			conn, reader, code := shake(headers)
			if code != http.StatusSwitchingProtocols {
				t.Errorf("%s: status %d", name, code)
			}
			_, _ = io.WriteString(conn, frame)
			if text, err := io.ReadAll(reader); errors.Is(err, os.ErrDeadlineExceeded) || strings.Contains(string(text), `"ready"`) {
				t.Errorf("%s: %q, %v", name, text, err)
			}
			_ = conn.Close()
		}
	}
	for _, origin := range []string{"https://evil.example", "null", "https://" + addr + ".evil.example"} {
		conn, _, code := shake("Origin: " + origin + "\r\n")
		if code != http.StatusForbidden {
			t.Errorf("a page of %s: status %d", origin, code)
		}
		_ = conn.Close()
	}
	silent := make([]net.Conn, 0, 150)
	for range cap(silent) {
		conn, _, _ := shake("")
		silent = append(silent, conn)
	}
	r.serves(t)
	for _, conn := range silent {
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("a silent socket is open after a minute")
		}
		_ = conn.Close()
	}
}

func attackEtcd(t *testing.T, r *target) {
	for program, made := range map[string]func() cli.Settings{
		"serve": func() cli.Settings { return &pushmanager.Config{} }, "controller": func() cli.Settings { return &controller.Config{} }, "connect-node": func() cli.Settings { return &connectnode.Config{} },
	} {
		if err := cli.Fill(made(), map[string]string{"ETCD_ENDPOINTS": "192.0.2.1:2379"}); err == nil || !strings.Contains(err.Error(), "ETCD") {
			t.Errorf("%s with an etcd elsewhere without TLS: %v", program, err)
		}
	}
	// Whoever has no certificate of its authorities reads nothing in it.
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"https://" + r.etcd.Endpoint()}, TLS: as(t, newAuthority(t).issue(t, "spiffe://test/push-manager/pm")), Logger: zap.NewNop()})
	if err == nil {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		if got, err := client.Get(ctx, discovery.ConnectNodePrefix, clientv3.WithPrefix()); err == nil {
			t.Errorf("a stranger reads %v", got)
		}
		cancel()
		_ = client.Close()
	}
	r.etcd.Restart()
	r.serves(t)
	eventually(t, "the registration stands", func() bool { return len(r.n.NotReady()) == 0 && r.m.Reachable() == 1 && len(r.m.NotReady()) == 0 })
}

func attackForSecrets(t *testing.T, r *target) {
	secret, err := os.ReadFile(r.files.Secret)
	if err != nil {
		t.Fatal(err)
	}
	keyFile, err := os.ReadFile(r.dir + "/api.key")
	if err != nil {
		t.Fatal(err)
	}
	good := r.a.token(t, nil, nil)
	planted := map[string]string{
		"an API key": r.key[len("pmk_")+len(r.shop)+1:], "a token": good[strings.LastIndexByte(good, '.')+1:], "a secret of an issuer": string(secret), "a private key": strings.Split(string(keyFile), "\n")[1],
	}
	api := r.anybody(t)
	for _, header := range []string{"Bearer " + r.key, "Bearer " + good, r.key, "Basic " + r.key, "Bearer " + r.key + "x", "Bearer " + good + "x", "Bearer " + string(secret)} {
		_, err := api.PushToUser(with(t, "authorization", header), toUser("u-0"))
		for name, text := range planted {
			if strings.Contains(fmt.Sprint(err, status.Convert(err).Details()), text[:16]) {
				t.Errorf("an error shows %s", name)
			}
		}
	}
	shown := map[string]string{"the log": r.log.String(), "the command line of this process": strings.Join(os.Args, " ")}
	page := as(t, certs.Pair{})
	page.NextProtos = nil
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: page}}
	for _, url := range []string{
		"http://" + r.m.HTTPAddr() + "/metrics", "http://" + r.m.HTTPAddr() + "/readyz", "http://" + r.m.HTTPAddr() + "/debug/pprof/goroutine?debug=2", "http://" + r.m.HTTPAddr() + "/debug/pprof/heap?debug=1",
		"http://" + r.m.HTTPAddr() + "/debug/pprof/cmdline", "https://" + r.n.HTTPAddr().String() + "/", "http://" + r.n.MetricsAddr().String() + "/metrics", "http://" + r.controller.HTTPAddr() + "/metrics",
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+r.key)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if served := resp.StatusCode == http.StatusOK; served == strings.HasSuffix(url, "cmdline") {
			t.Errorf("%s: status %d", url, resp.StatusCode)
		}
		shown[url] = string(text)
	}
	set, c := config.New(), &pushmanager.Config{}
	c.Bind(set)
	var printed strings.Builder
	env := map[string]string{"ETCD_USERNAME": "u", "ETCD_PASSWORD": string(secret)}
	if err := errors.Join(set.Load(config.Options{NoFile: true, LookupEnv: func(name string) (string, bool) { v, ok := env[name]; return v, ok }}), set.Write(&printed, false)); err != nil {
		t.Fatal(err)
	}
	shown["--print-config"] = printed.String()
	for where, text := range shown {
		if len(text) == 0 {
			t.Errorf("%s is empty", where)
		}
		for name, secret := range planted {
			for begin := 0; begin+16 <= len(secret); begin += 8 {
				if strings.Contains(text, secret[begin:begin+16]) {
					t.Errorf("%s shows a part of %s", where, name)
					break
				}
			}
		}
	}
	if !strings.Contains(r.log.String(), "push refused") {
		t.Error("the log says nothing of all this")
	}
}

// metric is the value of a metric by its name with labels, 0 if there is none.
func metric(t *testing.T, m *pushmanager.PushManager, name string) (value float64) {
	t.Helper()
	for line := range strings.Lines(metricsOf(t, m)) {
		if text, ok := strings.CutPrefix(line, name+" "); ok {
			_, _ = fmt.Sscan(text, &value)
		}
	}
	return value
}
