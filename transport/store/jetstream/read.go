package jetstream

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/push-manager/push-manager/transport/store"
)

const (
	directGet = "$JS.API.DIRECT.GET."
	leaderGet = "$JS.API.STREAM.MSG.GET."

	// maxBatch bounds one direct get. It is that of a server for the last messages of many subjects.
	maxBatch = 1024
	// anyBytes bounds what Any reads: it only wants to know whether there is something.
	anyBytes = 256 << 10
	// Replicas that lag are asked again so often, after such a pause.
	lagRetries = 20
	lagPause   = 10 * time.Millisecond
)

// getRequest is a request for messages, of which a direct get answers several.
type getRequest struct {
	Seq       uint64   `json:"seq,omitempty"`
	NextFor   string   `json:"next_by_subj,omitempty"`
	LastFor   string   `json:"last_by_subj,omitempty"`
	MultiLast []string `json:"multi_last,omitempty"`
	Batch     int      `json:"batch,omitempty"`
	MaxBytes  int      `json:"max_bytes,omitempty"`
}

// stored is a message as it came back.
type stored struct {
	subject string
	seq     uint64
	data    []byte
}

// batch is the answer to a direct get.
type batch struct {
	messages []stored
	through  uint64 // the place up to which messages are all that match
	upTo     uint64 // the last place of the replica; only of an answer to MultiLast that has messages
	cut      bool   // nothing is said of matches that are not among messages
}

