package webhook

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/internal/label"
	"github.com/push-manager/push-manager/internal/pause"
	"github.com/push-manager/push-manager/internal/plain"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	// SignatureHeader has when the body was signed, and the signature: t=<unix>,v1=<hex HMAC-SHA256(secret, t "." body)>.
	SignatureHeader = "Push-Manager-Signature"

	// MaxBatch and maxBatchBytes bound the receipts of one request.
	MaxBatch      = 100
	maxBatchBytes = 256 << 10
	// maxAnswer is how much of an answer is read: so a connection can be used again.
	maxAnswer = 64 << 10
	// lookPause is how often it is looked for receipts while there are none. What comes meanwhile goes together.
	lookPause = 200 * time.Millisecond
	// Pauses between attempts to send the same receipts; they double.
	firstPause, lastPause = time.Second, time.Minute
	// turnPause is the pause before the turn is asked for again after an error.
	turnPause = time.Second
)

// Config is what a Webhook needs. URL and Secret, or Target, must be set, and Source and Turns.
type Config struct {
	URL    string
	Secret func() []byte // at the moment
	Source Source
	Turns  Turns

	// Target is both where they may change. nil: URL and Secret.
	Target func() (url string, secret []byte)
	// Name is what the log calls it. Default "receipts".
	Name string
	// Names are those of its metrics, and Labels what they have, in pairs. Default: those of receipts, and none.
	Names  Names
	Labels []string
	// Encode makes the body of a request, and tells how much it has of the page. What cannot be read is counted as missed. Default: that
	// of receipts.
	Encode func(page *Page) (body []byte, n int, err error)

	// Shared says that others go on when this instance ends.
	Shared bool
	// Timeout bounds one request with its answer. Default 10 s.
	Timeout time.Duration
	// RetryMin and RetryMax are the first and the longest pause between two attempts. Default 1 s and 1 min.
	RetryMin, RetryMax time.Duration
	Logger             *slog.Logger // nil: nothing is logged
	Metrics            *metrics.Set // nil: a set of its own
}

// Names are those of metrics.
type Names struct{ Requests, Taken, Lost, Seconds, Active, Failures string }

// Source has the receipts of all senders in one line.
type Source interface {
	// Read returns receipts behind a position, at most so many with about so many bytes, and the position behind them. Missed is
	// how many in between were dropped. A position of a line that was lost is the begin of the one that is there.
	Read(ctx context.Context, after Position, most, bytes int) (Page, error)
	// Head is the position behind all receipts that there are.
	Head(ctx context.Context) (Position, error)
}

// Position is a place in the line of an epoch.
type Position struct{ Epoch, Seq uint64 }

// Page is what Source.Read returns.
type Page struct {
	Receipts []Receipt
	Last     Position
	Missed   uint64
}

// Receipt is a receipt of a sender of pushes.
type Receipt struct {
	Position string // as WatchReceipts tells it, "" where it cannot be asked for
	Sender   string
	Content  []byte // a PushReceipt
}

// Turns decide who sends.
type Turns interface {
	// Next returns when it is this instance's turn. It tries until ctx ends.
	Next(ctx context.Context) (Turn, error)
}

// Turn is the right to send. It is used by one goroutine.
type Turn interface {
	// Over is closed when the turn is somebody else's, or may be.
	Over() <-chan struct{}
	// Position is the one that was kept last, by anybody. known is false if there is none.
	Position(ctx context.Context) (p Position, known bool, err error)
	// Keep keeps a position, if the turn is not over.
	Keep(ctx context.Context, p Position) error
	// End gives the turn to somebody else.
	End(ctx context.Context)
}

// Webhook sends receipts from Start to Close.
type Webhook struct {
	// Static after Start.
	cfg    Config
	client *http.Client
	log    *slog.Logger
	stop   context.CancelFunc
	wg     sync.WaitGroup
	ok     *metrics.Counter
	failed *metrics.Counter
	sent   *metrics.Counter
	lost   *metrics.Counter
	took   *metrics.PrometheusHistogram
	shown  []string // names of these and of gauges

	turn     atomic.Bool // it is ours
	failures atomic.Int64
	drain    chan struct{} // closed when what is left is to be sent, and then no more
}

