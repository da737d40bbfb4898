package jetstream

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/fnv"
	"math"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/push-manager/push-manager/internal/wire"
	"github.com/push-manager/push-manager/transport/store"
)

const (
	receiptStream   = "PM_RCPT"
	receiptSubjects = "pmr."
	// receiptAge is how long receipts are kept, maxReceipts how many of one sender.
	receiptAge  = 24 * time.Hour
	maxReceipts = 100_000
)

// Fields of a receipt as it is stored, as in message.go.
const (
	fieldReceiptSender = iota + 1
	fieldReceipt
)

var _ store.Receipts = (*Store)(nil)

// receipts is the stream of receipts, once it has been found.
type receipts struct{ stream jetstream.Stream }

// receiptConfig is the stream's. What does not fit pushes out the oldest.
func (s *Store) receiptConfig() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:              receiptStream,
		Description:       "receipts of pushes",
		Subjects:          []string{receiptSubjects + ">"},
		Storage:           jetstream.FileStorage,
		Replicas:          s.cfg.Replicas,
		Discard:           jetstream.DiscardOld,
		MaxMsgsPerSubject: int64(s.cfg.MaxReceipts),
		MaxBytes:          int64(s.cfg.ReceiptBytes),
		MaxAge:            receiptAge,
		AllowDirect:       true,
		Duplicates:        100 * time.Millisecond, // the least: nothing here has an id of NATS
	}
}

// openReceipts finds the stream, or makes it: a server that has come back may have lost it.
func (s *Store) openReceipts(ctx context.Context) (*receipts, error) {
	if r := s.receipts.Load(); r != nil {
		return r, nil
	}
	stream, err := s.js.CreateOrUpdateStream(ctx, s.receiptConfig())
	if err != nil {
		return nil, down(fmt.Errorf("stream %s: %w", receiptStream, err))
	}
	r := &receipts{stream: stream}
	s.receipts.Store(r)
	return r, nil
}

// receiptError is down. If the stream is not there, it is made before it is used again.
func (s *Store) receiptError(err error) error {
	if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, nats.ErrNoResponders) {
		s.receipts.Store(nil)
	}
	return down(err)
}

// epochOf tells streams apart: one that was lost and made again counts from one.
func epochOf(info *jetstream.StreamInfo) uint64 {
	sum := fnv.New64a()
	_, _ = sum.Write([]byte(info.Created.Format(time.RFC3339Nano)))
	return sum.Sum64()
}

func receiptSubject(sender string) string {
	return receiptSubjects + token(sha256.Sum256([]byte(sender)))
}

// AppendReceipts implements store.Receipts.
func (s *Store) AppendReceipts(ctx context.Context, list []store.Receipt) []error {
	errs := make([]error, len(list))
	if _, err := s.openReceipts(ctx); err != nil {
		for i := range errs {
			errs[i] = err
		}
		return errs
	}
	acks := make([]jetstream.PubAckFuture, len(list))
	for i := range list {
		data := encodeReceipt(&list[i])
		if int64(len(data)) > s.nc.MaxPayload()-1<<10 {
			errs[i] = store.ErrReceiptSize
			continue
		}
		var err error
		msg := &nats.Msg{Subject: receiptSubject(list[i].Sender), Data: data}
		if acks[i], err = s.js.PublishMsgAsync(msg, jetstream.WithRetryAttempts(0)); err != nil {
			errs[i] = s.receiptError(err)
		}
	}
	for i := range list {
		if errs[i] != nil {
			continue
		}
		select {
		case ok := <-acks[i].Ok():
			list[i].Seq = ok.Sequence
		case err := <-acks[i].Err():
			errs[i] = s.receiptError(err)
		case <-ctx.Done():
			errs[i] = s.receiptError(context.Cause(ctx))
		}
	}
	return errs
}

