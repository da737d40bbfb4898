package hooks

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.etcd.io/bbolt"

	"github.com/push-manager/push-manager/internal/label"
	"github.com/push-manager/push-manager/internal/reload"
	"github.com/push-manager/push-manager/internal/webhook"
)

// Kind is what has happened.
type Kind string

// The kinds of events.
const (
	Connect    Kind = "connect"
	Disconnect Kind = "disconnect"
	Join       Kind = "join"
	Leave      Kind = "leave"
)

func kinds() []string {
	return []string{string(Connect), string(Disconnect), string(Join), string(Leave)}
}

// Event is what happened to one connection. Ids are without their tenant.
type Event struct {
	Kind       Kind
	At         time.Time
	Boot       string // of the gateway: another one with each start
	Tenant     string // "" for none
	User       string
	Room       string // of Join and Leave
	Connection string // once in a process
	Device     string // "" for none
	Code       uint16 // of Disconnect: the close code, 1006 for none
}

const (
	// waitingMost is how many events may be in memory: those of some seconds in which all clients of a node come or go.
	waitingMost = 1 << 16
	// batchMost is how many are written to disk at a time.
	batchMost = 1 << 10
	// diskPause is the pause after a write that has failed.
	diskPause = time.Second
)

// Config is what Hooks need. File, Dir and Node must be set.
type Config struct {
	File string
	Dir  string // of the queues
	Node string // the id of the gateway
	// QueueBytes bounds what waits for one receiver. Default 256 MiB.
	QueueBytes int
	// AllowPlain allows URLs without TLS that are not on this machine.
	AllowPlain bool
	// ReloadInterval is how often the files are read again. Default 10 s.
	ReloadInterval time.Duration
	// Timeout, RetryMin and RetryMax are those of webhook.Config.
	Timeout, RetryMin, RetryMax time.Duration

	Logger  *slog.Logger // nil: nothing is logged
	Metrics *metrics.Set // nil: a set of its own
}

// Hooks send events, from Open to Close. A nil one takes none.
type Hooks struct {
	// Static after Open.
	cfg      Config
	file     *file
	in       chan Event
	stop     chan struct{} // closed when no event comes any more
	writing  sync.WaitGroup
	loop     *reload.Loop
	dropped  *metrics.Counter
	reloaded map[bool]*metrics.Counter // by whether it went well

	current atomic.Pointer[[]*sender] // replaced as a whole

	trouble string // owned by the loop: what is wrong with the files
	number  uint64 // owned by the writer
}

// sender is a hook with its queue.
type sender struct {
	name    string
	hook    atomic.Pointer[hook] // changes with the file
	queue   *queue
	webhook *webhook.Webhook
	shown   []string // names of metrics of the queue
}

// Open reads the files, which must be right, and begins to send what waits.
func Open(cfg Config) (*Hooks, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.NewSet()
	}
	if cfg.QueueBytes == 0 {
		cfg.QueueBytes = 256 << 20
	}
	if cfg.ReloadInterval == 0 {
		cfg.ReloadInterval = 10 * time.Second
	}
	list, err := read(cfg.File, cfg.AllowPlain)
	if err != nil {
		return nil, err
	}
	h := &Hooks{
		cfg: cfg, in: make(chan Event, waitingMost), stop: make(chan struct{}),
		dropped: cfg.Metrics.GetOrCreateCounter("connect_node_hook_events_dropped_total"),
		reloaded: map[bool]*metrics.Counter{
			true:  cfg.Metrics.GetOrCreateCounter(`connect_node_hook_reloads_total{result="ok"}`),
			false: cfg.Metrics.GetOrCreateCounter(`connect_node_hook_reloads_total{result="failed"}`),
		},
	}
	if h.file, err = openFile(cfg.Dir); err != nil {
		return nil, err
	}
	h.current.Store(new([]*sender))
	names := make([]string, len(list))
	for i := range list {
		names[i] = list[i].Name
	}
	forgotten, err := h.file.forget(names)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", cfg.Dir, err), h.file.close())
	}
	if forgotten > 0 {
		cfg.Logger.Info("hooks are there no more", "forgotten", forgotten)
	}
	if err := h.take(list); err != nil {
		h.drain(context.Background(), *h.current.Load())
		return nil, errors.Join(err, h.file.close())
	}
	cfg.Metrics.GetOrCreateGauge("connect_node_hook_events_waiting", func() float64 { return float64(len(h.in)) })
	h.writing.Go(h.writeLoop)
	h.loop = reload.Start(cfg.ReloadInterval, h.read)
	return h, nil
}

