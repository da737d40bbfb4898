package route

import "sync"

// names gives equal ids of nodes the same memory: there are few nodes, and every
// group of every room and user names one. It is safe for concurrent use.
type names struct {
	mu sync.Mutex
	// Guarded by mu.
	known map[string]string
}

// namesMost bounds known. A Controller that names more nodes than any deployment has
// costs memory for each mention again, and no more.
const namesMost = 8192

func newNames() *names { return &names{known: make(map[string]string)} }

// of returns node as a string that does not alias it.
func (n *names) of(node []byte) string {
	if len(node) == 0 {
		return ""
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if name, ok := n.known[string(node)]; ok {
		return name
	}
	if len(n.known) == namesMost {
		clear(n.known)
	}
	name := string(node)
	n.known[name] = name
	return name
}
