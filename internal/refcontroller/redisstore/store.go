package redisstore

import (
	"cmp"
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/redis/go-redis/v9"

	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/internal/slots"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	// listMost is how many members the reply of a join lists: a room that fills costs
	// the square of it.
	listMost = 100
	// pageMembers is how much of a large room one call reads: Redis does nothing else meanwhile.
	pageMembers = 1000
	// usersCall is how many users one call looks up.
	usersCall = 500
	// dropChunk is how many memberships of a dead node one call looks at, or those of a slot.
	dropChunk = 500
	// wordMemory is how long the word of a node that says no more is kept.
	wordMemory = 10 * time.Minute
)

var (
	errAway = errors.New("redis has not answered yet")
	errLost = errors.New("redis has been emptied, restarted or replaced: the nodes are asked again")
)

//go:embed store.lua
var source string

var script = redis.NewScript(source) //nolint:gochecknoglobals // a constant

// Config is what a Store needs.
type Config struct {
	Target Target
	// Prefix begins all keys. Default "pm".
	Prefix string
	// MaxUsers limits the users of each room, 0 for no limit.
	MaxUsers int
	// Logger, nil to discard.
	Logger *slog.Logger
	// Metrics, nil for none.
	Metrics *metrics.Set
}

// Store is a refcontroller.Shared.
type Store struct {
	// Static after Notify.
	client   redis.UniversalClient
	keys     []string // of the script
	changes  string   // the key of the stream
	me       string
	maxUsers int
	page     int // how many members one call reads
	tell     func(refcontroller.Change)
	log      *slog.Logger
	m        handles

	identity atomic.Pointer[identity] // replaced by follow
	counts   atomic.Pointer[refcontroller.Counts]
	told     atomic.Pointer[time.Time]
	lease    atomic.Int64           // the longest of a watcher here, in ms
	believes atomic.Pointer[string] // the id that this Controller believes
	believed atomic.Bool            // somebody does

	mu sync.Mutex
	// Guarded by mu.
	moved   chan struct{}     // closed and made anew when one of these changes
	at      uint64            // the entry of the stream told last
	change  uint64            // the last that was a change
	others  map[string]uint64 // what the other Controllers have settled
	settled uint64            // what this one has
}

// identity is the store that was found.
type identity struct{ id, run string }

// String is the ID of the Store, "" before it was found.
func (i *identity) String() string {
	if i == nil {
		return ""
	}
	return i.id + "." + i.run
}

// New makes a Store, which connects when Run begins. Close it after Run.
func New(cfg Config) *Store {
	if cfg.Prefix == "" {
		cfg.Prefix = "pm"
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.NewSet()
	}
	prefix := cfg.Prefix + ":{" + cfg.Prefix + "}:"
	s := &Store{
		client: cfg.Target.client(), keys: []string{prefix + "meta"}, changes: prefix + "changes", me: rand.Text(),
		maxUsers: cfg.MaxUsers, page: pageMembers, tell: func(refcontroller.Change) {}, log: cfg.Logger,
		moved: make(chan struct{}), others: map[string]uint64{},
	}
	s.m = newHandles(s, cfg.Metrics)
	s.counts.Store(&refcontroller.Counts{})
	s.told.Store(&time.Time{})
	s.lease.Store(3000)
	return s
}

// Close ends the connections.
func (s *Store) Close() error { return s.client.Close() }

// Notify implements refcontroller.Store.
func (s *Store) Notify(tell func(refcontroller.Change)) { s.tell = tell }

// ID implements refcontroller.Store.
func (s *Store) ID() string {
	return s.identity.Load().String()
}

// Counts implements refcontroller.Store.
func (s *Store) Counts() refcontroller.Counts { return *s.counts.Load() }

// do runs the script.
func (s *Store) do(ctx context.Context, op string, args ...any) (*reply, error) {
	return s.doAt(ctx, s.identity.Load(), op, args...)
}

// doAt runs the script if the store is still the one that was found.
func (s *Store) doAt(ctx context.Context, i *identity, op string, args ...any) (*reply, error) {
	if i == nil {
		return nil, errAway
	}
	v, err := script.Run(ctx, s.client, s.keys, append([]any{op, i.id, i.run}, args...)...).Slice()
	return s.read(op, v, err)
}