// Read implements store.Store. The messages of a user's two kinds are found in two ways, and merged: a server finds those of
// one subject by an index, while it looks at everything where a subject has a star in it.
func (s *Store) Read(ctx context.Context, user string, after uint64, most, bytes int) ([]store.Entry, bool, error) {
	if _, err := s.ready(); err != nil {
		return nil, false, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	p, prefix := s.place(user)
	least, err := s.leaderPlace(ctx, p)
	if err != nil {
		return nil, false, err
	}
	page := page{user: user, most: max(most, 1), bytes: bytes, now: time.Now()}
	for next := after + 1; ; {
		// One more than fits: it tells that more follows.
		want := getRequest{Seq: next, Batch: min(page.most-len(page.entries)+1, maxBatch), MaxBytes: max(bytes-page.size, 1)}
		plain, err := s.plain(ctx, p, prefix, want)
		if err != nil {
			return nil, false, err
		}
		keyed, err := s.keyed(ctx, p, prefix, want, least)
		if err != nil {
			return nil, false, err
		}
		known := min(plain.through, keyed.through)
		messages := slices.Concat(plain.messages, keyed.messages)
		slices.SortFunc(messages, func(a, b stored) int { return cmp.Compare(a.seq, b.seq) })
		for _, m := range messages {
			if m.seq > known {
				break
			}
			if !strings.HasPrefix(m.subject, prefix) { // the message head
				continue
			}
			if !page.add(m, s.corrupt.Inc) {
				return page.entries, true, nil
			}
		}
		if known == math.MaxUint64 {
			return page.entries, false, nil
		}
		next = known + 1
	}
}

// plain returns messages without a collapse key.
func (s *Store) plain(ctx context.Context, p int, prefix string, want getRequest) (batch, error) {
	want.NextFor = prefix + plainSuffix
	got, err := s.direct(ctx, p, want)
	if err != nil || got.through != math.MaxUint64 || s.cfg.Replicas == 1 {
		return got, err
	}
	// The replica knows of no more. The leader may.
	last := want.Seq - 1
	if n := len(got.messages); n > 0 {
		last = got.messages[n-1].seq
	}
	newest, err := s.askLeader(ctx, p, getRequest{LastFor: want.NextFor})
	if err != nil || len(newest) == 0 || newest[0].seq <= last {
		return got, err
	}
	following, err := s.askLeader(ctx, p, getRequest{Seq: last + 1, NextFor: want.NextFor})
	for _, m := range following {
		got.messages, got.through = append(got.messages, m), m.seq
	}
	return got, err
}

// keyed returns messages with a collapse key, of a replica that has got to place least.
func (s *Store) keyed(ctx context.Context, p int, prefix string, want getRequest, least uint64) (batch, error) {
	want.MultiLast = []string{prefix + keyedSuffix + "*"}
	if s.cfg.Replicas > 1 {
		want.MultiLast = append(want.MultiLast, headSubject(p))
	}
	got, err := s.fresh(ctx, p, want, least)
	if err != nil {
		return batch{}, err
	}
	if got.cut { // too many keys for an answer
		want.MultiLast, want.NextFor = nil, prefix+keyedSuffix+"*"
		return s.direct(ctx, p, want)
	}
	return got, nil
}

// leaderPlace is the last place of a partition; 0 where the only replica is always up to date.
func (s *Store) leaderPlace(ctx context.Context, p int) (uint64, error) {
	if s.cfg.Replicas == 1 {
		return 0, nil
	}
	streams, err := s.ready()
	if err != nil {
		return 0, err
	}
	info, err := streams[p].Info(ctx)
	if err != nil {
		return 0, down(err)
	}
	return info.State.LastSeq, nil
}

// fresh is direct for the last messages of subjects, from a replica that has got to place least.
func (s *Store) fresh(ctx context.Context, p int, request getRequest, least uint64) (batch, error) {
	for range lagRetries {
		got, err := s.direct(ctx, p, request)
		if err != nil || got.cut || got.upTo >= least {
			return got, err
		}
		pause(ctx, lagPause)
	}
	return batch{}, down(errors.New("replicas lag"))
}

// page is what Read returns, while it grows.
type page struct {
	user        string
	most, bytes int
	now         time.Time

	entries []store.Entry
	size    int // of payloads
}

// add takes a message. It is false for one that does not fit any more.
func (p *page) add(m stored, corrupt func()) bool {
	e, err := decode(m.data)
	if err != nil || e.User != p.user { // a collision of 128 bits, or somebody else's message
		corrupt()
		return true
	}
	if !e.Expires.After(p.now) {
		return true
	}
	size := len(e.Message.Payload)
	if len(p.entries) > 0 && (len(p.entries) >= p.most || p.size+size > p.bytes) {
		return false
	}
	e.Seq = m.seq
	p.entries, p.size = append(p.entries, e), p.size+size
	return true
}

// Any implements store.Store. It may tell of somebody who has nothing: whose messages have expired, or of whom a short answer
// says nothing.
func (s *Store) Any(ctx context.Context, users []string) ([]bool, error) {
	if _, err := s.ready(); err != nil {
		return nil, err
	}
	if len(users) > maxBatch {
		return nil, fmt.Errorf("%d users at a time, the limit is %d", len(users), maxBatch)
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	parts := make([]map[string][]int, s.cfg.Partitions) // of users, by prefix
	for i, user := range users {
		p, prefix := s.place(user)
		if parts[p] == nil {
			parts[p] = map[string][]int{}
		}
		parts[p][prefix] = append(parts[p][prefix], i)
	}
	anything, failed, asked := make([]bool, len(users)), make(chan error, len(parts)), 0
	for p, prefixes := range parts {
		if prefixes != nil {
			asked++
			go func() { failed <- s.anyOf(ctx, p, prefixes, anything) }()
		}
	}
	var errs []error
	for range asked {
		errs = append(errs, <-failed)
	}
	return anything, errors.Join(errs...)
}

// anyOf is Any for the users of a partition.
func (s *Store) anyOf(ctx context.Context, p int, prefixes map[string][]int, anything []bool) error {
	request := getRequest{Batch: maxBatch, MaxBytes: anyBytes}
	for prefix := range prefixes {
		request.MultiLast = append(request.MultiLast, prefix+">")
	}
	if s.cfg.Replicas > 1 {
		request.MultiLast = append(request.MultiLast, headSubject(p))
	}
	least, err := s.leaderPlace(ctx, p)
	if err != nil {
		return err
	}
	got, err := s.fresh(ctx, p, request, least)
	if err != nil {
		return err
	}
	for _, m := range got.messages {
		for _, i := range prefixes[prefixOf(m.subject)] {
			anything[i] = true
		}
	}
	if got.cut || got.through != math.MaxUint64 {
		for _, all := range prefixes {
			for _, i := range all {
				anything[i] = true
			}
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// prefixOf is the part of a subject that is a user's: that up to its third dot.
func prefixOf(subject string) string {
	dots := 0
	for i := range len(subject) {
		if subject[i] == '.' {
			if dots++; dots == 3 {
				return subject[:i+1]
			}
		}
	}
	return ""
}

// Trim implements store.Store.
func (s *Store) Trim(ctx context.Context, user string, seq uint64) error {
	streams, err := s.ready()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	p, prefix := s.place(user)
	if err := streams[p].Purge(ctx, jetstream.WithPurgeSubject(prefix+">"), jetstream.WithPurgeSequence(seq+1)); err != nil {
		return down(err)
	}
	return nil
}

// Forget implements store.Store. Each message is overwritten in its file, which an embedded server does at once; what was
// trimmed before, or replaced by a later message, goes from the files when they are compacted. When ctx ends before
// everything is erased, a second call goes on.
func (s *Store) Forget(ctx context.Context, user string) (int, error) {
	streams, err := s.ready()
	if err != nil {
		return 0, err
	}
	p, prefix := s.place(user)
	count := 0
	for _, subject := range []string{prefix + plainSuffix, prefix + keyedSuffix + "*"} {
		for last := uint64(math.MaxUint64); ; {
			step, cancel := context.WithTimeout(ctx, requestTimeout)
			messages, err := s.askLeader(step, p, getRequest{LastFor: subject})
			if err != nil || len(messages) == 0 || messages[0].seq >= last { // the last one could not be erased: Purge takes it
				cancel()
				if err != nil {
					return count, err
				}
				break
			}
			last = messages[0].seq
			err = streams[p].SecureDeleteMsg(step, last)
			cancel()
			if api := (&jetstream.APIError{}); err == nil {
				count++
			} else if !errors.As(err, &api) { // an answer: it has expired meanwhile, for example
				return count, down(err)
			}
		}
	}
	step, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err := streams[p].Purge(step, jetstream.WithPurgeSubject(prefix+">")); err != nil {
		return count, down(err)
	}
	return count, nil
}

// direct asks any replica of a partition for a batch of messages.
func (s *Store) direct(ctx context.Context, p int, request getRequest) (batch, error) {
	return s.directOf(ctx, streamName(p), request)
}

// directOf asks any replica of a stream.
func (s *Store) directOf(ctx context.Context, stream string, request getRequest) (batch, error) {
	body, err := json.Marshal(request)
	if err != nil {
		return batch{}, err
	}
	inbox, answers := s.nc.NewInbox(), make(chan *nats.Msg, request.Batch+2) // all of them and the end
	sub, err := s.nc.ChanSubscribe(inbox, answers)
	if err != nil {
		return batch{}, down(err)
	}
	defer func() { _ = sub.Unsubscribe() }() // of a connection that is gone, too
	if err := s.nc.PublishRequest(directGet+stream, inbox, body); err != nil {
		return batch{}, down(err)
	}
	var got batch
	for last := uint64(0); ; {
		select {
		case msg := <-answers:
			end, err := got.take(msg, &last)
			if err != nil {
				return batch{}, down(err)
			}
			if end {
				return got, nil
			}
		case <-ctx.Done():
			return batch{}, down(context.Cause(ctx))
		}
	}
}

// take adds an answer. last is the place of the message before it: every message names it, so that one that is missing is noticed.
func (b *batch) take(msg *nats.Msg, last *uint64) (end bool, err error) {
	number := func(header string) uint64 {
		n, err := strconv.ParseUint(msg.Header.Get(header), 10, 64)
		if err != nil {
			return 0
		}
		return n
	}
	switch status := msg.Header.Get("Status"); status {
	case "":
		if before := number("Nats-Last-Sequence"); before != *last {
			return false, fmt.Errorf("the answer has a gap: message %d is missing", before)
		}
		*last = number(jetstream.SequenceHeader)
		b.messages = append(b.messages, stored{subject: msg.Header.Get(jetstream.SubjectHeader), seq: *last, data: msg.Data})
		return false, nil
	case "204": // the end of a batch
		if before := number("Nats-Last-Sequence"); before != *last {
			return false, fmt.Errorf("the answer has a gap: message %d is missing", before)
		}
		b.through, b.upTo = math.MaxUint64, number("Nats-UpTo-Sequence")
		if number("Nats-Num-Pending") > 0 && len(b.messages) > 0 {
			b.through = *last
		}
		return true, nil
	case "404":
		b.through = math.MaxUint64
		return true, nil
	case "413": // more subjects match than an answer may have messages
		b.cut = true
		return true, nil
	default:
		return false, fmt.Errorf("the answer has status %q %s", status, msg.Header.Get("Description"))
	}
}

// askLeader returns the message of a partition that a request names, none if there is no such message.
func (s *Store) askLeader(ctx context.Context, p int, request getRequest) ([]stored, error) {
	return s.leaderOf(ctx, streamName(p), request)
}

// leaderOf asks the leader of a stream.
func (s *Store) leaderOf(ctx context.Context, stream string, request getRequest) ([]stored, error) {
	body, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	msg, err := s.nc.RequestWithContext(ctx, leaderGet+stream, body)
	if err != nil {
		return nil, down(err)
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message *struct {
			Subject string `json:"subject"`
			Seq     uint64 `json:"seq"`
			Data    []byte `json:"data"`
		} `json:"message"`
	}
	if err := json.Unmarshal(msg.Data, &answer); err != nil {
		return nil, down(fmt.Errorf("the leader's answer: %w", err))
	}
	switch {
	case answer.Error != nil && answer.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		return nil, nil
	case answer.Error != nil:
		return nil, down(answer.Error)
	case answer.Message == nil:
		return nil, down(errors.New("the leader's answer has no message"))
	}
	return []stored{{subject: answer.Message.Subject, seq: answer.Message.Seq, data: answer.Message.Data}}, nil
}