// Start begins to send.
func Start(cfg Config) (*Webhook, error) {
	if cfg.Target == nil {
		to, secret := cfg.URL, cfg.Secret
		if to == "" || secret == nil {
			return nil, errors.New("webhook: URL or Secret is missing")
		}
		cfg.Target = func() (string, []byte) { return to, secret() }
	}
	if cfg.Source == nil || cfg.Turns == nil {
		return nil, errors.New("webhook: Source or Turns is missing")
	}
	defaultTo(&cfg.Name, "receipts")
	defaultTo(&cfg.Names, Names{
		Requests: "push_manager_receipt_webhook_requests_total", Taken: "push_manager_receipt_webhook_receipts_total",
		Lost: "push_manager_receipt_webhook_lost_total", Seconds: "push_manager_receipt_webhook_seconds",
		Active: "push_manager_receipt_webhook_active", Failures: "push_manager_receipt_webhook_failures",
	})
	if cfg.Encode == nil {
		cfg.Encode = encode
	}
	defaultTo(&cfg.Timeout, 10*time.Second)
	defaultTo(&cfg.RetryMin, firstPause)
	defaultTo(&cfg.RetryMax, lastPause)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.NewSet()
	}
	var shown []string
	set, names, name := cfg.Metrics, &cfg.Names, func(metric string, labels ...string) string {
		shown = append(shown, label.Name(metric, slices.Concat(cfg.Labels, labels)...))
		return shown[len(shown)-1]
	}
	w := &Webhook{
		cfg: cfg, log: cfg.Logger.With("webhook", cfg.Name), drain: make(chan struct{}), client: newClient(cfg.Timeout),
		ok:     set.GetOrCreateCounter(name(names.Requests, "result", "ok")),
		failed: set.GetOrCreateCounter(name(names.Requests, "result", "failed")),
		sent:   set.GetOrCreateCounter(name(names.Taken)),
		lost:   set.GetOrCreateCounter(name(names.Lost)),
		took:   set.GetOrCreatePrometheusHistogramExt(name(names.Seconds), []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}),
	}
	set.GetOrCreateGauge(name(names.Active), func() float64 {
		if w.turn.Load() {
			return 1
		}
		return 0
	})
	set.GetOrCreateGauge(name(names.Failures), func() float64 { return float64(w.failures.Load()) })
	w.shown = shown
	var running context.Context
	running, w.stop = context.WithCancel(context.Background())
	w.wg.Go(func() { w.loop(running) })
	return w, nil
}

func defaultTo[T comparable](p *T, value T) {
	var zero T
	if *p == zero {
		*p = value
	}
}

// CheckURL reads the URL of a receiver.
func CheckURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.Fragment != "":
		return nil, fmt.Errorf("%q is not like https://HOST/PATH", plain.Line(text, 64))
	case u.User != nil:
		return nil, errors.New("has a user in it: the signature tells who sends")
	}
	return u, nil
}

// newClient makes one with a connection of its own, which believes nothing.
func newClient(timeout time.Duration) *http.Client {
	return &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            (&net.Dialer{Timeout: timeout, KeepAlive: 15 * time.Second}).DialContext,
			TLSHandshakeTimeout:    timeout,
			ForceAttemptHTTP2:      true,
			MaxIdleConns:           2,
			IdleConnTimeout:        90 * time.Second,
			MaxResponseHeaderBytes: maxAnswer,
			DisableCompression:     true, // an answer is not read for what it says
		},
	}
}

// Drain ends the sending: once what there is has been sent, or with Config.Shared what is under way. At the end of ctx that is cut off.
func (w *Webhook) Drain(ctx context.Context) {
	close(w.drain)
	cut := context.AfterFunc(ctx, w.stop)
	w.wg.Wait()
	cut()
	w.stop()
	w.client.CloseIdleConnections()
}

// Forget takes its metrics away, after Drain.
func (w *Webhook) Forget() {
	for _, name := range w.shown {
		w.cfg.Metrics.UnregisterMetric(name)
	}
}

// loop sends whenever it is our turn.
func (w *Webhook) loop(ctx context.Context) {
	asking, cancel := context.WithCancel(ctx)
	defer cancel()
	w.wg.Go(func() { // who has no turn has nothing to finish
		select {
		case <-w.drain:
			cancel()
		case <-ctx.Done():
		}
	})
	for last := ""; asking.Err() == nil; {
		err := w.guarded(ctx, asking)
		w.turn.Store(false)
		if asking.Err() != nil {
			return
		}
		if text := err.Error(); text != last {
			last = text
			w.log.Warn("webhook: not our turn any more, asking for it again", "err", err)
		}
		pause.For(asking, pause.Jitter(turnPause))
	}
}

// errDrained ends a turn after Drain.
var errDrained = errors.New("draining")

// guarded is one turn. A fault of ours ends it, and not the process.
func (w *Webhook) guarded(ctx, asking context.Context) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v", v)
		}
	}()
	turn, err := w.cfg.Turns.Next(asking)
	if err != nil {
		return err
	}
	defer func() {
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), turnPause)
		defer cancel()
		turn.End(ending)
	}()
	w.turn.Store(true)
	w.log.Info("webhook: this instance sends")
	ctx, cancel := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-turn.Over():
			cancel()
		case <-ctx.Done():
		}
	})
	defer func() {
		cancel()
		watch.Wait()
	}()
	return w.serve(ctx, turn)
}

