package console

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io/fs"
	"log/slog"
	"mime"
	"net/http"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/plain"
	"github.com/push-manager/push-manager/transport/ingress"
	"github.com/push-manager/push-manager/transport/link"
)

const (
	// every is the least time between two snapshots.
	every = time.Second
	// askEvery is how often etcd is asked for other instances, while somebody looks, and askTime how long it has.
	askEvery = 10 * time.Second
	askTime  = 3 * time.Second
	// ageHeader says how old a snapshot is in ms, so that a page can come when the next one is due.
	ageHeader = "X-Snapshot-Age"
)

// Config of a Console. All but Others, Pages and Logger is required.
type Config struct {
	// About does not change.
	About About
	// Metrics has the counters and gauges that are shown; Collect brings up to date those that are not by themselves.
	Metrics *metrics.Set
	Collect func()
	// State, Nodes, Latencies and Callers are asked for each snapshot.
	State     func() State
	Nodes     func(use func(*link.NodeDetails))
	Latencies func() (bounds []float64, counts map[string][]uint64)
	Callers   func() []ingress.CallerStatus
	// Others lists all instances that are registered, this one included.
	Others func(ctx context.Context) ([]Instance, error)
	// Settings in force, with secrets masked.
	Settings []config.Value
	Warnings *Warnings
	// Pages on which a person can be a user, of a stack that is for trying.
	Pages  func() []Page
	Logger *slog.Logger // nil: nothing is logged
}

