package web

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/transport/ingress"
)

// headSize is that of what stands before each message of an enveloped body: a byte of flags and four of the length. It is
// the same in gRPC, gRPC-Web and the streams of Connect.
const headSize = 5

// gzip is the encoding in which messages may come, if the ingress says so.
const gzip = "gzip"

// smallBody is what is read of a body of unknown length before there is memory for it.
const smallBody = 4 << 10

// call is a request as the handlers of gRPC want it: its messages are read when they ask for them, once they have memory.
type call struct {
	// Static.
	method    string
	encoding  string // of messages, "" for none
	foreign   bool   // another header than that of the protocol names one
	body      io.Reader
	length    int64 // of a bare body, -1 if it is not known
	most      int   // bytes of a message
	enveloped bool
	stream    bool
	control   *http.ResponseController
	bodyTime  time.Duration
	w         *response

	begin   []byte // of a bare body of unknown length: what has been read of it
	read    bool   // the body was asked for
	trailer metadata.MD
	ended   atomic.Bool // WriteStatus has been called
}

var _ ingress.Call = (*call)(nil)

// Method implements grpc.ServerTransportStream.
func (c *call) Method() string { return c.method }

// SetHeader implements grpc.ServerTransportStream. No handler of ours sends any.
func (c *call) SetHeader(metadata.MD) error { return nil }

// SendHeader implements grpc.ServerTransportStream.
func (c *call) SendHeader(metadata.MD) error { return nil }

// SetTrailer implements grpc.ServerTransportStream.
func (c *call) SetTrailer(md metadata.MD) error {
	c.trailer = metadata.Join(c.trailer, md)
	return nil
}

// RecvCompress tells the encoding of messages.
func (c *call) RecvCompress() string { return c.encoding }

// ReadMessageHeader reads what stands before a message, or makes it. With the first one begins the time that the body of a
// call has, however small it is: until it is whole, the call is open and keeps its place from others.
func (c *call) ReadMessageHeader(head []byte) error {
	again := c.read
	c.read = true
	if !again && !c.stream && c.length != 0 {
		_ = c.control.SetReadDeadline(time.Now().Add(c.bodyTime)) // it fails for a client that has gone
	}
	switch {
	case c.enveloped:
		_, err := io.ReadFull(c.body, head[:headSize])
		if errors.Is(err, io.EOF) {
			c.whole()
		}
		return c.failed(err)
	case again:
		return io.EOF
	case c.length >= 0:
		return c.announce(head, c.length)
	}
	c.begin = make([]byte, smallBody+1)
	n, err := io.ReadFull(c.body, c.begin)
	c.begin = c.begin[:n]
	switch {
	case err == nil:
		return c.announce(head, int64(c.most))
	case errors.Is(err, io.EOF):
		c.whole()
		return c.announce(head, 0)
	case errors.Is(err, io.ErrUnexpectedEOF): // Read finds out whether it was broken off
		return c.announce(head, int64(n))
	default:
		return c.failed(err)
	}
}

// whole ends the time of a body that is there: while its call goes on, the connection is read for its end, and a deadline
// would look like one.
func (c *call) whole() {
	if !c.stream {
		_ = c.control.SetReadDeadline(time.Time{}) // it fails for a client that has gone
	}
}

func (c *call) announce(head []byte, size int64) error {
	head[0] = 0
	if c.encoding == gzip && size > 0 {
		head[0] = 1 // as in a body with heads
	}
	binary.BigEndian.PutUint32(head[1:], uint32(min(size, 1<<32-1)))
	return nil
}

