package wire

import "google.golang.org/protobuf/encoding/protowire"

// AppendUint appends a number, a bool or an enum, unless it is 0.
func AppendUint(b []byte, number protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	if number < 16 && v < 0x80 { // as in most fields: two bytes
		return append(b, byte(number<<3)|byte(protowire.VarintType), byte(v))
	}
	return protowire.AppendVarint(protowire.AppendTag(b, number, protowire.VarintType), v)
}

// SizeUint is the size of what AppendUint appends.
func SizeUint(number protowire.Number, v uint64) int {
	if v == 0 {
		return 0
	}
	return protowire.SizeTag(number) + protowire.SizeVarint(v)
}

// AppendLen begins a length-delimited field whose n bytes the caller appends.
func AppendLen(b []byte, number protowire.Number, n int) []byte {
	if number < 16 && n < 0x80 {
		return append(b, byte(number<<3)|byte(protowire.BytesType), byte(n))
	}
	return protowire.AppendVarint(protowire.AppendTag(b, number, protowire.BytesType), uint64(n))
}

// SizeLen is the size of a length-delimited field of n bytes.
func SizeLen(number protowire.Number, n int) int {
	return protowire.SizeTag(number) + protowire.SizeBytes(n)
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
