package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/store"
)

// wait bounds each test. Slow machines keep their stores waiting.
const wait = time.Minute

// Limits are those of a store. Zero is the implementation's default, which keeps at least 1,000 messages for a user.
type Limits struct {
	MaxPerUser, MaxBytes, MaxReceipts int
}

// Data is what a store keeps, across the times that it is open.
type Data interface {
	// Open opens a store on the data. The test closes it.
	Open(t *testing.T, limits Limits) store.Store
	// Files is a directory with all files of the data, "" for none that can be looked into.
	Files() string
}

// Run tests an implementation. empty makes data with nothing in it; those of an earlier test are not used any more.
func Run(t *testing.T, empty func(t *testing.T) Data) {
	for name, test := range map[string]func(t *testing.T, data Data){
		"EachUserGetsTheirsInOrder":                    orderPerUser,
		"ReadHasWhatWasAppendedBefore":                 readsItsWrites,
		"PagesEndAtMostMessagesAndBytes":               pages,
		"AMessageComesBackAsItWas":                     everyField,
		"TheMessageAboveTheQuotaIsRefused":             quota,
		"AFullStoreRefusesAndLosesNothing":             full,
		"NothingIsReadAfterItsExpiry":                  expiry,
		"OfACollapseKeyTheLatestIsRead":                collapse,
		"AnyTellsWhoHasSomething":                      anything,
		"TrimForgetsUpToAPlace":                        trim,
		"ForgetLeavesNothingOfAUser":                   forget,
		"ConcurrentAppendsAreAllThere":                 concurrent,
		"UsersAreToldApartWhateverTheirIds":            hostileIDs,
		"LargePayloadsComeBack":                        large,
		"WhatIsStoredOutlivesTheStore":                 reopen,
		"CallsWhoseTimeIsUpReturn":                     deadlines,
		"ReadsWhileOthersAppendSeeOrderWithoutMissing": readWhileAppending,
	} {
		t.Run(name, func(t *testing.T) { test(t, empty(t)) })
	}
}

// open opens a store that is closed when the test ends.
func open(t *testing.T, data Data, limits Limits) *opened {
	t.Helper()
	o := &opened{t: t, Store: data.Open(t, limits)}
	t.Cleanup(o.close)
	return o
}

type opened struct {
	store.Store

	t      *testing.T
	closed bool
}

func (o *opened) close() {
	o.t.Helper()
	if o.closed {
		return
	}
	o.closed = true
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	if err := o.Close(ctx); err != nil {
		o.t.Errorf("close: %v", err)
	}
}

// entry is a message for a user that lasts for an hour.
func entry(user, payload string) store.Entry {
	return store.Entry{User: user, Message: &engine.Stored{MessageID: "m", Payload: []byte(payload)}, Expires: time.Now().Add(time.Hour)}
}

// add appends entries, all of which must be stored.
func (o *opened) add(entries ...store.Entry) {
	o.t.Helper()
	ctx, cancel := context.WithTimeout(o.t.Context(), wait)
	defer cancel()
	for part := range slices.Chunk(entries, 500) {
		for i, err := range o.Append(ctx, part) {
			if err != nil {
				o.t.Fatalf("append for %q: %v", part[i].User, err)
			}
		}
	}
}

// read returns the payloads that wait for a user behind a place, page by page, and the last place.
func (o *opened) read(user string, after uint64, most, size int) (payloads []string, last uint64) {
	o.t.Helper()
	ctx, cancel := context.WithTimeout(o.t.Context(), wait)
	defer cancel()
	for last = after; ; {
		page, more, err := o.Read(ctx, user, last, most, size)
		if err != nil {
			o.t.Fatalf("read %q: %v", user, err)
		}
		if len(page) > most {
			o.t.Fatalf("a page of %d messages, asked for %d", len(page), most)
		}
		sum := 0
		for _, e := range page {
			if e.User != user {
				o.t.Fatalf("read %q: got a message for %q", user, e.User)
			}
			if e.Seq <= last {
				o.t.Fatalf("read %q: place %d follows %d", user, e.Seq, last)
			}
			last, sum = e.Seq, sum+len(e.Message.Payload)
			payloads = append(payloads, string(e.Message.Payload))
		}
		if len(page) > 1 && sum > size {
			o.t.Fatalf("a page of %d bytes, asked for %d", sum, size)
		}
		if !more {
			return payloads, last
		}
		if len(page) == 0 {
			o.t.Fatalf("read %q: an empty page, and more", user)
		}
	}
}