// Emit has an event sent to whom it concerns. It never waits: one for which there is no room is lost, and counted.
func (h *Hooks) Emit(e Event) {
	if h == nil || !slices.ContainsFunc(*h.current.Load(), func(s *sender) bool { return s.hook.Load().wants(&e) }) {
		return
	}
	select {
	case h.in <- e:
	default:
		h.dropped.Inc()
	}
}

// Reload has the files read soon. It does not wait.
func (h *Hooks) Reload() { h.loop.Now() }

// Close writes what is in memory to disk, sends what it can until ctx ends, and leaves the rest on disk. Nothing is emitted any more.
func (h *Hooks) Close(ctx context.Context) error {
	h.loop.Close()
	close(h.stop)
	h.writing.Wait()
	h.drain(ctx, *h.current.Load())
	if err := h.file.close(); err != nil {
		return fmt.Errorf("hooks: %w", err)
	}
	return nil
}

// drain ends senders.
func (h *Hooks) drain(ctx context.Context, list []*sender) {
	var wg sync.WaitGroup
	for _, s := range list {
		wg.Go(func() {
			s.webhook.Drain(ctx)
			s.webhook.Forget()
			for _, name := range s.shown {
				h.cfg.Metrics.UnregisterMetric(name)
			}
		})
	}
	wg.Wait()
}

// read takes over what the files hold. It tells whether something is wrong that was not before.
func (h *Hooks) read() (worse bool) {
	list, err := read(h.cfg.File, h.cfg.AllowPlain)
	if err == nil {
		if h.same(list) {
			h.trouble = ""
			return false
		}
		err = h.take(list)
	}
	h.reloaded[err == nil].Inc()
	if err != nil {
		if worse = h.trouble != err.Error(); worse {
			h.trouble = err.Error()
			h.cfg.Logger.Error("hooks not taken over, those before stay in use", "error", err)
		}
		return worse
	}
	h.trouble = ""
	h.cfg.Logger.Info("hooks taken over", "hooks", len(list))
	return false
}

// same tells whether the files hold what is in use.
func (h *Hooks) same(list []hook) bool {
	now := *h.current.Load()
	return len(list) == len(now) && !slices.ContainsFunc(list, func(l hook) bool {
		return !slices.ContainsFunc(now, func(s *sender) bool { return s.hook.Load().equal(&l) })
	})
}

func (h *hook) equal(o *hook) bool {
	return h.Name == o.Name && h.URL == o.URL && h.SecretFile == o.SecretFile && bytes.Equal(h.secret, o.secret) &&
		slices.Equal(h.Events, o.Events) && slices.Equal(h.Rooms, o.Rooms)
}

// take makes the hooks of the files those in use. One that is there already keeps its queue, one that is there no more is forgotten with
// what waits for it.
func (h *Hooks) take(list []hook) error {
	before := *h.current.Load()
	var next, begun []*sender
	for i := range list {
		l := &list[i]
		if at := slices.IndexFunc(before, func(s *sender) bool { return s.name == l.Name }); at >= 0 {
			next = append(next, before[at])
			continue
		}
		s, err := h.begin(l)
		if err != nil {
			h.drain(canceled(), begun)
			return err
		}
		next, begun = append(next, s), append(begun, s)
	}
	for i, s := range next { // from here on nothing fails
		s.hook.Store(&list[i])
	}
	h.current.Store(&next)
	for _, s := range before {
		if slices.Contains(next, s) {
			continue
		}
		h.drain(canceled(), []*sender{s})
		events, _ := s.queue.size()
		if err := s.queue.delete(); err != nil {
			h.cfg.Logger.Error("queue of a hook not deleted", "hook", s.name, "error", err)
		}
		h.cfg.Logger.Info("hook is there no more", "hook", s.name, "forgotten", events)
	}
	return nil
}

