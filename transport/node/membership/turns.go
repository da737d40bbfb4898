package membership

import (
	"container/list"
	"slices"
)

// turns is a queue in which users take turns: one with a thousand memberships to
// report delays another by one of them. Guarded by Reporter.mu.
type turns struct {
	users map[string]*list.Element
	ring  list.List // of *turn, in the order of their turns
	n     int       // memberships
}

// turn is what waits for one user, oldest first. Never empty.
type turn struct {
	user    string
	waiting []*membership
}

func (q *turns) push(m *membership) {
	q.n++
	if e := q.users[m.user]; e != nil {
		t := e.Value.(*turn)
		t.waiting = append(t.waiting, m)
		return
	}
	if q.users == nil {
		q.users = make(map[string]*list.Element)
	}
	q.users[m.user] = q.ring.PushBack(&turn{user: m.user, waiting: []*membership{m}})
}

// pop takes the next one. There must be one.
func (q *turns) pop() *membership {
	e := q.ring.Front()
	m := e.Value.(*turn).waiting[0]
	q.ring.MoveToBack(e)
	q.take(e, 0)
	return m
}

// remove takes out m, which waits.
func (q *turns) remove(m *membership) {
	e := q.users[m.user]
	q.take(e, slices.Index(e.Value.(*turn).waiting, m))
}

func (q *turns) take(e *list.Element, i int) {
	q.n--
	t := e.Value.(*turn)
	if len(t.waiting) == 1 {
		q.ring.Remove(e)
		delete(q.users, t.user)
		return
	}
	if i == 0 {
		t.waiting[0] = nil
		t.waiting = t.waiting[1:]
		return
	}
	t.waiting = slices.Delete(t.waiting, i, i+1)
}