// Read reads n bytes of a message. Of a body of unknown length it reads fewer if that ends, and one more if it does not.
func (c *call) Read(n int) (mem.BufferSlice, error) {
	if n == 0 {
		return nil, nil
	}
	b := make([]byte, n)
	if c.enveloped || c.length > 0 {
		if _, err := io.ReadFull(c.body, b); err != nil {
			return nil, c.failed(begun(err))
		}
		if !c.enveloped {
			c.length -= int64(n)
			if c.length == 0 {
				c.whole()
			}
		}
		return mem.BufferSlice{mem.SliceBuffer(b)}, nil
	}
	have := copy(b, c.begin)
	c.begin = c.begin[have:]
	if len(c.begin) > 0 { // more follows, in the next Read
		return mem.BufferSlice{mem.SliceBuffer(b[:have])}, nil
	}
	for have < n {
		more, err := c.body.Read(b[have:])
		have += more
		if errors.Is(err, io.EOF) {
			c.whole()
			return mem.BufferSlice{mem.SliceBuffer(b[:have])}, nil
		}
		if err != nil {
			return nil, c.failed(err)
		}
	}
	var one [1]byte
	switch _, err := io.ReadFull(c.body, one[:]); {
	case err == nil:
		b = append(b, one[0]) //nolint:makezero // a byte more than there may be says so
	case !errors.Is(err, io.EOF):
		return nil, c.failed(err)
	}
	c.whole()
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

// WriteStatus ends reads that wait, and of a stream the writes as well.
func (c *call) WriteStatus(*status.Status) error {
	c.ended.Store(true)
	past := time.Now()
	err := c.control.SetReadDeadline(past)
	if c.stream {
		err = errors.Join(err, c.control.SetWriteDeadline(past))
	}
	return err
}

// failed is an error of the body in the words of gRPC's transport.
func (c *call) failed(err error) error {
	switch {
	case err == nil, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return err
	case errors.Is(err, os.ErrDeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, "the request did not come in")
	default:
		return status.Error(codes.Canceled, "the client has gone")
	}
}

// begun is the error of a message that has begun.
func begun(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// translated is a call whose messages are no protobuf.
type translated struct {
	*call

	translate func(b []byte) ([]byte, error)
}

var (
	_ ingress.Call       = (*translated)(nil)
	_ ingress.Translator = (*translated)(nil)
)

// Translate implements ingress.Translator.
func (c *translated) Translate(b []byte) ([]byte, error) { return c.translate(b) }

// callOf is the call of a handler's context.
func callOf(ctx context.Context) *call {
	return asCall(grpc.ServerTransportStreamFromContext(ctx))
}

func asCall(in grpc.ServerTransportStream) *call {
	switch c := in.(type) {
	case *call:
		return c
	case *translated:
		return c.call
	default:
		return nil
	}
}

// newCall brings a request into the shape of a call. form is what makes protobuf of JSON that has another shape than that
// of the method's request; nil for none.
func (s *Server) newCall(w *response, r *http.Request, m *method, form func(b []byte) ([]byte, error)) ingress.Call {
	kind := strings.ToLower(r.Header.Get("Content-Type")) // as connect takes it
	c := &call{
		method: m.procedure, body: r.Body, length: r.ContentLength, most: s.limits.MaxRecvBytes, stream: m.streams(),
		control: http.NewResponseController(w), bodyTime: s.limits.BodyTimeout, w: w,
		enveloped: strings.HasPrefix(kind, "application/grpc") || strings.HasPrefix(kind, "application/connect+"),
	}
	if c.stream && r.ProtoMajor == 1 {
		c.body = &streamBody{ReadCloser: r.Body}
	}
	own := "Content-Encoding"
	switch {
	case strings.HasPrefix(kind, "application/grpc"):
		own = "Grpc-Encoding"
	case c.enveloped:
		own = "Connect-Content-Encoding"
	}
	for _, key := range [...]string{"Content-Encoding", "Connect-Content-Encoding", "Grpc-Encoding"} {
		if v := strings.Join(r.Header.Values(key), ", "); v != "" && v != "identity" {
			c.encoding, c.foreign = v, c.foreign || key != own
		}
		r.Header.Del(key) // connect gets an empty message, and would look for a decompressor
	}
	switch {
	case form != nil:
		return &translated{c, form}
	case strings.Contains(kind, "json"):
		return &translated{c, m.fromJSON}
	default:
		return c
	}
}

// Timeouts as clients may write them.
var (
	connectTimeout = regexp.MustCompile(`^[0-9]{1,10}$`)
	grpcTimeout    = regexp.MustCompile(`^[0-9]{1,8}[HMSmun]$`)
)

// refused is why a request cannot be served, nil if it can. Connect would find out by itself, but its errors do not say that
// nothing was sent.
func (s *Server) refused(c *call, r *http.Request) error {
	switch {
	case c.encoding == "":
	case !s.limits.Gzip:
		return errCompressed
	case c.encoding != gzip, c.foreign:
		return errEncoding
	}
	key, valid := "Connect-Timeout-Ms", connectTimeout
	if strings.HasPrefix(strings.ToLower(r.Header.Get("Content-Type")), "application/grpc") {
		key, valid = "Grpc-Timeout", grpcTimeout
	}
	if given := r.Header.Get(key); given != "" && !valid.MatchString(given) {
		return s.cfg.Ingress.Refused(invalid(strings.ToLower(key), "is not a time")) //nolint:wrapcheck // it is one of ours
	}
	return nil
}

// emptyMessage is what connect gets to read in place of a body.
func (c *call) emptyMessage() io.ReadCloser {
	if c.enveloped {
		return io.NopCloser(bytes.NewReader(make([]byte, headSize)))
	}
	return http.NoBody
}

// header is what handlers may ask a request's headers for.
func header(h http.Header) metadata.MD {
	md := make(metadata.MD, 4)
	for from, to := range map[string]string{"Authorization": "authorization", "X-Priority": "x-priority", "Traceparent": "traceparent", "Tracestate": "tracestate"} {
		if v := h[from]; v != nil {
			md[to] = v
		}
	}
	for _, key := range h["X-Api-Key"] { // two credentials are one too many, as two of a kind are
		md["authorization"] = append(slices.Clip(md["authorization"]), "Bearer "+key)
	}
	return md
}

// tenthOff is d, give or take a tenth.
func tenthOff(d time.Duration) time.Duration {
	return d + time.Duration((rand.Float64()*2-1)*float64(d)/10)
}