// ReadReceipts implements store.Receipts.
func (s *Store) ReadReceipts(ctx context.Context, sender string, after uint64, most, bytes int) (page store.ReceiptPage, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	r, err := s.openReceipts(ctx)
	if err != nil {
		return page, err
	}
	subject := receiptSubject(sender)
	got, err := s.directOf(ctx, receiptStream, getRequest{Seq: after + 1, NextFor: subject, Batch: min(max(most, 1), maxBatch), MaxBytes: max(bytes, 1)})
	if err != nil {
		return page, err
	}
	page.Last = after
	for _, m := range got.messages {
		s.addReceipt(&page, m, sender)
	}
	page.More = got.through != math.MaxUint64
	// Nothing of the sender's goes but the oldest. So nothing is gone behind after, if the oldest that is left is not behind it. The
	// leader says so, after the page was read.
	oldest, err := s.leaderOf(ctx, receiptStream, getRequest{Seq: 1, NextFor: subject})
	if err != nil {
		return page, err
	}
	if len(oldest) == 0 || oldest[0].seq > after {
		// Something is gone only if the stream has got beyond after, or if the sender has as many as one may have.
		info, err := r.stream.Info(ctx, jetstream.WithSubjectFilter(subject))
		if err != nil {
			return page, s.receiptError(err)
		}
		page.Gap = info.State.FirstSeq > after+1 || info.State.Subjects[subject] >= uint64(s.cfg.MaxReceipts)
	}
	if page.More || s.cfg.Replicas == 1 {
		return page, nil
	}
	// The replica knows of no more. The leader may.
	following, err := s.leaderOf(ctx, receiptStream, getRequest{Seq: page.Last + 1, NextFor: subject})
	if err != nil {
		return page, err
	}
	for _, m := range following {
		page.More = true
		s.addReceipt(&page, m, sender)
	}
	return page, nil
}

// addReceipt adds a message to a page of a sender.
func (s *Store) addReceipt(page *store.ReceiptPage, m stored, sender string) {
	page.Last = m.seq
	receipt, err := decodeReceipt(m.data)
	if err != nil || receipt.Sender != sender { // a collision of 128 bits, or somebody else's message
		s.corrupt.Inc()
		return
	}
	receipt.Seq = m.seq
	page.Receipts = append(page.Receipts, receipt)
}

// FollowReceipts implements store.Receipts. A replica that lags has the beginning of what the others have.
func (s *Store) FollowReceipts(ctx context.Context, after uint64, most, bytes int) (page store.ReceiptPage, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if _, err := s.openReceipts(ctx); err != nil {
		return page, err
	}
	got, err := s.directOf(ctx, receiptStream, getRequest{Seq: after + 1, Batch: min(max(most, 1), maxBatch), MaxBytes: max(bytes, 1)})
	if err != nil {
		return page, err
	}
	page.Last = after
	for _, m := range got.messages {
		page.Missing += m.seq - page.Last - 1
		page.Last = m.seq
		receipt, err := decodeReceipt(m.data)
		if err != nil {
			s.corrupt.Inc()
			page.Missing++
			continue
		}
		receipt.Seq = m.seq
		page.Receipts = append(page.Receipts, receipt)
	}
	page.Gap, page.More = page.Missing > 0, got.through != math.MaxUint64
	return page, nil
}

// ReceiptsHead implements store.Receipts.
func (s *Store) ReceiptsHead(ctx context.Context) (epoch, last uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	r, err := s.openReceipts(ctx)
	if err != nil {
		return 0, 0, err
	}
	info, err := r.stream.Info(ctx)
	if err != nil {
		return 0, 0, s.receiptError(err)
	}
	return epochOf(info), info.State.LastSeq, nil
}

func encodeReceipt(r *store.Receipt) []byte {
	b := make([]byte, 0, wire.SizeString(fieldReceiptSender, r.Sender)+wire.SizeLen(fieldReceipt, len(r.Content))+len(r.Content))
	return wire.AppendBytes(wire.AppendString(b, fieldReceiptSender, r.Sender), fieldReceipt, r.Content)
}

var errNoReceipt = errors.New("no receipt")

// decodeReceipt reads what encodeReceipt has written. The content is a part of data.
func decodeReceipt(data []byte) (r store.Receipt, err error) {
	m := wire.Reader{Rest: data}
	for m.Next() {
		switch {
		case m.IsBytes(fieldReceiptSender):
			r.Sender = string(m.Bytes)
		case m.IsBytes(fieldReceipt):
			r.Content = m.Bytes
		}
	}
	switch {
	case m.Err != nil:
		return store.Receipt{}, m.Err
	case len(r.Content) == 0:
		return store.Receipt{}, errNoReceipt
	}
	return r, nil
}
