package jetstream

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/transport/store"
)

// serverDir and serverPort have this test binary run a server in a directory and nothing else.
const (
	serverDir  = "STORE_TEST_SERVER_DIR"
	serverPort = "STORE_TEST_SERVER_PORT"
)

// serve runs a server until standard input ends: with whoever has started this process.
func serve() error {
	port, err := strconv.Atoi(os.Getenv(serverPort))
	if err != nil {
		return err
	}
	cfg := Config{Dir: os.Getenv(serverDir)}.withDefaults()
	opts := serverOptions(&cfg)
	opts.DontListen, opts.Host, opts.Port = false, "127.0.0.1", port
	if _, err := startServer(context.Background(), opts, slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// process is a server in a process of its own, which can be killed.
type process struct {
	t         *testing.T
	dir, addr string
	cmd       *exec.Cmd
	stdin     io.Closer
}

func (p *process) start() {
	p.t.Helper()
	_, port, err := net.SplitHostPort(p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.cmd = exec.CommandContext(context.Background(), os.Args[0])
	p.cmd.Env = append(os.Environ(), serverDir+"="+p.dir, serverPort+"="+port)
	p.cmd.Stderr = os.Stderr
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		p.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
}

// kill returns when the process is gone.
func (p *process) kill() {
	p.t.Helper()
	if err := p.cmd.Process.Kill(); err != nil {
		p.t.Fatal(err)
	}
	_ = p.cmd.Wait() // that it was killed
	_ = p.stdin.Close()
}

// TestWhatWasAcknowledgedIsThereAfterTheStoreIsKilled kills the server amid writes, several times. LONG=1 does so ten times,
// after 100,000 messages each.
func TestWhatWasAcknowledgedIsThereAfterTheStoreIsKilled(t *testing.T) {
	rounds, each := 3, 500
	if os.Getenv("LONG") != "" {
		rounds, each = 10, 100_000
	}
	const users = 50
	p := &process{t: t, dir: t.TempDir(), addr: freeport.Addr(t)}
	p.start()
	t.Cleanup(func() { p.kill() })
	s, err := Open(t.Context(), Config{URLs: []string{"nats://" + p.addr}, Partitions: 2, Replicas: 1, MaxPerUser: 1 << 24})
	if err != nil {
		t.Fatal(err)
	}
	spool, err := store.NewSpool(t.Context(), store.SpoolConfig{Store: s, Usage: s.Usage, Lanes: s.Partitions(), Lane: s.Partition})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = spool.Close(ctx)
		_ = s.Close(ctx)
	})
	within := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not within a minute: %s", what)
			}
		}
	}

	var mu sync.Mutex
	acked, down := map[string]map[string]bool{}, false // payloads by user; the server is gone
	count, wrong := 0, 0
	stop := make(chan struct{})
	var writing sync.RWMutex // held while all is read
	var writers sync.WaitGroup
	defer func() {
		close(stop)
		writers.Wait()
	}()
	for w := range 4 {
		writers.Go(func() {
			room := make(chan struct{}, 500) // under way
			for i := 0; ; i++ {
				select {
				case <-stop:
					for range cap(room) {
						room <- struct{}{}
					}
					return
				case room <- struct{}{}:
				}
				user, payload := fmt.Sprint("user ", (w*7+i)%users), fmt.Sprint(w, "/", i)
				writing.RLock()
				writing.RUnlock() //nolint:staticcheck // it waits
				mu.Lock()
				gone := down // from before it was given to the Spool
				mu.Unlock()
				spool.Append(&engine.Stored{MessageID: payload, Payload: []byte(payload)}, []string{user}, time.Now().Add(3*time.Second), func(r []engine.Spooled) {
					defer func() { <-room }()
					mu.Lock()
					defer mu.Unlock()
					if r[0].Err != nil {
						return
					}
					if acked[user] == nil {
						acked[user] = map[string]bool{}
					}
					acked[user][payload] = true
					if count++; gone && down {
						wrong++
					}
				})
				if gone { // it is refused at once
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	read := func() {
		t.Helper()
		writing.Lock()
		defer writing.Unlock()
		mu.Lock()
		want := map[string][]string{}
		for user, payloads := range acked {
			for payload := range payloads {
				want[user] = append(want[user], payload)
			}
		}
		mu.Unlock()
		for user, payloads := range want {
			got := map[string]bool{}
			for last, more := uint64(0), true; more; {
				var page []store.Entry
				within("read", func() bool {
					page, more, err = s.Read(t.Context(), user, last, 1000, 1<<20)
					return err == nil
				})
				for _, e := range page {
					last, got[string(e.Message.Payload)] = e.Seq, true
				}
			}
			lost := 0
			for _, payload := range payloads {
				if !got[payload] {
					lost++
				}
			}
			if lost > 0 {
				t.Errorf("%d of %d messages for %s that were acknowledged are lost", lost, len(payloads), user)
			}
		}
	}
	for round := range rounds {
		within("the spool stores", spool.Up)
		mu.Lock()
		target := count + each
		mu.Unlock()
		for began := time.Now(); ; time.Sleep(time.Millisecond) {
			mu.Lock()
			n := count
			mu.Unlock()
			if n >= target {
				break
			}
			if time.Since(began) > 5*time.Minute {
				t.Fatalf("round %d: only %d of %d were acknowledged", round, n-target+each, each)
			}
		}
		p.kill()
		mu.Lock()
		down = true
		mu.Unlock()
		within("the spool refuses", func() bool { return !spool.Up() })
		time.Sleep(200 * time.Millisecond)
		mu.Lock()
		if down = false; wrong > 0 {
			t.Errorf("round %d: %d messages were acknowledged while the server was gone", round, wrong)
		}
		mu.Unlock()
		p.start()
		within("the spool stores again", spool.Up)
		read()
	}
}

// TestServersThatComeBackEmptyAreUsed: a server was replaced, and with it its disk.
func TestServersThatComeBackEmptyAreUsed(t *testing.T) {
	p := &process{t: t, dir: t.TempDir(), addr: freeport.Addr(t)}
	p.start()
	t.Cleanup(func() { p.kill() })
	s, err := Open(t.Context(), Config{URLs: []string{"nats://" + p.addr}, Partitions: 2, Replicas: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close(context.Background()) })
	stored := func() {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
			err := s.Append(t.Context(), []store.Entry{message("u", "payload")})[0]
			if err == nil {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	}
	stored()
	p.kill()
	p.dir = t.TempDir()
	p.start()
	stored()
}
