package link

import (
	"testing"

	pubsub "github.com/push-manager/push-manager/proto"
)

// What a node says of connections is input, and becomes a reply to a caller.
func TestDescriptionsOfConnectionsThatCannotBeAreRefused(t *testing.T) {
	one := func(c *pubsub.Connection) []*pubsub.UserConnections {
		return []*pubsub.UserConnections{{Connections: []*pubsub.Connection{c}}}
	}
	for name, tc := range map[string]struct {
		said  []*pubsub.UserConnections
		asked int
		good  bool
	}{
		"nobody is here":          {[]*pubsub.UserConnections{{}}, 1, true},
		"some of those":           {[]*pubsub.UserConnections{{}}, 2, true},
		"a connection":            {one(&pubsub.Connection{ConnectionId: "1", DeviceId: "d", Attributes: map[string]string{"k": "v"}, RoomIds: []string{"r"}}), 1, true},
		"nothing":                 {nil, 1, false}, // whoever asks again for the rest would ask for ever
		"more than asked for":     {[]*pubsub.UserConnections{{}, {}}, 1, false},
		"too many connections":    {[]*pubsub.UserConnections{{Connections: make([]*pubsub.Connection, connectionsMost+1)}}, 1, false},
		"an id of any form":       {one(&pubsub.Connection{ConnectionId: "\xff"}), 1, false},
		"a device of any form":    {one(&pubsub.Connection{DeviceId: "\xff"}), 1, false},
		"a key of any form":       {one(&pubsub.Connection{Attributes: map[string]string{"\xff": "v"}}), 1, false},
		"a value of any form":     {one(&pubsub.Connection{Attributes: map[string]string{"k": "\xff"}}), 1, false},
		"a room of any form":      {one(&pubsub.Connection{RoomIds: []string{"r", "\xff"}}), 1, false},
		"as many as there may be": {[]*pubsub.UserConnections{{Connections: make([]*pubsub.Connection, connectionsMost)}}, 1, true},
	} {
		if described(tc.said, tc.asked) != tc.good {
			t.Errorf("%s: good is %v", name, !tc.good)
		}
	}
}