// read is the reply to a run of the script.
func (s *Store) read(op string, v []any, err error) (*reply, error) {
	if err != nil {
		s.m.errors.Inc()
		return nil, fmt.Errorf("redis: %s: %w", op, err)
	}
	r := &reply{rest: v}
	switch status := r.text(); status {
	case "ok", "full":
		r.full = status == "full"
		return r, nil
	case "lost":
		return nil, errLost
	case "old":
		return nil, refcontroller.ErrOld
	case "boot":
		return nil, refcontroller.ErrOtherBoot
	default:
		return nil, fmt.Errorf("redis: %s: a reply that is not understood", op)
	}
}

// report runs the script for a report, and waits until what it has made or found is told.
func (s *Store) report(ctx context.Context, op string, args ...any) (*reply, error) {
	id := s.identity.Load()
	r, err := s.doAt(ctx, id, op, args...)
	if err != nil {
		return nil, err
	}
	change := uint64(r.number())
	if r.err != nil {
		return nil, fmt.Errorf("redis: %s: %w", op, r.err)
	}
	return r, s.await(ctx, func() (bool, error) {
		if s.identity.Load() != id {
			return false, errLost
		}
		return s.at >= change, nil
	})
}

// await returns once done says so, which is asked while mu is held whenever something has moved.
func (s *Store) await(ctx context.Context, done func() (bool, error)) error {
	for {
		s.mu.Lock()
		ok, err := done()
		moved := s.moved
		s.mu.Unlock()
		if ok || err != nil {
			return err
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return fmt.Errorf("wait for redis: %w", ctx.Err())
		}
	}
}

func number(seq uint64) string { return fmt.Sprintf("%020d", seq) }

func halves(hash uint64) (hi, lo string) {
	return strconv.FormatUint(hash>>32, 10), strconv.FormatUint(hash&math.MaxUint32, 10)
}

// Join implements refcontroller.Store.
func (s *Store) Join(ctx context.Context, j refcontroller.Join) (refcontroller.Joined, error) {
	hash := slots.Hash(j.User, j.Room)
	hi, lo := halves(hash)
	blob, err := encode(j)
	if err != nil {
		return refcontroller.Joined{}, err
	}
	most := listMost
	if j.WithoutUsers {
		most = 0
	}
	r, err := s.report(ctx, "join", j.Node, j.Boot, number(j.Seq), j.User, j.Room, slots.Of(hash), hi, lo, blob, s.maxUsers, most)
	if err != nil {
		return refcontroller.Joined{}, err
	}
	info := r.list()
	head := info.text()
	room, err := s.room(j.Room, head)
	if err != nil {
		return refcontroller.Joined{}, err
	}
	if len(info.rest) > 0 {
		if err := members(room, info.list().texts(), nil); err != nil {
			return refcontroller.Joined{}, err
		}
	}
	return refcontroller.Joined{Full: r.full, Room: room}, r.err
}

// Leave implements refcontroller.Store.
func (s *Store) Leave(ctx context.Context, l refcontroller.Leave) (bool, error) {
	r, err := s.report(ctx, "leave", l.Node, l.Boot, number(l.Seq), l.User, l.Room, slots.Of(slots.Hash(l.User, l.Room)))
	if err != nil {
		return false, err
	}
	return r.number() > 0, r.err
}

// Begin implements refcontroller.Store.
func (s *Store) Begin(ctx context.Context, by refcontroller.Reporter) (int, error) {
	r, err := s.report(ctx, "begin", by.Node, by.Boot, number(by.Seq))
	if err != nil {
		return 0, err
	}
	fresh, era, clock := r.number(), r.text(), r.number()
	if r.err != nil {
		return 0, r.err
	}
	if fresh == 0 && by.Boot != "" && by.Seq == 0 {
		return 0, nil // Nothing can be below.
	}
	if by.Boot == "" {
		era = ""
	}
	return s.drop(ctx, by.Node, clock, era, number(by.Seq))
}

// DropNode implements refcontroller.Store.
func (s *Store) DropNode(ctx context.Context, node string) (int, error) {
	// Joins that come later are the node's new life: the first call says when now is.
	r, err := s.do(ctx, "clock")
	if err != nil {
		return 0, err
	}
	clock := r.number()
	if r.err != nil {
		return 0, r.err
	}
	return s.drop(ctx, node, clock, "", number(0))
}

