package pushmanager

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/auth/authtest"
	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

const allRights = `allow: [{methods: ["*"], users: ["*"], rooms: ["*"]}]`

// TestCallersArePartOfTheProgram: a certificate, a token and a key are asked for, on an address that others reach, and what
// is taken out of the files is refused after a signal.
func TestCallersArePartOfTheProgram(t *testing.T) {
	etcd, ca := etcdtest.Start(t), etcdtest.NewCA(t)
	cert, certKey := ca.Issue("localhost", "127.0.0.1")
	callerCert, callerKey := ca.Issue("billing.internal")
	files := authtest.New(t, "")
	key, id := files.NewKey(time.Time{})
	policy := func(more string) string {
		return fmt.Sprintf("version: 1\ncallers:\n- {name: c, match: [{san: billing.internal}], %s}\n- {name: t, match: [{jwt: {issuer: %q, subject: t}}], %s}\n", allRights, authtest.Issuer, allRights) + more
	}
	files.WritePolicy(policy(fmt.Sprintf("- {name: k, match: [{key: %s}], %s}\n", id, allRights)))
	m := startPushManager(t, map[string]string{
		"ETCD_ENDPOINTS": etcd.Endpoint(), "TLS_CERT_FILE": cert, "TLS_KEY_FILE": certKey, "TLS_CLIENT_CA_FILE": ca.File,
		"TLS_RELOAD_INTERVAL": "1h", "LISTEN_ADDRESS": "0.0.0.0", "METRICS_ADDRESS": "127.0.0.1",
		"AUTH_MODE": "required", "AUTH_POLICY_FILE": files.Policy, "AUTH_API_KEYS_FILE": files.Keys,
		"AUTH_JWT": fmt.Sprintf(`[{issuer: %q, audience: %s, hs_secret_file: %q}]`, authtest.Issuer, authtest.Audience, files.Secret),
	})
	defer drain(t, m, 8*time.Second)
	anybody, certified := trust(t, ca.File, "", ""), trust(t, ca.File, callerCert, callerKey)
	conns := map[bool]*grpc.ClientConn{}
	for withCertificate, creds := range map[bool]grpc.DialOption{false: grpc.WithTransportCredentials(anybody), true: grpc.WithTransportCredentials(certified)} {
		conn, err := grpc.NewClient(near(m.GRPCAddr()), creds)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		conns[withCertificate] = conn
	}
	push := func(withCertificate bool, bearer string) codes.Code {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if bearer != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+bearer)
		}
		_, err := pubsub.NewPushManagerServiceClient(conns[withCertificate]).PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "nobody", Content: &pubsub.MessageContent{Data: []byte("x")}})
		if code := status.Code(err); code != codes.Unavailable { // there is no Controller: it was let in
			return code
		}
		return codes.OK
	}
	token := files.Token("t", time.Hour)
	for name, c := range map[string]struct {
		withCertificate bool
		bearer          string
		want            codes.Code
	}{
		"nothing": {false, "", codes.Unauthenticated}, "a certificate": {true, "", codes.OK}, "a token": {false, token, codes.OK}, "a key": {false, key, codes.OK},
		"a bad token and a certificate": {true, "x", codes.Unauthenticated}, "a token of nobody": {false, files.Token("u", time.Hour), codes.Unauthenticated},
	} {
		if got := push(c.withCertificate, c.bearer); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	_, text := get(t, "http://"+near(m.HTTPAddr())+"/metrics")
	for _, want := range []string{`push_manager_auth_failures_total{reason="no_credential"} 1`, "push_manager_policy_callers 3", "push_manager_insecure 0", "push_manager_api_keys 1"} {
		if !strings.Contains(text, want) {
			t.Errorf("the metrics have no %s", want)
		}
	}

	files.WritePolicy("version: 1\ncallers: []\n")
	m.Reload() // as SIGHUP does
	eventually(t, "a bad policy is counted", func() bool {
		_, text := get(t, "http://"+near(m.HTTPAddr())+"/metrics")
		return strings.Contains(text, `push_manager_policy_reloads_total{result="failed"} 1`)
	})
	if got := push(false, key); got != codes.OK {
		t.Errorf("with a bad policy: %v", got)
	}
	files.WritePolicy(policy(""))
	m.Reload()
	eventually(t, "the caller that was removed is refused", func() bool { return push(false, key) == codes.Unauthenticated })
	files.WritePolicy(policy(fmt.Sprintf("- {name: k, match: [{key: %s}], %s}\n", id, allRights)))
	m.Reload()
	eventually(t, "the caller is back", func() bool { return push(false, key) == codes.OK })
	files.DropKey(id)
	m.Reload()
	eventually(t, "the key that was removed is refused", func() bool { return push(false, key) == codes.Unauthenticated })
	for name, c := range map[string]codes.Code{"a certificate": push(true, ""), "a token": push(false, token)} {
		if c != codes.OK {
			t.Errorf("%s: %v", name, c)
		}
	}
}

