package ingress

import (
	"math"
	"runtime/debug"
	"time"
)

// What calls and connections take, in bytes. TestWhatCallsTake measures it.
const (
	// openBytes is what an open unary call takes: a goroutine, gRPC's stream, a push, and a
	// body of smallBody.
	openBytes = 24 << 10
	smallBody = 4 << 10
	// streamBytes is what an open PushStream takes, idle or not: goroutines and buffers, what
	// its client may send before anybody reads it (StreamWindow comes on top), and shareFree.
	streamBytes = 20<<10 + shareFree
	// connBytes is what a connection takes: two buffers of 32 KiB and two goroutines.
	connBytes = 96 << 10

	// pushBytes is what a push of a PushStream takes besides its bytes.
	pushBytes = 1 << 10
	// pushSize is the size of small pushes of which there are many in a message.
	pushSize = 128
	// translatedShare is how often a message that has to be translated is there besides: parsed, encoded, and joined before.
	translatedShare = 3
	// idBytes is what an id takes besides its bytes: its place in two lists.
	idBytes = 3 * 16
	// idSize is the size of the smallest id in a list.
	idSize = 3
)

// maxSpaceWait is for how long a unary call waits for space. It has said how large it is,
// and no more than StreamWindow of it has come.
const maxSpaceWait = 2 * time.Second

// Bounds without a limit of memory.
const (
	unlimitedSpace       = 1 << 30
	unlimitedOpen        = 1 << 17
	unlimitedStreams     = 1 << 14
	unlimitedConnections = 1 << 14
	unlimitedWindow      = 256 << 10 // with 64 KiB a PushStream moves a fifth less
)

// fit sets the bounds that are not set to what fits into the memory that the process may have:
// a quarter of it each is for bodies, open unary calls and streams, and an eighth for
// connections. A stream's window is a small part of it, so that many fit. The rest is for all that is not of the API, and for garbage.
func (c *Config) fit() {
	memory := debug.SetMemoryLimit(-1)
	auto := func(v *int, share, each, least, unlimited int) {
		switch {
		case *v != 0:
		case memory == math.MaxInt64:
			*v = unlimited
		default:
			*v = int(min(max(memory/int64(share*each), int64(least)), int64(unlimited)))
		}
	}
	auto(&c.StreamWindow, 8192, 1, 64<<10, unlimitedWindow)
	auto(&c.BodyBytes, 4, 1, 8<<20, unlimitedSpace)
	auto(&c.OpenCalls, 4, openBytes, 256, unlimitedOpen)
	auto(&c.Streams, 4, streamBytes+c.StreamWindow, 64, unlimitedStreams)
	auto(&c.Connections, 8, connBytes, 64, unlimitedConnections)
	setDefault(&c.ConnectionsPerAddress, (3*c.Connections+3)/4)
}

// bodyBytes is what reading a request of so many bytes may take: gRPC's buffers, our copy, and
// as many ids as there can be, with so many bytes to be put before each.
func (s *Server) bodyBytes(a api, size, scope int) int64 {
	ids := 0
	if most := s.decoder.shapes[a].listMax + s.decoder.shapes[a].roomsMax; most > 0 {
		ids = min(size/idSize, most)
	}
	return int64(2*size+idBytes*ids) + scopedBytes(size, ids, scope)
}

// keptBytes is what a request takes from when it is decoded until it is answered.
func keptBytes(size, ids, scope int) int64 {
	return int64(size+idBytes*ids) + scopedBytes(size, ids, scope)
}

// scopedBytes is what the ids of a request take once more with the tenant before each.
func scopedBytes(size, ids, scope int) int64 {
	if scope == 0 {
		return 0
	}
	return int64(size + scope*ids)
}

// messageBytes is what a message of a PushStream may take until it is answered.
func messageBytes(size, scope int) int64 {
	pushes := min(1+size/pushSize, batchMax)
	return int64(2*size+pushBytes*pushes) + scopedBytes(size, pushes, scope)
}
