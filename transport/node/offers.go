package node

import (
	"cmp"
	"hash/maphash"
	"slices"

	pubsub "github.com/push-manager/push-manager/proto"
)

// offers are the streams of managers that offer one feature.
type offers []offer

type offer struct {
	st      *stream
	manager uint64 // hash
	stream  uint64 // hash
}

// add adds a stream. number is another one for each stream.
func (o *offers) add(st *stream, hello *pubsub.Hello, seed maphash.Seed, number uint64) {
	manager := maphash.String(seed, cmp.Or(hello.GetInstanceId(), hello.GetManagerId()))
	*o = append(*o, offer{st: st, manager: manager, stream: mix(manager + number)})
}

// remove removes a stream. False: it is not there.
func (o *offers) remove(st *stream) bool {
	was := len(*o)
	*o = slices.DeleteFunc(*o, func(s offer) bool { return s.st == st })
	return len(*o) < was
}

// pick is the stream for the hash of a key: always of the same manager, as long as the managers are the same. It
// is nil where there is none.
func (o offers) pick(key uint64) *stream {
	var best *stream
	var high [2]uint64
	for _, s := range o {
		at := [2]uint64{mix(key ^ s.manager), mix(key ^ s.stream)}
		if best == nil || cmp.Or(cmp.Compare(at[0], high[0]), cmp.Compare(at[1], high[1])) > 0 {
			best, high = s.st, at
		}
	}
	return best
}

// mix spreads the bits of a hash (splitmix64).
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}