func (o *opened) all(user string) []string {
	o.t.Helper()
	payloads, _ := o.read(user, 0, 100, 1<<20)
	return payloads
}

func (o *opened) want(user string, want ...string) {
	o.t.Helper()
	if got := o.all(user); !slices.Equal(got, want) {
		o.t.Errorf("%.80q has %s, want %s", user, brief(got), brief(want))
	}
}

func brief(payloads []string) string {
	if len(payloads) > 12 {
		return fmt.Sprintf("%d messages, %.20q to %.20q", len(payloads), payloads[0], payloads[len(payloads)-1])
	}
	return fmt.Sprintf("%.200q", payloads)
}

func numbered(from, to int) (payloads []string) {
	for i := from; i < to; i++ {
		payloads = append(payloads, fmt.Sprintf("message %d", i))
	}
	return payloads
}

func entries(user string, payloads []string) (all []store.Entry) {
	for _, payload := range payloads {
		all = append(all, entry(user, payload))
	}
	return all
}

func orderPerUser(t *testing.T, data Data) {
	o := open(t, data, Limits{})
	var mixed []store.Entry
	for i := range 300 {
		mixed = append(mixed, entry(fmt.Sprintf("user %d", i%7), fmt.Sprintf("message %d", i)))
	}
	for part := range slices.Chunk(mixed, 64) {
		o.add(part...)
		for i := range part {
			if part[i].Seq == 0 {
				t.Fatal("an entry that was stored has no place")
			}
		}
	}
	places := map[string][]uint64{}
	for _, e := range mixed {
		places[e.User] = append(places[e.User], e.Seq)
	}
	for u := range 7 {
		user := fmt.Sprintf("user %d", u)
		if !slices.IsSorted(places[user]) {
			t.Errorf("places of %q do not rise: %v", user, places[user])
		}
		var want []string
		for i := u; i < 300; i += 7 {
			want = append(want, fmt.Sprintf("message %d", i))
		}
		o.want(user, want...)
		middle := places[user][10]
		if got, last := o.read(user, middle, 5, 1<<20); !slices.Equal(got, want[11:]) || last != places[user][len(want)-1] {
			t.Errorf("%q behind place %d has %s up to %d", user, middle, brief(got), last)
		}
	}
	o.want("nobody")
	if got, _ := o.read("user 0", 1<<62, 10, 1<<20); len(got) != 0 {
		t.Errorf("behind the last place there is %q", got)
	}
}

func readsItsWrites(t *testing.T, data Data) {
	o := open(t, data, Limits{})
	var want []string
	for i := range 200 {
		want = append(want, fmt.Sprintf("message %d", i))
		o.add(entry("u", want[i]))
		if i%10 == 0 {
			o.want("u", want...)
		}
		got, err := o.Any(t.Context(), []string{"u"})
		if err != nil || !got[0] {
			t.Fatalf("any: %v, %v", got, err)
		}
	}
}

func pages(t *testing.T, data Data) {
	o := open(t, data, Limits{})
	want := numbered(0, 25)
	o.add(entries("u", want)...)
	size := len("message 00")
	for _, test := range []struct{ most, bytes, first int }{
		{10, 1 << 20, 10}, {25, 1 << 20, 25}, {24, 1 << 20, 24}, {100, 1 << 20, 25}, {100, 3 * size, 3}, {100, 1, 1}, {100, 0, 1}, {1, 0, 1},
	} {
		page, more, err := o.Read(t.Context(), "u", 0, test.most, test.bytes)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) != test.first || more != (test.first < len(want)) {
			t.Errorf("%d messages, %d bytes: a page of %d, more %v", test.most, test.bytes, len(page), more)
		}
		if got, _ := o.read("u", 0, test.most, test.bytes); !slices.Equal(got, want) {
			t.Errorf("%d messages, %d bytes: %s in all", test.most, test.bytes, brief(got))
		}
	}
}

