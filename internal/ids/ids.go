package ids

import (
	"errors"
	"fmt"
	"unicode/utf8"
)

// MaxBytes is the contract's limit of an id.
const MaxBytes = 256

// ReservedRooms begins the names of rooms that are no clients': each node keeps all its users in one of them, so that
// the Controller also finds those without a room.
const ReservedRooms = "@node:"

// What is wrong with an id.
var (
	ErrEmpty     = errors.New("must not be empty")
	ErrTooLong   = errors.New("too long")
	ErrMalformed = errors.New("must be valid UTF-8 without control characters")
)

// Check says what is wrong with an id that may have so many bytes. The error is or wraps
// one of the three.
func Check[ID string | []byte](id ID, most int) error {
	switch {
	case len(id) == 0:
		return ErrEmpty
	case len(id) > most:
		return fmt.Errorf("%w: %d bytes, more than %d", ErrTooLong, len(id), most)
	}
	for i := 0; i < len(id); {
		if c := id[i]; c < utf8.RuneSelf {
			if c < ' ' || c == 0x7f { // C0 and DEL
				return ErrMalformed
			}
			i++
			continue
		}
		r, n := utf8.DecodeRuneInString(string(id[i:min(i+utf8.UTFMax, len(id))]))
		if n == 1 || r < 0xa0 { // broken, or C1
			return ErrMalformed
		}
		i += n
	}
	return nil
}
