package route

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"
)

// Config is what a Directory needs. Source, Shards, Shard and Go are required.
type Config struct {
	Source Source
	// Shards is the number of shards, Shard the shard of a key, Go runs a look-up in
	// a shard's bounded pool or says at once that it cannot.
	Shards int
	Shard  func(key string) int
	Go     func(shard int, task func()) error

	// TTL is how long an answer is good that came while no change stream vouched for it.
	// 0 means 1 s.
	TTL time.Duration
	// StaleTTL is how long an answer may still serve while the Controller cannot
	// be reached, from when it was last known to be true. 0 means 60 s.
	StaleTTL time.Duration
	// LookupTimeout bounds one look-up. 0 means 300 ms.
	LookupTimeout time.Duration
	// Places is how many look-ups Go runs at a time in one shard. The fewer are left,
	// the less time a look-up gets: those that nobody answers leave places to others.
	// 0 means 256.
	Places int
	// MaxMembers bounds the members of all cached rooms together. 0 means
	// 4,000,000, some 160 MB with ids of 14 bytes. Unions may have as many again, those of their rooms included.
	MaxMembers int
	// MaxUsers bounds the cached users. 0 means 1,000,000, some 370 MB.
	MaxUsers int
}

// Defaults are what the zero fields of a Config stand for: a program takes the defaults of its
// keys from here.
func Defaults() Config { return Config{}.withDefaults() }

func (c Config) withDefaults() Config {
	c.TTL = orDefault(c.TTL, time.Second)
	c.StaleTTL = orDefault(c.StaleTTL, time.Minute)
	c.LookupTimeout = orDefault(c.LookupTimeout, 300*time.Millisecond)
	c.Places = orDefault(c.Places, 256)
	c.MaxMembers = orDefault(c.MaxMembers, 4_000_000)
	c.MaxUsers = orDefault(c.MaxUsers, 1_000_000)
	return c
}

func orDefault[T int | time.Duration](v, def T) T {
	if v == 0 {
		return def
	}
	return v
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	if c.Source == nil || c.Shard == nil || c.Go == nil || c.Shards <= 0 {
		errs = append(errs, errors.New("route config needs Source, Shards, Shard and Go"))
	}
	for name, v := range map[string]int64{
		"TTL": int64(c.TTL), "StaleTTL": int64(c.StaleTTL), "LookupTimeout": int64(c.LookupTimeout), "Places": int64(c.Places),
		"MaxMembers": int64(c.MaxMembers), "MaxUsers": int64(c.MaxUsers),
	} {
		if v < 0 {
			errs = append(errs, fmt.Errorf("route %s is negative", name))
		}
	}
	return errors.Join(errs...)
}

// Directory answers where rooms and users are. Its methods never block and are
// safe for concurrent use.
type Directory struct {
	Rooms, Users *Table

	cfg      Config
	renewed  func() time.Time // see Renewed; nil if the source does not tell
	seed     maphash.Seed
	epoch    time.Time
	names    *names
	builders sync.Pool // of *builder
	unions   *unions
	// Answers of earlier generations are not good for anybody.
	generation atomic.Uint64
	revision   atomic.Uint64 // the highest that Moved has brought
	// Up to then the change stream vouches for the answers of the generation.
	watchedUntil atomic.Int64
	watchEnd     atomic.Pointer[watchEnd] // of the generation before
}

// watchEnd is up to when answers of a generation were vouched for.
type watchEnd struct {
	generation uint64
	at         nanos
}

// nanos is a point in time as nanoseconds since just before the directory was made: a
// third of a time.Time, of which there would be three in each entry. The zero value
// is before all that are.
type nanos int64

func (d *Directory) nanos(t time.Time) nanos { return nanos(t.Sub(d.epoch)) }

func (d *Directory) now() nanos { return d.nanos(time.Now()) }

