package store

import (
	"context"
	"errors"
)

// Receipts keep the receipts of all senders of pushes in one line, for a day at the most. When there are too many of one sender or
// in all, the oldest go. An implementation passes storetest.RunReceipts. All methods are safe for concurrent use, and
// return by ctx's end.
type Receipts interface {
	// AppendReceipts stores each receipt, or says why not, with an error for each: ErrReceiptSize, or one that wraps
	// engine.ErrSpoolDown, after which it may be stored all the same. It sets Seq of the others. Those of one call may stand
	// in any order.
	AppendReceipts(ctx context.Context, receipts []Receipt) []error
	// ReadReceipts returns receipts of sender behind place after, in order: all whose AppendReceipts had returned before,
	// as far as most receipts and about so many bytes go, and at least one. Gap tells that some behind after may be gone.
	ReadReceipts(ctx context.Context, sender string, after uint64, most, bytes int) (ReceiptPage, error)
	// FollowReceipts returns what follows place after in the line, of all senders, in order. It may lag behind AppendReceipts. Gap
	// tells that some behind after are gone; Missing is how many those are.
	FollowReceipts(ctx context.Context, after uint64, most, bytes int) (ReceiptPage, error)
	// ReceiptsHead is the last place of the line, no less than that of any AppendReceipts that had returned. Places of another
	// epoch mean nothing.
	ReceiptsHead(ctx context.Context) (epoch, last uint64, err error)
}

// ErrReceiptSize refuses a receipt that is larger than anything that can be stored.
var ErrReceiptSize = errors.New("the receipt is too large to be stored")

// Receipt is one receipt of a sender.
type Receipt struct {
	Sender  string
	Content []byte
	Seq     uint64 // its place; rises, not by one
}

// ReceiptPage is some receipts.
type ReceiptPage struct {
	Receipts []Receipt
	Last     uint64 // up to which the page goes, also where what stands there cannot be read; after if it is empty
	More     bool   // something may follow the last one
	Gap      bool
	Missing  uint64
}
