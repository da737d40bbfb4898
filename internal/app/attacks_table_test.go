package app_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/gobwas/ws"
	"github.com/gobwas/ws/wsutil"
	golangjwt "github.com/golang-jwt/jwt/v5"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/app/connectnode"
	"github.com/push-manager/push-manager/internal/app/pushmanager"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	"github.com/push-manager/push-manager/internal/certs"
	pubsub "github.com/push-manager/push-manager/proto"
)

// attacks is what is done to a whole program whose connections have TLS and whose callers and clients show who they are. After
// each of them an honest caller pushes to an honest client over a new connection, and the client has got nothing else. Where
// an attack takes long, the row has a short form of it, and the comment names the test that takes its time.
var attacks = []struct {
	number      int
	what        string
	learnedFrom string
	do          func(t *testing.T, r *target)
}{
	{1, "plain text on the port of TLS, TLS 1.2, no ALPN", "grpc-go#434", attackWithoutTLS}, // TestWhoIsLetInAtEachPort
	{2, "no certificate, of another authority, expired, not yet valid, for servers", "NATS, etcd", attackWithBadCertificates},
	{3, "a common name says admin, the alternative name does not", "NATS CVE-2026-33248", attackWithACommonName},
	{4, "an authority goes, its client resumes a session", "CVE-2025-68121, golang/go#77217, Traefik GHSA-gv8r-9rw9-9697", attackWithAnOldSession}, // TestNoSessionIsResumedPastTheAuthorities
	{5, "connections that say nothing, half a hello, a byte now and then", "etcd CVE-2026-73500, Traefik CVE-2026-22045, -32305", attackInSilence}, // 2,000: TestSilentConnectionsAreInNobodysWay
	{6, "the entry of a node in etcd has the address of another, or of a stranger", "", attackWithAnAddress},                                       // TestSwappedAddressesInEtcdReachNobody
	{7, "a node has the certificate of another, and says hello with the right id", "", attackWithAHello},                                           // TestNothingReachesTheWrongNodeWhenAddressesAreSwapped
	{8, "alg none, HS256 with a public key, another algorithm, crit, two credentials", "RFC 8725", attackWithForgedTokens},                         // TestForgedTokensAreRefused
	{9, "a token for nobody, a configuration without audience", "OpenFGA CVE-2026-55689", attackWithoutAudience},
	{10, "the kid of one issuer's key in another issuer's token", "Centrifugo CVE-2026-49998", attackWithAKidOfTwo},
	{11, "URLs, paths and templates in iss, kid, jku, x5u", "Centrifugo CVE-2026-32301", attackWithURLs},                            // files: TestTokenOpensNoFileAndNoConnection
	{12, "tokens with random kids", "MicahParks/jwkset#26, tilegroxy#883", attackWithRandomKids},                                    // TestUnknownKeysCostOneFetchIn30Seconds
	{13, "a key of an issuer, an API key, a caller are removed; a PushStream is open", "jwkset CVE-2025-22149", attackOfTheRevoked}, // TestARevokedCallerIsRefusedWithItsNextMessage
	{14, "a token of 1 MiB, 10^5 dots", "golang-jwt CVE-2025-30204", attackWithLargeTokens},                                         // costs: TestLargeTokensAreRefusedBeforeTheyAreParsed
	{15, "a setting that switches verification off", "Centrifugo GHSA-q926-c743-49qj", attackWithSettings},                          // TestInsecureIsShownAndLogged
	{16, "paths that are nearly a method", "grpc-go CVE-2026-33186, CVE-2026-84445", attackWithPaths},
	{17, "every way in without credentials", "Temporal CVE-2026-5724", attackEveryWayIn}, // all that is served: TestEveryWayInAsksWhoCalls
	{18, "a forbidden id behind allowed ones", "Temporal CVE-2025-14986, OpenFGA", attackBehindAllowedIDs},
	{19, "headers that name a caller or a tenant", "NATS CVE-2026-33223, Traefik CVE-2026-33433, -88011, Centrifugo CVE-2026-71485", attackWithHeaders},
	{20, "ids that look like another tenant's", "Mercure CVE-2026-39972, OpenFGA CVE-2026-48096", attackTenants}, // TestTenantsWithTheSameIDsNeverMeet
	{21, "ids that look like a pattern", "NATS GHSA-jx8g-9g95-6322", attackPatterns},
	{22, "two callers on one connection", "Traefik CVE-2026-71326", attackOnOneConnection},                                                            // 10^6 times: LONG=1, TestCallersOnOneConnectionAreNotMixed
	{23, "frames of WebSockets, silent sockets, pages of strangers", "NATS CVE-2026-27889, -27571, -33219, gorilla CVE-2020-27813", attackWebSockets}, // TestHostileFramesEndTheirConnectionOnly, TestSilentSocketsAreBounded
	{25, "an etcd elsewhere without TLS, one that restarts", "etcd#12385, #13413, CVE-2026-33413, -44283, -73499", attackEtcd},                        // 10 minutes: SOAK_DURATION, TestSecuredEtcdIsUsedForLongWithTheLeastRights
	{24, "secrets of all rows in what is shown and logged", "NATS CVE-2026-33247, OpenFGA CVE-2026-40293, grpc GO-2024-2978", attackForSecrets},       // the last: TestNoSecretIsShownAnywhere
}

