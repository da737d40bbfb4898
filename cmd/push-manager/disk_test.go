package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/etcdtest"
)

// smallDisk is a file system of some bytes.
func smallDisk(t *testing.T, size string) (dir string) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("no tmpfs here")
	}
	dir = filepath.Join(t.TempDir(), "disk")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		if errors.Is(err, syscall.EPERM) {
			t.Skip("file systems may not be mounted here: ", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

// endsWithDiskFull checks how a stack ends whose etcd cannot write: with the reason in one line, and no stack trace.
func endsWithDiskFull(t *testing.T, p *process) {
	t.Helper()
	p.ends(30*time.Second, 1)
	text := p.stderr.String()
	if strings.Contains(text, "goroutine ") || strings.Contains(text, "panic:") {
		t.Errorf("a panic:\n%s", text)
	}
	if n := len(regexp.MustCompile(`(?m)^.*level=ERROR.*no space left on device.*$`).FindAllString(text, -1)); n != 1 {
		t.Errorf("%d lines say why, 1 is right:\n%s", n, text)
	}
}

func TestDevOnAFullDiskFailsInOneLine(t *testing.T) {
	dir := smallDisk(t, "1m") // etcd's first file has 64 MiB
	endsWithDiskFull(t, execute(t, nil, "push-manager", "dev", "--base-port=0", "--nodes=1", "--data-dir="+filepath.Join(dir, "etcd")))
}

func TestDevWhoseDiskFillsUpFailsInOneLine(t *testing.T) {
	dir := smallDisk(t, "160m")
	p := execute(t, nil, "push-manager", "dev", "--base-port=0", "--nodes=1", "--data-dir="+filepath.Join(dir, "etcd"))
	var etcd string
	for p.stdout.Scan() {
		if found := regexp.MustCompile(`^ +etcd +(\S+)`).FindStringSubmatch(p.stdout.Text()); found != nil {
			etcd = found[1]
		}
		if strings.Contains(p.stdout.Text(), "Ctrl-C") {
			break
		}
	}
	fill, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = fill.Write(make([]byte, 1<<12))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("fill the disk: %v", err)
	}
	_ = fill.Close() // it holds nothing
	client := etcdtest.NewClient(t, etcd)
	for {
		select {
		case <-p.done:
			endsWithDiskFull(t, p)
			return
		default:
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			_, _ = client.Put(ctx, "/fill", strings.Repeat("x", 1<<20)) // etcd goes while it writes
			cancel()
		}
	}
}
