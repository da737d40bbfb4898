package audit

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, cfg Config) *Log {
	t.Helper()
	if cfg.File == "" {
		cfg.File = filepath.Join(t.TempDir(), "audit.log")
	}
	l, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func closeLog(t *testing.T, l *Log) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := l.Close(ctx); err != nil {
		t.Error(err)
	}
}

// lines are those of a file, each of which must be JSON.
func lines(t *testing.T, file string) (all []map[string]any) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
		var line map[string]any
		if err := json.Unmarshal(s.Bytes(), &line); err != nil {
			t.Fatalf("%q: %v", s.Text(), err)
		}
		all = append(all, line)
	}
	return all
}

func TestALineSaysWhoDidWhat(t *testing.T) {
	l := open(t, Config{HashIDs: true})
	l.Write(Entry{
		Event: Push, Caller: "billing", Tenant: "shop", Credential: "key 4fZ1q9aB", Peer: "10.0.0.1", Method: "PushToRoom", TargetKind: "room",
		Target: "order-7\n\"", Outcome: "partial", TraceID: "0af7651916cd43dd8448eb211c80319c", Results: &Results{Delivered: 3, Offline: 1, Failed: 2},
	})
	closeLog(t, l)
	got := lines(t, l.cfg.File)
	if len(got) != 1 {
		t.Fatalf("%d lines, want 1", len(got))
	}
	if _, err := time.Parse(time.RFC3339Nano, got[0]["time"].(string)); err != nil {
		t.Error(err)
	}
	for name, want := range map[string]any{
		"event": "push", "caller": "billing", "tenant": "shop", "credential": "key 4fZ1q9aB", "peer": "10.0.0.1", "method": "PushToRoom", "target_kind": "room",
		"outcome": "partial", "delivered": 3.0, "offline": 1.0, "failed": 2.0, "unknown": 0.0, "trace_id": "0af7651916cd43dd8448eb211c80319c",
	} {
		if got[0][name] != want {
			t.Errorf("%s is %v, want %v", name, got[0][name], want)
		}
	}
	if s, _ := got[0]["target"].(string); !strings.HasPrefix(s, "sha256:") || len(s) != len("sha256:")+64 {
		t.Errorf("target is %q", s)
	}
	for _, name := range []string{"level", "msg", "reason", "count"} {
		if _, there := got[0][name]; there {
			t.Errorf("%s is there", name)
		}
	}
	info, err := os.Stat(l.cfg.File)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestRefusalsOfASecondAreOneLine(t *testing.T) {
	l := open(t, Config{})
	for range 10_000 {
		l.Refused(Entry{Event: AuthDenied, Reason: "expired", Peer: "10.0.0.1"})
		l.Refused(Entry{Event: PushDenied, Caller: "billing", Reason: "RATE_LIMITED", Target: "t"})
	}
	closeLog(t, l)
	counts := map[string]float64{}
	got := lines(t, l.cfg.File)
	for _, line := range got {
		counts[line["event"].(string)] += line["count"].(float64)
	}
	if counts[AuthDenied] != 10_000 || counts[PushDenied] != 10_000 || len(got) > 200 {
		t.Errorf("%d lines with %v", len(got), counts)
	}
}

func TestNobodyWaitsAndWhatIsLostIsCounted(t *testing.T) {
	file := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(file, 0o600); err != nil {
		t.Skip(err)
	}
	reader, err := os.OpenFile(file, os.O_RDWR, 0) // both, so that it does not wait for a writer
	if err != nil {
		t.Fatal(err)
	}
	l := open(t, Config{File: file})
	const all = 3 * queueLines // a pipe that nobody reads holds 64 KiB
	for range all {
		l.Write(Entry{Event: Push})
	}
	if n := l.lost.Get(); n == 0 || n > all-queueLines {
		t.Errorf("%d lines of %d are lost", n, all)
	}
	read := make(chan int)
	go func() {
		n := 0
		for s := bufio.NewScanner(reader); n < all-int(l.lost.Get()) && s.Scan(); n++ {
		}
		read <- n
	}()
	closeLog(t, l)
	if n := <-read; n != all-int(l.lost.Get()) || int(l.lines.Get()) != n {
		t.Errorf("%d lines came, %d are lost, of %d", n, l.lost.Get(), all)
	}
	_ = reader.Close()
}

func TestADiskThatIsFullIsSaidOnce(t *testing.T) {
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip("no /dev/full here")
	}
	var log syncBuffer
	l := open(t, Config{File: "/dev/full", Logger: slog.New(slog.NewTextHandler(&log, nil)), Metrics: metrics.NewSet()})
	for range 5 {
		l.Write(Entry{Event: Push})
		time.Sleep(10 * time.Millisecond)
	}
	closeLog(t, l)
	if n := l.lost.Get(); n != 5 || strings.Count(log.String(), "cannot be written") != 1 {
		t.Errorf("%d lost; %s", n, log.String())
	}
}

// syncBuffer is a log that is read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestAFileThatWasRenamedIsLeftOnReload(t *testing.T) {
	l := open(t, Config{})
	written := func(n uint64) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); l.lines.Get() < n; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("not written")
			}
		}
	}
	l.Write(Entry{Event: Push, Caller: "a"})
	written(1)
	old := l.cfg.File + ".1"
	if err := os.Rename(l.cfg.File, old); err != nil {
		t.Fatal(err)
	}
	l.Reload()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(l.cfg.File); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	l.Write(Entry{Event: Push, Caller: "b"})
	closeLog(t, l)
	if before, after := lines(t, old), lines(t, l.cfg.File); len(before) != 1 || len(after) != 1 || after[0]["caller"] != "b" {
		t.Errorf("before %v, after %v", before, after)
	}
}

func TestAFileThatCannotBeOpenedEndsTheStart(t *testing.T) {
	if _, err := Open(Config{File: filepath.Join(t.TempDir(), "none", "audit.log")}); err == nil {
		t.Error("no error")
	}
}

func TestAKeyIsUsedForTheFirstTimeOnce(t *testing.T) {
	l := open(t, Config{})
	defer closeLog(t, l)
	if !l.FirstUse("a") || l.FirstUse("a") || !l.FirstUse("b") {
		t.Error("not once each")
	}
}

func TestAPushThatIsNotSampledCostsNothing(t *testing.T) {
	l := open(t, Config{})
	defer closeLog(t, l)
	if n := testing.AllocsPerRun(1000, func() {
		if l.Sampled() {
			t.Error("sampled")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
