package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// The events there are.
const (
	AuthDenied     = "auth.denied" // no valid credentials
	PushDenied     = "push.denied" // no right, no rate or no quota left
	Push           = "push"        // a sample of what was let in
	Broadcast      = "broadcast"   // every one that was let in
	UserForgotten  = "user.forgotten"
	UserReplayed   = "user.replayed"
	PushExplained  = "push.explained"
	Disconnected   = "connections.closed"
	RefusalLifted  = "refusal.lifted"
	JobCreated     = "job.created"
	JobPaused      = "job.paused"
	JobResumed     = "job.resumed"
	JobCancelled   = "job.cancelled"
	JobRateSet     = "job.rate_set"
	JobDeleted     = "job.deleted"
	ConfigReloaded = "config.reloaded"
	TLSReloaded    = "tls.reloaded"
	KeyUsedFirst   = "key.used_first" // since the start
)

const (
	// queueLines is how many lines may wait to be written.
	queueLines = 8192
	// gatherLines bounds the refusals of a second that are told apart.
	gatherLines = 8192
	// gatherTime is how long refusals are gathered.
	gatherTime = time.Second
	// flushBytes is how much is written at a time.
	flushBytes = 64 << 10
	// fileMode is that of a new file. One that is there keeps its own: logrotate's "create 0640" holds.
	fileMode = 0o600
)

// Stdout as Config.File is the standard output.
const Stdout = "-"

// Config of a Log. File is required.
type Config struct {
	File string
	// AllowedSample is the share of pushes that are written although they were let in, from 0 to 1. Broadcasts always are.
	AllowedSample float64
	// HashIDs writes the SHA-256 of ids of users and rooms in their place.
	HashIDs bool

	Logger  *slog.Logger // nil: nothing is logged
	Metrics *metrics.Set // nil: a set of its own
}

// Entry is what a line says. Empty fields are left out.
type Entry struct {
	Event      string
	Caller     string
	Tenant     string
	Credential string // kind and id, never a secret
	Peer       string
	Method     string
	TargetKind string
	Target     string // an id of a room or user; Write and Refused clone it
	Targets    int    // ids, where there are several
	Outcome    string
	Reason     string
	TraceID    string
	MessageID  string // Write and Refused clone it
	Job        string // the id of a broadcast job
	Rate       int    // of a job, users a second

	// Of connections.closed.
	Connections int
	RefusedFor  time.Duration

	// Results of a push, or nil.
	Results *Results

	time  time.Time
	count int // of refusals that this line stands for
}

// Results are users.
type Results struct{ Delivered, Offline, Failed, Unknown int }

// key is what refusals are gathered by.
type key struct{ event, caller, reason string }

// Log is an audit log, open.
type Log struct {
	// Static after Open.
	cfg    Config
	lines  *metrics.Counter
	lost   *metrics.Counter
	queue  chan Entry
	reload chan struct{} // one token: open the file again
	stop   chan struct{}
	ended  chan struct{}

	// Owned by loop.
	out     io.WriteCloser
	handler slog.Handler
	buffer  bytes.Buffer
	waiting int  // lines in buffer
	torn    bool // the last line in the file is not whole
	trouble bool // the last write failed

	mu       sync.Mutex
	gathered map[key]*Entry
	keys     map[string]struct{} // ids of keys that have been used
}

// Open opens the file, which is made with mode 0600 if need be, and writes to it until Close.
func Open(cfg Config) (*Log, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.NewSet()
	}
	l := &Log{
		cfg:      cfg,
		lines:    cfg.Metrics.GetOrCreateCounter("push_manager_audit_lines_total"),
		lost:     cfg.Metrics.GetOrCreateCounter("push_manager_audit_lost_total"),
		queue:    make(chan Entry, queueLines),
		reload:   make(chan struct{}, 1),
		stop:     make(chan struct{}),
		ended:    make(chan struct{}),
		gathered: map[key]*Entry{},
		keys:     map[string]struct{}{},
	}
	cfg.Metrics.GetOrCreateGauge("push_manager_audit_queue", func() float64 { return float64(len(l.queue)) })
	var err error
	if l.out, err = cfg.open(); err != nil {
		return nil, err
	}
	l.handler = slog.NewJSONHandler(&l.buffer, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		switch a.Key {
		case slog.LevelKey:
			return slog.Attr{}
		case slog.MessageKey:
			a.Key = "event"
		}
		return a
	}})
	go l.loop()
	return l, nil
}

func (c *Config) open() (io.WriteCloser, error) {
	if c.File == Stdout {
		return keepOpen{os.Stdout}, nil
	}
	file, err := os.OpenFile(c.File, os.O_APPEND|os.O_CREATE|os.O_WRONLY, fileMode)
	if err != nil {
		return nil, fmt.Errorf("open the audit log: %w", err)
	}
	return file, nil
}

// keepOpen is a file that is not ours to close.
type keepOpen struct{ io.Writer }

func (keepOpen) Close() error { return nil }

// Sampled tells whether a push that was let in is to be written.
func (l *Log) Sampled() bool {
	return l.cfg.AllowedSample > 0 && (l.cfg.AllowedSample >= 1 || rand.Float64() < l.cfg.AllowedSample)
}

// Write queues a line. It does not wait: one for which there is no place is lost, and counted.
func (l *Log) Write(e Entry) {
	e.time, e.Target, e.MessageID = time.Now(), strings.Clone(e.Target), strings.Clone(e.MessageID)
	select {
	case l.queue <- e:
	default:
		l.lost.Inc()
	}
}

