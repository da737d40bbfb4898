package telemetry

import (
	"cmp"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/push-manager/push-manager/internal/config"
)

// LogConfig says what the log looks like.
type LogConfig struct {
	Level  string // debug, info, warn, error
	Format string // text, json
}

// Bind adds the keys log_level and log_format. A level that is set already is the
// default.
func (c *LogConfig) Bind(s *config.Set) {
	s.Choice(&c.Level, "log_level", cmp.Or(c.Level, "info"), "Least level that is logged: debug, info, warn or error.",
		"debug", "info", "warn", "error")
	s.Choice(&c.Format, "log_format", "text", "Format of the log on standard error: text or json.", "text", "json")
}

// ParseLevel is the level of a word, info for none.
func ParseLevel(text string) (level slog.Level, err error) {
	if text == "" {
		return slog.LevelInfo, nil
	}
	if err := level.UnmarshalText([]byte(strings.ToUpper(text))); err != nil {
		return 0, fmt.Errorf("log level: %w", err)
	}
	return level, nil
}

// NewLogger makes a logger that writes to w, and sets level, which may be changed while it is in use.
func NewLogger(w io.Writer, c LogConfig, level *slog.LevelVar) (*slog.Logger, error) {
	first, err := ParseLevel(c.Level)
	if err != nil {
		return nil, err
	}
	level.Set(first)
	opts := &slog.HandlerOptions{Level: level}
	switch c.Format {
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	case "text", "":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	}
	return nil, fmt.Errorf("log format %q is neither text nor json", c.Format)
}
