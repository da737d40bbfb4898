package ingress

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
)

// rawCall is a call as gRPC's transport has it. Asking it, and not grpc.ServerStream, tells how
// large a message is before it is read: a large one must not come in before there is memory
// for it, and one that is too large has to be refused with our own words.
type rawCall interface {
	RecvCompress() string
	ReadMessageHeader(head []byte) error
	Read(n int) (mem.BufferSlice, error)
	// WriteStatus ends the call, and a Read that waits.
	WriteStatus(*status.Status) error
}

// errForeignTransport refuses a call whose transport cannot be asked: gRPC is not one that this
// package was built with, or has other credentials than those of Config.
var errForeignTransport = errors.New("the transport of gRPC is not as expected")

// encodingError refuses messages in another encoding than Config.Gzip allows. It keeps out compressors that some other package of
// the program registers: without one gRPC answers UNIMPLEMENTED by itself.
type encodingError string

func (e encodingError) Error() string { return "grpc-encoding " + string(e) + " is not supported" }

// messageHead is what stands before each message: a flag and the length.
const messageHead = 5

// tooLargeError refuses a message of which nothing but its head has been read.
type tooLargeError struct{ size, most int }

func (e *tooLargeError) Error() string {
	return fmt.Sprintf("request: has %d bytes, more than %d", e.size, e.most)
}

// next awaits the next message. head is for messageHead bytes. io.EOF means that there is none.
func (s *Server) next(w rawCall, head []byte) (m announced, err error) {
	if err := w.ReadMessageHeader(head); err != nil {
		return m, err
	}
	m.size = int(binary.BigEndian.Uint32(head[1:]))
	m.becomes = m.size
	switch {
	case head[0] == 0:
	case head[0] == 1 && s.unzipper != nil && w.RecvCompress() == gzipName:
		m.zip, m.becomes = s.unzipper, s.unzipper.most
	default:
		return m, &engine.InvalidError{Field: "request", Code: engine.CodeMalformed, Description: "is marked as compressed, and the call names no encoding"}
	}
	if m.size > s.cfg.MaxRecvBytes {
		return m, &tooLargeError{m.size, s.cfg.MaxRecvBytes}
	}
	return m, nil
}

// fill reads the message, and frees what has been read of it. Server.convert is to follow.
func (in *inbound) fill(w rawCall, m announced) error {
	data, err := w.Read(max(m.size-m.begun.Len(), 0))
	if err != nil {
		m.begun.Free()
		return err
	}
	if m.begun != nil {
		data = append(m.begun, data...)
	}
	if n := data.Len(); n > m.size { // of unknown length, see Call
		data.Free()
		return &tooLargeError{n, m.size}
	}
	if _, translated := w.(Translator); translated || m.zip != nil {
		in.raw = data.Materialize()
	} else {
		in.copyFrom(data, data.Len())
	}
	data.Free()
	return nil
}

// errNoTurn refuses a request that could not be decompressed or translated in time.
var errNoTurn = fmt.Errorf("%w: too many large requests that are compressed or no protobuf", engine.ErrOverloaded)

// convert decompresses and translates the message that fill has read, if it is to be. A large one takes a hundred milliseconds of a
// core, so such wait for their turn, maxWait at most (0: until ctx ends), and have half of the cores: pushes go on beside them. What
// nobody waits for any more is not converted.
func (s *Server) convert(ctx context.Context, w rawCall, in *inbound, m announced, maxWait time.Duration) (err error) {
	t, translated := w.(Translator)
	if m.zip == nil && !translated {
		return nil
	}
	b := in.raw
	in.raw = nil
	if m.becomes > smallBody {
		var late <-chan time.Time
		if maxWait > 0 {
			timer := time.NewTimer(maxWait)
			defer timer.Stop()
			late = timer.C
		}
		select {
		case s.turns <- struct{}{}:
			defer func() { <-s.turns }()
		case <-late:
			return errNoTurn
		case <-ctx.Done():
		}
		switch err := ctx.Err(); {
		case errors.Is(err, context.DeadlineExceeded):
			return engine.ErrDeadline
		case err != nil:
			return engine.ErrCanceled
		}
	}
	if m.zip != nil {
		if b, err = m.zip.unzip(b); err != nil {
			return err
		}
	}
	if translated {
		if b, err = t.Translate(b); err != nil {
			return err //nolint:wrapcheck // it is one of ours
		}
	}
	in.copyFrom(mem.BufferSlice{mem.SliceBuffer(b)}, len(b))
	return nil
}

// only reads the message of a call that has one, as fill does, and then that no other follows: what a
// client sends behind it would stay in memory, however long the push takes.
func (in *inbound) only(w rawCall, m announced, head []byte) error {
	if err := in.fill(w, m); err != nil {
		return err
	}
	switch err := w.ReadMessageHeader(head); {
	case err == nil:
		return &engine.InvalidError{Field: "request", Code: engine.CodeTooMany, Description: "must be one message"}
	case errors.Is(err, io.EOF):
		return nil
	default:
		return err
	}
}

// unread is the error of a call whose message was not read whole, so that nothing was done for
// it: for what its head says, or because the client has gone or broken off.
func unread(err error) error {
	var invalid *engine.InvalidError
	var large *tooLargeError
	switch {
	case errors.As(err, &invalid), errors.As(err, &large), errors.Is(err, errPanic), errors.Is(err, errNoTurn), errors.Is(err, engine.ErrDeadline):
		return err
	case errors.Is(err, io.EOF):
		return &engine.InvalidError{Field: "request", Code: engine.CodeRequired, Description: "must be there"}
	case errors.Is(err, io.ErrUnexpectedEOF):
		return &engine.InvalidError{Field: "request", Code: engine.CodeMalformed, Description: "ends before it is whole"}
	case status.Code(err) == codes.DeadlineExceeded:
		return engine.ErrDeadline
	default:
		return engine.ErrCanceled
	}
}