func everyField(t *testing.T, data Data) {
	o := open(t, data, Limits{})
	expires := time.Now().Add(time.Hour).Truncate(time.Millisecond)
	for i, m := range []engine.Stored{
		{MessageID: "id", Sender: "tenant/caller", PayloadHash: 1<<32 - 1, Payload: []byte("payload\x00\xff"), Room: "room", CollapseKey: "key"},
		{Payload: []byte{}},
	} {
		user := fmt.Sprintf("user %d", i)
		o.add(store.Entry{User: user, Message: &m, Expires: expires})
		page, _, err := o.Read(t.Context(), user, 0, 10, 1<<20)
		if err != nil || len(page) != 1 {
			t.Fatalf("read: %d messages, %v", len(page), err)
		}
		got := page[0]
		if !got.Expires.Equal(expires) || got.Seq == 0 || got.Message.MessageID != m.MessageID || got.Message.Sender != m.Sender ||
			got.Message.PayloadHash != m.PayloadHash || !bytes.Equal(got.Message.Payload, m.Payload) || got.Message.Room != m.Room ||
			got.Message.CollapseKey != m.CollapseKey {
			t.Errorf("stored %+v, read %+v of %+v", m, got.Message, got)
		}
	}
}

func quota(t *testing.T, data Data) {
	o := open(t, data, Limits{MaxPerUser: 1000})
	all := entries("u", numbered(0, 1001))
	refused := 0
	for part := range slices.Chunk(all, 500) {
		for _, err := range o.Append(t.Context(), part) {
			if err == nil {
				continue
			}
			refused++
			if !errors.Is(err, engine.ErrSpoolQuota) || err.Error() != "user has 1000 messages waiting" {
				t.Errorf("above the quota: %v", err)
			}
		}
	}
	if refused != 1 {
		t.Errorf("%d of 1,001 messages were refused", refused)
	}
	o.add(entry("another", "message"))
	o.want("another", "message")
	want := numbered(0, 1000)
	o.want("u", want...)
	_, last := o.read("u", 0, 100, 1<<20)
	page, _, err := o.Read(t.Context(), "u", 0, 10, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Trim(t.Context(), "u", page[9].Seq); err != nil {
		t.Fatal(err)
	}
	o.add(entry("u", "later"))
	o.want("u", append(want[10:], "later")...)
	if got, _ := o.read("u", last, 10, 1<<20); !slices.Equal(got, []string{"later"}) {
		t.Errorf("behind the last place there is %q", got)
	}
}

func full(t *testing.T, data Data) {
	o := open(t, data, Limits{MaxBytes: 1 << 20})
	payload := strings.Repeat("x", 8<<10)
	stored, refused := map[string][]string{}, 0
	for i := range 400 {
		user := fmt.Sprintf("user %d", i%10)
		e := entry(user, fmt.Sprintf("%d %s", i, payload))
		switch err := o.Append(t.Context(), []store.Entry{e})[0]; {
		case err == nil:
			stored[user] = append(stored[user], string(e.Message.Payload))
		case errors.Is(err, engine.ErrSpoolFull):
			refused++
		default:
			t.Fatalf("append: %v", err)
		}
	}
	if refused == 0 || len(stored) == 0 {
		t.Errorf("%d were refused, and %d users have something", refused, len(stored))
	}
	for user, want := range stored {
		o.want(user, want...)
		if _, err := o.Forget(t.Context(), user); err != nil {
			t.Fatal(err)
		}
	}
	o.add(entry("user 0", "there is room again"))
}

func expiry(t *testing.T, data Data) {
	o := open(t, data, Limits{})
	for i := range 30 {
		e := entry("u", fmt.Sprintf("message %d", i))
		if i%3 != 0 {
			e.Expires = time.Now().Add(-time.Second + time.Duration(i%3)*900*time.Millisecond) // by the time it is read: gone, or soon
		}
		o.add(e)
	}
	for began := time.Now(); time.Since(began) < 1500*time.Millisecond; {
		page, _, err := o.Read(t.Context(), "u", 0, 100, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page {
			if late := began.Sub(e.Expires); late > 0 {
				t.Fatalf("%q was read although it had expired %v before", e.Message.Payload, late)
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	var want []string
	for i := 0; i < 30; i += 3 {
		want = append(want, fmt.Sprintf("message %d", i))
	}
	o.want("u", want...)
	got, _ := o.read("u", 0, 1, 1<<20) // what has expired between them takes no place in a page
	if !slices.Equal(got, want) {
		t.Errorf("one at a time: %q", got)
	}
}

func collapse(t *testing.T, data Data) {
	o := open(t, data, Limits{MaxPerUser: 20})
	keyed := func(user, key, payload string) store.Entry {
		e := entry(user, payload)
		e.Message.CollapseKey = key
		return e
	}
	for i := range 50 { // more often than the quota of other messages
		o.add(keyed("u", "score", fmt.Sprintf("score %d", i)))
		if i%10 == 0 {
			o.add(entry("u", fmt.Sprintf("message %d", i)), keyed("u", "mood", fmt.Sprintf("mood %d", i)), keyed("v", "score", fmt.Sprintf("of v %d", i)))
		}
	}
	got := o.all("u")
	slices.Sort(got)
	if want := []string{"message 0", "message 10", "message 20", "message 30", "message 40", "mood 40", "score 49"}; !slices.Equal(got, want) {
		t.Errorf("u has %q, want %q", got, want)
	}
	o.want("v", "of v 40")
	one, _ := o.read("u", 0, 1, 1<<20)
	if slices.Sort(one); !slices.Equal(one, got) {
		t.Errorf("one at a time u has %q, want %q", one, got)
	}
	// A later one is found behind whatever was read before.
	_, last := o.read("u", 0, 100, 1<<20)
	o.add(keyed("u", "score", "score 50"))
	if got, _ := o.read("u", last, 100, 1<<20); !slices.Equal(got, []string{"score 50"}) {
		t.Errorf("behind place %d there is %q", last, got)
	}
	for _, key := range []string{"a.b", "*", ">", " ", "\x00", strings.Repeat("k", 64), "m"} {
		o.add(keyed("w", key, "first of "+key), keyed("w", key, "second of "+key))
	}
	if got := o.all("w"); len(got) != 7 || slices.ContainsFunc(got, func(s string) bool { return !strings.HasPrefix(s, "second") }) {
		t.Errorf("w has %q", got)
	}
}

func anything(t *testing.T, data Data) {
	o := open(t, data, Limits{})
	var users []string
	for i := range 1000 {
		users = append(users, fmt.Sprintf("user %d", i))
	}
	check := func(has func(i int) bool) {
		t.Helper()
		got, err := o.Any(t.Context(), users)
		if err != nil || len(got) != len(users) {
			t.Fatalf("any: %d answers, %v", len(got), err)
		}
		for i, something := range got {
			if has(i) && !something { // "may have" is allowed, "has not" is not
				t.Fatalf("%q has something, any says no", users[i])
			}
			if !has(i) && something {
				t.Errorf("%q has nothing, any says yes", users[i])
			}
		}
	}
	check(func(int) bool { return false })
	var some []store.Entry
	for i := 0; i < 1000; i += 13 {
		some = append(some, entry(users[i], "message"))
	}
	o.add(some...)
	check(func(i int) bool { return i%13 == 0 })
	var keyed []store.Entry
	for i := 5; i < 1000; i += 100 {
		e := entry(users[i], "message")
		e.Message.CollapseKey = "key"
		keyed = append(keyed, e)
	}
	o.add(keyed...)
	check(func(i int) bool { return i%13 == 0 || i%100 == 5 })
	if _, err := o.Forget(t.Context(), users[13]); err != nil {
		t.Fatal(err)
	}
	check(func(i int) bool { return i != 13 && i%13 == 0 || i%100 == 5 })
	got, err := o.Any(t.Context(), []string{users[0], users[1], users[0]})
	if err != nil || !slices.Equal(got, []bool{true, false, true}) {
		t.Errorf("somebody who is asked for twice: %v, %v", got, err)
	}
	if got, err := o.Any(t.Context(), nil); err != nil || len(got) != 0 {
		t.Errorf("nobody: %v, %v", got, err)
	}
	// What is large is found, too.
	var large []store.Entry
	for i := 1; i < 60; i += 13 {
		large = append(large, entry(users[i], strings.Repeat("x", 256<<10)))
	}
	o.add(large...)
	answers, err := o.Any(t.Context(), users)
	for i := range users {
		if (i%13 == 0 && i != 13 || i < 60 && i%13 == 1) && !answers[i] {
			t.Errorf("%q has something, any says no (%v)", users[i], err)
		}
	}
}

func trim(t *testing.T, data Data) {
	o := open(t, data, Limits{})
	o.add(entries("u", numbered(0, 10))...)
	o.add(entries("v", numbered(0, 10))...)
	keyed := entry("u", "keyed")
	keyed.Message.CollapseKey = "key"
	o.add(keyed)
	page, _, err := o.Read(t.Context(), "u", 0, 100, 1<<20)
	if err != nil || len(page) != 11 {
		t.Fatalf("read: %d, %v", len(page), err)
	}
	for range 2 { // twice is as good as once
		if err := o.Trim(t.Context(), "u", page[3].Seq); err != nil {
			t.Fatal(err)
		}
		o.want("u", append(numbered(4, 10), "keyed")...)
	}
	if err := o.Trim(t.Context(), "u", page[0].Seq); err != nil {
		t.Fatal(err)
	}
	o.want("u", append(numbered(4, 10), "keyed")...)
	o.want("v", numbered(0, 10)...)
	if err := o.Trim(t.Context(), "u", page[10].Seq); err != nil {
		t.Fatal(err)
	}
	o.want("u")
	o.add(entry("u", "later"))
	o.want("u", "later")
	if got, _ := o.read("u", page[10].Seq, 10, 1<<20); !slices.Equal(got, []string{"later"}) {
		t.Errorf("behind what was trimmed there is %q", got)
	}
	if err := o.Trim(t.Context(), "nobody", 5); err != nil {
		t.Errorf("trim nobody: %v", err)
	}
}

func forget(t *testing.T, data Data) {
	o := open(t, data, Limits{})
	const secret = "the secret of somebody to forget"
	for i := range 40 { // among others, and behind what a file holds
		o.add(entry("forgotten-user-id", fmt.Sprintf("%s %d", secret, i)), entry("other", fmt.Sprintf("message %d", i)))
	}
	keyed := entry("forgotten-user-id", secret+" with a key")
	keyed.Message.CollapseKey = "key"
	o.add(keyed)
	count, err := o.Forget(t.Context(), "forgotten-user-id")
	if err != nil || count != 41 {
		t.Errorf("forget: %d, %v, want 41", count, err)
	}
	o.want("forgotten-user-id")
	o.want("other", numbered(0, 40)...)
	if got, err := o.Any(t.Context(), []string{"forgotten-user-id", "other"}); err != nil || got[0] || !got[1] {
		t.Errorf("any: %v, %v", got, err)
	}
	if count, err := o.Forget(t.Context(), "forgotten-user-id"); err != nil || count != 0 {
		t.Errorf("forget again: %d, %v", count, err)
	}
	if count, err := o.Forget(t.Context(), "nobody"); err != nil || count != 0 {
		t.Errorf("forget nobody: %d, %v", count, err)
	}
	o.close()
	if data.Files() == "" {
		return
	}
	if !found(t, data.Files(), "other") {
		t.Error("the files do not even hold what is kept: this test looks at the wrong ones")
	}
	for _, text := range []string{secret, "forgotten-user-id"} {
		if found(t, data.Files(), text) {
			t.Errorf("%q is still in the files", text)
		}
	}
}

// found tells whether a text is in any file.
func found(t *testing.T, dir, text string) (yes bool) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path) //nolint:gosec // a file of the test's own
		yes = yes || bytes.Contains(content, []byte(text))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return yes
}

func concurrent(t *testing.T, data Data) {
	o := open(t, data, Limits{})
	const writers, each = 16, 60
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				batch := []store.Entry{entry(fmt.Sprintf("own %d", w), fmt.Sprintf("message %d", i)), entry("shared", fmt.Sprintf("%d of %d", i, w))}
				for _, err := range o.Append(t.Context(), batch) {
					if err != nil {
						t.Errorf("append: %v", err)
					}
				}
			}
		})
	}
	wg.Wait()
	for w := range writers {
		o.want(fmt.Sprintf("own %d", w), numbered(0, each)...)
	}
	next := make([]int, writers)
	for _, payload := range o.all("shared") {
		var i, w int
		if _, err := fmt.Sscanf(payload, "%d of %d", &i, &w); err != nil {
			t.Fatal(err)
		}
		if next[w] != i {
			t.Errorf("of writer %d, message %d comes where %d should", w, i, next[w])
		}
		next[w] = i + 1
	}
	for w, n := range next {
		if n != each {
			t.Errorf("of writer %d there are %d messages", w, n)
		}
	}
}