func TestWithoutAuthNobodyIsAsked(t *testing.T) {
	etcd := etcdtest.Start(t)
	m := startPushManager(t, map[string]string{"ETCD_ENDPOINTS": etcd.Endpoint()})
	defer drain(t, m, 8*time.Second)
	conn, err := grpc.NewClient(m.GRPCAddr(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "authorization", "Basic x"), 20*time.Second)
	defer cancel()
	if _, err := pubsub.NewPushManagerServiceClient(conn).BroadcastMessage(ctx, &pubsub.BroadcastMessageRequest{Content: &pubsub.MessageContent{Data: []byte("x")}}); status.Code(err) == codes.Unauthenticated {
		t.Error(err)
	}
}

func TestSettingsOfAuthAreChecked(t *testing.T) {
	ca := etcdtest.NewCA(t)
	cert, key := ca.Issue("localhost")
	files := authtest.New(t, "version: 1\ncallers: [{name: a, match: [{san: a.b}], "+allRights+"}]\n")
	bad := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(bad, []byte("version: 1\ncallers:\n- {name: a, match: [{san: a.b}], allow: [{methods: [Push]}]}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	issuer := func(text string) string {
		return fmt.Sprintf("[{issuer: %q, hs_secret_file: %q%s}]", authtest.Issuer, files.Secret, text)
	}
	for name, tc := range map[string]struct {
		env  map[string]string
		want string // "": it is right
	}{
		"keys":                      {map[string]string{"AUTH_POLICY_FILE": files.Policy, "AUTH_API_KEYS_FILE": files.Keys}, ""},
		"tokens":                    {map[string]string{"AUTH_POLICY_FILE": files.Policy, "AUTH_JWT": issuer(", audience: x")}, ""},
		"certificates":              {map[string]string{"AUTH_POLICY_FILE": files.Policy, "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key, "TLS_CLIENT_CA_FILE": ca.File}, ""},
		"nothing":                   {nil, "AUTH_POLICY_FILE: missing"},
		"no way to show who one is": {map[string]string{"AUTH_POLICY_FILE": files.Policy}, "AUTH_MODE: required, and callers have no way"},
		"certificates nobody asks for": {map[string]string{"AUTH_POLICY_FILE": files.Policy, "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key, "TLS_CLIENT_CA_FILE": ca.File, "TLS_CLIENT_AUTH": "none"},
			"AUTH_MODE: required, and callers have no way"},
		"no file":                {map[string]string{"AUTH_POLICY_FILE": "/nowhere", "AUTH_API_KEYS_FILE": files.Keys}, "AUTH_POLICY_FILE: open /nowhere"},
		"a bad policy":           {map[string]string{"AUTH_POLICY_FILE": bad, "AUTH_API_KEYS_FILE": files.Keys}, `line 3: callers[0].allow[0].methods[0]: "Push" is no method`},
		"bad keys":               {map[string]string{"AUTH_POLICY_FILE": files.Policy, "AUTH_API_KEYS_FILE": bad}, "AUTH_API_KEYS_FILE: "},
		"an issuer, no audience": {map[string]string{"AUTH_POLICY_FILE": files.Policy, "AUTH_JWT": issuer("")}, "audience: missing"},
		"a policy, mode none":    {map[string]string{"AUTH_MODE": "none", "AUTH_POLICY_FILE": files.Policy}, "AUTH_POLICY_FILE: has no effect"},
		"keys, mode none":        {map[string]string{"AUTH_MODE": "none", "AUTH_API_KEYS_FILE": files.Keys}, "AUTH_API_KEYS_FILE: has no effect"},
		"tokens, mode none":      {map[string]string{"AUTH_MODE": "none", "AUTH_JWT": issuer(", audience: x")}, "AUTH_JWT: has no effect"},
		"another mode":           {map[string]string{"AUTH_MODE": "off"}, "AUTH_MODE"},
		"off loopback without TLS": {map[string]string{"AUTH_POLICY_FILE": files.Policy, "AUTH_API_KEYS_FILE": files.Keys, "LISTEN_ADDRESS": "0.0.0.0"},
			"LISTEN_ADDRESS: \"0.0.0.0\" can be reached by others, without TLS (TLS_CERT_FILE, TLS_KEY_FILE): only"},
		"off loopback with TLS":          {map[string]string{"AUTH_POLICY_FILE": files.Policy, "AUTH_API_KEYS_FILE": files.Keys, "LISTEN_ADDRESS": "0.0.0.0", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key}, ""},
		"off loopback, TLS without auth": {map[string]string{"AUTH_MODE": "none", "LISTEN_ADDRESS": "0.0.0.0", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key}, "without authentication (AUTH_MODE=required"},
		"off loopback, nothing":          {map[string]string{"AUTH_MODE": "none", "LISTEN_ADDRESS": "0.0.0.0"}, "without TLS (TLS_CERT_FILE, TLS_KEY_FILE) and authentication (AUTH_MODE=required"},
	} {
		env := map[string]string{"AUTH_MODE": "required"}
		maps.Copy(env, tc.env)
		_, err := load(t, nil, env, "")
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}
