// Package redistest runs redis-server for tests.
package redistest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/freeport"
)

// Server is one redis-server, which keeps nothing on disk.
type Server struct {
	// Static.
	tb   testing.TB
	Port string
	args []string
	log  string
	conf string // of a Sentinel, which keeps there what it finds out

	cmd *exec.Cmd // nil while it is down
}

// Start starts a redis-server with more arguments, or skips the test where there is none.
func Start(tb testing.TB, args ...string) *Server {
	tb.Helper()
	return StartAt(tb, freeport.Take(tb, 1)[0], args...)
}

// StartAt is Start with a port.
func StartAt(tb testing.TB, port string, args ...string) *Server {
	tb.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		if os.Getenv("CI") == "true" {
			tb.Fatal("redis-server is missing (Debian: package redis-server)")
		}
		tb.Skip("redis-server is missing (Debian: package redis-server)")
	}
	dir := tb.TempDir()
	s := &Server{tb: tb, Port: port, log: filepath.Join(dir, "redis.log"), args: append([]string{
		"--bind", "127.0.0.1", "--dir", dir, "--save", "", "--appendonly", "no", "--daemonize", "no",
	}, args...)}
	s.Up()
	tb.Cleanup(s.Kill)
	return s
}

// Sentinel starts one that watches primary by the name "primary". The first call of Start skips
// the test where there is no Redis.
func Sentinel(tb testing.TB, primary *Server) *Server {
	tb.Helper()
	dir := tb.TempDir()
	s := &Server{tb: tb, Port: freeport.Take(tb, 1)[0], log: filepath.Join(dir, "sentinel.log"), conf: filepath.Join(dir, "sentinel.conf")}
	text := fmt.Sprintf("port %s\nbind 127.0.0.1\ndir %s\nsentinel monitor primary 127.0.0.1 %s 1\nsentinel down-after-milliseconds primary 1000\nsentinel failover-timeout primary 10000\n",
		s.Port, dir, primary.Port)
	if err := os.WriteFile(s.conf, []byte(text), 0o600); err != nil {
		tb.Fatal(err)
	}
	s.Up()
	tb.Cleanup(s.Kill)
	return s
}

// Addr is its host and port.
func (s *Server) Addr() string { return net.JoinHostPort("127.0.0.1", s.Port) }

// URL is it for go-redis.
func (s *Server) URL() string { return "redis://" + s.Addr() }

// Up starts it, and waits until it listens.
func (s *Server) Up() {
	s.tb.Helper()
	log, err := os.OpenFile(s.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.tb.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	args := append([]string{"--port", s.Port}, s.args...)
	if s.conf != "" {
		args = []string{s.conf, "--sentinel"}
	}
	s.cmd = exec.Command("redis-server", args...)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		s.tb.Fatal(err)
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.DialTimeout("tcp", s.Addr(), time.Second)
		if err == nil {
			_ = conn.Close()
			return
		}
		if time.Now().After(end) {
			text, _ := os.ReadFile(s.log)
			s.tb.Fatalf("redis-server does not listen: %v\n%s", err, text)
		}
	}
}

// Kill ends it without a word. What it knew is gone.
func (s *Server) Kill() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
		s.cmd = nil
	}
}
