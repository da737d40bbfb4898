package pushmanager

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/buildinfo"
	"github.com/push-manager/push-manager/internal/console"
	"github.com/push-manager/push-manager/transport/discovery"
	"github.com/push-manager/push-manager/transport/ingress/web"
)

// warningsKept is how many lines of the log the console shows.
const warningsKept = 200

// urlKey is the metadata of our entry in etcd with the address of HTTP_PORT, for the consoles of other instances.
const urlKey = "http_url"

// keepWarnings is log, whose last warnings are kept for the console.
func (m *PushManager) keepWarnings(log *slog.Logger) *slog.Logger {
	if m.web != nil {
		m.warnings = console.NewWarnings(warningsKept)
		log = slog.New(m.warnings.Handler(log.Handler()))
		m.log = log
	}
	return log
}

// openConsole makes the console, which is served with the push API over HTTP.
func (m *PushManager) openConsole(cfg *Config, set *metrics.Set) error {
	about := console.About{
		ID: cfg.ManagerID, Version: buildinfo.Version(), Started: time.Now(), GRPC: app.Advertised(cfg.AdvertiseAddress, m.api.Addr()),
		Shards: m.shards.Len(), Store: cfg.Store.Where, Auth: cfg.Auth.on(),
	}
	client, prefix := cfg.Discovery.Client, discovery.PushManagerPrefix
	own := console.Config{
		About: about, Metrics: set, Collect: func() { m.collect() }, State: func() console.State { return m.consoleState(cfg.Controller.Address) },
		Nodes: m.links.Details, Latencies: m.ingress.Latencies, Callers: m.ingress.Callers,
		Others: func(ctx context.Context) ([]console.Instance, error) {
			list, err := discovery.List(ctx, client, prefix, 100)
			all := make([]console.Instance, 0, len(list))
			for _, r := range list {
				one := console.Instance{ID: r.ID, Address: r.Addr}
				if url := r.Metadata[urlKey]; strings.HasPrefix(url, "http://") || strings.HasPrefix(url, "https://") {
					one.URL = url
				}
				all = append(all, one)
			}
			return all, err //nolint:wrapcheck // it has context
		},
		Warnings: m.warnings, Pages: cfg.Pages, Logger: m.log,
	}
	if cfg.settings != nil {
		own.Settings = cfg.settings.Values()
	}
	c, err := console.New(own)
	if err != nil {
		return err
	}
	m.life.Add("console", app.Closing(c.Close))
	cfg.Web.Console = web.Console{Files: c.Files, Data: c.Data()}
	return nil
}

func (m *PushManager) consoleState(controller string) console.State {
	away, _, trouble := m.controller.Away()
	return console.State{
		NotReady: m.health.NotReady(), Controller: controller, ControllerAwayMS: away.Milliseconds(), ControllerTrouble: trouble, Watched: m.controller.Watched(),
		EtcdSynced: m.watcher.Synced(), EtcdStaleMS: m.watcher.Stale().Milliseconds(), EtcdTrouble: m.watcher.Why(),
	}
}

// webURL is where others reach the push API over HTTP, "" for nowhere.
func (m *PushManager) webURL(cfg *Config) string {
	if m.web == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(app.Advertised(cfg.AdvertiseAddress, m.api.Addr()))
	_, port, webErr := net.SplitHostPort(m.web.Addr().String())
	if err != nil || webErr != nil {
		return ""
	}
	scheme := "http://"
	if cfg.TLS.On() {
		scheme = "https://"
	}
	return scheme + net.JoinHostPort(host, port)
}
