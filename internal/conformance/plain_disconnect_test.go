package conformance

import (
	pubsub "github.com/push-manager/push-manager/proto"
)

// disconnect takes what a frame says of connections to close. Nobody has named a device, and the only room is everybody's. Refusals are
// of use where clients come back, which these do not.
func (st *plainStream) disconnect(f *pubsub.DeliverRequest) error {
	p := st.p
	if len(p.features()) == 1 && p.fault != "disconnects without the feature" {
		return nil
	}
	for _, d := range f.GetDisconnects() {
		one := (d.UserId == "") != (d.RoomId == "")
		if (d.Token == 0 || !one || d.Code < 4000 || d.Code > 4999) && p.fault != "any disconnect will do" {
			return broken("a disconnect of nobody")
		}
		closed := uint32(0)
		p.mu.Lock()
		if _, here := p.users[d.UserId]; here && d.DeviceId == "" && !d.AllowAgain && p.fault != "disconnects nobody" {
			delete(p.users, d.UserId)
			closed = 1
		}
		if d.RefuseMs > 0 && p.fault == "a refusal is for all" {
			clear(p.users)
		}
		p.mu.Unlock()
		if p.fault != "disconnects are not answered" {
			st.send(&pubsub.DeliverResponse{Disconnected: []*pubsub.Disconnected{{Token: d.Token, Connections: closed, Failed: p.fault == "disconnects fail"}}})
		}
	}
	return nil
}
