package jetstream

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/store"
)

const (
	// logGrace is how much longer than MaxTTL a log keeps a message: clocks differ, and what is dropped for its age has to be expired.
	logGrace = time.Minute
	// maxLogPart is the largest message of a log, as a part of what its partition keeps.
	maxLogPart = 4
	// followInterval is the pause between two looks at a partition that is followed. A Heads that tells of more ends it.
	followInterval = 250 * time.Millisecond
	// followBytes bounds what is read at once from a partition that is followed.
	followBytes = 1 << 20
)

var (
	errRenewed = errors.New("the logs of rooms were made anew")
	errBehind  = errors.New("the log ends before this place")
)

// logStreams are the streams of rooms, by partition.
type logStreams struct {
	streams []jetstream.Stream
	created []time.Time
	epoch   uint64 // of created
	heads   []head
}

// head is the last place of a partition as Heads has told it.
type head struct {
	mu     sync.Mutex
	seq    uint64        // guarded by mu
	raised chan struct{} // closed when seq rises; nil: nobody waits
}

func newLogStreams(streams []jetstream.Stream, created []time.Time) *logStreams {
	sum := sha256.New()
	for _, at := range created { // with their number: there is one for each
		sum.Write(binary.BigEndian.AppendUint64(nil, uint64(at.UnixNano())))
	}
	return &logStreams{streams: streams, created: created, epoch: max(binary.BigEndian.Uint64(sum.Sum(nil)), 1), heads: make([]head, len(streams))}
}

// prepareLogs is prepare for the streams of rooms.
func (s *Store) prepareLogs(ctx context.Context) error {
	streams, created := make([]jetstream.Stream, s.cfg.Partitions), make([]time.Time, s.cfg.Partitions)
	for p := range streams {
		var err error
		if streams[p], err = s.createStream(ctx, s.logConfig(p)); err != nil {
			return err
		}
		created[p] = streams[p].CachedInfo().Created
	}
	if was := s.logs.Load(); was == nil || !slices.EqualFunc(was.created, created, time.Time.Equal) {
		s.logs.Store(newLogStreams(streams, created))
	}
	return nil
}

// logConfig is a partition's of rooms. Nothing leaves it but from its beginning, and the oldest of a room: that is how ReadLog
// knows what may be missing. So messages have no TTL of their own there.
func (s *Store) logConfig(p int) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:              logName(p),
		Description:       "messages to rooms",
		Subjects:          []string{logPrefix(p) + ">"},
		Storage:           jetstream.FileStorage,
		Replicas:          s.cfg.Replicas,
		Discard:           jetstream.DiscardOld,
		MaxMsgsPerSubject: int64(s.cfg.MaxPerRoom),
		MaxBytes:          s.logPartBytes(),
		MaxAge:            s.cfg.MaxTTL + logGrace,
		AllowDirect:       true,
		Duplicates:        100 * time.Millisecond,
		Metadata:          map[string]string{partitionsKey: strconv.Itoa(s.cfg.Partitions)},
	}
}

func (s *Store) logPartBytes() int64 { return int64(max(s.cfg.logBytes()/s.cfg.Partitions, 1)) }

func logName(p int) string   { return "PM_LOG_" + strconv.Itoa(p) }
func logPrefix(p int) string { return "pmg." + strconv.Itoa(p) + "." }

// logPlace is where a room's messages are.
func (s *Store) logPlace(room string) (p int, subject string) {
	p, token := s.hash(room)
	return p, logPrefix(p) + token
}

func (s *Store) readyLogs() (*logStreams, error) {
	logs := s.logs.Load()
	if logs == nil {
		return nil, engine.ErrSpoolDown
	}
	return logs, nil
}

