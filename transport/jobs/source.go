package jobs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/pause"
	"github.com/push-manager/push-manager/internal/plain"
)

const (
	// pageTime is how long the users of a page last, at the rate that is set.
	pageTime = 5 * time.Second
	// pageLeast and pageMost bound their number.
	pageLeast, pageMost = 100, 10_000
	// pageAge is how old a page may be when a user's turn comes: who has come since then, or has gone, is not known.
	pageAge = 10 * time.Second
	// listTimeout bounds one question to a node.
	listTimeout = 5 * time.Second
	// listCalls is how many nodes are asked at a time.
	listCalls = 16
	// passAfter is how long a node that does not answer is waited for.
	passAfter = 10 * time.Second
	// fetchPause is the pause before users are asked for again.
	fetchPause = 500 * time.Millisecond
)

var errNoNodes = errors.New("no Connect-Node is known")

// user is whose turn comes.
type user struct {
	turn uint64
	id   string // with its scope
	room int    // by its place in the spec; 0 where there are none
}

// page is users in the order of their turns: all whose turn is first to last.
type page struct {
	users       []user // that are left
	found       int    // that there were
	first, last uint64
	at          time.Time
}

// pages fetches users ahead of their turns. It is used by one goroutine; the fetching is done by others, one after the other.
type pages struct {
	// Static.
	run *run

	now    *page // nil: none
	next   *page
	ahead  chan *page // of the one that is being fetched, nil for none
	cancel context.CancelFunc
	wg     sync.WaitGroup

	// Of the goroutine that fetches.
	failing map[string]time.Time // nodes that do not answer, since when
	told    map[string]bool      // what has been said once
}

// get is the users whose turn comes next, from a turn on: nil while they are not known yet.
func (p *pages) get(from uint64, want int) *page {
	select {
	case p.next = <-p.ahead:
		p.ahead = nil
	default:
	}
	if p.now == nil {
		p.now, p.next = p.next, nil
	}
	if p.now != nil && time.Since(p.now.at) > pageAge {
		p.drop()
	}
	switch {
	case p.ahead != nil || p.next != nil:
	case p.now == nil:
		p.fetch(from, want)
	case p.now.last != ids.LastTurn && len(p.now.users) < want/2:
		p.fetch(p.now.last+1, want)
	}
	return p.now
}

// take takes n users off the page.
func (p *pages) take(n int) {
	if p.now.users = p.now.users[n:]; len(p.now.users) == 0 {
		p.now = nil
	}
}

// drop forgets all that is known. Those whose turn has not come are fetched again.
func (p *pages) drop() {
	if p.ahead != nil {
		p.cancel()
	}
	p.now, p.next, p.ahead = nil, nil, nil
	p.wg.Wait()
}

// fetch begins to ask for users.
func (p *pages) fetch(from uint64, want int) {
	ctx, cancel := context.WithCancel(context.Background())
	ahead := make(chan *page, 1)
	p.ahead, p.cancel = ahead, cancel
	p.wg.Go(func() {
		defer cancel()
		defer p.run.recovered("pages", func() { ahead <- nil }) // it is fetched again
		for {
			got, err := p.read(ctx, from, want)
			if err == nil {
				ahead <- got
				return
			}
			if ctx.Err() != nil {
				return
			}
			p.run.stalls(err.Error())
			if !pause.For(ctx, fetchPause) {
				return
			}
		}
	})
}

// read asks for users once.
func (p *pages) read(ctx context.Context, from uint64, want int) (*page, error) {
	r := p.run
	line := &ids.Line{First: from, Last: ids.LastTurn, Limit: want}
	var members [][]string // of rooms, with their scope, sorted
	var err error
	switch {
	case r.spec.GetEverybody():
		err = p.readNodes(ctx, line)
	case len(r.spec.GetRoomIds()) > 0:
		members, err = p.readRooms(ctx, line)
	default:
		for _, id := range r.spec.GetUserIds() {
			line.Add(r.scope + id)
		}
	}
	if err != nil {
		return nil, err
	}
	users := line.Users()
	got := &page{first: from, last: line.Last, found: len(users), at: time.Now(), users: make([]user, len(users))}
	for i, u := range users {
		room := slices.IndexFunc(members, func(of []string) bool { _, ok := slices.BinarySearch(of, u.User); return ok })
		got.users[i] = user{u.Turn, u.User, max(room, 0)}
	}
	return got, nil
}

