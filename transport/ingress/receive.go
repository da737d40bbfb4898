package ingress

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

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

// encodingError refuses compressed messages. It keeps out compressors that some other package of
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

// next awaits the next message and tells how large it is. head is for messageHead bytes.
// io.EOF means that there is none.
func (s *Server) next(w rawCall, head []byte) (size int, err error) {
	if err := w.ReadMessageHeader(head); err != nil {
		return 0, err
	}
	if head[0] != 0 {
		return 0, &engine.InvalidError{Field: "request", Code: engine.CodeMalformed, Description: "is marked as compressed, and the call names no encoding"}
	}
	size = int(binary.BigEndian.Uint32(head[1:]))
	if size > s.cfg.MaxRecvBytes {
		return 0, &tooLargeError{size, s.cfg.MaxRecvBytes}
	}
	return size, nil
}

// first reads the first bytes of a large message, which need no space: whoever announces a
// message and sends none of it gets none.
func first(w rawCall) (mem.BufferSlice, error) { return w.Read(smallBody) }

// fill reads the message of which next has read the head. begin is what is read of it already, nil
// for nothing; fill frees it.
func (in *inbound) fill(w rawCall, begin mem.BufferSlice, size int) error {
	data, err := w.Read(size - begin.Len())
	if err != nil {
		begin.Free()
		return err
	}
	if begin != nil {
		data = append(begin, data...)
	}
	if n := data.Len(); n > size { // of unknown length, see Call
		data.Free()
		return &tooLargeError{n, size}
	}
	if t, ok := w.(Translator); ok {
		translated, err := translate(t, data)
		if err != nil {
			return err
		}
		data = mem.BufferSlice{mem.SliceBuffer(translated)}
	}
	in.copyFrom(data, data.Len())
	data.Free()
	return nil
}

func translate(t Translator, data mem.BufferSlice) ([]byte, error) {
	defer data.Free()
	return t.Translate(data.Materialize()) //nolint:wrapcheck // it is one of ours
}

// only reads the message of a call that has one, as fill does, and then that no other follows: what a
// client sends behind it would stay in memory, however long the push takes.
func (in *inbound) only(w rawCall, begin mem.BufferSlice, size int, head []byte) error {
	if err := in.fill(w, begin, size); err != nil {
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
	case errors.As(err, &invalid), errors.As(err, &large):
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
