package refgateway

import (
	"context"
	"encoding/json"
	"testing"

	"github.com/push-manager/push-manager/internal/etcdtest"
)

func TestGatewayRegistersAndLeavesEtcdFirst(t *testing.T) {
	etcd := etcdtest.Start(t)
	client := etcd.Client()
	c := newController(t)
	g, _ := start(t, c, func(cfg *Config) { cfg.Etcd, cfg.AdvertiseAddress = client, "gateway.example:50052" })
	eventually(t, "ready, and so registered", func() bool { return len(g.NotReady()) == 0 })
	value := func() string {
		r, err := client.Get(t.Context(), "/services/connect-node/node-1")
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Kvs) == 0 {
			return ""
		}
		return string(r.Kvs[0].Value)
	}
	var got struct {
		Addr     string
		Metadata struct {
			NodeID string `json:"node_id"`
		}
	}
	if err := json.Unmarshal([]byte(value()), &got); err != nil || got.Addr != "gateway.example:50052" || got.Metadata.NodeID != "node-1" {
		t.Errorf("%s: %v", value(), err)
	}
	connect(t, g, "u", "r")
	etcd.Stop()
	eventually(t, "not ready without etcd", func() bool { return len(g.NotReady()) > 0 })
	if g.NotReady("controller") == nil || g.NotReady("discovery") != nil {
		t.Errorf("without the controller: %q, without discovery: %q", g.NotReady("controller"), g.NotReady("discovery"))
	}
	etcd.Restart()
	eventually(t, "ready again", func() bool { return len(g.NotReady()) == 0 })
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := g.Drain(ctx); err != nil {
		t.Error(err)
	}
	if v := value(); v != "" {
		t.Errorf("still registered: %s", v)
	}
}
