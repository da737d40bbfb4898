package ingress

import (
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth"
)

// api is what a call asks for.
type api uint8

const (
	toRoom api = iota
	toUser
	toUsers
	toRooms
	toAll
	apis // how many ask for a push; of a call: that it is a PushStream

	forgetUser
	replay
	explain
	watchReceipts

	disconnect // of PresenceService

	// Of BroadcastJobService.
	createJob
	getJob
	listJobs
	watchJob
	pauseJob
	resumeJob
	cancelJob
	setJobRate
	deleteJob

	// Of PresenceService.
	getRoomMembers
	getUsers
	watchPresence
	methods // how many there are
)

// String is the name of the method, and the label in metrics.
func (a api) String() string { return a.method().String() }

// idField is the field with the ids that the api pushes to.
func (a api) idField() string {
	switch a {
	case toRoom:
		return "room_id"
	case toUser:
		return "user_id"
	case toUsers:
		return "user_ids"
	case toRooms:
		return "room_ids"
	case forgetUser, replay:
		return "user_id"
	case createJob:
		return "spec"
	case getRoomMembers:
		return "room_id"
	case getUsers:
		return "user_ids"
	case disconnect:
		return "user_id or room_id"
	default:
		return ""
	}
}

// ofJobs tells whether it is a method of BroadcastJobService.
func (a api) ofJobs() bool { return a >= createJob && a <= deleteJob }

// ofPresence tells whether it is a method of PresenceService.
func (a api) ofPresence() bool { return a >= getRoomMembers && a <= watchPresence }

func (a api) kind() engine.Kind {
	switch a {
	case toRoom:
		return engine.ToRoom
	case toUser:
		return engine.ToUser
	case toUsers:
		return engine.ToUsers
	case toRooms:
		return engine.ToRooms
	default:
		return engine.ToAll
	}
}

// method is that of the api, as rights name it.
func (a api) method() auth.Method {
	switch a {
	case toRoom:
		return auth.PushToRoom
	case toUser:
		return auth.PushToUser
	case toUsers:
		return auth.PushToUsers
	case toRooms:
		return auth.PushToRooms
	case forgetUser:
		return auth.ForgetUser
	case replay:
		return auth.Replay
	case explain:
		return auth.Explain
	case watchReceipts:
		return auth.WatchReceipts
	case disconnect:
		return auth.Disconnect
	case createJob, getJob, listJobs, watchJob, pauseJob, resumeJob, cancelJob, setJobRate, deleteJob:
		return auth.CreateJob + auth.Method(a-createJob) // they are in the same order
	case getRoomMembers:
		return auth.GetRoomMembers
	case getUsers:
		return auth.GetUsers
	case watchPresence:
		return auth.WatchPresence
	default:
		return auth.BroadcastMessage
	}
}

// allowedTo tells whether a caller may call the method at all. Which ids it may name is asked when they are known.
func (a api) allowedTo(who *auth.Principal) bool {
	return who.May(a.method()) || a == disconnect && who.May(auth.DisconnectRoom) || a == watchPresence && who.May(auth.WatchRoomPresence)
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
	case 7:
		return toRooms, true
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
	case toRooms:
		return 7
	default:
		return 6
	}
}
