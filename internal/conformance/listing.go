package conformance

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/ids"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	// listMost and listBytes are what a list may have at most.
	listMost  = 10_000
	listBytes = 900 << 10
	// pagesMost bounds the pages of a node with many users.
	pagesMost = 100
	// connectionsMost is how many of one user's an answer may name.
	connectionsMost = 100
)

func listingChecks() []check {
	return []check{
		{name: "listing/turns", expect: "ListUsers: those who are connected, each once, ordered by turn, and all of them up to last_turn", users: 1, run: listingTurns},
		{name: "listing/pages", expect: "ListUsers: limit cuts the list at a turn, and whoever goes on behind last_turn finds everybody once", users: 2, run: listingPages},
		{name: "listing/scope", expect: "ListUsers: users whose ids begin with scope, and no others", users: 1, run: listingScope},
		{name: "listing/connections", expect: "ListConnections: the connections of each user, in the order that was asked for, each with an id of its own or none", users: 1, run: listingConnections},
	}
}

// list asks for users from a turn on, and checks what holds for every list.
func (t *tester) list(ctx context.Context, first uint64, limit uint32, scope string) (users []string, last uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*t.cfg.Within)
	defer cancel()
	r, err := t.api.ListUsers(ctx, &pubsub.ListUsersRequest{FirstTurn: first, Limit: limit, Scope: scope})
	if status.Code(err) == codes.Unimplemented {
		return nil, 0, &skipped{"the node does not do it: broadcast jobs for everybody pass it by"}
	}
	if err != nil {
		return nil, 0, err
	}
	users, last = r.GetUserIds(), r.GetLastTurn()
	size, turn := 0, first
	for i, user := range users {
		size += len(user)
		switch {
		case ids.Turn(user) < turn:
			return nil, 0, fmt.Errorf("user %q, whose turn is %d, is listed behind turn %d", user, ids.Turn(user), turn)
		case ids.Turn(user) > last:
			return nil, 0, fmt.Errorf("user %q, whose turn is %d, is listed, and last_turn is %d", user, ids.Turn(user), last)
		case slices.Contains(users[:i], user):
			return nil, 0, fmt.Errorf("user %q is listed twice", user)
		case !strings.HasPrefix(user, scope):
			return nil, 0, fmt.Errorf("user %q is listed, and its id does not begin with %q", user, scope)
		}
		turn = ids.Turn(user)
	}
	// More than the limit is right only if they have the same turn.
	if n := int(limit); len(users) > n && ids.Turn(users[n]) != ids.Turn(users[n-1]) {
		return nil, 0, fmt.Errorf("%d users are listed, and limit is %d", len(users), limit)
	}
	if last != ids.LastTurn && (len(users) == 0 || last != turn) {
		return nil, 0, fmt.Errorf("last_turn is %d, which is neither the turn of the last user listed (%d) nor %d", last, turn, ids.LastTurn)
	}
	if size > listBytes {
		return nil, 0, fmt.Errorf("the list has %d bytes, more than %d", size, listBytes)
	}
	return users, last, nil
}

// missing is a user who is connected, and not in a list that is whole from one turn to another.
func (t *tester) missing(users []string, first, last uint64) error {
	for _, user := range t.cfg.Users {
		if turn := ids.Turn(user); turn >= first && turn <= last && !slices.Contains(users, user) {
			return fmt.Errorf("user %q, whose turn is %d, is not listed, and the list is whole from %d to %d", user, turn, first, last)
		}
	}
	if slices.Contains(users, t.cfg.Absent) {
		return fmt.Errorf("user %q is listed, and is not connected", t.cfg.Absent)
	}
	return nil
}

func listingTurns(ctx context.Context, t *tester) error {
	after := ids.Turn(t.cfg.Users[0]) + 1 // which that user is not in
	for _, first := range []uint64{0, after} {
		users, last, err := t.list(ctx, first, listMost, "")
		if err == nil {
			err = t.missing(users, first, last)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func listingPages(ctx context.Context, t *tester) error {
	// A node of its own has the users of the test, and one that is in use more than are gone through.
	for _, limit := range []uint32{1, listMost / pagesMost} {
		var all []string
		first, last := uint64(0), uint64(0)
		for range pagesMost {
			users, upTo, err := t.list(ctx, first, limit, "")
			if err != nil {
				return err
			}
			all, last = append(all, users...), upTo
			if last == ids.LastTurn {
				break
			}
			first = last + 1
		}
		if err := t.missing(all, 0, last); err != nil {
			return fmt.Errorf("in pages of %d: %w", limit, err)
		}
	}
	return nil
}

func listingScope(ctx context.Context, t *tester) error {
	users, last, err := t.list(ctx, 0, listMost, "conformance-nobody/")
	if err != nil {
		return err
	}
	if len(users) > 0 || last != ids.LastTurn {
		return fmt.Errorf("of a tenant without users, %s are listed up to turn %d", some(users), last)
	}
	return nil
}

// listingConnections asks for the rest as often as the answers need, as Push-Manager does.
func listingConnections(ctx context.Context, t *tester) error {
	ctx, cancel := context.WithTimeout(ctx, 2*t.cfg.Within)
	defer cancel()
	users := append([]string{t.cfg.Absent}, t.cfg.Users...)
	known := map[string]string{} // who has a connection, by its id
	for len(users) > 0 {
		r, err := t.api.ListConnections(ctx, &pubsub.ListConnectionsRequest{UserIds: users})
		if status.Code(err) == codes.Unimplemented {
			return &skipped{"the node does not do it: callers are not told which connections users have"}
		}
		if err != nil {
			return err
		}
		if n := len(r.GetUsers()); n == 0 || n > len(users) {
			return fmt.Errorf("%d answers for %d users", n, len(users))
		}
		for i, u := range r.GetUsers() {
			switch n := len(u.GetConnections()); {
			case users[i] == t.cfg.Absent && n > 0:
				return fmt.Errorf("user %q, who is not connected, has %d connections", users[i], n)
			case users[i] != t.cfg.Absent && n == 0:
				return fmt.Errorf("user %q, who is connected, has no connection", users[i])
			case n > connectionsMost:
				return fmt.Errorf("user %q has %d connections in the answer, more than %d", users[i], n, connectionsMost)
			}
			for _, c := range u.GetConnections() {
				id := c.GetConnectionId()
				if other, twice := known[id]; twice && id != "" {
					return fmt.Errorf("connection_id %q is that of a connection of %q, and of one of %q", id, other, users[i])
				}
				known[id] = users[i]
			}
		}
		users = users[len(r.GetUsers()):]
	}
	return nil
}