// drop ends memberships of a node, little by little.
func (s *Store) drop(ctx context.Context, node string, clock int64, era, seq string) (int, error) {
	total := 0
	for slot := int64(0); slot < slots.Count; {
		r, err := s.report(ctx, "drop", node, slot, clock, era, seq, dropChunk)
		if err != nil {
			return total, err
		}
		next, n := r.number(), r.number()
		if r.err != nil || next <= slot {
			return total, cmp.Or(r.err, errReply)
		}
		slot = next
		total += int(n)
	}
	return total, nil
}

// SetSlot implements refcontroller.Store.
func (s *Store) SetSlot(ctx context.Context, by refcontroller.Reporter, slot int, list []refcontroller.Join) error {
	args := []any{by.Node, by.Boot, number(by.Seq), slot}
	for _, j := range list {
		hi, lo := halves(slots.Hash(j.User, j.Room))
		blob, err := encode(j)
		if err != nil {
			return err
		}
		args = append(args, j.User, j.Room, hi, lo, blob)
	}
	_, err := s.report(ctx, "slot", args...)
	return err
}

// Differing implements refcontroller.Store.
func (s *Store) Differing(ctx context.Context, by refcontroller.Reporter, digests []uint64) ([]uint32, error) {
	r, err := s.do(ctx, "digests", by.Node, by.Boot)
	if err != nil {
		return nil, err
	}
	have, err := parseDigests(r.list().texts())
	if err := cmp.Or(err, r.err); err != nil {
		return nil, err
	}
	var differing []uint32
	for i, d := range digests {
		if i >= len(have) || have[i] != d {
			differing = append(differing, uint32(i))
		}
	}
	return differing, nil
}

// Room implements refcontroller.Store.
func (s *Store) Room(ctx context.Context, id string) (*pubsub.RoomInfo, refcontroller.Revision, error) {
	identity := s.identity.Load() // Every page is of the same store.
	at := refcontroller.Revision{Store: identity.String()}
	var info *pubsub.RoomInfo
	var seen map[string]struct{} // A page may repeat members of another one.
	for cursor := "0"; ; {
		r, err := s.doAt(ctx, identity, "room", id, cursor, s.page, s.page)
		if err != nil {
			return nil, at, err
		}
		next, head, page, change := r.text(), r.text(), r.list().texts(), r.number()
		if r.err != nil {
			return nil, at, r.err
		}
		if info == nil {
			at.Number = uint64(change) // What comes while the rest is read may be missing.
			if info, err = s.room(id, head); err != nil || info == nil {
				return nil, at, err
			}
			if next != "0" {
				seen = make(map[string]struct{}, 2*s.page)
			}
		}
		if err := members(info, page, seen); err != nil {
			return nil, at, err
		}
		if cursor = next; cursor == "0" {
			break
		}
	}
	if len(info.GetUsers()) == 0 {
		return nil, at, nil // All have left while it was read.
	}
	return info, at, nil
}

// Members implements refcontroller.Store. HSCAN names everybody who is there from its first page to its last.
func (s *Store) Members(ctx context.Context, id string, from refcontroller.Cursor, most int) (refcontroller.Page, error) {
	identity, cursor := s.identity.Load(), "0"
	if from.Store != "" {
		if from.Store != identity.String() {
			return refcontroller.Page{}, refcontroller.ErrOtherStore
		}
		if n, err := strconv.ParseUint(from.At, 10, 64); err != nil || n == 0 {
			return refcontroller.Page{}, refcontroller.ErrCursor
		}
		cursor = from.At
	}
	r, err := s.doAt(ctx, identity, "room", id, cursor, most, most)
	if err != nil {
		return refcontroller.Page{}, err
	}
	next, head, fields, _ := r.text(), r.text(), r.list().texts(), r.number()
	if r.err != nil {
		return refcontroller.Page{}, r.err
	}
	info, err := s.room(id, head)
	if err != nil || info == nil {
		return refcontroller.Page{}, err
	}
	if err := members(info, fields, nil); err != nil {
		return refcontroller.Page{}, err
	}
	page := refcontroller.Page{Members: info.GetUsers()}
	if _, _, page.Users, err = parseHead(head); err != nil {
		return refcontroller.Page{}, err
	}
	if next != "0" {
		page.Next = refcontroller.Cursor{Store: identity.String(), At: next}
	}
	return page, nil
}

