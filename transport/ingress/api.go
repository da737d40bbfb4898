package ingress

import (
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/push-manager/push-manager/engine"
)

// api is what a push asks for.
type api uint8

const (
	toRoom api = iota
	toUser
	toUsers
	toAll
	apis // how many there are
)

// String is the name of the method, and the label in metrics.
func (a api) String() string {
	switch a {
	case toRoom:
		return "PushToRoom"
	case toUser:
		return "PushToUser"
	case toUsers:
		return "PushToUsers"
	default:
		return "BroadcastMessage"
	}
}

func (a api) kind() engine.Kind {
	switch a {
	case toRoom:
		return engine.ToRoom
	case toUser:
		return engine.ToUser
	case toUsers:
		return engine.ToUsers
	default:
		return engine.ToAll
	}
}

// asked tells which api a field of PushStreamRequest asks for.
func asked(num protowire.Number) (api, bool) {
	switch num {
	case 2:
		return toRoom, true
	case 3:
		return toUser, true
	case 4:
		return toAll, true
	case 5:
		return toUsers, true
	default:
		return 0, false
	}
}

// resultField is the field of PushStreamResponse that answers the api.
func (a api) resultField() protowire.Number {
	switch a {
	case toRoom:
		return 3
	case toUser:
		return 4
	case toAll:
		return 5
	default:
		return 6
	}
}