func TestAttacksAreDeniedAndOthersServed(t *testing.T) {
	r := newTarget(t)
	r.serves(t)
	for _, a := range attacks {
		t.Run(fmt.Sprintf("%d %s", a.number, a.what), func(t *testing.T) {
			a.do(t, r)
			r.serves(t)
			if t.Failed() {
				t.Log("learned from: " + a.learnedFrom)
			}
		})
	}
}

// target is the fleet that is attacked.
type target struct {
	*fleet

	m     *pushmanager.PushManager
	n     *connectnode.ConnectNode
	files *authtest.Files
	key   string // of the tenant shop
	shop  string // the id of key
	a, b  issuing
	idp   *httptest.Server // of the keys of b
	asked atomic.Int64     // how often
	log   logText

	alice, bank *listener
	honest      pubsub.PushManagerServiceClient
	creds       credentials.TransportCredentials
	pushes      int
}

// issuing is an issuer of tokens with a key whose id is k1, as is that of the other one.
type issuing struct {
	name string
	key  *ecdsa.PrivateKey
}

func (i issuing) set(t *testing.T) []byte {
	t.Helper()
	text, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: i.key.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// token is one of billing, with other claims and headers; nil takes one away.
func (i issuing) token(t *testing.T, claims, header map[string]any) string {
	t.Helper()
	all := golangjwt.MapClaims{"iss": i.name, "aud": authtest.Audience, "sub": "billing", "exp": time.Now().Add(time.Hour).Unix()}
	token := golangjwt.NewWithClaims(golangjwt.SigningMethodES256, all)
	token.Header["kid"] = "k1"
	for changes, into := range map[*map[string]any]map[string]any{&claims: all, &header: token.Header} {
		for name, value := range *changes {
			if into[name] = value; value == nil {
				delete(into, name)
			}
		}
	}
	text, err := token.SignedString(i.key)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// logText is a log to look into.
type logText struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// listener is a client of the node that keeps what it is sent.
type listener struct{ got chan string }

// listen lets a client in by a token, which joins rooms.
func (r *target) listen(t *testing.T, user, tenant string, rooms ...string) *listener {
	t.Helper()
	token := r.files.Token(user, time.Hour, func(c golangjwt.MapClaims) {
		c["iss"], c["aud"] = "clients", "clients"
		if tenant != "" {
			c["tenant"] = tenant
		}
	})
	dialer := ws.Dialer{TLSConfig: as(t, certs.Pair{}), Protocols: []string{"pm.v1", "pm.bearer." + token}}
	dialer.TLSConfig.NextProtos = nil
	conn, _, _, err := dialer.Dial(t.Context(), "wss://"+r.n.HTTPAddr().String()+"/ws")
	if err != nil {
		t.Fatal(err)
	}
	l := &listener{make(chan string, 1000)}
	joined := make(chan struct{}, len(rooms)+1)
	var reader sync.WaitGroup
	reader.Go(func() {
		for {
			text, _, err := wsutil.ReadServerData(conn)
			switch {
			case err != nil:
				return
			case bytes.Contains(text, []byte(`"type":"joined"`)), bytes.Contains(text, []byte(`"type":"ready"`)):
				joined <- struct{}{}
			case bytes.Contains(text, []byte(`"content"`)):
				l.got <- string(text)
			}
		}
	})
	t.Cleanup(func() {
		_ = conn.Close()
		reader.Wait()
	})
	for _, room := range rooms {
		if err := wsutil.WriteClientText(conn, fmt.Appendf(nil, `{"type":"join","room_id":%q}`, room)); err != nil {
			t.Fatal(err)
		}
	}
	for range len(rooms) + 1 {
		select {
		case <-joined:
		case <-with(t).Done():
			t.Fatal("a client is not let in")
		}
	}
	return l
}

// policy has an honest caller who may everything, and others with few rights. who are left out.
func (r *target) policy(without ...string) string {
	const honest = `{name: honest, tenant: "*", match: [{san: "spiffe://test/honest"}], allow: [{methods: ["*"], users: ["*"], rooms: ["*"]}]}`
	few := `allow: [{methods: [PushToUser, PushToUsers], users: [alice, "u-*"]}, {methods: [PushToRoom], rooms: ["order-*"]}]`
	text := "version: 1\ntenants: {shop: {}, bank: {}}\ncallers:\n- " + honest + "\n"
	for name, match := range map[string]string{
		"billing": fmt.Sprintf(`tenant: "*", match: [{jwt: {issuer: %q, subject: billing}}, {jwt: {issuer: %q, subject: billing}}, {jwt: {issuer: %q, subject: billing}}], %s`, r.a.name, r.b.name, authtest.Issuer, few),
		"one":     fmt.Sprintf(`tenant: "*", match: [{jwt: {issuer: %q, subject: one}}], allow: [{methods: [PushToUser], users: [u-1]}]`, r.a.name),
		"two":     fmt.Sprintf(`tenant: "*", match: [{jwt: {issuer: %q, subject: two}}], allow: [{methods: [PushToUser], users: [u-2]}]`, r.a.name),
		"shop":    fmt.Sprintf(`tenant: shop, match: [{key: %s}], allow: [{methods: ["*"], users: ["*"], rooms: ["*"]}]`, r.shop),
	} {
		if !slices.Contains(without, name) {
			text += "- {name: " + name + ", " + match + "}\n"
		}
	}
	return text
}

func newTarget(t *testing.T) *target {
	t.Helper()
	r := &target{}
	for issuer, name := range map[*issuing]string{&r.a: "https://a.example", &r.b: "https://b.example"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		*issuer = issuing{name, key}
	}
	set := r.b.set(t)
	r.idp = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		r.asked.Add(1)
		_, _ = w.Write(set)
	}))
	t.Cleanup(r.idp.Close)
	r.files = authtest.New(t, "")
	r.key, r.shop = r.files.NewKey(time.Time{})
	r.files.WritePolicy(r.policy())
	r.fleet = newFleet(t, "100ms")
	r.fleet.log = slog.NewJSONHandler(&r.log, &slog.HandlerOptions{Level: slog.LevelDebug})
	r.write("a.jwks", r.a.set(t))
	r.m = r.startPushManager(map[string]string{
		"TLS_CLIENT_AUTH": "optional", "AUTH_MODE": "required", "AUTH_POLICY_FILE": r.files.Policy, "AUTH_API_KEYS_FILE": r.files.Keys,
		"AUTH_JWT": fmt.Sprintf(`[{issuer: %q, audience: %[2]q, jwks_file: %[3]q}, {issuer: %[4]q, audience: %[2]q, jwks_url: %[5]q}, {issuer: %[6]q, audience: %[2]q, hs_secret_file: %[7]q}]`,
			r.a.name, authtest.Audience, filepath.Join(r.dir, "a.jwks"), r.b.name, r.idp.URL+"/jwks", authtest.Issuer, r.files.Secret),
		"API_HANDSHAKES": "100",
		// What is promised is not how fast a busy machine is.
		"PUSH_TIMEOUT": "1m", "LINK_ACK_TIMEOUT": "30s", "LINK_QUEUE_AGE": "30s", "LINK_SILENCE": "30s", "LOOKUP_TIMEOUT": "20s",
	})
	r.n = r.node("n1", false, map[string]string{
		"CLIENT_AUTH_MODE": "jwt", "CLIENT_AUTH_JWT": fmt.Sprintf(`[{issuer: clients, audience: clients, hs_secret_file: %q}]`, r.files.Secret), "CLIENT_AUTH_UNVERIFIED": "100",
	})
	r.creds = credentials.NewTLS(as(t, r.authority.issue(t, "spiffe://test/honest")))
	r.honest = r.connect(t, r.creds)
	r.alice, r.bank = r.listen(t, "alice", "", "order-7", "secret"), r.listen(t, "alice", "bank", "lobby")
	eventually(t, "the node is reached", func() bool { return r.m.Reachable() == 1 })
	eventually(t, "issuer b is asked for its keys", func() bool { return r.asked.Load() > 0 })
	return r
}

