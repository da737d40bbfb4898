package ingress

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"runtime"

	"github.com/klauspost/compress/gzip"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"

	"github.com/push-manager/push-manager/engine"
)

// gzipName is the encoding in which messages may come, with Config.Gzip.
const gzipName = "gzip"

const (
	// gzipBegin is how a compressed message begins (RFC 1952, section 2.3.1): two bytes for gzip, one for DEFLATE.
	gzipBegin = "\x1f\x8b\x08"
	// gzipLeast is how short it can be: a header of ten bytes, an empty block, a checksum and a length.
	gzipLeast = 20
	// gzipRatio is how many bytes one can become: DEFLATE has 258 for two bits, see https://zlib.net/zlib_tech.html.
	gzipRatio = 1032
)

// unzipper decompresses messages. It has as many decompressors as there are cores, of 45 KiB each: to decompress waits for nothing.
type unzipper struct {
	// Static.
	most     int // bytes that a message may become
	panicked func(where string, v any)
	idle     chan *gzip.Reader
}

func newUnzipper(most int, panicked func(string, any)) *unzipper {
	z := &unzipper{most: most, panicked: panicked, idle: make(chan *gzip.Reader, runtime.GOMAXPROCS(0))}
	for range cap(z.idle) {
		z.idle <- new(gzip.Reader)
	}
	return z
}

// size is how long b says that it becomes, in its last four bytes (RFC 1952, section 2.3.1). unzip holds it to that.
func (z *unzipper) size(b []byte) (int, error) {
	if !bytes.HasPrefix(b, []byte(gzipBegin)) {
		return 0, badGzip("does not begin as gzip does")
	}
	if len(b) < gzipLeast {
		return 0, badGzip("ends before it is whole")
	}
	n := int(binary.LittleEndian.Uint32(b[len(b)-4:]))
	switch {
	case n > gzipRatio*len(b):
		return 0, badGzip("says that it becomes more than it can")
	case n > z.most:
		return 0, &tooLargeError{size: n, most: z.most}
	}
	return n, nil
}

// unzip decompresses a message. It takes no more memory than the message says that it needs.
func (z *unzipper) unzip(b []byte) (message []byte, err error) {
	n, err := z.size(b)
	if err != nil {
		return nil, err
	}
	r := <-z.idle
	defer func() {
		if v := recover(); v != nil {
			z.panicked("gzip", v)
			r, message, err = new(gzip.Reader), nil, errPanic
		}
		z.idle <- r
	}()
	from := bytes.NewReader(b)
	if err := r.Reset(from); err != nil {
		return nil, badGzip("has no header of gzip")
	}
	r.Multistream(false)
	message = make([]byte, n+1) // one more than there may be
	have, err := io.ReadFull(r, message)
	switch {
	case err == nil:
		return nil, badGzip("becomes more than its last four bytes say")
	case !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF), have != n, from.Len() > 0:
		return nil, badGzip("is damaged, or more than one gzip member")
	}
	return message[:n], nil
}

func badGzip(description string) error {
	return &engine.InvalidError{Field: "request", Code: engine.CodeMalformed, Description: description}
}

// plainReply keeps gRPC from compressing a reply because the request was. It would, with a compressor that some other package of the
// program has registered, at 800 KiB each.
func plainReply(ctx context.Context) {
	_ = grpc.SetSendCompressor(ctx, encoding.Identity) // it fails for a call that has not come by gRPC
}

// announced is a message of which the head has been read.
type announced struct {
	size    int             // on the wire
	zip     *unzipper       // decompresses it; nil: it is not compressed
	becomes int             // how large it is at the most once it is decompressed
	begun   mem.BufferSlice // what has been read of it
}

// begin reads the first bytes of a message that is large or compressed. They need no space: whoever announces a message and sends none of
// it gets none. A compressed message tells at its end what it becomes, so one that is not small is reckoned as the largest.
func (m *announced) begin(w rawCall) (err error) {
	if m.zip == nil && m.size <= smallBody {
		return nil
	}
	if m.begun, err = w.Read(min(m.size, smallBody)); err != nil || m.zip == nil || m.size > smallBody {
		return err
	}
	if m.becomes, err = m.zip.size(m.begun.Materialize()); err != nil {
		m.begun.Free()
	}
	return err
}
