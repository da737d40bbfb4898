package gateway

// turns is a queue in which users take turns: one with a thousand memberships to
// report delays another by one of them. Guarded by reports.mu.
type turns struct {
	users map[string]*turn
	ring  []*turn // in the order of their turns
	n     int     // memberships
}

// turn is what waits for one user, oldest first.
type turn struct {
	user string
	list []*membership
}

func (q *turns) push(m *membership) {
	t := q.users[m.user]
	if t == nil {
		if q.users == nil {
			q.users = make(map[string]*turn)
		}
		t = &turn{user: m.user}
		q.users[m.user] = t
		q.ring = append(q.ring, t)
	}
	t.list = append(t.list, m)
	q.n++
}

// pop takes the next one; nil when there is none.
func (q *turns) pop() *membership {
	if q.n == 0 {
		return nil
	}
	q.n--
	t := q.ring[0]
	q.ring[0] = nil
	q.ring = q.ring[1:]
	m := t.list[0]
	t.list[0] = nil
	if t.list = t.list[1:]; len(t.list) == 0 {
		delete(q.users, t.user)
	} else {
		q.ring = append(q.ring, t)
	}
	return m
}
