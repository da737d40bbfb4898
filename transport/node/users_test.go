package node

import "testing"

// device is a connection that takes so many messages.
type device struct {
	room  string // that it is in
	space int
	got   int
}

func (d *device) Deliver(m *Message) Outcome {
	switch {
	case m.RoomID != "" && m.RoomID != d.room:
		return NotHere
	case d.got == d.space:
		return Failed
	}
	d.got++
	return Delivered
}

var (
	_ Sessions = (*Users[*device])(nil)
	_ Scoped   = (*Users[*device])(nil)
)

func TestUsersDeliverToEveryDevice(t *testing.T) {
	u := NewUsers[*device]()
	phone, laptop, full := &device{room: "r", space: 9}, &device{space: 9}, &device{room: "r"}
	u.Add("alice", phone)
	u.Add("alice", laptop)
	u.Add("alice", full)
	u.Add("bob", full)
	u.Add("carol", laptop)
	for _, test := range []struct {
		name, user, room string
		want             Outcome
	}{
		{"one device takes it", "alice", "", Delivered},
		{"the device in the room takes it", "alice", "r", Delivered},
		{"the queue is full", "bob", "r", Failed},
		{"no device is in the room", "carol", "r", NotHere},
		{"nobody", "dave", "", NotHere},
	} {
		if got := u.Deliver(test.user, &Message{RoomID: test.room}); got != test.want {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
	}
	if phone.got != 2 || laptop.got != 1 {
		t.Errorf("phone %d, laptop %d, want 2 and 1", phone.got, laptop.got)
	}
	if delivered, failed := u.Broadcast(&Message{}); delivered != 2 || failed != 1 {
		t.Errorf("broadcast: delivered %d, failed %d, want 2 and 1", delivered, failed)
	}
	if u.Online() != 3 || u.Connections() != 5 {
		t.Errorf("%d users, %d connections, want 3 and 5", u.Online(), u.Connections())
	}
}

func TestUsersForgetWhoGoes(t *testing.T) {
	u := NewUsers[*device]()
	first, second := &device{space: 1}, &device{space: 1}
	u.Add("alice", first)
	u.Add("alice", second)
	u.Remove("alice", first)
	u.Remove("alice", first)
	u.Remove("bob", second)
	if got := u.Of("alice"); len(got) != 1 || got[0] != second || u.Online() != 1 || u.Connections() != 1 {
		t.Errorf("%v, %d users, %d connections; want the second device", got, u.Online(), u.Connections())
	}
	u.Remove("alice", second)
	if u.Online() != 0 || u.Connections() != 0 || u.Deliver("alice", &Message{}) != NotHere {
		t.Errorf("%d users, %d connections after all have gone", u.Online(), u.Connections())
	}
}
