package controller

import (
	"context"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/internal/redistest"
	pubsub "github.com/push-manager/push-manager/proto"
)

func TestSettingsOfTheStore(t *testing.T) {
	ca := etcdtest.NewCA(t)
	secret := filepath.Join(t.TempDir(), "url")
	if err := os.WriteFile(secret, []byte("rediss://u:secret@redis:1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	redis := func(more ...string) map[string]string {
		env := map[string]string{"CONTROLLER_STORE": "redis"}
		for i := 0; i < len(more); i += 2 {
			env[more[i]] = more[i+1]
		}
		return env
	}
	for name, tc := range map[string]struct {
		env  map[string]string
		want string // in the error; empty: none
	}{
		"memory":                 {nil, ""},
		"memory with a URL":      {map[string]string{"REDIS_URL": "redis://localhost"}, "REDIS_URL"},
		"another one":            {map[string]string{"CONTROLLER_STORE": "mysql"}, "CONTROLLER_STORE"},
		"no URL":                 {redis(), "REDIS_URL"},
		"here":                   {redis("REDIS_URL", "redis://localhost:1"), ""},
		"elsewhere":              {redis("REDIS_URL", "redis://u:secret@redis:1"), "TLS"},
		"elsewhere, one of them": {redis("REDIS_URL", "redis://localhost:1?addr=redis:2"), "TLS"},
		"elsewhere, allowed":     {redis("REDIS_URL", "redis://redis:1", "ALLOW_INSECURE", "true"), ""},
		"with TLS":               {redis("REDIS_URL", "rediss://u:secret@redis:1"), ""},
		"with TLS, unverified":   {redis("REDIS_URL", "rediss://redis:1?skip_verify=true"), "skip_verify"},
		"from a file":            {redis("REDIS_URL_FILE", secret), ""},
		"no URL at all":          {redis("REDIS_URL", "u:secret@redis"), "REDIS_URL"},
		"own authority":          {redis("REDIS_URL", "rediss://redis:1", "REDIS_CA_FILE", ca.File), ""},
		"no authority in it":     {redis("REDIS_URL", "rediss://redis:1", "REDIS_CA_FILE", secret), "no certificate"},
		"authority for nothing":  {redis("REDIS_URL", "redis://localhost:1", "REDIS_CA_FILE", ca.File), "REDIS_CA_FILE"},
		"braces in the prefix":   {redis("REDIS_URL", "redis://localhost:1", "REDIS_PREFIX", "a{b}"), "REDIS_PREFIX"},
	} {
		env := map[string]string{"ETCD_ENDPOINTS": "127.0.0.1:1"}
		maps.Copy(env, tc.env)
		err := cli.Fill(&Config{}, env)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
		if err != nil && strings.Contains(err.Error(), "secret@") {
			t.Errorf("%s: the error has the password: %v", name, err)
		}
	}
}

// The settings reach Redis: with TLS, a password and a prefix. Until it is there look-ups fail, and
// readiness says why.
func TestControllerKeepsMembershipsInRedis(t *testing.T) {
	ca := etcdtest.NewCA(t)
	cert, key := ca.Issue("127.0.0.1")
	tlsPort := freeport.Take(t, 1)[0]
	redis := redistest.Start(t, "--tls-port", tlsPort, "--tls-cert-file", cert, "--tls-key-file", key, "--tls-auth-clients", "no",
		"--requirepass", "secret")
	redis.Kill()
	var cfg Config
	if err := cli.Fill(&cfg, map[string]string{
		"CONTROLLER_STORE": "redis", "REDIS_URL": "rediss://:secret@127.0.0.1:" + tlsPort, "REDIS_CA_FILE": ca.File, "REDIS_PREFIX": "one",
		"GRPC_PORT": "0", "METRICS_PORT": "0", "ETCD_ENDPOINTS": "127.0.0.1:1", "WARMUP": "0",
	}); err != nil {
		t.Fatal(err)
	}
	c, err := Start(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := c.Drain(ctx); err != nil {
			t.Error(err)
		}
		http.DefaultClient.CloseIdleConnections()
	}()
	conn, err := grpc.NewClient(c.GRPCAddr(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := pubsub.NewControllerServiceClient(conn)
	if _, err := client.GetRoomInfo(t.Context(), &pubsub.GetRoomInfoRequest{RoomId: "r"}); status.Code(err) != codes.Unavailable {
		t.Errorf("without Redis: %v", err)
	}
	redis.Up()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		_, err := client.JoinRoom(t.Context(), &pubsub.JoinRoomRequest{UserId: "u", RoomId: "r", NodeId: "n"})
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	info, err := client.GetRoomInfo(t.Context(), &pubsub.GetRoomInfoRequest{RoomId: "r"})
	if err != nil || len(info.GetRoomInfo().GetUsers()) != 1 {
		t.Errorf("%v, %v", info, err)
	}
	resp, err := http.Get("http://" + c.HTTPAddr() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err != nil || !strings.Contains(string(body), "controller_redis_others 0") {
		t.Errorf("no metrics of the store, %v", err)
	}
}
