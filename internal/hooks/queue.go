package hooks

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/push-manager/push-manager/internal/webhook"
)

const (
	// fileName is the one of all queues.
	fileName = "hooks.db"
	// openWait is how long another process that has the file is waited for.
	openWait = 2 * time.Second
	// maxAge is how long an event is worth sending.
	maxAge = 24 * time.Hour
	// stamp is the length of the time in front of an event on disk, in milliseconds since 1970.
	stamp = 8
	// place is the length of a key: the number of an event.
	place = 8
)

// file is the file of the queues. The library panics of what it cannot read, and a page that is not there is a fault: either is an error
// here, and nothing more is done with the file, which the library may have locked.
type file struct {
	db     *bbolt.DB
	path   string
	broken atomic.Bool
}

// openFile opens the file. One process has it at a time.
func openFile(dir string) (*file, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f := &file{path: filepath.Join(dir, fileName)}
	err := f.guarded(func() (err error) {
		f.db, err = bbolt.Open(f.path, 0o600, &bbolt.Options{Timeout: openWait, FreelistType: bbolt.FreelistMapType})
		return err
	})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("%s: another process has it", dir)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return f, nil
}

func (f *file) guarded(do func() error) (err error) {
	if f.broken.Load() {
		return f.damaged("see above")
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if v := recover(); v != nil {
			f.broken.Store(true)
			err = f.damaged(v)
		}
	}()
	return do()
}

func (f *file) damaged(why any) error {
	return fmt.Errorf("%s is damaged, move it away: %.200q", f.path, fmt.Sprint(why))
}

func (f *file) update(do func(tx *bbolt.Tx) error) error {
	return f.guarded(func() error { return f.db.Update(do) })
}

func (f *file) view(do func(tx *bbolt.Tx) error) error {
	return f.guarded(func() error { return f.db.View(do) })
}

// close leaves a file that is broken to the end of the process.
func (f *file) close() error {
	if f.broken.Load() {
		return nil
	}
	return f.guarded(f.db.Close)
}

// forget deletes the queues of hooks that are not among names: they were taken out of HOOKS_FILE while nobody read it. It returns
// how many events were in them.
func (f *file) forget(names []string) (events int, err error) {
	err = f.update(func(tx *bbolt.Tx) error {
		events = 0
		var gone [][]byte
		if err := tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
			if !slices.Contains(names, string(name)) {
				gone, events = append(gone, bytes.Clone(name)), events+b.Stats().KeyN
			}
			return nil
		}); err != nil {
			return err
		}
		for _, name := range gone {
			if err := tx.DeleteBucket(name); err != nil {
				return err
			}
		}
		return nil
	})
	return events, err
}

// queue is the events of a hook that the receiver has not taken, on disk: a bucket with rising keys. It is a webhook.Source and its Turns.
type queue struct {
	// Static.
	file *file
	name []byte // of the bucket
	most int64  // bytes

	mu sync.Mutex
	// Guarded by mu.
	events int
	bytes  int64
}

// openQueue makes the bucket, or counts what is in it: so a file that is damaged is an error of the start.
func openQueue(f *file, name string, most int64) (*queue, error) {
	q := &queue{file: f, name: []byte(name), most: most}
	err := f.update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(q.name)
		if err != nil {
			return err
		}
		return b.ForEach(func(key, value []byte) error {
			if len(key) != place || len(value) < stamp {
				return f.damaged("an event has no number or no time")
			}
			q.events++
			q.bytes += int64(len(value))
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("queue %s: %w", name, err)
	}
	return q, nil
}

// delete forgets all of it.
func (q *queue) delete() error {
	return q.file.update(func(tx *bbolt.Tx) error { return tx.DeleteBucket(q.name) })
}

// size is what waits.
func (q *queue) size() (events int, bytes int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.events, q.bytes
}

// change is what a transaction adds to the size, once it is committed.
type change struct {
	events int
	bytes  int64
}

func (q *queue) add(c change) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.events += c.events
	q.bytes += c.bytes
}