// New makes a directory. Close ends it.
func New(config Config) (*Directory, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	d := &Directory{cfg: config.withDefaults(), seed: maphash.MakeSeed(), epoch: time.Now().Add(-1), names: newNames()}
	d.generation.Store(1)
	if r, ok := config.Source.(Renewed); ok {
		d.renewed = r.Renewed
	}
	var err error
	if d.Rooms, err = newTable(d, "room", d.cfg.MaxMembers); err != nil {
		return nil, err
	}
	if d.Users, err = newTable(d, "user", d.cfg.MaxUsers); err != nil {
		return nil, err
	}
	if d.unions, err = newUnions(&d.cfg); err != nil {
		return nil, err
	}
	return d, nil
}

// Close frees what the caches hold in the background, and waits until nobody waits for a union. Look-ups in
// flight end with their timeout in the pool that runs them.
func (d *Directory) Close() {
	d.unions.working.Wait()
	d.Rooms.cache.StopAllGoroutines()
	d.Users.cache.StopAllGoroutines()
	d.unions.cache.StopAllGoroutines()
}

// Missing is what a node says against an answer: that it does not have some users, or
// has taken nothing.
type Missing struct {
	Node  string
	Users []string  // nil for all that the answer has on the node
	Since time.Time // when it said so
}

// Vouch tells until when the change stream vouches for what was looked up since the
// last InvalidateAll, as long as Invalidate does not name it. For a query with a later
// Query.Now it is looked up again. time.Now ends it at once. The next call goes on where
// this one ends: whoever may have missed a change calls InvalidateAll before it.
func (d *Directory) Vouch(until time.Time) {
	d.watchedUntil.Store(int64(d.nanos(until)))
}

// validUntil is up to when e was true for certain: what the change stream vouches for
// is true now, and what it vouched for was true until that ended.
func (d *Directory) validUntil(e *entry, now nanos) nanos {
	if e.fallback {
		return e.known
	}
	if e.generation == d.generation.Load() {
		return max(e.known, min(now, nanos(d.watchedUntil.Load())))
	}
	if l := d.watchEnd.Load(); l != nil && l.generation == e.generation {
		return max(e.known, l.at)
	}
	return e.known
}

// Nanos is t on the clock of Snapshot.Published.
func (d *Directory) Nanos(t time.Time) int64 { return int64(d.nanos(t)) }

// timeout is that of a look-up that is one of so many under way in its shard: all of the
// time in an empty pool, a quarter of it when half of the places are taken, less and less.
// So look-ups that hang do not fill the pool, however many come, and others find places.
func (d *Directory) timeout(running int64) time.Duration {
	full := d.cfg.LookupTimeout
	left := float64(max(int64(d.cfg.Places)-running+1, 0)) / float64(d.cfg.Places)
	return max(time.Duration(float64(full)*left*left), full/32)
}

// Invalidate forgets the answers for rooms and users, which have changed.
func (d *Directory) Invalidate(rooms, users []string) {
	for _, room := range rooms {
		d.Rooms.invalidate(room)
	}
	for _, user := range users {
		d.Users.invalidate(user)
	}
}

// InvalidateAll forgets all answers. It costs no more with many of them. Calls of it are
// not concurrent. Vouch may be called meanwhile, for the same change stream: what that
// vouches for is true until then, of the answers that are being forgotten, too. The first
// call for a new stream comes after the last Vouch of the one before.
func (d *Directory) InvalidateAll() {
	d.watchEnd.Store(&watchEnd{d.generation.Load(), min(d.now(), nanos(d.watchedUntil.Load()))})
	d.generation.Add(1)
	d.revision.Store(0) // of another store, perhaps
	d.Rooms.invalidateAll()
	d.Users.invalidateAll()
}

