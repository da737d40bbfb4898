package storetest

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"go.uber.org/goleak"

	"github.com/push-manager/push-manager/transport/store"
)

// The pool library keeps two goroutines of a pool of its own from the start on.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

// memoryData are logs in memory.
type memoryData struct{ *Logs }

func (d memoryData) OpenLogs(_ *testing.T, limits LogLimits) (store.Logs, func(context.Context) error) {
	d.Limit(limits.MaxPerRoom, limits.MaxBytes/4/d.partitions)
	return d.Logs, func(context.Context) error { return nil }
}

func (d memoryData) Renew(*testing.T) { d.Logs.Renew() }

func TestLogsInMemoryKeepTheContract(t *testing.T) {
	for _, partitions := range []int{1, 4} {
		t.Run(fmt.Sprintf("partitions=%d", partitions), func(t *testing.T) {
			RunLogs(t, func(*testing.T) LogData { return memoryData{NewLogs(partitions)} })
		})
	}
}

func TestHooksOfLogsInMemory(t *testing.T) {
	l := NewLogs(1)
	o := openLogs(t, memoryData{l}, LogLimits{})
	places := o.add(logEntries(numbered(0, 5))...)
	l.Drop(0, places[1])
	if got, _, gap := o.read("r", 0, 10, 1<<20); len(got) != 3 || !gap {
		t.Errorf("two were dropped: %q, gap %v", got, gap)
	}
	bad := errors.New("bad")
	l.Before(func(_ context.Context, call, room string) error {
		if call == CallTell && room == "r" {
			return bad
		}
		return nil
	})
	f := o.follow(t.Context(), 0, 0)
	if err := f.end(t); !errors.Is(err, bad) {
		t.Errorf("a hook that fails: %v", err)
	}
	l.Before(nil)
	f = o.follow(t.Context(), 0, 0)
	f.until(t, places[4])
	l.Renew()
	if err := f.end(t); err == nil || l.Calls(CallFollow) != 2 || l.Calls(CallAppend) != 1 {
		t.Errorf("made anew: %v, after %d and %d calls", err, l.Calls(CallFollow), l.Calls(CallAppend))
	}
}