// AppendLog implements store.Logs.
func (s *Store) AppendLog(ctx context.Context, entries []store.LogEntry) []error {
	logs, err := s.readyLogs()
	if err != nil {
		return slices.Repeat([]error{err}, len(entries))
	}
	// The stream would take a message that is larger than itself, and drop it at once.
	most := s.logPartBytes() / maxLogPart
	message := func(i int) *nats.Msg {
		e := &entries[i]
		_, subject := s.logPlace(e.Message.Room)
		return &nats.Msg{Subject: subject, Data: encode("", e.Message, e.Expires)}
	}
	return s.publish(ctx, len(entries), most, message, func(i int, seq uint64) {
		entries[i].Place = engine.Place{Epoch: logs.epoch, Partition: uint32(s.Partition(entries[i].Message.Room)), Seq: seq}
	})
}

// ReadLog implements store.Logs. Gap is never false where something is missing. It is true without need where the place is older
// than everything in the partition, or ahead of it, where the room has as much as it may and all of it is behind the place, and
// where what was dropped had expired.
func (s *Store) ReadLog(ctx context.Context, room string, after uint64, most, bytes int) (store.LogPage, error) {
	logs, err := s.readyLogs()
	if err != nil {
		return store.LogPage{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	p, subject := s.logPlace(room)
	page, first, size, now := store.LogPage{Last: after}, uint64(0), 0, time.Now()
	// One more than fits: it tells that more follows.
	want := getRequest{NextFor: subject, Batch: min(max(most, 1)+1, maxBatch), MaxBytes: max(bytes, 1)}
	for end := false; !end && !page.More; {
		want.Seq = page.Last + 1
		got, err := s.inOrder(ctx, logName(p), want)
		if err != nil {
			return store.LogPage{}, err
		}
		for _, m := range got.messages {
			if first == 0 {
				first = m.seq
			}
			e, ok := s.logEntry(logs, p, m)
			if ok && e.Message.Room != room { // a collision of 128 bits, or written by somebody else
				s.corrupt.Inc()
				ok = false
			}
			if ok && e.Expires.After(now) {
				length := len(e.Message.Payload)
				if n := len(page.Entries); n > 0 && (n >= most || size+length > bytes) {
					page.More = true
					break
				}
				page.Entries, size = append(page.Entries, e), size+length
			}
			page.Last = m.seq
		}
		end, want.Batch = got.through == math.MaxUint64, maxBatch // many have expired
	}
	page.Gap, err = s.gap(ctx, logs, p, getRequest{Seq: after + 1, NextFor: subject}, first)
	return page, err
}

// logEntry reads a message of a log.
func (s *Store) logEntry(logs *logStreams, p int, m stored) (store.LogEntry, bool) {
	e, err := decodeLog(m.data)
	if err != nil {
		s.corrupt.Inc()
		return store.LogEntry{}, false
	}
	e.Place = engine.Place{Epoch: logs.epoch, Partition: uint32(p), Seq: m.seq}
	return e, true
}

// gap tells whether the leader may have dropped something of what was asked for. It is called after the read, whose first
// message was in place first, or 0 for none.
func (s *Store) gap(ctx context.Context, logs *logStreams, p int, asked getRequest, first uint64) (bool, error) {
	info, err := logs.streams[p].Info(ctx, jetstream.WithSubjectFilter(asked.NextFor))
	if err != nil {
		return false, down(err)
	}
	if !info.Created.Equal(logs.created[p]) {
		s.prepareSoon()
		return false, down(errRenewed)
	}
	if asked.Seq < info.State.FirstSeq || asked.Seq > info.State.LastSeq+1 { // the latter: a server has lost what it had
		return true, nil
	}
	if info.State.Subjects[asked.NextFor] >= uint64(s.cfg.MaxPerRoom) {
		oldest, err := s.leaderOf(ctx, logName(p), getRequest{Seq: 1, NextFor: asked.NextFor})
		if err != nil || len(oldest) == 0 || oldest[0].seq >= asked.Seq {
			return true, err
		}
	}
	if s.cfg.Replicas == 1 || first == 0 {
		return false, nil
	}
	// The replica that has answered may have dropped what the leader has not dropped yet.
	next, err := s.leaderOf(ctx, logName(p), asked)
	return len(next) > 0 && next[0].seq < first, err
}

// Heads implements store.Logs.
func (s *Store) Heads(ctx context.Context) (epoch uint64, heads []uint64, err error) {
	logs, err := s.readyLogs()
	if err != nil {
		return 0, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	created, failed := make([]time.Time, len(logs.streams)), make([]error, len(logs.streams))
	heads = make([]uint64, len(logs.streams))
	var wg sync.WaitGroup
	for p, stream := range logs.streams {
		wg.Go(func() {
			info, err := stream.Info(ctx)
			if err != nil {
				failed[p] = down(err)
				return
			}
			created[p], heads[p] = info.Created, info.State.LastSeq
		})
	}
	wg.Wait()
	if err := errors.Join(failed...); err != nil {
		return 0, nil, err
	}
	if !slices.EqualFunc(created, logs.created, time.Time.Equal) {
		was := logs
		logs = newLogStreams(was.streams, created)
		s.logs.CompareAndSwap(was, logs)
	}
	for p, seq := range heads {
		logs.heads[p].set(seq)
	}
	return logs.epoch, heads, nil
}

func (h *head) set(seq uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if seq > h.seq && h.raised != nil {
		close(h.raised)
		h.raised = nil
	}
	h.seq = seq
}

// wait returns when a head behind place told is known, or d has passed.
func (h *head) wait(ctx context.Context, told uint64, d time.Duration) {
	h.mu.Lock()
	if h.seq > told {
		h.mu.Unlock()
		return
	}
	if h.raised == nil {
		h.raised = make(chan struct{})
	}
	raised := h.raised
	h.mu.Unlock()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-raised:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// Follow implements store.Logs. It looks for what is new in short intervals, and at once after a Heads that tells of something.
func (s *Store) Follow(ctx context.Context, partition int, after uint64, f func(e store.LogEntry) bool, caughtUp func(seq uint64)) error {
	logs, err := s.readyLogs()
	if err != nil {
		return err
	}
	for told, first := after, true; ; first = false {
		info, err := s.followed(ctx, logs, partition)
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // That ctx has ended is no error.
		case err != nil:
			return err
		case info.State.LastSeq < told:
			return down(errBehind)
		}
		was := told
		for told < info.State.LastSeq {
			messages, err := s.following(ctx, partition, told, info.State.LastSeq)
			switch {
			case ctx.Err() != nil:
				return nil //nolint:nilerr // likewise
			case err != nil:
				return err
			case len(messages) == 0: // they are not kept any more
				told = info.State.LastSeq
			}
			for _, m := range messages {
				if e, ok := s.logEntry(logs, partition, m); ok && !f(e) {
					return nil
				}
				told = m.seq
			}
		}
		if first || told > was {
			caughtUp(told)
		}
		logs.heads[partition].wait(ctx, told, followInterval)
	}
}

// followed is what the leader of a partition says of it.
func (s *Store) followed(ctx context.Context, logs *logStreams, p int) (*jetstream.StreamInfo, error) {
	step, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	info, err := logs.streams[p].Info(step)
	if err != nil {
		return nil, down(err)
	}
	if !info.Created.Equal(logs.created[p]) {
		s.prepareSoon()
		return nil, down(errRenewed)
	}
	return info, nil
}

// following returns some of a partition's next messages behind a place, up to place through. None: nothing of these is kept.
func (s *Store) following(ctx context.Context, p int, after, through uint64) ([]stored, error) {
	step, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	got, err := s.directOf(step, logName(p), getRequest{Seq: after + 1, Batch: maxBatch, MaxBytes: followBytes})
	if i := slices.IndexFunc(got.messages, func(m stored) bool { return m.seq > through }); i >= 0 { // the leader has not told of these
		got.messages = got.messages[:i]
	}
	if err != nil || len(got.messages) > 0 || s.cfg.Replicas == 1 {
		return got.messages, err
	}
	// The replica may lag.
	next, err := s.leaderOf(step, logName(p), getRequest{Seq: after + 1, NextFor: logPrefix(p) + ">"})
	if len(next) > 0 && next[0].seq > through {
		next = nil
	}
	return next, err
}
