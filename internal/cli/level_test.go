package cli

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/telemetry"
)

// quiet are the settings of a program that only logs, when it is told to.
type quiet struct {
	log     telemetry.LogConfig
	program *reloading
	logger  chan *slog.Logger
}

func (q *quiet) Bind(s *config.Set)                                    { q.log.Bind(s) }
func (*quiet) Validate(*config.Set, func(string) (string, bool)) error { return nil }
func (q *quiet) LogConfig() telemetry.LogConfig                        { return q.log }
func (*quiet) Timeout() time.Duration                                  { return time.Second }
func (q *quiet) Start(_ context.Context, l *slog.Logger) (Program, error) {
	q.logger <- l
	return q.program, nil
}

// TestSIGHUPTakesTheLogLevelOver: from the file; a file that is broken leaves it as it is.
func TestSIGHUPTakesTheLogLevelOver(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("log_level: warn\n")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	said := make(chan string)
	go func() {
		text, _ := io.ReadAll(r)
		said <- string(text)
	}()
	was := os.Stderr
	os.Stderr = w
	p, loggers := &reloading{waiting: make(chan struct{}), reloads: make(chan struct{}, 3)}, make(chan *slog.Logger, 1)
	code := make(chan int)
	go func() {
		code <- Main(CommandLine{Name: "p", Commands: []Command{{Name: "p", File: true, New: func() Settings { return &quiet{program: p, logger: loggers} }}}}, []string{"--config", file})
	}()
	logger := <-loggers
	<-p.waiting
	hangUp := func() {
		t.Helper()
		if err := syscall.Kill(syscall.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		<-p.reloads // comes after the level
	}
	logger.Info("one")
	write("log_level: debug\n")
	hangUp()
	logger.Debug("two")
	write("log_level: [\n")
	hangUp()
	logger.Debug("three")
	write("log_level: error\n")
	hangUp()
	logger.Warn("four")
	if err := syscall.Kill(syscall.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := <-code; got != ExitStopped {
		t.Errorf("exit code %d", got)
	}
	os.Stderr = was
	_ = w.Close()
	text := <-said
	_ = r.Close()
	for word, want := range map[string]bool{"msg=one": false, "msg=two": true, "msg=three": true, "msg=four": false, "from=WARN to=DEBUG": true, "from=DEBUG to=ERROR": true, "the log level stays": true} {
		if strings.Contains(text, word) != want {
			t.Errorf("%q in the log: %v, want %v:\n%s", word, !want, want, text)
		}
	}
}
