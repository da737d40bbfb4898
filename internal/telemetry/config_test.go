package telemetry

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func yamlFile(t *testing.T, text string) string {
	t.Helper()
	if text == "" {
		return ""
	}
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func lookupEnv(env map[string]string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		if v, ok := env[name]; ok {
			return v, true
		}
		return os.LookupEnv(name)
	}
}

func TestLogHasLevelAndFormat(t *testing.T) {
	for name, tc := range map[string]struct {
		cfg  LogConfig
		want string
	}{
		"text":  {LogConfig{Level: "info", Format: "text"}, "level=WARN msg=shown id=7"},
		"json":  {LogConfig{Level: "warn", Format: "json"}, `"msg":"shown","id":7}`},
		"empty": {LogConfig{}, "msg=shown"},
	} {
		var out bytes.Buffer
		logger, err := NewLogger(&out, tc.cfg, new(slog.LevelVar))
		if err != nil {
			t.Fatal(err)
		}
		logger.Debug("hidden")
		logger.Warn("shown", "id", 7)
		if !strings.Contains(out.String(), tc.want) || strings.Contains(out.String(), "hidden") {
			t.Errorf("%s: %q", name, out.String())
		}
	}
	for _, bad := range []LogConfig{{Level: "loud"}, {Format: "xml"}} {
		if _, err := NewLogger(&bytes.Buffer{}, bad, new(slog.LevelVar)); err == nil {
			t.Errorf("%v: no error", bad)
		}
	}
}
