package console

import (
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/push-manager/push-manager/internal/plain"
)

// Bounds of what is kept of a line of the log.
const (
	messageMax = 256
	valueMax   = 512
	valuesMax  = 12
)

// Warnings are the last lines of a log from WARN on. It is safe for concurrent use.
type Warnings struct {
	most int

	mu sync.Mutex
	// Guarded by mu.
	total uint64
	last  []warning // a ring, once it is full: the oldest one stands at total % most

	encoding sync.Mutex
	// Guarded by encoding.
	text    []byte // what json has answered last
	textOf  uint64 // the total of that
	encoded time.Time
}

// warning is a line. Its texts are one line each, of what can be printed.
type warning struct {
	Time    int64       `json:"time"` // ms
	Level   string      `json:"level"`
	Message string      `json:"message"`
	Values  [][2]string `json:"values,omitempty"`
}

// NewWarnings keeps the last ones, most at most.
func NewWarnings(most int) *Warnings { return &Warnings{most: most} }

// Handler keeps what goes to inner, whatever the level is there.
func (w *Warnings) Handler(inner slog.Handler) slog.Handler { return &handler{inner: inner, to: w} }

// Total is how many there have been.
func (w *Warnings) Total() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.total
}

func (w *Warnings) add(one warning) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.last) < w.most {
		w.last = append(w.last, one)
	} else {
		w.last[w.total%uint64(w.most)] = one
	}
	w.total++
}

// json is all of them, the latest first. They are encoded once for all who look, and once a second at most: then a new line is
// in the answer to whoever asks after that second.
func (w *Warnings) json() []byte {
	w.encoding.Lock()
	defer w.encoding.Unlock()
	now := time.Now()
	if w.text != nil && (w.textOf == w.Total() || now.Sub(w.encoded) < every) {
		return w.text
	}
	w.mu.Lock()
	out := struct {
		Total   uint64    `json:"total"`
		Entries []warning `json:"entries"`
	}{w.total, make([]warning, 0, len(w.last))}
	if len(w.last) == w.most {
		at := int(w.total % uint64(w.most))
		out.Entries = append(out.Entries, w.last[at:]...)
		out.Entries = append(out.Entries, w.last[:at]...)
	} else {
		out.Entries = append(out.Entries, w.last...)
	}
	w.mu.Unlock()
	slices.Reverse(out.Entries)
	w.text, _ = json.Marshal(out) // it is texts and numbers
	w.textOf, w.encoded = out.Total, now
	return w.text
}

// handler is a slog.Handler.
type handler struct {
	inner  slog.Handler
	to     *Warnings
	prefix string      // of names, the groups with a dot behind each
	values [][2]string // of the logger
}

// Enabled implements slog.Handler.
func (h *handler) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn || h.inner.Enabled(ctx, level)
}

// Handle implements slog.Handler.
func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		one := warning{Time: r.Time.UnixMilli(), Level: r.Level.String(), Message: plain.Line(r.Message, messageMax), Values: slices.Clip(h.values)}
		r.Attrs(func(a slog.Attr) bool {
			one.Values = appendValue(one.Values, h.prefix, a)
			return true
		})
		h.to.add(one)
	}
	if !h.inner.Enabled(ctx, r.Level) {
		return nil
	}
	return h.inner.Handle(ctx, r) //nolint:wrapcheck // it is one
}

// WithAttrs implements slog.Handler.
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	next := *h
	next.inner, next.values = h.inner.WithAttrs(attrs), slices.Clip(h.values)
	for _, a := range attrs {
		next.values = appendValue(next.values, h.prefix, a)
	}
	return &next
}

// WithGroup implements slog.Handler.
func (h *handler) WithGroup(name string) slog.Handler {
	next := *h
	next.inner = h.inner.WithGroup(name)
	if name != "" {
		next.prefix += name + "."
	}
	return &next
}

func appendValue(values [][2]string, prefix string, a slog.Attr) [][2]string {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			prefix += a.Key + "."
		}
		for _, inner := range v.Group() {
			values = appendValue(values, prefix, inner)
		}
		return values
	}
	if len(values) >= valuesMax {
		return values
	}
	return append(values, [2]string{plain.Line(prefix+a.Key, messageMax), plain.Line(v.String(), valueMax)})
}
