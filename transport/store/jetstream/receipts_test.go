package jetstream

import (
	"context"
	"errors"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/store"
	"github.com/push-manager/push-manager/transport/store/storetest"
)

func TestEmbeddedReceiptsKeepTheContract(t *testing.T) {
	storetest.RunReceipts(t, func(t *testing.T) storetest.Data { return embeddedData{t.TempDir(), 1} })
}

// TestClusterReceiptsKeepTheContract is slow, as TestClusterKeepsTheContract is.
func TestClusterReceiptsKeepTheContract(t *testing.T) {
	if os.Getenv("LONG") == "" {
		t.Skip("slow: make store-long runs it")
	}
	data := clusterData{startCluster(t), 1}
	storetest.RunReceipts(t, func(t *testing.T) storetest.Data { return data.empty(t) })
}

// TestAStreamOfReceiptsThatIsLostIsMadeAgain, with another epoch.
func TestAStreamOfReceiptsThatIsLostIsMadeAgain(t *testing.T) {
	s, err := Open(t.Context(), Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close(context.Background()) }()
	one := func() error {
		return s.AppendReceipts(t.Context(), []store.Receipt{{Sender: "a", Content: []byte("1")}})[0]
	}
	if err := one(); err != nil {
		t.Fatal(err)
	}
	before, _, err := s.ReceiptsHead(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.js.DeleteStream(t.Context(), receiptStream); err != nil {
		t.Fatal(err)
	}
	if err := one(); !errors.Is(err, engine.ErrSpoolDown) {
		t.Errorf("into a stream that is not there: %v", err)
	}
	if err := one(); err != nil {
		t.Error(err)
	}
	after, head, err := s.ReceiptsHead(t.Context())
	if err != nil || after == before || head != 1 {
		t.Errorf("epoch %d, was %d, head %d; %v", after, before, head, err)
	}
}

// What is in the stream may be from anybody who can write to it.
func TestWhatIsNoReceiptIsLeftOut(t *testing.T) {
	s, err := Open(t.Context(), Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close(context.Background()) }()
	if _, err := s.openReceipts(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, data := range [][]byte{nil, {0xff}, encodeReceipt(&store.Receipt{Sender: "b", Content: []byte("1")}), encodeReceipt(&store.Receipt{Sender: "a", Content: []byte("2")})} {
		if _, err := s.js.Publish(t.Context(), receiptSubject("a"), data); err != nil {
			t.Fatal(err)
		}
	}
	page, err := s.ReadReceipts(t.Context(), "a", 0, 10, 1<<20)
	if err != nil || len(page.Receipts) != 1 || string(page.Receipts[0].Content) != "2" || page.Last != 4 || page.Gap {
		t.Errorf("%+v, %v", page, err)
	}
	page, err = s.FollowReceipts(t.Context(), 0, 10, 1<<20)
	if err != nil || len(page.Receipts) != 2 || page.Missing != 2 || page.Last != 4 {
		t.Errorf("%+v, %v", page, err)
	}
	if n := s.corrupt.Get(); n != 5 {
		t.Errorf("%d are counted", n)
	}
}

func FuzzDecodeReceipt(f *testing.F) {
	f.Add(encodeReceipt(&store.Receipt{Sender: "shop/a", Content: []byte("x")}))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decodeReceipt(data)
		if err != nil {
			return
		}
		again, err := decodeReceipt(encodeReceipt(&r))
		if err != nil || again.Sender != r.Sender || string(again.Content) != string(r.Content) {
			t.Errorf("%+v comes back as %+v, %v", r, again, err)
		}
	})
}

// TestReceiptsOutliveALeader: what is appended at one instance while the stream's leader ends comes to a watcher at
// another; what was stored without an answer comes twice.
func TestReceiptsOutliveALeader(t *testing.T) {
	if os.Getenv("LONG") == "" {
		t.Skip("slow: make store-long runs it")
	}
	c := startCluster(t)
	set := metrics.NewSet()
	instance := func(set *metrics.Set) (*Store, *store.ReceiptLog) {
		s, err := Open(t.Context(), Config{URLs: c.urls, Partitions: 1})
		if err != nil {
			t.Fatal(err)
		}
		waitReady(t, s)
		l, err := store.NewReceiptLog(store.ReceiptLogConfig{Receipts: s, Metrics: set})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			_ = l.Close(ctx)
			_ = s.Close(ctx)
		})
		return s, l
	}
	s, writer := instance(set)
	_, other := instance(nil)
	var reader *store.ReceiptReader
	for deadline := time.Now().Add(time.Minute); reader == nil; time.Sleep(100 * time.Millisecond) {
		var err error
		if reader, err = other.Watch(t.Context(), "a", ""); err != nil && time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	defer reader.Close()
	const all = 3000
	go func() {
		for i := range all {
			writer.Append("a", strconv.Itoa(i), []byte(strconv.Itoa(i)))
			time.Sleep(time.Millisecond)
		}
	}()
	seen, again, stopped := map[string]bool{}, 0, false
	for deadline := time.Now().Add(2 * time.Minute); len(seen) < all; {
		changed, err := reader.Next(t.Context(), func(_ string, receipt []byte) error {
			if seen[string(receipt)] {
				again++
			}
			seen[string(receipt)] = true
			return nil
		})
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("after %d, %d again: %v", len(seen), again, err)
		}
		if len(seen) > 500 && !stopped {
			stopped = true
			info, err := s.receipts.Load().stream.Info(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, srv := range c.servers {
				if srv.Name() == info.Cluster.Leader {
					stopServer(srv)
				}
			}
		}
		if changed != nil {
			time.Sleep(10 * time.Millisecond)
		}
	}
	if lost := set.GetOrCreateCounter("push_manager_receipts_lost_total").Get(); lost != 0 || !stopped {
		t.Errorf("%d are lost, stopped: %v", lost, stopped)
	}
	t.Logf("%d came again", again)
}
