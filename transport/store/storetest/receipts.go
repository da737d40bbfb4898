package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/store"
)

// RunReceipts tests an implementation of store.Receipts, which is a store.Store, too. empty is that of Run.
func RunReceipts(t *testing.T, empty func(t *testing.T) Data) {
	for name, test := range map[string]func(t *testing.T, data Data){
		"ASenderReadsItsReceiptsInOrder":      receiptsInOrder,
		"ReadHasWhatWasAppendedBefore":        receiptsReadTheirWrites,
		"TheLineHasTheReceiptsOfAll":          receiptsInLine,
		"TheOldestOfASenderGoAndThatIsTold":   receiptsOfOneAreBounded,
		"WhoeverMissesNothingIsToldOfNoGap":   receiptsWithoutGap,
		"PlacesOutliveTheStore":               receiptsReopen,
		"ATooLargeReceiptIsRefusedAlone":      receiptTooLarge,
		"CallsWhoseTimeIsUpReturn":            receiptDeadlines,
		"ConcurrentAppendsAreAllThereInOrder": receiptsConcurrent,
	} {
		t.Run(name, func(t *testing.T) { test(t, empty(t)) })
	}
}

// line is the receipts of a store.
type line struct {
	store.Receipts

	t     *testing.T
	begin uint64 // the place behind which a test begins
}

func openLine(t *testing.T, data Data, limits Limits) (*opened, line) {
	t.Helper()
	o := open(t, data, limits)
	receipts, ok := o.Store.(store.Receipts)
	if !ok {
		t.Fatal("the store keeps no receipts")
	}
	l := line{receipts, t, 0}
	eventually(t, func() string { // a cluster that has just made the line has no leader for it
		if _, last, err := l.ReceiptsHead(t.Context()); err != nil || last > 0 {
			return text(err)
		}
		list := []store.Receipt{{Sender: "the first of all", Content: []byte("x")}}
		err := l.AppendReceipts(t.Context(), list)[0]
		l.begin = list[0].Seq
		return text(err)
	})
	return o, l
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// add stores a receipt with each text, one after the other, and returns their places.
func (l line) add(sender string, texts ...string) (places []uint64) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), wait)
	defer cancel()
	for _, text := range texts {
		list := []store.Receipt{{Sender: sender, Content: []byte(text)}}
		if err := l.AppendReceipts(ctx, list)[0]; err != nil {
			l.t.Fatalf("append %q: %v", text, err)
		}
		places = append(places, list[0].Seq)
	}
	return places
}

// read reads pages of a sender until nothing more follows.
func (l line) read(sender string, after uint64, most int) (texts []string, gap bool) {
	l.t.Helper()
	return l.pages(most, after, func(ctx context.Context, after uint64) (store.ReceiptPage, error) {
		return l.ReadReceipts(ctx, sender, after, most, 1<<20)
	}, sender)
}

// follow reads pages of the line.
func (l line) follow(after uint64, most int) (texts []string, gap bool) {
	l.t.Helper()
	return l.pages(most, after, func(ctx context.Context, after uint64) (store.ReceiptPage, error) {
		return l.FollowReceipts(ctx, after, most, 1<<20)
	}, "")
}

func (l line) pages(most int, after uint64, read func(ctx context.Context, after uint64) (store.ReceiptPage, error), sender string) (texts []string, gap bool) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), wait)
	defer cancel()
	for {
		page, err := read(ctx, after)
		if err != nil {
			l.t.Fatalf("read behind %d: %v", after, err)
		}
		if len(page.Receipts) > most+1 {
			l.t.Fatalf("a page of %d receipts, asked for %d", len(page.Receipts), most)
		}
		gap = gap || page.Gap
		for _, r := range page.Receipts {
			if r.Seq <= after || sender != "" && r.Sender != sender {
				l.t.Fatalf("%q of %q at %d, behind %d", r.Content, r.Sender, r.Seq, after)
			}
			after = r.Seq
			texts = append(texts, string(r.Content))
		}
		if !page.More {
			return texts, gap
		}
		if page.Last <= after && len(page.Receipts) == 0 {
			l.t.Fatalf("a page that leads nowhere: %v", page)
		}
		after = max(after, page.Last)
	}
}

func texts(prefix string, n int) (list []string) {
	for i := range n {
		list = append(list, fmt.Sprint(prefix, i))
	}
	return list
}

func receiptsInOrder(t *testing.T, data Data) {
	_, l := openLine(t, data, Limits{})
	want := texts("a", 10)
	for i := range want {
		l.add("a", want[i])
		l.add("", "of nobody")
		l.add("shop/a", "of another")
	}
	for _, most := range []int{1, 3, 100} {
		if got, gap := l.read("a", 0, most); gap || !slices.Equal(got, want) {
			t.Errorf("in pages of %d: %q, gap %v", most, got, gap)
		}
	}
	if got, _ := l.read("", 0, 100); len(got) != 10 {
		t.Errorf("of the sender without a name: %q", got)
	}
	if got, gap := l.read("nobody", 0, 100); gap || got != nil {
		t.Errorf("of nobody: %q, gap %v", got, gap)
	}
}

func receiptsReadTheirWrites(t *testing.T, data Data) {
	_, l := openLine(t, data, Limits{})
	last := uint64(0)
	for i := range 100 {
		text := strconv.Itoa(i)
		place := l.add("a", text)[0]
		if got, _ := l.read("a", last, 10); !slices.Equal(got, []string{text}) {
			t.Fatalf("behind %d: %q, want %q", last, got, text)
		}
		if _, head, err := l.ReceiptsHead(t.Context()); err != nil || head < place {
			t.Fatalf("the head is %d, %v, below %d", head, err, place)
		}
		last = place
	}
}