// canceled is a context that has ended.
func canceled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// begin opens the queue of a hook, and its sender.
func (h *Hooks) begin(l *hook) (*sender, error) {
	queue, err := openQueue(h.file, l.Name, int64(h.cfg.QueueBytes))
	if err != nil {
		return nil, err
	}
	s := &sender{name: l.Name, queue: queue}
	s.hook.Store(l)
	labels := []string{"hook", l.Name}
	s.webhook, err = webhook.Start(webhook.Config{
		Source: queue, Turns: queue, Encode: encode, Name: "events", Labels: labels,
		Names: webhook.Names{
			Requests: "connect_node_hook_requests_total", Taken: "connect_node_hook_events_total", Lost: "connect_node_hook_lost_total",
			Seconds: "connect_node_hook_seconds", Active: "connect_node_hook_active", Failures: "connect_node_hook_failures",
		},
		Target:  func() (string, []byte) { now := s.hook.Load(); return now.URL, now.secret },
		Timeout: h.cfg.Timeout, RetryMin: h.cfg.RetryMin, RetryMax: h.cfg.RetryMax,
		Logger: h.cfg.Logger.With("hook", l.Name), Metrics: h.cfg.Metrics,
	})
	if err != nil {
		return nil, fmt.Errorf("hook %q: %w", l.Name, err)
	}
	s.shown = []string{label.Name("connect_node_hook_queue_events", labels...), label.Name("connect_node_hook_queue_bytes", labels...)}
	h.cfg.Metrics.GetOrCreateGauge(s.shown[0], func() float64 { events, _ := queue.size(); return float64(events) })
	h.cfg.Metrics.GetOrCreateGauge(s.shown[1], func() float64 { _, bytes := queue.size(); return float64(bytes) })
	return s, nil
}

// writeLoop puts events on disk, as many at a time as have come.
func (h *Hooks) writeLoop() {
	for {
		select {
		case e := <-h.in:
			h.write(h.gather(e))
		case <-h.stop:
			for len(h.in) > 0 {
				h.write(h.gather(<-h.in))
			}
			return
		}
	}
}

// gather takes what is there behind an event, a batch at most.
func (h *Hooks) gather(first Event) []Event {
	batch := []Event{first}
	for len(batch) < batchMost {
		select {
		case e := <-h.in:
			batch = append(batch, e)
		default:
			return batch
		}
	}
	return batch
}

// write puts a batch into the queues of the hooks that want it. A disk that cannot be written to is tried again until the end; meanwhile
// events wait in memory.
func (h *Hooks) write(batch []Event) {
	texts := make([][]byte, len(batch))
	for i := range batch {
		h.number++
		texts[i] = h.encode(&batch[i])
	}
	for first := true; ; first = false {
		err := h.commit(batch, texts)
		if err == nil {
			return
		}
		if first {
			h.cfg.Logger.Error("events of hooks cannot be written to disk, trying again", "error", err)
		}
		timer := time.NewTimer(diskPause)
		select {
		case <-timer.C:
		case <-h.stop:
			timer.Stop()
			h.dropped.Add(len(batch))
			return
		}
	}
}

// commit writes a batch at once.
func (h *Hooks) commit(batch []Event, texts [][]byte) error {
	senders, now := *h.current.Load(), time.Now()
	changes := make([]change, len(senders))
	err := h.file.update(func(tx *bbolt.Tx) (err error) {
		for i, s := range senders {
			l := s.hook.Load()
			var wanted [][]byte
			for k := range batch {
				if l.wants(&batch[k]) {
					wanted = append(wanted, texts[k])
				}
			}
			if len(wanted) == 0 {
				continue
			}
			if changes[i], err = s.queue.append(tx, now, wanted); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for i, s := range senders {
		s.queue.add(changes[i])
	}
	return nil
}

// encode is an event as receivers get it. Its id is that of no other event.
func (h *Hooks) encode(e *Event) []byte {
	text, err := json.Marshal(struct {
		ID         string    `json:"id"`
		Event      Kind      `json:"event"`
		Time       time.Time `json:"time"`
		Node       string    `json:"node_id"`
		Boot       string    `json:"boot_id"`
		Connection string    `json:"connection_id"`
		Tenant     string    `json:"tenant,omitempty"`
		User       string    `json:"user_id"`
		Room       string    `json:"room_id,omitempty"`
		Device     string    `json:"device_id,omitempty"`
		Code       uint16    `json:"code,omitempty"`
	}{
		e.Boot + "-" + strconv.FormatUint(h.number, 10), e.Kind, e.At.UTC().Truncate(time.Millisecond), h.cfg.Node, e.Boot, e.Connection,
		e.Tenant, e.User, e.Room, e.Device, e.Code,
	})
	if err != nil { // a year that no clock has
		return []byte(`{}`)
	}
	return text
}

// encode makes the body of a request.
func encode(page *webhook.Page) (body []byte, n int, err error) {
	body = append(body, `{"events":[`...)
	for i, r := range page.Receipts {
		if i > 0 {
			body = append(body, ',')
		}
		body = append(body, r.Content...)
	}
	return append(body, `]}`...), len(page.Receipts), nil
}
