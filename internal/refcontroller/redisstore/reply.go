package redisstore

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/internal/slots"
	pubsub "github.com/push-manager/push-manager/proto"
)

var errReply = errors.New("redis has what is not understood")

// reply is read from its beginning. The first thing that is not as expected is its err, and all
// after that is empty.
type reply struct {
	rest []any
	full bool
	err  error
	of   *reply // whose list this is
}

func (r *reply) next() any {
	if len(r.rest) == 0 || r.err != nil {
		r.fail()
		return nil
	}
	v := r.rest[0]
	r.rest = r.rest[1:]
	return v
}

func (r *reply) fail() {
	r.rest = nil
	if r.err == nil {
		r.err = errReply
	}
	if r.of != nil {
		r.of.fail()
	}
}

func (r *reply) text() string {
	s, ok := r.next().(string)
	if !ok {
		r.fail()
	}
	return s
}

func (r *reply) number() int64 {
	switch v := r.next().(type) {
	case int64:
		return v
	case string:
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			r.fail()
		}
		return n
	}
	r.fail()
	return 0
}

func (r *reply) list() *reply {
	v, ok := r.next().([]any)
	if !ok {
		r.fail()
	}
	return &reply{rest: v, err: r.err, of: r}
}

// texts are all that is left.
func (r *reply) texts() []string {
	out := make([]string, 0, len(r.rest))
	for len(r.rest) > 0 {
		out = append(out, r.text())
	}
	return out
}

// encode is what a membership says beside where it is.
func encode(j refcontroller.Join) (string, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(&pubsub.UserInfo{UserName: j.Name, Metadata: j.Metadata})
	if err != nil {
		return "", fmt.Errorf("encode a membership: %w", err)
	}
	return string(b), nil
}

// members adds fields of a room's hash, with their values, to info. Those of seen are there already.
func members(info *pubsub.RoomInfo, fields []string, seen map[string]struct{}) error {
	if len(fields)%2 != 0 {
		return errReply
	}
	for i := 0; i+1 < len(fields); i += 2 {
		if fields[i] == "" {
			continue // the room's own
		}
		if seen != nil {
			if _, again := seen[fields[i]]; again {
				continue
			}
			seen[fields[i]] = struct{}{}
		}
		m, err := parseMember(fields[i], fields[i+1])
		if err != nil {
			return err
		}
		info.Users = append(info.Users, m)
	}
	return nil
}

func parseMember(field, record string) (*pubsub.UserInfo, error) {
	user, node, ok := strings.Cut(field, "\x00")
	head, blob, found := strings.Cut(record, "\n")
	parts := strings.Split(head, " ")
	if !ok || !found || len(parts) != 6 {
		return nil, errReply
	}
	joined, err := strconv.ParseInt(parts[3], 10, 64)
	if err != nil {
		return nil, errReply
	}
	m := &pubsub.UserInfo{}
	if err := proto.Unmarshal([]byte(blob), m); err != nil {
		return nil, fmt.Errorf("%w: %w", errReply, err)
	}
	m.UserId, m.NodeId, m.JoinedAt = user, node, joined
	return m, nil
}

func parseHead(head string) (created, updated int64, users int, err error) {
	parts := strings.Split(head, " ")
	if len(parts) != 3 {
		return 0, 0, 0, errReply
	}
	var errs [3]error
	created, errs[0] = strconv.ParseInt(parts[0], 10, 64)
	updated, errs[1] = strconv.ParseInt(parts[1], 10, 64)
	users, errs[2] = strconv.Atoi(parts[2])
	if errors.Join(errs[:]...) != nil {
		return 0, 0, 0, errReply
	}
	return created, updated, users, nil
}

func parseDigests(fields []string) ([]uint64, error) {
	digests := make([]uint64, slots.Count)
	if len(fields)%2 != 0 {
		return nil, errReply
	}
	for i := 0; i+1 < len(fields); i += 2 {
		slot, err := strconv.Atoi(fields[i])
		high, low, ok := strings.Cut(fields[i+1], " ")
		hi, errHi := strconv.ParseUint(high, 10, 32)
		lo, errLo := strconv.ParseUint(low, 10, 32)
		if !ok || errors.Join(err, errHi, errLo) != nil || slot < 0 || slot >= slots.Count {
			return nil, errReply
		}
		digests[slot] = hi<<32 | lo
	}
	return digests, nil
}

// parseChange is an entry of the stream. One without nodes, or with what is not understood,
// names the rooms and users.
func parseChange(n uint64, rooms, users, nodes string) refcontroller.Change {
	c := refcontroller.Change{Revision: n, Rooms: strings.Split(rooms, "\x00"), Users: strings.Split(users, "\x00")}
	signed := strings.Split(nodes, "\x00")
	if len(signed) != len(c.Users) || len(c.Rooms) != len(c.Users) {
		return c
	}
	moves := make([]refcontroller.Move, len(signed))
	for i, node := range signed {
		if len(node) < 2 || node[0] != '+' && node[0] != '-' {
			return c
		}
		moves[i] = refcontroller.Move{Room: c.Rooms[i], User: c.Users[i], Node: node[1:], Left: node[0] == '-'}
	}
	return refcontroller.Change{Revision: n, Moves: moves}
}

// presences reads n users, and their rooms if those are wanted.
func presences(r *reply, n int, out []refcontroller.Presence, rooms bool) ([]refcontroller.Presence, error) {
	type stay struct {
		room, node string
		clock      int64
	}
	if len(r.rest) != n {
		return nil, errReply
	}
	for range n {
		fields := r.list()
		stays := make([]stay, 0, len(fields.rest)/2)
		for len(fields.rest) > 0 {
			room, node, ok := strings.Cut(fields.text(), "\x00")
			stays = append(stays, stay{room, node, fields.number()})
			if !ok || fields.err != nil {
				return nil, errReply
			}
		}
		slices.SortFunc(stays, func(a, b stay) int { return int(max(-1, min(1, b.clock-a.clock))) })
		var p refcontroller.Presence
		for i, st := range stays {
			if i == 0 {
				p.Room = st.room
			}
			if !slices.Contains(p.Nodes, st.node) {
				p.Nodes = append(p.Nodes, st.node)
			}
			if rooms {
				p.Rooms = append(p.Rooms, st.room)
			}
		}
		slices.Sort(p.Rooms)
		p.Rooms = slices.Compact(p.Rooms)
		out = append(out, p)
	}
	return out, r.err
}
