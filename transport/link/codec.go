package link

import (
	"fmt"
	"sync"

	"google.golang.org/grpc/mem"
)

// codec passes bytes that are encoded and decoded by this package.
type codec struct{}

// outFrame is an encoded message. SendMsg takes over its buffer, which goes back
// to the pool once gRPC has put it on the wire.
type outFrame struct{ buf mem.Buffer }

// inFrame is the memory into which a message is received. Each message replaces
// the one before.
type inFrame struct{ b []byte }

// inFrameKeep is what an inFrame keeps between messages; acks are small, and a
// rare large one must not stay for the life of the stream.
const inFrameKeep = 64 << 10

// Name is the content subtype, which every gRPC server understands.
func (codec) Name() string { return "proto" }

// Marshal hands the buffer of an *outFrame to gRPC.
func (codec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*outFrame)
	if !ok {
		return nil, fmt.Errorf("link: marshal %T", v)
	}
	return mem.BufferSlice{f.buf}, nil
}

// Unmarshal copies a message into an *inFrame.
func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*inFrame)
	if !ok {
		return fmt.Errorf("link: unmarshal %T", v)
	}
	if cap(f.b) > inFrameKeep {
		f.b = nil
	}
	f.b = f.b[:0]
	for _, b := range data {
		f.b = append(f.b, b.ReadOnlyData()...)
	}
	return nil
}

const (
	// bufferMin is where buffers start: gRPC does not return smaller ones than
	// 1 KiB to their pool.
	bufferMin = 4 << 10
	// bufferKeep is the largest that is kept. A frame with the definition of a huge
	// audience must not pin its memory.
	bufferKeep = 1 << 20
)

// bufferPool holds the buffers of frames. Who has taken one owns it until it is
// handed over to gRPC, which puts it back.
type bufferPool struct{ pool sync.Pool }

// take returns an empty buffer.
func (p *bufferPool) take() *[]byte {
	if b, ok := p.pool.Get().(*[]byte); ok {
		*b = (*b)[:0]
		return b
	}
	b := make([]byte, 0, bufferMin)
	return &b
}

// Get is a part of mem.BufferPool that nobody calls.
func (p *bufferPool) Get(n int) *[]byte {
	b := make([]byte, n)
	return &b
}

// Put returns a buffer.
func (p *bufferPool) Put(b *[]byte) {
	if cap(*b) <= bufferKeep {
		p.pool.Put(b)
	}
}