func hostileIDs(t *testing.T, data Data) {
	o := open(t, data, Limits{})
	ids := []string{
		"a", "a.b", "a.b.c", "a.*", "*", ">", "a.>", "$JS.API.STREAM.DELETE.X", "pmi.0.x", " ", "a b", "\t", "..", ".", "/", "tenant:a", "tenant/a", "tenant\x00a",
		"\x00", "\xff\xfe", "Ä", "A\u0308", "日本語", strings.Repeat("x", 256), strings.Repeat("x", 255), strings.Repeat(".", 256), strings.Repeat("é", 128), "A", "{}", `"`, "\r\n",
		"head", "m", "NATS/1.0\r\nStatus: 204\r\n\r\n",
	}
	var all []store.Entry
	for _, id := range ids {
		all = append(all, entry(id, "first of "+id), entry(id, "second of "+id))
	}
	o.add(all...)
	for _, id := range ids {
		o.want(id, "first of "+id, "second of "+id)
	}
	if got, err := o.Any(t.Context(), ids); err != nil || slices.Contains(got, false) {
		t.Errorf("any: %v, %v", got, err)
	}
	for i, id := range ids {
		if count, err := o.Forget(t.Context(), id); err != nil || count != 2 {
			t.Errorf("forget %q: %d, %v", id, count, err)
		}
		for _, other := range ids[i+1:] {
			o.want(other, "first of "+other, "second of "+other)
		}
	}
}

