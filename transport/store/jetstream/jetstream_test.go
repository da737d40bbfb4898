package jetstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/store"
	"github.com/push-manager/push-manager/transport/store/storetest"
)

func TestMain(m *testing.M) {
	if os.Getenv(serverDir) != "" {
		if err := serve(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) // the pool library keeps two goroutines of a pool of its own from the start on
}

// embeddedData is that of an embedded store.
type embeddedData struct {
	dir        string
	partitions int
}

func (d embeddedData) Files() string { return d.dir }

func (d embeddedData) Open(t *testing.T, limits storetest.Limits) store.Store {
	t.Helper()
	s, err := Open(t.Context(), Config{Dir: d.dir, Partitions: d.partitions, MaxPerUser: limits.MaxPerUser, MaxBytes: limits.MaxBytes, MaxReceipts: limits.MaxReceipts})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestEmbeddedStoreKeepsTheContract(t *testing.T) {
	for _, partitions := range []int{1, 4} {
		t.Run(fmt.Sprintf("partitions=%d", partitions), func(t *testing.T) {
			storetest.Run(t, func(t *testing.T) storetest.Data { return embeddedData{t.TempDir(), partitions} })
		})
	}
}

// message is an entry that lasts for an hour.
func message(user, payload string) store.Entry {
	return store.Entry{User: user, Message: &engine.Stored{MessageID: "m", Payload: []byte(payload)}, Expires: time.Now().Add(time.Hour)}
}

func TestOneStoreHasADirectoryAndKeepsItsPartitions(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(t.Context(), Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("opened twice: %v", err)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), Config{Dir: dir, Partitions: 2}); !errors.Is(err, ErrPartitions) || strings.Contains(err.Error(), "\n") {
		t.Errorf("another number of partitions: %v", err)
	}
	if s, err = Open(t.Context(), Config{Dir: dir, MaxPerUser: 2}); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close(context.Background()) }()
	var errs []error
	for _, payload := range []string{"a", "b", "c"} {
		errs = append(errs, s.Append(t.Context(), []store.Entry{message("u", payload)})[0])
	}
	if errs[0] != nil || errs[1] != nil || !errors.Is(errs[2], engine.ErrSpoolQuota) {
		t.Errorf("limits of a later start do not count: %v", errs)
	}
}

func TestTheLogSaysThatThereIsNoConnection(t *testing.T) {
	var log bytes.Buffer
	s, err := Open(t.Context(), Config{URLs: []string{"nats://127.0.0.1:1"}, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "no connection to a server") {
		t.Errorf("the log says:\n%s", &log)
	}
}

func TestWhatCannotBeReadIsLeftOutAndCounted(t *testing.T) {
	s, err := Open(t.Context(), Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close(context.Background()) }()
	_, prefix := s.place("u")
	other := message("v", "for somebody else")
	for _, e := range []store.Entry{message("u", "first"), message("u", "second")} {
		for _, data := range [][]byte{nil, []byte("\xff\xff\xff"), []byte("\x0a\x01u"), encode(other.User, other.Message, other.Expires)} {
			if _, err := s.js.Publish(t.Context(), prefix+plainSuffix, data); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Append(t.Context(), []store.Entry{e})[0]; err != nil {
			t.Fatal(err)
		}
	}
	page, more, err := s.Read(t.Context(), "u", 0, 10, 1<<20)
	if err != nil || more || len(page) != 2 || string(page[1].Message.Payload) != "second" {
		t.Errorf("%v, %v, %v", page, more, err)
	}
	if s.corrupt.Get() != 8 {
		t.Errorf("%d were counted", s.corrupt.Get())
	}
}

func TestOfManyCollapseKeysEachIsRead(t *testing.T) {
	s, err := Open(t.Context(), Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close(context.Background()) }()
	const keys = maxBatch + 50 // more than one answer may have
	var all []store.Entry
	for i := range keys {
		e := message("u", fmt.Sprint(i))
		e.Message.CollapseKey = fmt.Sprint(i)
		if all = append(all, e); i%100 == 0 {
			all = append(all, message("u", "plain"))
		}
	}
	for _, err := range s.Append(t.Context(), all) {
		if err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for last, more := uint64(0), true; more; {
		var page []store.Entry
		if page, more, err = s.Read(t.Context(), "u", last, 100, 1<<20); err != nil {
			t.Fatal(err)
		}
		for _, e := range page {
			last, got = e.Seq, append(got, string(e.Message.Payload))
		}
	}
	var want []string
	for _, e := range all {
		want = append(want, string(e.Message.Payload))
	}
	if !slices.Equal(got, want) {
		t.Errorf("%d of %d messages, or another order", len(got), len(want))
	}
	if anything, err := s.Any(t.Context(), []string{"u", "v"}); err != nil || !anything[0] {
		t.Errorf("any: %v, %v", anything, err)
	}
}

// FuzzDecode reads what a store may hold.
func FuzzDecode(f *testing.F) {
	e := message("u", "payload")
	e.Message.CollapseKey, e.Message.Room, e.Message.Sender, e.Message.PayloadHash = "key", "room", "sender", 7
	f.Add(encode(e.User, e.Message, e.Expires))
	f.Add([]byte("\x0a\x01u\x38\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x42\x00"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := decode(data)
		if err != nil {
			return
		}
		if e.User == "" || e.Expires.IsZero() || len(e.User)+len(e.Message.Payload)+len(e.Message.MessageID) > len(data) {
			t.Errorf("%+v", e)
		}
		again, err := decode(encode(e.User, e.Message, e.Expires))
		if e.Expires.UnixMilli() > 0 && (err != nil || again.User != e.User || !again.Expires.Equal(e.Expires) || !bytes.Equal(again.Message.Payload, e.Message.Payload) ||
			again.Message.CollapseKey != e.Message.CollapseKey || again.Message.MessageID != e.Message.MessageID) {
			t.Errorf("%+v became %+v, %v", e, again, err)
		}
	})
}
