package link

import (
	"slices"
	"testing"

	"github.com/push-manager/push-manager/internal/ids"
)

// What a node says of its users is input: who is named must have been asked for.
func TestListsOfUsersThatCannotBeAreRefused(t *testing.T) {
	users := []string{"shop/a", "shop/b", "shop/c"}
	slices.SortFunc(users, func(a, b string) int {
		if ids.Turn(a) < ids.Turn(b) {
			return -1
		}
		return 1
	})
	first, second, last := ids.Turn(users[0]), ids.Turn(users[1]), ids.Turn(users[2])
	for name, tc := range map[string]struct {
		users       []string
		first, last uint64
		good        bool
	}{
		"all":                 {users, 0, ids.LastTurn, true},
		"exactly":             {users, first, last, true},
		"nobody":              {nil, 0, ids.LastTurn, true},
		"nobody, and no end":  {nil, 0, 0, false},
		"nobody is left out":  {users, 0, last + 1, false},
		"no turn":             {users, 0, 0, false},
		"in another order":    {[]string{users[1], users[0]}, 0, ids.LastTurn, false},
		"twice":               {[]string{users[0], users[0]}, 0, ids.LastTurn, false},
		"before the first":    {users, second, ids.LastTurn, false},
		"behind the last":     {users, 0, second, false},
		"of somebody else":    {[]string{"news/a"}, 0, ids.LastTurn, false},
		"an id of any form":   {[]string{"shop/\x00"}, 0, ids.LastTurn, true}, // one bad id does not cost a node all its users
		"less than asked for": {nil, second, first, false},
	} {
		if listed(tc.users, tc.first, tc.last, "shop/") != tc.good {
			t.Errorf("%s: good is %v", name, !tc.good)
		}
	}
}