// room is a room as its head describes it, nil for an empty one.
func (s *Store) room(id, head string) (*pubsub.RoomInfo, error) {
	if head == "" {
		return nil, nil //nolint:nilnil // no such room
	}
	created, updated, _, err := parseHead(head)
	if err != nil {
		return nil, err
	}
	return &pubsub.RoomInfo{
		RoomId: id, CreatedAt: created, UpdatedAt: updated,
		Metadata: &pubsub.RoomMetadata{Name: id, MaxUsers: int32(min(s.maxUsers, math.MaxInt32))},
	}, nil
}

// Users implements refcontroller.Store.
func (s *Store) Users(ctx context.Context, users []string, rooms bool) ([]refcontroller.Presence, error) {
	i := s.identity.Load()
	if i == nil {
		return nil, errAway
	}
	if len(users) <= usersCall {
		args := make([]any, len(users))
		for n, user := range users {
			args[n] = user
		}
		r, err := s.do(ctx, "users", args...)
		if err != nil {
			return nil, err
		}
		return presences(r, len(users), make([]refcontroller.Presence, 0, len(users)), rooms)
	}
	for again := false; ; again = true {
		pipe := s.client.Pipeline()
		var calls []*redis.Cmd
		for chunk := range slices.Chunk(users, usersCall) {
			args := []any{"users", i.id, i.run}
			for _, user := range chunk {
				args = append(args, user)
			}
			calls = append(calls, script.EvalSha(ctx, pipe, s.keys, args...))
		}
		_, err := pipe.Exec(ctx)
		if redis.HasErrorPrefix(err, "NOSCRIPT") && !again {
			if err := script.Load(ctx, s.client).Err(); err != nil {
				return nil, fmt.Errorf("redis: load the script: %w", err)
			}
			continue
		}
		out := make([]refcontroller.Presence, 0, len(users))
		for _, call := range calls {
			v, err := call.Slice()
			r, err := s.read("users", v, err)
			if err != nil {
				return nil, err
			}
			if out, err = presences(r, min(usersCall, len(users)-len(out)), out, rooms); err != nil {
				return nil, err
			}
		}
		return out, nil
	}
}

// Rooms implements refcontroller.Store, ordered by id.
func (s *Store) Rooms(ctx context.Context) ([]*pubsub.RoomStats, error) {
	found := map[string]*pubsub.RoomStats{}
	for cursor := "0"; ; {
		r, err := s.do(ctx, "rooms", cursor, pageMembers)
		if err != nil {
			return nil, err
		}
		cursor = r.text()
		for len(r.rest) > 0 {
			id, head := r.text(), r.text()
			if head == "" || r.err != nil {
				continue // It has just ended.
			}
			created, _, users, err := parseHead(head)
			if err != nil {
				return nil, err
			}
			found[id] = &pubsub.RoomStats{RoomId: id, CreatedAt: created, UserCount: int32(min(users, math.MaxInt32))}
		}
		if r.err != nil {
			return nil, r.err
		}
		if cursor == "0" {
			break
		}
	}
	stats := make([]*pubsub.RoomStats, 0, len(found))
	for _, room := range found {
		stats = append(stats, room)
	}
	slices.SortFunc(stats, func(a, b *pubsub.RoomStats) int { return strings.Compare(a.GetRoomId(), b.GetRoomId()) })
	return stats, nil
}

// Nodes implements refcontroller.Store.
func (s *Store) Nodes(ctx context.Context) (map[string]string, error) {
	r, err := s.do(ctx, "nodes")
	if err != nil {
		return nil, err
	}
	nodes := map[string]string{}
	for len(r.rest) > 0 {
		node, boot := r.text(), r.text()
		nodes[node] = boot
	}
	return nodes, r.err
}

// Hear implements refcontroller.Shared.
func (s *Store) Hear(ctx context.Context, by refcontroller.Reporter, told string) error {
	i, flag := s.identity.Load(), "0"
	if told == i.String() {
		flag = "1"
	}
	_, err := s.doAt(ctx, i, "hear", by.Node, by.Boot, flag)
	return err
}

// Words implements refcontroller.Shared.
func (s *Store) Words(ctx context.Context) (map[string]refcontroller.Word, error) {
	r, err := s.do(ctx, "words", wordMemory.Milliseconds())
	if err != nil {
		return nil, err
	}
	words := map[string]refcontroller.Word{}
	for len(r.rest) > 0 {
		node, ago, complete, boot := r.text(), r.number(), r.text(), r.text()
		words[node] = refcontroller.Word{Boot: boot, Ago: max(0, time.Duration(ago)*time.Millisecond), Complete: complete == "1"}
	}
	return words, r.err
}
