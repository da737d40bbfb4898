package refgateway

import (
	"bytes"
	"encoding/binary"
	"io"
	"math"
	"sync/atomic"

	"github.com/gobwas/httphead"
	"github.com/gobwas/ws/wsflate"
	"github.com/klauspost/compress/flate"
)

// deflater compresses messages to clients, and decompresses theirs (permessage-deflate, RFC 7692). Neither side keeps anything between two
// messages (server_no_context_takeover, client_no_context_takeover): a connection takes no more memory than without, and a push is
// compressed once for all its recipients.
type deflater struct {
	// Static.
	least   int                // bytes that are worth it
	writers chan *flate.Writer // as many as there are cores, as of readers: neither waits for anything
	readers chan io.ReadCloser
	held    *atomic.Int64 // Gateway.held
	count   *counters
}

// deflateLevel is that of a push to a single client, too: higher ones cost 1.2 to 3 times as much, and save a twentieth. PERF.md has
// them side by side.
const deflateLevel = flate.BestSpeed

func newDeflater(g *Gateway) *deflater {
	d := &deflater{
		least: g.cfg.DeflateMinBytes, held: &g.held, count: &g.count,
		writers: make(chan *flate.Writer, g.cores), readers: make(chan io.ReadCloser, g.cores),
	}
	for range g.cores {
		d.writers <- nil // made when it is needed: of 600 KiB
		d.readers <- nil
	}
	return d
}

// negotiate answers what a client offers: the first permessage-deflate that can be. What cannot be is declined, and the client is served
// without. A window that it has less of bounds the messages that are compressed for it: none refers back further than its own beginning.
func (d *deflater) negotiate(to *recipient) func(httphead.Option) (httphead.Option, error) {
	return func(offer httphead.Option) (accepted httphead.Option, _ error) {
		var p wsflate.Parameters
		if to.deflate != nil || !bytes.Equal(offer.Name, wsflate.ExtensionNameBytes) || p.Parse(offer) != nil {
			return accepted, nil //nolint:nilerr // an offer that is wrong is declined, and the client is served
		}
		to.deflate, to.window = d, math.MaxInt
		if bits := p.ServerMaxWindowBits; bits.Defined() && bits.Bytes() < wsflate.MaxLZ77WindowSize {
			to.window = bits.Bytes()
		}
		return wsflate.Parameters{ServerNoContextTakeover: true, ClientNoContextTakeover: true, ServerMaxWindowBits: p.ServerMaxWindowBits}.Option(), nil
	}
}

// What a compressed message is made of (RFC 1951, 3.2). Its blocks may come from several places: around the one that all recipients share,
// and that refers to nothing outside itself, stand blocks with what differs between them, as it is.
const (
	storedHead = 5 // of a block that is not compressed
	// braceBlock is "}" in a block with the fixed codes, and the head of an empty block. A message ends in such a block without its
	// last four bytes (RFC 7692, 7.2.1).
	braceBlock = "\xaa\x05\x00"
	// deflateEnd is those bytes, and a last block, for our own decompressor.
	deflateEnd = "\x00\x00\xff\xff\x01\x00\x00\xff\xff"
)

// appendStored begins a block of n bytes, which follow.
func appendStored(b []byte, n int) []byte {
	b = binary.LittleEndian.AppendUint16(append(b, 0), uint16(n))
	return binary.LittleEndian.AppendUint16(b, ^uint16(n))
}

// shared is the tail of a frame compressed, without the brace that ends it: blocks that end at a byte. It is nil for one that is sent as
// it is. The caller's queue holds the frame.
func (d *deflater) shared(f *frame, window int) []byte {
	if n := len(f.tail); !f.gap || n < d.least || n > window {
		return nil
	}
	f.deflating.Do(func() {
		b := d.deflate(f.tail[:len(f.tail)-1])
		if len(b) > len(f.tail)-len(f.tail)/8 {
			d.count.incompressible.Inc()
			return
		}
		f.deflated = b
		f.more.Store(int64(len(b)))
		d.held.Add(int64(len(b)))
	})
	return f.deflated
}

func (d *deflater) deflate(b []byte) []byte {
	w := <-d.writers
	defer func() { d.writers <- w }() // nil after a panic
	using := w
	w = nil
	var out bytes.Buffer
	if using == nil {
		using, _ = flate.NewWriter(&out, deflateLevel) // no error: the level is known
	} else {
		using.Reset(&out)
	}
	_, _ = using.Write(b) // a Buffer takes all
	_ = using.Flush()
	w = using
	return bytes.Clone(out.Bytes()) // many pushes wait, and a Buffer has room to spare
}

// appendDeflated is appendTo with the compressed tail.
func (q queued) appendDeflated(b []byte, to *recipient, shared []byte) (_, tail, end []byte) {
	before := len(q.head) + len(to.user)
	marked := q.marked(to)
	after := len(braceBlock)
	if marked {
		var marks [len(ackMember) + 20 + len(replayedMember)]byte
		after = len(q.id) + len(q.appendMarks(marks[:0])) + 1
	}
	start := len(b)
	n := storedHead + before + len(shared) + after
	if marked {
		n += storedHead + 1
	}
	b = appendHeader(b, q.op, n)
	b[start] |= 0x40 // RSV1
	b = appendStored(b, before)
	b = append(append(b, q.head...), to.user...)
	last := b
	if len(shared) <= copyBytes {
		last = append(last, shared...)
	} else {
		tail, last = shared, nil
	}
	if marked {
		last = append(q.appendMarks(append(appendStored(last, after), q.id...)), '}', 0)
	} else {
		last = append(last, braceBlock...)
	}
	to.deflate.count.deflated.Inc()
	to.deflate.count.deflateSaved.Add(q.size(to) - n)
	if tail != nil {
		return b, tail, last
	}
	return last, nil, nil
}

// inflate decompresses a message of a client, of most bytes then. It returns the close code of one that is too large or no DEFLATE.
func (d *deflater) inflate(b []byte, most int) (message []byte, code uint16) {
	r := <-d.readers
	defer func() { d.readers <- r }() // nil after a panic
	using := r
	r = nil
	from := bytes.NewReader(append(b, deflateEnd...))
	if using == nil {
		using = flate.NewReader(from)
	} else if err := using.(flate.Resetter).Reset(from, nil); err != nil { //nolint:forcetypeassert // flate promises it
		return nil, closeProtocol
	}
	message, err := io.ReadAll(io.LimitReader(using, int64(most)+1))
	r = using
	switch {
	case len(message) > most:
		return nil, closeTooLarge
	case err != nil, from.Len() > len(deflateEnd)+1: // it has ended its stream itself, and more than RFC 7692, 7.2.3.5, follows
		return nil, closeProtocol
	}
	return message, 0
}
