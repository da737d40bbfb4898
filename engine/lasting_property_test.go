package engine

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// clients are the users of a lasting push with what becomes of them at each node, drawn from a seed,
// and the ledger of that.
type clients struct {
	mu sync.Mutex
	// Guarded by mu.
	rng     *rand.Rand
	reached map[string]bool // for certain: has acknowledged, or cannot
	acked   map[string]bool
	barred  map[string]bool // its message id was used for something else
	liars   int
}

// answer is a node's answer to a delivery, with receipts.
func (c *clients) answer(d *Delivery) {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := d.Options()
	switch c.rng.IntN(8) {
	case 0:
		d.Lose(LostStream)
		return
	case 1:
		_, _ = d.Ack(Ack{Refused: true})
		return
	}
	var a Ack
	var unacked []string
	acked := 0
	for _, user := range d.all() {
		switch class := c.rng.IntN(8); {
		case class == 0:
			a.NotHere = append(a.NotHere, user)
		case class == 1:
			a.Failed = append(a.Failed, user)
		case class == 2 && o.MessageID != "":
			a.Reused = append(a.Reused, user)
			c.barred[user] = true
		case class == 3 && o.ClientAck:
			a.Delivered++
			a.Pending++
			unacked = append(unacked, user)
		case class <= 5 && o.ClientAck:
			a.Delivered++
			a.Pending++
			acked++
			c.acked[user], c.reached[user] = true, true
		default:
			a.Delivered++
			c.reached[user] = true
		}
	}
	if o.MessageID != "" {
		a.Duplicates = c.rng.IntN(a.Delivered + 1)
	}
	ways, told := c.rng.IntN(6), 0
	if acked > 0 {
		told = c.rng.IntN(acked + 1)
	}
	if _, err := d.Ack(a); err != nil {
		panic(err)
	}
	if a.Pending == 0 {
		return
	}
	var receipts sync.WaitGroup // they race with each other, and with the clock
	switch ways {
	case 0:
		if told > 0 {
			_ = d.Receipt(told, nil, false)
		}
		receipts.Go(d.LoseReceipts)
	case 1: // and then nothing
		_ = d.Receipt(told, nil, false)
	case 2:
		c.liars++
		receipts.Go(func() { _ = d.Receipt(acked+len(unacked)+1, nil, true) })
	default:
		_ = d.Receipt(told, nil, false)
		receipts.Go(func() { _ = d.Receipt(acked-told, unacked, true) })
		if ways == 5 {
			receipts.Go(d.LoseReceipts)
		}
	}
	receipts.Wait()
}

// TestBooksOfLastingPushesBalance holds every account against what nodes, clients and the store
// did: the sums hold, nothing is claimed that is not certain, and with the store nobody is lost.
func TestBooksOfLastingPushesBalance(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w, spool := newWorld(), newSpool()
		w.config.Spool, w.shards = spool, 1
		e := w.engineFor(rt)
		w.users = drawPlaces(rt, "places")
		users := append(slices.Sorted(maps.Keys(w.users)), "nobody")
		o := Options{
			ClientAck: rapid.Bool().Draw(rt, "ack"), Store: rapid.Bool().Draw(rt, "store"),
			AckTimeout: time.Duration(rapid.IntRange(1, 20).Draw(rt, "ms")) * time.Millisecond,
		}
		if rapid.Bool().Draw(rt, "id") {
			o.MessageID = "m"
		}
		c := &clients{
			rng: rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 3)), reached: map[string]bool{},
			acked: map[string]bool{}, barred: map[string]bool{},
		}
		for _, n := range w.nodes {
			n.answer = c.answer
			n.decline = rapid.SampledFrom([]Reason{Sent, Sent, Sent, DropQueueFull, DropUnreachable}).Draw(rt, "decline "+n.id)
		}
		refused := map[string]bool{}
		for _, user := range users {
			refused[user] = rapid.IntRange(0, 4).Draw(rt, "refuse "+user) == 0
		}
		spool.refuse = func(user string) error {
			if refused[user] {
				return ErrSpoolQuota
			}
			return nil
		}
		spool.silent = rapid.IntRange(0, 9).Draw(rt, "silent") == 0
		var book receiptBook
		if o.MessageID != "" && o.ClientAck && rapid.Bool().Draw(rt, "async") {
			o.Async, o.Receipts = true, &book
		}
		p := with(toUsers(users...), o)
		p.Timeout = time.Duration(rapid.IntRange(5, 100).Draw(rt, "timeout")) * time.Millisecond
		w.config.Timeout = p.Timeout
		e.timeout = p.Timeout
		r, err := e.Do(context.Background(), p)
		if err != nil {
			if o.Store {
				rt.Fatalf("an error of a push with a store: %v", err)
			}
			return // the machine was too slow for the push's time
		}
		if bad := r.check(); bad != nil || r.Targets != len(users) {
			rt.Fatalf("%v: %+v", bad, r)
		}
		if o.Async {
			for book.ended() == 0 {
				time.Sleep(time.Millisecond)
			}
			first := r
			if r, _, _ = book.last(); first.Acked != 0 || r.Delivered > first.Delivered {
				rt.Fatalf("first %+v, then %+v", first, r)
			}
		}
		if err := e.Drain(context.Background()); err != nil { // who tells of receipts may not have left yet
			rt.Fatal(err)
		}
		c.hold(rt, spool, refused, o, users, r)
		if s := e.Stats(); s.InFlight != 0 || s.Async != 0 || s.Receipts != 0 {
			rt.Fatalf("left behind: %+v", s)
		}
	})
}

func (b *receiptBook) ended() int {
	_, _, n := b.last()
	return n
}

// hold holds the final account against the ledger.
func (c *clients) hold(rt *rapid.T, spool *testSpool, refused map[string]bool, o Options, users []string, r Result) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if bad := r.check(); bad != nil || r.Targets != len(users) {
		rt.Fatalf("%v: %+v", bad, r)
	}
	if r.Acked > len(c.acked) {
		rt.Fatalf("%d acknowledged, the account says %+v", len(c.acked), r)
	}
	if o.ClientAck && c.liars == 0 && r.Delivered > len(c.reached) {
		rt.Fatalf("%d reached for certain, the account says %+v", len(c.reached), r)
	}
	blamed, unstored, late := 0, 0, false // the store, or the machine, was too slow for some
	for _, f := range r.NodeFailures {
		switch {
		case strings.HasPrefix(f.Reason, "failed: store: "):
			unstored += f.Users
			late = late || strings.HasSuffix(f.Reason, errNoAnswer.Error())
		case strings.Contains(f.Reason, "internal"):
			rt.Fatalf("the account was mended: %+v", r)
		default:
			blamed += f.Users
		}
	}
	if blamed != r.Failed+r.Unknown {
		rt.Fatalf("node failures name %d users of %d: %+v", blamed, r.Failed+r.Unknown, r)
	}
	kept := 0
	for _, user := range users {
		n := len(spool.of(user))
		kept += n
		switch {
		case n > 1:
			rt.Fatalf("%s is stored %d times", user, n)
		case n == 1 && (!o.Store || c.barred[user]):
			rt.Fatalf("%s is stored", user)
		case o.Store && n == 0 && !late && !refused[user] && !c.barred[user] && !c.reached[user]:
			rt.Fatalf("%s is neither reached nor stored: %+v", user, r)
		}
	}
	if r.Stored > kept || !late && r.Stored != kept {
		rt.Fatalf("%d are stored, the account says %+v", kept, r)
	}
	if !o.Store && unstored > 0 {
		rt.Fatalf("the store is blamed: %+v", r)
	}
}
