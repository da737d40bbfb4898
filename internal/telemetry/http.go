package telemetry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/klauspost/compress/gzhttp"

	"github.com/push-manager/push-manager/internal/exposition"
	"github.com/push-manager/push-manager/internal/health"
)

// HTTPConfig is what the HTTP side needs. The zero value of all but Address works.
type HTTPConfig struct {
	// Address to listen on, HOST:PORT. Listener takes its place when set.
	Address  string
	Listener net.Listener
	// Metrics are written at /metrics, after those of Go and the process.
	Metrics *metrics.Set
	// Collect is called before each reading of Metrics, to refresh gauges.
	Collect func()
	// NotReady returns why the process must get no traffic, nothing when it may. It leaves out what
	// the checks named in exclude say. nil: always ready.
	NotReady func(exclude ...string) []string
	// Checks are the names that exclude may hold.
	Checks []string
	// Notes are added to the answer that the process is ready. nil: none.
	Notes func() []string
	// PprofRemote lets clients of other machines read profiles.
	PprofRemote bool
	Logger      *slog.Logger
}

// The bounds of the HTTP side. Its clients are scrapers and probes: small
// requests, quick readers.
const (
	readTimeout    = 5 * time.Second
	writeTimeout   = 2 * time.Minute // a CPU profile of a minute fits
	idleTimeout    = 2 * time.Minute // above any scrape interval
	maxHeaderBytes = 16 << 10
)

// HTTP is a running HTTP side.
type HTTP struct {
	// Static after StartHTTP.
	cfg      HTTPConfig
	server   *http.Server
	listener net.Listener

	wg  sync.WaitGroup
	err error // of Serve; read after wg.Wait
}

// StartHTTP listens and serves until Close.
func StartHTTP(cfg HTTPConfig) (*HTTP, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	compressed, err := gzhttp.NewWrapper(gzhttp.EnableZstd(false))
	if err != nil {
		return nil, fmt.Errorf("compress metrics: %w", err)
	}
	h := &HTTP{cfg: cfg, listener: cfg.Listener}
	if h.listener == nil {
		var lc net.ListenConfig
		if h.listener, err = lc.Listen(context.Background(), "tcp", cfg.Address); err != nil {
			return nil, fmt.Errorf("listen for metrics and health: %w", err)
		}
	}
	h.server = &http.Server{
		Handler:           h.mux(compressed),
		ReadHeaderTimeout: readTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug),
	}
	h.wg.Go(func() {
		if err := h.server.Serve(h.listener); !errors.Is(err, http.ErrServerClosed) {
			h.err = err
			h.cfg.Logger.Error("metrics and health are not served any more", "error", err)
		}
	})
	return h, nil
}

// Addr is where it listens.
func (h *HTTP) Addr() net.Addr { return h.listener.Addr() }

// Close lets answers under way finish until ctx ends, then cuts them.
func (h *HTTP) Close(ctx context.Context) error {
	err := h.server.Shutdown(ctx)
	if err != nil {
		err = h.server.Close()
	}
	h.wg.Wait()
	return errors.Join(err, h.err)
}

func (h *HTTP) mux(compressed func(http.Handler) http.HandlerFunc) *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", index)
	mux.Handle("GET /metrics", compressed(http.HandlerFunc(h.metrics))) // for clients that accept gzip
	mux.HandleFunc("GET /healthz", healthz)
	mux.HandleFunc("GET /readyz", health.Readyz(h.cfg.Checks, h.cfg.NotReady, h.cfg.Notes))
	mux.Handle("GET /debug/pprof/", h.local(pprof.Index))
	// Not cmdline: what it shows may have been meant for this process alone.
	mux.Handle("GET /debug/pprof/profile", h.local(pprof.Profile))
	mux.Handle("GET /debug/pprof/symbol", h.local(pprof.Symbol))
	mux.Handle("POST /debug/pprof/symbol", h.local(pprof.Symbol))
	mux.Handle("GET /debug/pprof/trace", h.local(pprof.Trace))
	return mux
}

func index(w http.ResponseWriter, _ *http.Request) {
	health.Answer(w, http.StatusOK, "/metrics\n/healthz\n/readyz\n/debug/pprof/\n")
}

// healthz says that the process lives and answers, whatever its peers do: a
// restart would not bring them back.
func healthz(w http.ResponseWriter, _ *http.Request) { health.Answer(w, http.StatusOK, "ok\n") }

func (h *HTTP) metrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", exposition.ContentType)
	if h.cfg.Collect != nil {
		h.cfg.Collect()
	}
	_ = exposition.Write(w, h.cfg.Metrics) // whoever asked has gone if it fails
}

// local answers clients on this machine only. A request that a proxy on this
// machine passes on comes from elsewhere.
func (h *HTTP) local(next http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		forwarded := r.Header.Get("X-Forwarded-For") != "" || r.Header.Get("Forwarded") != ""
		if !h.cfg.PprofRemote && (forwarded || !fromLoopback(r.RemoteAddr)) {
			health.Answer(w, http.StatusForbidden, "profiles are for clients on this machine, unless PPROF_REMOTE=true\n")
			return
		}
		next(w, r)
	})
}

func fromLoopback(remote string) bool {
	addr, err := netip.ParseAddrPort(remote)
	return err == nil && addr.Addr().Unmap().IsLoopback()
}
