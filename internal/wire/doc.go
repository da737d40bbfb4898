// Package wire reads and writes protobuf messages field by field, for the few messages that
// are too many for generated code: pushes, frames, acks, members of rooms. What it reads and
// writes is what generated code reads and writes.
//
// # Reading
//
//	m := wire.Reader{Rest: message}
//	for m.Next() {
//		switch {
//		case m.IsBytes(2):
//			name = wire.String(m.Bytes) // or string(m.Bytes), a copy
//		case m.IsUint(3):
//			count = m.Uint
//		}
//	}
//	if m.Err != nil { ... }
//
// Nothing is copied and nothing is allocated. A field with a known number and another type
// than it should have is an unknown field, as everywhere in protobuf. Strings may have any
// bytes: UTF-8 is for the caller to check. A message that comes as several fields of one
// number is for the caller to merge.
//
// # Writing
//
// A field of another message begins with [AppendLen], so its length comes first: what
// AppendX writes, SizeX measures.
//
//	b = wire.AppendLen(b, 1, wire.SizeString(2, name)+wire.SizeUint(3, count))
//	b = wire.AppendString(b, 2, name)
//	b = wire.AppendUint(b, 3, count)
//
// AppendString and AppendUint leave zero values out, as proto3 does. AppendBytes and
// AppendStrings write what they are given: messages, members of a oneof, lists.
package wire