// About is what an instance is.
type About struct {
	ID      string    `json:"id"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	GRPC    string    `json:"grpc"` // address of the push API
	Shards  int       `json:"shards"`
	Store   string    `json:"store"` // where, "off" for nowhere
	Auth    bool      `json:"auth"`  // callers must say who they are
}

// State is what is no metric.
type State struct {
	NotReady          []string `json:"not_ready,omitempty"` // why pushes cannot be delivered
	Controller        string   `json:"controller"`          // its address
	ControllerAwayMS  int64    `json:"controller_away_ms"`
	ControllerTrouble string   `json:"controller_trouble,omitempty"`
	Watched           bool     `json:"watched"`     // its change stream is trusted
	EtcdSynced        bool     `json:"etcd_synced"` // it has said which nodes there are
	EtcdStaleMS       int64    `json:"etcd_stale_ms"`
	EtcdTrouble       string   `json:"etcd_trouble,omitempty"`
}

// Instance is a Push-Manager that is registered.
type Instance struct {
	ID      string `json:"id"`
	Address string `json:"address"`
	URL     string `json:"url,omitempty"` // of its push API over HTTP
}

// Page is a link to the page of a gateway, on which one is a user.
type Page struct {
	User string `json:"user"`
	URL  string `json:"url"`
}

// Console serves the page and what it shows.
type Console struct {
	// Static after New.
	cfg      Config
	files    map[string]*file // by path below /console/
	settings []byte
	made     *metrics.Counter // snapshots
	stop     context.CancelFunc
	life     context.Context //nolint:containedctx // of what asks for other instances; ended by Close
	asking   sync.WaitGroup

	mu sync.Mutex
	// Guarded by mu.
	closed bool
	last   *snapshot
	maker  maker
	packer *gzip.Writer // its tables are a megabyte
	others []Instance
	asked  time.Time // for others last
	busy   bool      // they are being asked for
}

// snapshot is what all get who look within a second. It is immutable.
type snapshot struct {
	at            time.Time
	plain, packed []byte // JSON, and the same compressed
}

// file is one of the page.
type file struct {
	kind, tag string
	text      []byte
}

//go:embed page
var page embed.FS

// New makes a Console. Close ends it.
func New(cfg Config) (*Console, error) {
	if cfg.Pages == nil {
		cfg.Pages = func() []Page { return nil }
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	c := &Console{cfg: cfg, files: map[string]*file{}, made: cfg.Metrics.GetOrCreateCounter("push_manager_console_snapshots_total")}
	c.life, c.stop = context.WithCancel(context.Background())
	c.maker.cfg = &c.cfg
	settings := make([][3]string, len(cfg.Settings))
	for i, v := range cfg.Settings {
		settings[i] = [3]string{v.Name, v.Value, v.Source}
	}
	var err error
	if c.settings, err = json.Marshal(settings); err != nil {
		return nil, fmt.Errorf("the settings for the console: %w", err)
	}
	err = fs.WalkDir(page, "page", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := page.ReadFile(name)
		if err != nil {
			return fmt.Errorf("the page of the console: %w", err)
		}
		sum := sha256.Sum256(text)
		name = strings.TrimPrefix(name, "page/")
		c.files[name] = &file{kind: kindOf(name), tag: `"` + base64.RawURLEncoding.EncodeToString(sum[:12]) + `"`, text: text}
		return nil
	})
	if err != nil {
		return nil, err
	}
	c.files[""] = c.files["index.html"]
	return c, nil
}

// kindOf does not ask the system, which may know other kinds.
func kindOf(name string) string {
	switch path.Ext(name) {
	case ".html":
		return "text/html; charset=utf-8"
	case ".js":
		return "text/javascript; charset=utf-8"
	case ".css":
		return "text/css; charset=utf-8"
	case ".svg":
		return "image/svg+xml"
	default:
		return mime.FormatMediaType("text/plain", map[string]string{"charset": "utf-8"})
	}
}

// Close waits for what is under way.
func (c *Console) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.stop()
	c.asking.Wait()
}

// Files serves the page, which knows nothing, below /console/. A path that is not there is passed on.
func (c *Console) Files(missing http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f := c.files[strings.TrimPrefix(r.URL.Path, "/console/")]
		if f == nil {
			missing.ServeHTTP(w, r)
			return
		}
		h := w.Header()
		secure(h)
		h.Set("Content-Type", f.kind)
		h.Set("Cache-Control", "no-cache") // it is asked each time whether it is the same
		h.Set("ETag", f.tag)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(f.text))
	})
}

// Data serves what the page shows, by the name below /console/.
func (c *Console) Data() map[string]http.Handler {
	return map[string]http.Handler{
		"snapshot": http.HandlerFunc(c.serveSnapshot),
		"settings": http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { answer(w, c.settings) }),
		"warnings": http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { answer(w, c.cfg.Warnings.json()) }),
	}
}

func (c *Console) serveSnapshot(w http.ResponseWriter, r *http.Request) {
	s, err := c.snapshot()
	if err != nil {
		c.cfg.Logger.Error("no snapshot for the console", "error", err)
		http.Error(w, "no snapshot", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set(ageHeader, strconv.FormatInt(time.Since(s.at).Milliseconds(), 10))
	h.Set("Vary", "Accept-Encoding")
	if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		h.Set("Content-Encoding", "gzip")
		answer(w, s.packed)
		return
	}
	answer(w, s.plain)
}

func answer(w http.ResponseWriter, body []byte) {
	h := w.Header()
	secure(h)
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body) // it fails for a client that has gone
}

// secure lets the page load what is ours alone, and nobody frame or sniff it.
func secure(h http.Header) {
	h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
}

// snapshot is the last one, or another one if that is too old. Whoever comes while one is made waits for it.
func (c *Console) snapshot() (*snapshot, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if c.last != nil && now.Sub(c.last.at) < every {
		return c.last, nil
	}
	c.askLocked(now)
	text, err := c.maker.make(now, c.others)
	if err != nil {
		return nil, err
	}
	var packed bytes.Buffer
	if c.packer == nil {
		c.packer, err = gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	} else {
		c.packer.Reset(&packed)
	}
	if err == nil {
		_, err = c.packer.Write(text)
	}
	if err == nil {
		err = c.packer.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("compress a snapshot: %w", err)
	}
	c.made.Inc()
	c.last = &snapshot{at: now, plain: text, packed: packed.Bytes()}
	return c.last, nil
}

// askLocked has the other instances asked for if that is due. They come with a later snapshot.
func (c *Console) askLocked(now time.Time) {
	if c.cfg.Others == nil || c.closed || c.busy || !c.asked.IsZero() && now.Sub(c.asked) < askEvery {
		return
	}
	c.busy, c.asked = true, now
	c.asking.Go(func() {
		ctx, cancel := context.WithTimeout(c.life, askTime)
		defer cancel()
		others, err := c.cfg.Others(ctx)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.busy = false
		if err != nil {
			c.cfg.Logger.Debug("other instances are not known to the console", "error", plain.Line(err.Error(), 300))
			return // those of before are likelier than none
		}
		c.others = others
	})
}