func receiptsInLine(t *testing.T, data Data) {
	_, l := openLine(t, data, Limits{})
	var want []string
	first := l.add("a", "first")[0]
	for i := range 20 {
		want = append(want, strconv.Itoa(i))
		l.add(fmt.Sprint("sender ", i%3), want[i])
	}
	for _, most := range []int{1, 7, 100} {
		eventually(t, func() string {
			if got, gap := l.follow(first, most); gap || !slices.Equal(got, want) {
				return fmt.Sprintf("in pages of %d: %q, gap %v", most, got, gap)
			}
			return ""
		})
	}
}

func receiptsOfOneAreBounded(t *testing.T, data Data) {
	_, l := openLine(t, data, Limits{MaxReceipts: 10})
	other := l.add("b", "other")[0]
	places := l.add("a", texts("", 15)...)
	if got, gap := l.read("a", 0, 100); !gap || len(got) != 10 {
		t.Errorf("all: %d, gap %v", len(got), gap)
	}
	if _, gap := l.read("a", places[0], 100); !gap {
		t.Error("behind one that is gone: no gap is told")
	}
	if got, gap := l.read("a", places[5], 100); gap || len(got) != 9 {
		t.Errorf("behind the first that is left: %q, gap %v", got, gap)
	}
	if got, gap := l.read("b", 0, 100); gap || len(got) != 1 {
		t.Errorf("of another: %q, gap %v", got, gap)
	}
	eventually(t, func() string {
		page, err := l.FollowReceipts(t.Context(), other, 100, 1<<20)
		if err != nil || !page.Gap || page.Missing != 5 || len(page.Receipts) != 10 {
			return fmt.Sprintf("the line behind the other: %d receipts, %d missing, gap %v, %v", len(page.Receipts), page.Missing, page.Gap, err)
		}
		return ""
	})
}

// receiptsWithoutGap: a place in the line that is another's, and a sender who has had nothing for long.
func receiptsWithoutGap(t *testing.T, data Data) {
	_, l := openLine(t, data, Limits{MaxReceipts: 5})
	l.add("quiet", "1")
	noise := l.add("loud", texts("", 20)...)
	if got, gap := l.read("quiet", noise[19], 10); gap || got != nil {
		t.Errorf("nothing new: %q, gap %v", got, gap)
	}
	l.add("quiet", "2")
	if got, gap := l.read("quiet", noise[0], 10); gap || !slices.Equal(got, []string{"2"}) {
		t.Errorf("behind another's: %q, gap %v", got, gap)
	}
	if got, gap := l.read("new", noise[19], 10); gap || got != nil {
		t.Errorf("of one who has none: %q, gap %v", got, gap)
	}
}

func receiptsReopen(t *testing.T, data Data) {
	o, l := openLine(t, data, Limits{})
	places := l.add("a", "1", "2", "3")
	epoch, head, err := l.ReceiptsHead(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	o.close()
	_, l = openLine(t, data, Limits{})
	again, same, err := l.ReceiptsHead(t.Context())
	if err != nil || again != epoch || same != head || head != places[2] {
		t.Errorf("epoch %d and head %d, were %d and %d; %v", again, same, epoch, head, err)
	}
	if got, gap := l.read("a", places[0], 10); gap || !slices.Equal(got, []string{"2", "3"}) {
		t.Errorf("%q, gap %v", got, gap)
	}
}

func receiptTooLarge(t *testing.T, data Data) {
	_, l := openLine(t, data, Limits{})
	errs := l.AppendReceipts(t.Context(), []store.Receipt{{Sender: "a", Content: []byte("1")}, {Sender: "a", Content: make([]byte, 64<<20)}, {Sender: "b", Content: []byte("2")}})
	if errs[0] != nil || !errors.Is(errs[1], store.ErrReceiptSize) || errs[2] != nil {
		t.Errorf("%v", errs)
	}
}

func receiptDeadlines(t *testing.T, data Data) {
	_, l := openLine(t, data, Limits{})
	l.add("a", "1")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.AppendReceipts(ctx, []store.Receipt{{Sender: "a", Content: []byte("2")}})[0]; err != nil && !errors.Is(err, engine.ErrSpoolDown) {
		t.Errorf("append: %v", err)
	}
	if _, err := l.ReadReceipts(ctx, "a", 0, 1, 1); err != nil && !errors.Is(err, engine.ErrSpoolDown) {
		t.Errorf("read: %v", err)
	}
	if _, _, err := l.ReceiptsHead(ctx); err != nil && !errors.Is(err, engine.ErrSpoolDown) {
		t.Errorf("head: %v", err)
	}
}

func receiptsConcurrent(t *testing.T, data Data) {
	_, l := openLine(t, data, Limits{})
	var wg sync.WaitGroup
	for s := range 4 {
		wg.Go(func() { l.add(fmt.Sprint("sender ", s), texts("", 25)...) })
	}
	wg.Wait()
	for s := range 4 {
		if got, gap := l.read(fmt.Sprint("sender ", s), 0, 10); gap || !slices.Equal(got, texts("", 25)) {
			t.Errorf("sender %d: %q, gap %v", s, got, gap)
		}
	}
	eventually(t, func() string {
		if got, gap := l.follow(l.begin, 10); gap || len(got) != 100 {
			return fmt.Sprintf("%d in the line, gap %v", len(got), gap)
		}
		return ""
	})
}

// eventually tries until wrong says nothing: the line may lag.
func eventually(t *testing.T, wrong func() string) {
	t.Helper()
	for deadline := time.Now().Add(wait); ; time.Sleep(10 * time.Millisecond) {
		text := wrong()
		if text == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(text)
		}
	}
}