// connect is a connection to the push API.
func (r *target) connect(t *testing.T, creds credentials.TransportCredentials) pubsub.PushManagerServiceClient {
	t.Helper()
	return pubsub.NewPushManagerServiceClient(r.dial(t, creds))
}

func (r *target) dial(t *testing.T, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(r.m.GRPCAddr(), grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// anybody has no certificate.
func (r *target) anybody(t *testing.T) pubsub.PushManagerServiceClient {
	t.Helper()
	return r.connect(t, credentials.NewTLS(as(t, certs.Pair{})))
}

// with is a context with headers.
func with(t *testing.T, headers ...string) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), headers...), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// bearer is a context with credentials.
func bearer(t *testing.T, credential string) context.Context {
	t.Helper()
	return with(t, "authorization", "Bearer "+credential)
}

// evil is what nobody must get.
var evil = &pubsub.MessageContent{Data: []byte("EVIL")}

func toUser(id string) *pubsub.PushToUserRequest {
	return &pubsub.PushToUserRequest{UserId: id, Content: evil}
}

// serves has the honest caller push to the honest clients, over the connection that it has and over a new one.
func (r *target) serves(t *testing.T) {
	t.Helper()
	for _, api := range []pubsub.PushManagerServiceClient{r.honest, r.connect(t, r.creds)} {
		for user, l := range map[string]*listener{"alice": r.alice, "bank/alice": r.bank} {
			r.pushes++
			text := fmt.Sprintf("honest %d.", r.pushes)
			eventually(t, "a push is delivered to "+user, func() bool { // after a link broke it takes a moment
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				reply, err := api.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: user, Content: &pubsub.MessageContent{Data: []byte(text)}})
				if err != nil {
					t.Fatalf("an honest caller: %v", err)
				}
				return reply.GetSummary().GetDelivered() == 1
			})
			for got := ""; !strings.Contains(got, text); {
				if got != "" {
					t.Errorf("%s got %s", user, got)
				}
				select {
				case got = <-l.got:
				case <-with(t).Done():
					t.Fatalf("%s did not get %q", user, text)
				}
			}
		}
	}
	for line := range strings.Lines(metricsOf(t, r.m)) {
		if strings.Contains(line, "_panics_total") && !strings.HasPrefix(line, "#") && !strings.HasSuffix(line, " 0\n") {
			t.Errorf("there was a panic: %s", line)
		}
	}
}