func large(t *testing.T, data Data) {
	o := open(t, data, Limits{})
	var want []string
	for i := range 6 {
		want = append(want, fmt.Sprintf("%d%s", i, strings.Repeat(string(rune('a'+i)), 256<<10-1)))
	}
	o.add(entries("u", want)...)
	o.want("u", want...)
	page, more, err := o.Read(t.Context(), "u", 0, 100, 256<<10)
	if err != nil || len(page) != 1 || !more {
		t.Errorf("a page as large as one of them: %d, %v, %v", len(page), more, err)
	}
	// One that is too large is refused, and does no harm.
	if err := o.Append(t.Context(), []store.Entry{entry("u", strings.Repeat("x", 65<<20))})[0]; err == nil {
		t.Error("65 MiB were stored")
	}
	o.add(entry("u", "small"))
	o.want("u", append(want, "small")...)
}

func reopen(t *testing.T, data Data) {
	o := open(t, data, Limits{})
	o.add(entries("u", numbered(0, 50))...)
	_, last := o.read("u", 0, 20, 1<<20)
	if err := o.Trim(t.Context(), "u", last-45); err != nil {
		t.Fatal(err)
	}
	o.add(entry("v", "message"))
	had := o.all("u")
	if _, err := o.Forget(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
	o.close()
	o = open(t, data, Limits{})
	o.want("u", had...)
	o.want("v")
	o.add(entry("u", "later"))
	if got, _ := o.read("u", last, 10, 1<<20); !slices.Equal(got, []string{"later"}) {
		t.Errorf("behind the last place before there is %q", got)
	}
	if o.Durability() < store.OfProcess || o.Durability() > store.OfOneOfSeveral {
		t.Errorf("durability %d", o.Durability())
	}
}

func deadlines(t *testing.T, data Data) {
	o := open(t, data, Limits{})
	o.add(entry("u", "message"))
	over, cancel := context.WithCancel(t.Context())
	cancel()
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		for i, err := range o.Append(over, []store.Entry{entry("u", "late"), entry("v", "late")}) {
			if err != nil && !errors.Is(err, engine.ErrSpoolDown) {
				t.Errorf("append %d: %v", i, err)
			}
		}
		if _, _, err := o.Read(over, "u", 0, 10, 1<<20); err == nil {
			t.Error("read: no error")
		}
		if _, err := o.Any(over, []string{"u"}); err == nil {
			t.Error("any: no error")
		}
		if err := o.Trim(over, "u", 1<<40); err == nil {
			t.Error("trim: no error")
		}
		if _, err := o.Forget(over, "u"); err == nil {
			t.Error("forget: no error")
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	select {
	case <-returned:
	case <-ctx.Done():
		t.Fatal("calls do not return")
	}
	if got := o.all("u"); len(got) == 0 || got[0] != "message" {
		t.Errorf("afterwards there is %q", got)
	}
}

func readWhileAppending(t *testing.T, data Data) {
	o := open(t, data, Limits{})
	const total = 600
	appended := make(chan int, total) // those whose Append has returned
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(appended)
		for i := range total {
			if err := o.Append(t.Context(), []store.Entry{entry("u", fmt.Sprintf("message %d", i))})[0]; err != nil {
				t.Errorf("append: %v", err)
				return
			}
			appended <- i + 1
		}
	})
	least := 0
	for n := range appended {
		least = n
		for len(appended) > 0 {
			least = <-appended
		}
		got := o.all("u")
		if len(got) < least || !slices.Equal(got, numbered(0, len(got))) {
			t.Fatalf("%d were appended, %s are there", least, brief(got))
		}
	}
	wg.Wait()
	if least != total {
		t.Errorf("%d of %d were appended", least, total)
	}
}
