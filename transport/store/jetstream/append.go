package jetstream

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/store"
)

const (
	// maxPending bounds messages that are sent and not acknowledged, over all calls of Append and AppendLog.
	maxPending = 16 << 10
	// maxTTL keeps a TTL within what a header may say.
	maxTTL = 10 * 365 * 24 * time.Hour

	// Codes and texts of JetStream that jetstream has no names for. One code is for everything that a stream cannot store.
	codeStoreFailed   = jetstream.ErrorCode(10077)
	codeNotClustered  = jetstream.ErrorCode(10074)
	codeNoResources   = jetstream.ErrorCode(10023)
	codeStorageFull   = jetstream.ErrorCode(10047)
	textPerSubject    = "maximum messages per subject exceeded"
	textBytesExceeded = "maximum bytes exceeded"
)

// quotaError is an engine.ErrSpoolQuota that says how many messages wait.
type quotaError int

func (e quotaError) Error() string { return fmt.Sprintf("user has %d messages waiting", int(e)) }
func (quotaError) Unwrap() error   { return engine.ErrSpoolQuota }

// sizeError is an engine.ErrSpoolFull of a message that no stream would take.
type sizeError struct{ size, most int64 }

func (e sizeError) Error() string {
	return fmt.Sprintf("takes messages of at most %d bytes, this one has %d", e.most, e.size)
}
func (sizeError) Unwrap() error { return engine.ErrSpoolFull }

// Append implements store.Store. Entries of a user are stored in their order.
func (s *Store) Append(ctx context.Context, entries []store.Entry) []error {
	if _, err := s.ready(); err != nil {
		return slices.Repeat([]error{err}, len(entries))
	}
	now := time.Now()
	return s.publish(ctx, len(entries), math.MaxInt64, func(i int) *nats.Msg { return s.message(&entries[i], now) }, func(i int, seq uint64) { entries[i].Seq = seq })
}

// message is an entry as a message.
func (s *Store) message(e *store.Entry, now time.Time) *nats.Msg {
	_, prefix := s.place(e.User)
	ttl := min(max(e.Expires.Sub(now), 0), maxTTL)
	msg := &nats.Msg{
		Subject: subjectOf(prefix, e.Message.CollapseKey),
		Header:  nats.Header{jetstream.MsgTTLHeader: {strconv.Itoa(int(ttl/time.Second)+1) + "s"}},
		Data:    encode(e.User, e.Message, e.Expires),
	}
	if e.Message.CollapseKey != "" {
		msg.Header.Set(jetstream.MsgRollup, jetstream.MsgRollupSubject)
	}
	return msg
}

// publish sends n messages of at most so many bytes, one behind the other, and waits for their answers. stored is told the places.
func (s *Store) publish(ctx context.Context, n int, most int64, message func(i int) *nats.Msg, stored func(i int, seq uint64)) []error {
	most = min(most, s.nc.MaxPayload()-1<<10) // a place for headers
	errs, acks := make([]error, n), make([]jetstream.PubAckFuture, n)
	for i := range n {
		msg := message(i)
		if size := int64(len(msg.Data)); size > most {
			errs[i] = sizeError{size, most}
			continue
		}
		// A second attempt would come behind what followed the first.
		ack, err := s.js.PublishMsgAsync(msg, jetstream.WithRetryAttempts(0))
		if err != nil {
			errs[i] = down(err)
		}
		acks[i] = ack
	}
	for i := range n {
		if errs[i] != nil {
			continue
		}
		select {
		case ok := <-acks[i].Ok():
			stored(i, ok.Sequence)
		case err := <-acks[i].Err():
			errs[i] = s.appendError(err)
		case <-ctx.Done():
			errs[i] = down(context.Cause(ctx))
		}
	}
	return errs
}

// appendError is an error of JetStream in the words of an engine.Spool.
func (s *Store) appendError(err error) error {
	api := &jetstream.APIError{}
	if !errors.As(err, &api) {
		return down(err)
	}
	switch {
	case api.ErrorCode == codeStoreFailed && strings.Contains(api.Description, textPerSubject):
		return quotaError(s.cfg.MaxPerUser)
	case api.ErrorCode == codeStoreFailed && strings.Contains(api.Description, textBytesExceeded),
		api.ErrorCode == codeNoResources, api.ErrorCode == codeStorageFull:
		return engine.ErrSpoolFull
	}
	return down(err)
}
