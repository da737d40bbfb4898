package wire

import "google.golang.org/protobuf/encoding/protowire"

// AppendUint appends a number, a bool or an enum, unless it is 0.
func AppendUint(b []byte, number protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return appendTwo(b, uint64(number)<<3, v)
}

// SizeUint is the size of what AppendUint appends.
func SizeUint(number protowire.Number, v uint64) int {
	if v == 0 {
		return 0
	}
	return protowire.SizeVarint(uint64(number)<<3) + protowire.SizeVarint(v)
}

// AppendFixed64 appends a fixed64, unless it is 0.
func AppendFixed64(b []byte, number protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendFixed64(protowire.AppendTag(b, number, protowire.Fixed64Type), v)
}

// SizeFixed64 is the size of what AppendFixed64 appends.
func SizeFixed64(number protowire.Number, v uint64) int {
	if v == 0 {
		return 0
	}
	return protowire.SizeTag(number) + protowire.SizeFixed64()
}

// AppendLen begins a length-delimited field whose n bytes the caller appends.
func AppendLen(b []byte, number protowire.Number, n int) []byte {
	return appendTwo(b, protowire.EncodeTag(number, protowire.BytesType), uint64(n))
}

// SizeLen is the size of a length-delimited field of n bytes.
func SizeLen(number protowire.Number, n int) int {
	return protowire.SizeVarint(uint64(number)<<3) + protowire.SizeVarint(uint64(n)) + n
}

// AppendBytes appends bytes, an encoded message or a string, also an empty one.
func AppendBytes[T ~[]byte | ~string](b []byte, number protowire.Number, v T) []byte {
	return append(AppendLen(b, number, len(v)), v...)
}

// AppendString appends a string unless it is empty.
func AppendString(b []byte, number protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	return append(AppendLen(b, number, len(s)), s...)
}

// SizeString is the size of what AppendString appends.
func SizeString(number protowire.Number, s string) int {
	if s == "" {
		return 0
	}
	return SizeLen(number, len(s))
}

// AppendStrings appends a list.
func AppendStrings(b []byte, number protowire.Number, list []string) []byte {
	for _, s := range list {
		b = append(AppendLen(b, number, len(s)), s...)
	}
	return b
}

// SizeStrings is the size of what AppendStrings appends.
func SizeStrings(number protowire.Number, list []string) int {
	n := 0
	for _, s := range list {
		n += SizeLen(number, len(s))
	}
	return n
}

// appendTwo appends a tag and a value or a length. Most tags are one byte, and most of what
// follows is one or two.
func appendTwo(b []byte, tag, v uint64) []byte {
	switch {
	case tag >= 1<<7 || v >= 1<<14:
		return protowire.AppendVarint(protowire.AppendVarint(b, tag), v)
	case v < 1<<7:
		return append(b, byte(tag), byte(v))
	default:
		return append(b, byte(tag), byte(v)|1<<7, byte(v>>7))
	}
}