// readRooms adds the members of rooms.
func (p *pages) readRooms(ctx context.Context, line *ids.Line) (members [][]string, err error) {
	r := p.run
	for _, room := range r.spec.GetRoomIds() {
		asking, cancel := context.WithTimeout(ctx, r.svc.cfg.Engine.Timeout())
		users, found, err := r.svc.cfg.Engine.Members(asking, r.scope+room)
		cancel()
		if err != nil {
			return nil, fmt.Errorf("room %q: %w", plain.Line(room, textMax), err)
		}
		if !found {
			p.tell("room "+room, failure{Reason: fmt.Sprintf("failed: room %q not found", plain.Line(room, textMax))}, false)
		}
		for _, user := range users {
			line.Add(user)
		}
		members = append(members, users)
	}
	return members, nil
}

// readNodes adds the users of all nodes. A node that does not answer is waited for, and then passed by.
func (p *pages) readNodes(ctx context.Context, line *ids.Line) error {
	cfg := &p.run.svc.cfg
	nodes := cfg.Nodes.NodeIDs()
	if len(nodes) == 0 {
		return errNoNodes
	}
	type answer struct {
		users []string
		last  uint64
		err   error
	}
	answers := make([]answer, len(nodes))
	limit := min(max(64, 2*line.Limit/len(nodes)), pageMost) // turns are spread evenly
	places := make(chan struct{}, listCalls)
	var asking sync.WaitGroup
	for i, node := range nodes {
		places <- struct{}{}
		asking.Go(func() {
			defer func() { <-places }()
			defer p.run.recovered("list of users", func() { answers[i].err = errPanic })
			a := &answers[i]
			a.users, a.last, a.err = p.run.svc.inquiry.ask(ctx, node, func(ctx context.Context) ([]string, uint64, error) {
				return cfg.Nodes.ListUsers(ctx, node, line.First, limit, p.run.scope)
			})
		})
	}
	asking.Wait()
	if ctx.Err() != nil { // which is no fault of the nodes
		return ctx.Err()
	}
	for i, node := range nodes {
		a := &answers[i]
		if a.err == nil {
			delete(p.failing, node)
			line.Last = min(line.Last, a.last)
			continue
		}
		since, known := p.failing[node]
		if !known {
			since = time.Now()
			p.failing[node] = since
		}
		switch {
		case cfg.NoList(a.err):
			p.tell("node "+node, failure{Node: node, Reason: "failed: cannot be asked for its users"}, true)
		case time.Since(since) < passAfter:
			return fmt.Errorf("node %q: %w", plain.Line(node, textMax), a.err)
		default:
			p.tell("node "+node, failure{Node: node, Reason: "unknown: could not be asked for its users: " + a.err.Error()}, true)
		}
	}
	for i := range answers {
		if answers[i].err != nil {
			continue
		}
		for _, user := range answers[i].users {
			own, in := strings.CutPrefix(user, p.run.scope)
			switch {
			case !in:
			case ids.Check(own, cfg.Engine.Limits().IDBytes) != nil: // it would have all that are in one push with it refused
				p.tell("ids of node "+nodes[i], failure{Node: nodes[i], Reason: "failed: ids of users that cannot be pushed to"}, false)
			default:
				line.Add(user)
			}
		}
	}
	return nil
}

// tell says once what has no users. passedBy tells that it is a node.
func (p *pages) tell(what string, f failure, passedBy bool) {
	if p.told[what] {
		return
	}
	p.told[what] = true
	p.run.noted(f, passedBy)
}