// refused wants UNAUTHENTICATED in the words of all its reasons.
func refused(t *testing.T, what string, err error) {
	t.Helper()
	if st := status.Convert(err); st.Code() != codes.Unauthenticated || st.Message() != "no credentials, or none that are valid here" {
		t.Errorf("%s: %v", what, err)
	}
}

func denied(t *testing.T, what string, err error) {
	t.Helper()
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("%s: %v", what, err)
	}
}

// speak makes a call by hand over TLS, and returns the first headers of the answer, nil if the connection is closed.
func (r *target) speak(t *testing.T, headers ...hpack.HeaderField) map[string]string {
	t.Helper()
	conn, err := tls.Dial("tcp", r.m.GRPCAddr(), as(t, certs.Pair{}))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, h := range headers {
		_ = enc.WriteField(h) // into memory
	}
	_, _ = io.WriteString(conn, http2.ClientPreface)
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_ = framer.WriteSettings() // the read tells
	b, most := block.Bytes(), 16<<10
	_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:min(len(b), most)], EndHeaders: len(b) <= most})
	for b = b[min(len(b), most):]; len(b) > 0; b = b[min(len(b), most):] {
		_ = framer.WriteContinuation(1, len(b) <= most, b[:min(len(b), most)])
	}
	message, err := toUser("alice").MarshalVT()
	if err != nil {
		t.Fatal(err)
	}
	_ = framer.WriteData(1, true, append([]byte{0, 0, 0, 0, byte(len(message))}, message...))
	got := map[string]string{}
	for {
		frame, err := framer.ReadFrame()
		switch f := frame.(type) {
		case *http2.MetaHeadersFrame:
			for _, h := range f.Fields {
				got[h.Name] = h.Value
			}
			if f.StreamEnded() {
				return got
			}
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			return nil
		}
		if err != nil {
			return nil
		}
	}
}

const pathToUser = "/pubsub.PushManagerService/PushToUser"

// call are the headers of a call, and more.
func call(path string, more ...string) []hpack.HeaderField {
	list := []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "https"}, {Name: ":path", Value: path}, {Name: ":authority", Value: "push"},
		{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
	}
	for i := 0; i < len(more); i += 2 {
		list = append(list, hpack.HeaderField{Name: more[i], Value: more[i+1]})
	}
	return list
}
