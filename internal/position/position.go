// Package position has the positions that clients hold in the logs of rooms, as text: what a
// push to a room answers, and what a gateway tells its clients.
//
// A position is not secret and not signed: it says how far somebody has read, and grants nothing.
package position

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"slices"
)

const (
	// MaxPartitions bounds the partitions of a position.
	MaxPartitions = 64
	// MaxBytes bounds its text: what is longer is none.
	MaxBytes = 1 << 10

	version = 1
)

// ErrMalformed is that of a text that is no position.
var ErrMalformed = errors.New("is not a position")

// Position is a place in each of some partitions of the logs of rooms.
type Position struct {
	Epoch  uint64
	Places []Place // by Partition, rising
}

// Place is how far one partition has been read: up to Seq.
type Place struct {
	Partition uint32
	Seq       uint64
}

// In returns the place in a partition. False means that the position says nothing of it.
func (p *Position) In(partition uint32) (seq uint64, ok bool) {
	i, ok := slices.BinarySearchFunc(p.Places, partition, func(at Place, want uint32) int { return int(at.Partition) - int(want) })
	if !ok {
		return 0, false
	}
	return p.Places[i].Seq, true
}

// String is the text, which URLs and JSON take as it is.
func (p *Position) String() string {
	b := binary.BigEndian.AppendUint64([]byte{version}, p.Epoch)
	for _, at := range p.Places {
		b = binary.AppendUvarint(b, uint64(at.Partition))
		b = binary.AppendUvarint(b, at.Seq)
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

// Parse reads a text that String has made. Its error is ErrMalformed.
func Parse(text string) (Position, error) {
	if len(text) > MaxBytes {
		return Position{}, ErrMalformed
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil || len(b) < 9 || b[0] != version {
		return Position{}, ErrMalformed
	}
	p := Position{Epoch: binary.BigEndian.Uint64(b[1:])}
	for b = b[9:]; len(b) > 0; {
		partition, n := binary.Uvarint(b)
		if n <= 0 || partition >= MaxPartitions || len(p.Places) > 0 && uint64(p.Places[len(p.Places)-1].Partition) >= partition {
			return Position{}, ErrMalformed
		}
		seq, m := binary.Uvarint(b[n:])
		if m <= 0 {
			return Position{}, ErrMalformed
		}
		p.Places = append(p.Places, Place{Partition: uint32(partition), Seq: seq})
		b = b[n+m:]
	}
	return p, nil
}