// append puts events behind those that wait. The oldest go where there is no room: their places are missing then, which Read tells. The
// caller adds the change once tx is committed. A bucket that has been deleted takes nothing.
func (q *queue) append(tx *bbolt.Tx, now time.Time, events [][]byte) (c change, err error) {
	b := tx.Bucket(q.name)
	if b == nil {
		return c, nil
	}
	for _, e := range events {
		seq, err := b.NextSequence()
		if err != nil {
			return c, err
		}
		value := append(binary.BigEndian.AppendUint64(make([]byte, 0, stamp+len(e)), uint64(now.UnixMilli())), e...)
		if err := b.Put(binary.BigEndian.AppendUint64(nil, seq), value); err != nil {
			return c, err
		}
		c.events++
		c.bytes += int64(len(value))
	}
	_, bytes := q.size()
	cursor := b.Cursor()
	for key, value := cursor.First(); key != nil && bytes+c.bytes > q.most; key, value = cursor.First() {
		c.events--
		c.bytes -= int64(len(value))
		if err := cursor.Delete(); err != nil {
			return c, err
		}
	}
	return c, nil
}

// drop removes from the front what leaves tells.
func (q *queue) drop(leaves func(seq uint64, value []byte) bool) error {
	var c change
	err := q.file.update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(q.name)
		if b == nil {
			return nil
		}
		cursor := b.Cursor()
		for key, value := cursor.First(); key != nil && leaves(binary.BigEndian.Uint64(key), value); key, value = cursor.First() {
			c.events--
			c.bytes -= int64(len(value))
			if err := cursor.Delete(); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		q.add(c)
	}
	return err
}

// Read implements webhook.Source.
func (q *queue) Read(_ context.Context, after webhook.Position, most, bytes int) (webhook.Page, error) {
	page := webhook.Page{Last: after}
	old := false
	read := func(tx *bbolt.Tx) error {
		page, old = webhook.Page{Last: after}, false
		b := tx.Bucket(q.name)
		if b == nil {
			return nil
		}
		cursor := b.Cursor()
		for key, value := cursor.Seek(binary.BigEndian.AppendUint64(nil, after.Seq+1)); key != nil && len(page.Receipts) < most && bytes > 0; key, value = cursor.Next() {
			seq := binary.BigEndian.Uint64(key)
			if len(value) < stamp || isOld(value) {
				old = true
				return nil
			}
			page.Missed += seq - page.Last.Seq - 1
			page.Last.Seq = seq
			page.Receipts = append(page.Receipts, webhook.Receipt{Content: append([]byte(nil), value[stamp:]...)}) // it is tx's
			bytes -= len(value)
		}
		return nil
	}
	err := q.file.view(read)
	if err == nil && old && len(page.Receipts) == 0 {
		if err = q.drop(func(_ uint64, value []byte) bool { return len(value) < stamp || isOld(value) }); err == nil {
			err = q.file.view(read)
		}
	}
	if err != nil {
		return webhook.Page{}, fmt.Errorf("read the queue: %w", err)
	}
	return page, nil
}

// isOld tells whether a value is not worth sending any more. Only a clock outlives a process.
func isOld(value []byte) bool {
	return time.Since(time.UnixMilli(int64(binary.BigEndian.Uint64(value)))) > maxAge
}

// Head implements webhook.Source.
func (q *queue) Head(ctx context.Context) (webhook.Position, error) {
	p, _, err := turn{q}.Position(ctx)
	return p, err
}

// Next implements webhook.Turns: it is always this process's turn.
func (q *queue) Next(ctx context.Context) (webhook.Turn, error) { return turn{q}, ctx.Err() }

type turn struct{ *queue }

func (turn) Over() <-chan struct{} { return nil }
func (turn) End(context.Context)   {}

// Position is in front of the first one that waits.
func (t turn) Position(context.Context) (p webhook.Position, known bool, err error) {
	err = t.file.view(func(tx *bbolt.Tx) error {
		b := tx.Bucket(t.name)
		if b == nil {
			return nil
		}
		p.Seq = b.Sequence()
		if key, _ := b.Cursor().First(); key != nil {
			p.Seq = binary.BigEndian.Uint64(key) - 1
		}
		return nil
	})
	return p, true, err
}

// Keep forgets what is up to the position.
func (t turn) Keep(_ context.Context, p webhook.Position) error {
	if err := t.drop(func(seq uint64, _ []byte) bool { return seq <= p.Seq }); err != nil {
		return fmt.Errorf("take from the queue: %w", err)
	}
	return nil
}
