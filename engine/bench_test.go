package engine

import (
	"fmt"
	"testing"
)

// BenchmarkValidate is the check of a push against the limits.
func BenchmarkValidate(b *testing.B) {
	limits := Limits{}.withDefaults()
	ids := make([]string, 100)
	for i := range ids {
		ids[i] = fmt.Sprintf("user-%07d", i)
	}
	content := Content{Present: true, DataLen: 128, MetadataEntries: 2, MetadataBytes: 32}
	for name, p := range map[string]*Push{
		"push=user":             {Request: Request{Kind: ToUser, User: ids[0], Content: content}},
		"push=room":             {Request: Request{Kind: ToRoom, Room: "room-0000001", Content: content}},
		"push=room/exclude=100": {Request: Request{Kind: ToRoom, Room: "room-0000001", Exclude: ids, Content: content}},
		"push=users/users=100":  {Request: Request{Kind: ToUsers, Users: ids, Content: content}},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := limits.Check(&p.Request); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