// Stats is a reading of the directory's counters.
type Stats struct {
	Hits, Misses uint64 // queries answered from memory, and not
	Lookups      uint64 // calls of the Source
	LookupErrors uint64
	StaleServed  uint64 // look-ups that failed where a stale answer served
	Refreshes    uint64 // keys looked up again because a node knew better
	Confirmed    uint64 // keys not looked up again because the Controller had stayed with its answer
	Doubted      uint64 // answers that were not believed at first, see Renewed
	Moves        uint64 // changes of members that cached rooms were brought up to date with
	Waiting      int64  // queries in line now
	Rooms, Users int    // entries cached, about
	Members      uint64 // members of the cached rooms, about
	Unions       int    // lists of rooms whose members are kept together, about
	Watched      bool
}

// Stats reads the counters.
func (d *Directory) Stats() Stats {
	s := Stats{
		Rooms: d.Rooms.cache.EstimatedSize(), Users: d.Users.cache.EstimatedSize(),
		Members: d.Rooms.cache.WeightedSize(), Unions: d.unions.cache.EstimatedSize(), Watched: d.now() < nanos(d.watchedUntil.Load()),
	}
	for _, t := range []*Table{d.Rooms, d.Users} {
		for i := range t.lanes {
			h := &t.lanes[i]
			s.Hits += h.hits.Load()
			s.Misses += h.misses.Load()
			s.Lookups += h.lookups.Load()
			s.LookupErrors += h.lookupErrors.Load()
			s.StaleServed += h.staleServed.Load()
			s.Refreshes += h.refreshes.Load()
			s.Confirmed += h.confirmed.Load()
			s.Doubted += h.doubted.Load()
			s.Moves += h.moves.Load()
			s.Waiting += h.waiting.Load()
		}
	}
	return s
}

// Locate has w told where users are now, by one look-up that begins after the call. It takes
// nothing from memory, does not join a look-up under way, and leaves nothing in memory. w is
// told once about all of users, in their order; where the pool of the shard is full, before
// Locate returns. It keeps the slice until then.
func (d *Directory) Locate(shard int, users []string, w Waiter) {
	ln := &d.Users.lanes[shard]
	err := d.cfg.Go(shard, func() {
		timeout := d.timeout(ln.running.Add(1))
		snaps := make([]*Snapshot, len(users))
		err := errPanicked
		defer func() {
			// Runs on a panic of the source, too: nobody is left waiting.
			ln.running.Add(-1)
			if err != nil {
				ln.lookupErrors.Add(1)
				snaps = nil
			}
			w.Routed(users, snaps, err)
		}()
		ln.lookups.Add(1)
		_, err = d.lookup(d.Users, w, timeout, users, make([]*Snapshot, len(users)), snaps)
	})
	if err != nil {
		w.Routed(users, nil, errors.Join(ErrOverloaded, err))
	}
}

// lookup fills snaps for keys from the source. The revision is that of a room's answer, 0 for none.
func (d *Directory) lookup(t *Table, w Waiter, timeout time.Duration, keys []string, olds, snaps []*Snapshot) (revision uint64, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	ctx, end := w.Lookup(ctx, t.name)
	defer func() { end(err) }()
	if t == d.Users {
		nodes := make([][]string, len(keys))
		if err := d.cfg.Source.Users(ctx, keys, nodes); err != nil {
			return 0, err
		}
		for i, user := range keys {
			snaps[i] = d.names.userSnapshot(user, nodes[i], olds[i])
		}
		return 0, nil
	}
	b, ok := d.builders.Get().(*builder)
	if !ok {
		b = newBuilder(d.seed, d.names)
	}
	heard := d.revision.Load()
	found, revision, err := d.cfg.Source.Room(ctx, keys[0], b.add)
	if err != nil {
		return 0, err // and b goes with it: the source may have kept add
	}
	if revision < heard { // One that is older than what the change stream had told before is not what we take it for.
		revision = 0
	}
	snaps[0] = b.snapshot(found, olds[0])
	if b.reset() {
		d.builders.Put(b)
	}
	return revision, nil
}