// serve sends page after page, until the turn is over. Only what concerns the turn ends it.
func (w *Webhook) serve(ctx context.Context, turn Turn) error {
	at, known, err := turn.Position(ctx)
	if err == nil && !known { // the first time: from now on
		if at, err = w.cfg.Source.Head(ctx); err == nil {
			err = turn.Keep(ctx, at)
		}
	}
	if err != nil {
		return err
	}
	for wait := w.cfg.RetryMin; ctx.Err() == nil; {
		if w.cfg.Shared && w.draining() {
			return errDrained
		}
		// What could not be sent is read again: it may have been dropped meanwhile.
		page, err := w.send(ctx, at)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			if w.failures.Add(1) == 1 {
				w.log.Warn("webhook: cannot be sent, trying again", "err", err)
			}
			if !w.wait(ctx, pause.Jitter(wait), w.cfg.Shared) {
				continue
			}
			wait = min(2*wait, w.cfg.RetryMax)
		case page.Last == at:
			if w.draining() {
				return errDrained
			}
			w.wait(ctx, lookPause, true)
		default:
			if w.failures.Swap(0) > 0 {
				w.log.Info("webhook: sends again")
			}
			wait = w.cfg.RetryMin
			if err := turn.Keep(ctx, page.Last); err != nil {
				return err
			}
			w.lost.Add(int(page.Missed))
			at = page.Last
		}
	}
	return ctx.Err()
}

func (w *Webhook) draining() bool {
	select {
	case <-w.drain:
		return true
	default:
		return false
	}
}

// wait waits, no longer than until Drain if that cuts it short. It is false when ctx has ended.
func (w *Webhook) wait(ctx context.Context, d time.Duration, cutShort bool) bool {
	drain := w.drain
	if !cutShort {
		drain = nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-drain:
	case <-ctx.Done():
		return false
	}
	return true
}

// send reads what follows a position, and sends it once.
func (w *Webhook) send(ctx context.Context, at Position) (Page, error) {
	page, err := w.cfg.Source.Read(ctx, at, MaxBatch, maxBatchBytes)
	if err != nil {
		return page, err
	}
	body, n, err := w.cfg.Encode(&page)
	if err != nil || n == 0 {
		return page, err
	}
	began := time.Now()
	err = w.post(ctx, body)
	w.took.UpdateDuration(began)
	if err != nil {
		w.failed.Inc()
		return page, err
	}
	w.ok.Inc()
	w.sent.Add(n)
	return page, nil
}

// batch is the body of a request.
type batch struct {
	Receipts []item `json:"receipts"`
}

// item is one receipt in it.
type item struct {
	Position string          `json:"position,omitempty"`
	Caller   string          `json:"caller"`
	Receipt  json.RawMessage `json:"receipt"`
}

// encode makes the body, and tells how many receipts it has. One that cannot be read is left out and counted as missed.
func encode(page *Page) (body []byte, n int, err error) {
	var b batch
	for _, r := range page.Receipts {
		m := new(pubsub.PushReceipt)
		if proto.Unmarshal(r.Content, m) != nil {
			page.Missed++
			continue
		}
		text, err := protojson.Marshal(m)
		if err != nil { // text that is not UTF-8, which Unmarshal refuses, too
			page.Missed++
			continue
		}
		b.Receipts = append(b.Receipts, item{Position: r.Position, Caller: r.Sender, Receipt: text})
	}
	body, err = json.Marshal(b)
	return body, len(b.Receipts), err
}

// post sends a body once. nil means that the receiver has taken it.
func (w *Webhook) post(ctx context.Context, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, w.cfg.Timeout)
	defer cancel()
	to, secret := w.cfg.Target()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, to, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("User-Agent", "push-manager")
	request.Header.Set(SignatureHeader, sign(secret, body, time.Now()))
	response, err := w.client.Do(request)
	if err != nil {
		return withoutURL(err)
	}
	defer func() { _ = response.Body.Close() }()
	_, _ = io.CopyN(io.Discard, response.Body, maxAnswer) // the status has said everything
	if response.StatusCode < 200 || response.StatusCode > 299 {
		return fmt.Errorf("status %d", response.StatusCode)
	}
	return nil
}

// withoutURL leaves out the URL, which may hold a token in its path.
func withoutURL(err error) error {
	if inner := errors.Unwrap(err); inner != nil {
		return inner
	}
	return err
}

// sign makes the signature.
func sign(secret, body []byte, at time.Time) string {
	t := strconv.FormatInt(at.Unix(), 10)
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(t + "."))
	mac.Write(body)
	return "t=" + t + ",v1=" + hex.EncodeToString(mac.Sum(nil))
}
