package pushmanager

import (
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

func webAt(t *testing.T, env map[string]string) (*PushManager, string) {
	t.Helper()
	all := map[string]string{"HTTP_PORT": freeport.Take(t, 1)[0], "ETCD_ENDPOINTS": etcdtest.Start(t).Endpoint(), "CONTROLLER_ADDRESS": serveGRPC(t, "127.0.0.1:0", controllerServer())}
	maps.Copy(all, env)
	m := startPushManager(t, all)
	eventually(t, "pushes can be routed", m.ingress.Serving)
	return m, "http://" + m.WebAddr()
}

// webClient speaks HTTP/2 in plain text.
func webClient(t *testing.T, two bool) *http.Client {
	p := new(http.Protocols)
	p.SetHTTP1(!two)
	p.SetUnencryptedHTTP2(two)
	tr := &http.Transport{Protocols: p}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func postTo(t *testing.T, c *http.Client, url string, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(`{"text":"Hello"}`))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

// TestOverHTTPTheSameRateHolds: the caller's rate is one, whichever way its pushes come, and what is over it is 429 with Retry-After.
func TestOverHTTPTheSameRateHolds(t *testing.T) {
	m, url := webAt(t, map[string]string{"RATE_LIMIT": "1", "RATE_BURST": "2"})
	defer drain(t, m, 8*time.Second)
	api := pubsub.NewPushManagerServiceClient(client(t, m.GRPCAddr()))
	if _, err := api.BroadcastMessage(t.Context(), &pubsub.BroadcastMessageRequest{Content: hello()}); err != nil {
		t.Fatal(err)
	}
	c := webClient(t, false)
	for range 10 {
		resp, body := postTo(t, c, url+"/v1/broadcasts")
		if resp.StatusCode == http.StatusOK {
			continue
		}
		after, err := strconv.Atoi(resp.Header.Get("Retry-After"))
		if resp.StatusCode != http.StatusTooManyRequests || err != nil || after < 1 || !strings.Contains(body, `"RATE_LIMITED"`) || !strings.Contains(body, "google.rpc.RetryInfo") {
			t.Errorf("%d %v %s", resp.StatusCode, resp.Header, body)
		}
		return
	}
	t.Error("nothing is refused")
}

// TestOverHTTPTheSameConnectionsCount: a connection of HTTP has a place among those of gRPC, and gives it back.
func TestOverHTTPTheSameConnectionsCount(t *testing.T) {
	m, url := webAt(t, map[string]string{"API_CONNECTIONS": "2", "API_CONNECTIONS_PER_ADDRESS": "0"})
	defer drain(t, m, 8*time.Second)
	one, two, three := webClient(t, false), webClient(t, true), webClient(t, false)
	for _, c := range []*http.Client{one, two} {
		if resp, body := postTo(t, c, url+"/v1/broadcasts"); resp.StatusCode != http.StatusOK {
			t.Fatalf("%d %s", resp.StatusCode, body)
		}
	}
	if resp, body := postTo(t, three, url+"/v1/broadcasts"); resp.StatusCode != http.StatusTooManyRequests || !resp.Close || resp.Header.Get("Retry-After") == "" {
		t.Errorf("the third: %d, closed: %v, %s", resp.StatusCode, resp.Close, body)
	}
	one.CloseIdleConnections()
	eventually(t, "there is a place again", func() bool {
		resp, _ := postTo(t, three, url+"/v1/broadcasts")
		return resp.StatusCode == http.StatusOK
	})
}

// TestADrainEndsPushStreamsOverHTTP: what they took is answered, they end in good order, and new pushes find nobody.
func TestADrainEndsPushStreamsOverHTTP(t *testing.T) {
	m, url := webAt(t, map[string]string{"DRAIN_NOTICE": "0s"})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s := connect.NewClient[pubsub.PushStreamRequest, pubsub.PushStreamResponse](webClient(t, true), url+"/pubsub.PushManagerService/PushStream").CallBidiStream(ctx)
	if err := s.Send(&pubsub.PushStreamRequest{Id: 1, Push: &pubsub.PushStreamRequest_Broadcast{Broadcast: &pubsub.BroadcastMessageRequest{Content: hello()}}}); err != nil {
		t.Fatal(err)
	}
	if r, err := s.Receive(); err != nil || r.GetId() != 1 {
		t.Fatal(r, err)
	}
	began := time.Now()
	drain(t, m, 20*time.Second)
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("took %v", took)
	}
	_, err := s.Receive()
	var e *connect.Error
	if !errors.As(err, &e) || e.Code() != connect.CodeUnavailable || len(e.Details()) == 0 {
		t.Errorf("the stream ended with %v", err)
	}
	_ = s.CloseResponse()                                      // it has ended
	if _, err := http.Get(url + "/openapi.yaml"); err == nil { // there is nobody
		t.Error("somebody still listens")
	}
}

// TestAnOldConnectionOfHTTPIsToldToGo: with an age, a reply after it closes the connection.
func TestAnOldConnectionOfHTTPIsToldToGo(t *testing.T) {
	m, url := webAt(t, map[string]string{"API_CONNECTION_AGE": "1s"})
	defer drain(t, m, 8*time.Second)
	c := webClient(t, false)
	eventually(t, "it is told to go", func() bool {
		resp, _ := postTo(t, c, url+"/v1/broadcasts")
		return resp.Close
	})
}
