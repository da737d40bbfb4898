package jetstream

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/store"
)

const (
	// maxPending bounds messages that are sent and not acknowledged, over all calls of Append.
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
	errs := make([]error, len(entries))
	if _, err := s.ready(); err != nil {
		for i := range errs {
			errs[i] = err
		}
		return errs
	}
	acks, now := make([]jetstream.PubAckFuture, len(entries)), time.Now()
	for i := range entries {
		acks[i], errs[i] = s.publish(&entries[i], now)
	}
	for i := range entries {
		if errs[i] != nil {
			continue
		}
		select {
		case ok := <-acks[i].Ok():
			entries[i].Seq = ok.Sequence
		case err := <-acks[i].Err():
			errs[i] = s.appendError(err)
		case <-ctx.Done():
			errs[i] = down(context.Cause(ctx))
		}
	}
	return errs
}

func (s *Store) publish(e *store.Entry, now time.Time) (jetstream.PubAckFuture, error) {
	_, prefix := s.place(e.User)
	ttl := min(max(e.Expires.Sub(now), 0), maxTTL)
	msg := &nats.Msg{
		Subject: subjectOf(prefix, e.Message.CollapseKey),
		Header:  nats.Header{jetstream.MsgTTLHeader: {strconv.Itoa(int(ttl/time.Second)+1) + "s"}},
		Data:    encode(e),
	}
	if e.Message.CollapseKey != "" {
		msg.Header.Set(jetstream.MsgRollup, jetstream.MsgRollupSubject)
	}
	if most := s.nc.MaxPayload() - 1<<10; int64(len(msg.Data)) > most { // a place for headers
		return nil, sizeError{int64(len(msg.Data)), most}
	}
	// A second attempt would come behind what followed the first.
	ack, err := s.js.PublishMsgAsync(msg, jetstream.WithRetryAttempts(0))
	if err != nil {
		return nil, down(err)
	}
	return ack, nil
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
