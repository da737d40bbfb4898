package faultbench

import (
	"strings"
	"sync"

	"github.com/push-manager/push-manager/transport/node"
)

// clients are the users who are connected to one node, each with one client. They
// note what they get.
type clients struct {
	node string
	note func(id, user, client, node string)

	mu    sync.Mutex
	users map[string]bool
}

func newClients(node string, note func(id, user, client, node string), users ...string) *clients {
	c := &clients{node: node, note: note, users: map[string]bool{}}
	for _, user := range users {
		c.users[user] = true
	}
	return c
}

// connect and leave change who is here.
func (c *clients) connect(user string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.users[user] = true
}

func (c *clients) leave(user string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.users, user)
}

func (c *clients) has(user string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.users[user]
}

// take hands a push to a user, if the user is here.
func (c *clients) take(user string, data []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.users[user] {
		return false
	}
	c.note(idOf(data), user, user, c.node) // under mu: in the order in which the client gets them
	return true
}

// all hands a push to everybody who is here.
func (c *clients) all(data []byte) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	for user := range c.users {
		c.note(idOf(data), user, user, c.node)
	}
	return len(c.users)
}

// Deliver implements node.Sessions.
func (c *clients) Deliver(user string, m *node.Message) node.Outcome {
	if c.take(user, m.Data) {
		return node.Delivered
	}
	return node.NotHere
}

// Broadcast implements node.Sessions.
func (c *clients) Broadcast(m *node.Message) (int, int) { return c.all(m.Data), 0 }

// Online implements node.Sessions.
func (c *clients) Online() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.users)
}

// payload makes the data of a push: its id, and something behind it if it is to be
// larger.
func payload(id string, size int) []byte {
	data := []byte(id)
	if size > len(data) {
		data = append(data, ' ')
		data = append(data, strings.Repeat("x", size-len(data))...)
	}
	return data
}

func idOf(data []byte) string {
	id, _, _ := strings.Cut(string(data[:min(len(data), 32)]), " ")
	return id
}
