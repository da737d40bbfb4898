package wire

import (
	"errors"
	"slices"
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"
)

var errNumber = errors.New("invalid field number")

// Reader reads a message. Between two calls of Next it is one field of it.
type Reader struct {
	Rest []byte // not read yet: the message, at first
	Err  error  // why Next has ended early

	Uint  uint64 // value of a varint, a fixed32 or a fixed64
	Bytes []byte // value of a length-delimited field: a part of the message, with no room behind it

	tag uint64 // number and type
}

// Number is the field's number, 0 if not even that could be read.
func (r *Reader) Number() protowire.Number { return protowire.Number(r.tag >> 3) }

// Type is the field's type.
func (r *Reader) Type() protowire.Type { return protowire.Type(r.tag & 7) }

// IsBytes tells whether the field is a string, bytes, a message or a packed list.
func (r *Reader) IsBytes(number protowire.Number) bool {
	return r.tag == protowire.EncodeTag(number, protowire.BytesType)
}

// IsUint tells whether the field is a number, a bool or an enum.
func (r *Reader) IsUint(number protowire.Number) bool {
	return r.tag == protowire.EncodeTag(number, protowire.VarintType)
}

// IsFixed32 tells whether the field is a fixed32.
func (r *Reader) IsFixed32(number protowire.Number) bool {
	return r.tag == protowire.EncodeTag(number, protowire.Fixed32Type)
}

// IsFixed64 tells whether the field is a fixed64.
func (r *Reader) IsFixed64(number protowire.Number) bool {
	return r.tag == protowire.EncodeTag(number, protowire.Fixed64Type)
}

// Next reads the next field. It returns false at the end and on an error. Fields of other
// types than varint, length-delimited, fixed32 and fixed64 have neither Uint nor Bytes.
func (r *Reader) Next() bool {
	b := r.Rest
	// Most fields have a number below 16 and a value or a length below 128.
	if len(b) > 1 && b[0] >= 1<<3 && b[0] < 0x80 && b[1] < 0x80 {
		switch protowire.Type(b[0] & 7) {
		case protowire.VarintType:
			r.tag, r.Uint, r.Rest = uint64(b[0]), uint64(b[1]), b[2:]
			return true
		case protowire.BytesType:
			if end := 2 + int(b[1]); end <= len(b) {
				r.tag, r.Bytes, r.Rest = uint64(b[0]), b[2:end:end], b[end:]
				return true
			}
		}
	}
	return len(b) > 0 && r.next(b)
}

// next is Next for every field.
func (r *Reader) next(b []byte) bool {
	number, kind, n := protowire.Number(b[0]>>3), protowire.Type(b[0]&7), 1
	if number == 0 || b[0] >= 0x80 {
		number, kind, n = protowire.ConsumeTag(b)
	}
	if number > protowire.MaxValidNumber {
		r.tag, r.Err = 0, errNumber
		return false
	}
	r.tag = protowire.EncodeTag(number, kind)
	if n > 0 {
		b = b[n:]
		switch kind {
		case protowire.VarintType:
			r.Uint, n = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			r.Bytes, n = protowire.ConsumeBytes(b)
			r.Bytes = slices.Clip(r.Bytes)
		case protowire.Fixed32Type:
			var v uint32
			v, n = protowire.ConsumeFixed32(b)
			r.Uint = uint64(v)
		case protowire.Fixed64Type:
			r.Uint, n = protowire.ConsumeFixed64(b)
		default:
			n = protowire.ConsumeFieldValue(number, kind, b)
		}
	}
	if n < 0 {
		r.Err = protowire.ParseError(n)
		return false
	}
	r.Rest = b[n:]
	return true
}

// Uints calls yield for each number of a packed list until that returns an error.
func Uints(list []byte, yield func(uint64) error) error {
	for len(list) > 0 {
		v, n := protowire.ConsumeVarint(list)
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := yield(v); err != nil {
			return err
		}
		list = list[n:]
	}
	return nil
}

// String is a string over b without a copy: nobody writes to b as long as it is used.
func String(b []byte) string {
	return unsafe.String(unsafe.SliceData(b), len(b)) //nolint:gosec // see above
}