// Refused counts a refusal into a line of this second. The line has the details of the first.
func (l *Log) Refused(e Entry) {
	k := key{e.Event, e.Caller, e.Reason}
	l.mu.Lock()
	defer l.mu.Unlock()
	if first := l.gathered[k]; first != nil {
		first.count++
		return
	}
	if len(l.gathered) >= gatherLines {
		l.lost.Inc()
		return
	}
	e.time, e.Target, e.MessageID, e.count = time.Now(), strings.Clone(e.Target), strings.Clone(e.MessageID), 1
	l.gathered[k] = &e
}

// FirstUse tells whether a key is used for the first time since the start. Keys must be good ones, or their number has
// no bound.
func (l *Log) FirstUse(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, used := l.keys[id]; used {
		return false
	}
	l.keys[id] = struct{}{}
	return true
}

// Reload has the file opened again soon. It does not wait.
func (l *Log) Reload() {
	select {
	case l.reload <- struct{}{}:
	default:
	}
}

// Close writes what waits and closes the file. It is called once, after everything that writes. If the file takes
// nothing until ctx ends, the rest is lost.
func (l *Log) Close(ctx context.Context) error {
	close(l.stop)
	select {
	case <-l.ended:
		return nil
	case <-ctx.Done():
		return errors.New("the audit log is not written to its end")
	}
}

func (l *Log) loop() {
	defer close(l.ended)
	tick := time.NewTicker(gatherTime)
	defer tick.Stop()
	for {
		select {
		case e := <-l.queue:
			l.add(&e)
			l.drain()
		case <-tick.C:
			l.addGathered()
		case <-l.reload:
			l.reopen()
		case <-l.stop:
			l.drain()
			l.addGathered()
			l.flush()
			_ = l.out.Close() // what was written is written
			return
		}
		l.flush()
	}
}

// drain takes what is queued, as much as is written at a time.
func (l *Log) drain() {
	for {
		select {
		case e := <-l.queue:
			l.add(&e)
			if l.buffer.Len() >= flushBytes {
				l.flush()
			}
		default:
			return
		}
	}
}

func (l *Log) addGathered() {
	l.mu.Lock()
	gathered := l.gathered
	l.gathered = map[key]*Entry{}
	l.mu.Unlock()
	for _, e := range gathered {
		l.add(e)
		if l.buffer.Len() >= flushBytes {
			l.flush()
		}
	}
}

// add appends a line to the buffer.
func (l *Log) add(e *Entry) {
	r := slog.NewRecord(e.time, slog.LevelInfo, e.Event, 0)
	target := e.Target
	if l.cfg.HashIDs && target != "" {
		sum := sha256.Sum256([]byte(target))
		target = "sha256:" + hex.EncodeToString(sum[:])
	}
	for _, field := range []struct{ name, value string }{
		{"caller", e.Caller},
		{"tenant", e.Tenant},
		{"credential", e.Credential},
		{"peer", e.Peer},
		{"method", e.Method},
		{"target_kind", e.TargetKind},
		{"target", target},
		{"outcome", e.Outcome},
		{"reason", e.Reason},
		{"message_id", e.MessageID},
		{"job", e.Job},
		{"trace_id", e.TraceID},
	} {
		if field.value != "" {
			r.AddAttrs(slog.String(field.name, field.value))
		}
	}
	if e.Targets > 0 {
		r.AddAttrs(slog.Int("targets", e.Targets))
	}
	if e.Rate > 0 {
		r.AddAttrs(slog.Int("rate", e.Rate))
	}
	if e.Event == Disconnected {
		r.AddAttrs(slog.Int("connections", e.Connections))
	}
	if e.RefusedFor > 0 {
		r.AddAttrs(slog.Float64("refused_for_seconds", e.RefusedFor.Seconds()))
	}
	if n := e.Results; n != nil {
		r.AddAttrs(slog.Int("delivered", n.Delivered), slog.Int("offline", n.Offline), slog.Int("failed", n.Failed), slog.Int("unknown", n.Unknown))
	}
	if e.count > 0 {
		r.AddAttrs(slog.Int("count", e.count))
	}
	if err := l.handler.Handle(context.Background(), r); err != nil {
		l.lost.Inc() // a buffer takes everything, and texts can be encoded
		return
	}
	l.waiting++
}

// flush writes the buffer. What cannot be written is lost: to wait for a disk would only lose what comes next.
func (l *Log) flush() {
	if l.waiting == 0 {
		return
	}
	text := l.buffer.Bytes()
	if l.torn {
		text = append([]byte{'\n'}, text...)
	}
	n, err := l.out.Write(text)
	if err != nil {
		l.lost.Add(l.waiting)
		l.torn = l.torn || n > 0
		if !l.trouble {
			l.cfg.Logger.Error("audit log cannot be written, lines are lost", "file", l.cfg.File, "error", err)
		}
	} else {
		l.lines.Add(l.waiting)
		l.torn = false
		if l.trouble {
			l.cfg.Logger.Info("audit log is written again", "file", l.cfg.File)
		}
	}
	l.trouble = err != nil
	l.buffer.Reset()
	l.waiting = 0
}

// reopen takes the file that has the name now. If it cannot be opened, the one before is written on.
func (l *Log) reopen() {
	next, err := l.cfg.open()
	if err != nil {
		l.cfg.Logger.Error("audit log not opened again, the file before stays in use", "error", err)
		return
	}
	_ = l.out.Close() // what was written is written
	l.out, l.torn = next, false
}
