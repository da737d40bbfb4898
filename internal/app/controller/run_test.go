package controller

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/config"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Nodes must reach a Controller that warms up: it is ready, and says what it waits
// for. Look-ups fail with the same words.
func TestControllerSaysThatItWarmsUp(t *testing.T) {
	for warmup, warming := range map[string]bool{"1m": true, "0": false, "": true} {
		var cfg Config
		s := config.New()
		cfg.Bind(s)
		env := func(name string) (string, bool) {
			v, ok := map[string]string{"WARMUP": warmup, "ETCD_ENDPOINTS": "127.0.0.1:1"}[name]
			return v, ok && v != ""
		}
		if err := s.Load(config.Options{NoFile: true, LookupEnv: env}); err != nil {
			t.Fatal(err)
		}
		if err := cfg.Validate(s, env); err != nil {
			t.Fatal(err)
		}
		cfg.GRPCPort, cfg.MetricsPort = 0, 0
		c, err := Start(t.Context(), cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		readyz := func() (int, string) {
			resp, err := http.Get("http://" + c.HTTPAddr() + "/readyz")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Error(err)
			}
			return resp.StatusCode, string(body)
		}
		code, body := readyz()
		for end := time.Now().Add(10 * time.Second); body == "starting\n" && time.Now().Before(end); code, body = readyz() {
			time.Sleep(time.Millisecond)
		}
		if code != http.StatusOK || strings.Contains(body, "warming up: ") != warming {
			t.Errorf("WARMUP=%q: %d %q", warmup, code, body)
		}
		conn, err := grpc.NewClient(c.GRPCAddr(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		_, err = pubsub.NewControllerServiceClient(conn).GetRoomInfo(t.Context(), &pubsub.GetRoomInfoRequest{RoomId: "r"})
		if unavailable := status.Code(err) == codes.Unavailable; unavailable != warming {
			t.Errorf("WARMUP=%q: %v", warmup, err)
		}
		_ = conn.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		if err := c.Drain(ctx); err != nil {
			t.Error(err)
		}
		cancel()
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestProfilesAreForOthersOnlyWhereTheSettingSaysSo(t *testing.T) {
	for setting, want := range map[string]int{"true": http.StatusOK, "false": http.StatusForbidden} {
		var cfg Config
		if err := cli.Fill(&cfg, map[string]string{"PPROF_REMOTE": setting, "GRPC_PORT": "0", "METRICS_PORT": "0", "ETCD_ENDPOINTS": "127.0.0.1:1"}); err != nil {
			t.Fatal(err)
		}
		c, err := Start(t.Context(), cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+c.HTTPAddr()+"/debug/pprof/", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("X-Forwarded-For", "10.0.0.1")
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("PPROF_REMOTE=%s: %s, want %d", setting, resp.Status, want)
		}
		http.DefaultClient.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
		if err := c.Drain(ctx); err != nil {
			t.Error(err)
		}
		cancel()
	}
}
