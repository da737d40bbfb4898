package jobs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/pause"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	// lookEvery is how often it is looked what has changed, and whether a job has to be run.
	lookEvery = time.Second
	// lookAll is every how many looks all jobs are read, and not only those that have changed.
	lookAll = 60
	// staleAfter is how old the last look may be for a list of what has not ended.
	staleAfter = 5 * time.Second
	// waitsAfter is for how long a job may not get on before it counts as one that waits.
	waitsAfter = time.Minute
	// forgetMost is how many jobs that were kept long enough are forgotten in one look.
	forgetMost = 50
	// PageDefault is how many jobs a page of a list has when nobody says.
	PageDefault = 100
	// PageMost is how many it may have.
	PageMost = 1000
	// pageBytes is how large a page is about at most: clients take 4 MiB unless they are told otherwise.
	pageBytes = 1 << 20
	// idBytes is how long the id of a job may be.
	idBytes = 64
)

// Service has the jobs of all instances, and runs some of them. Its methods are safe for concurrent use. Their errors are
// or wrap those of the package, or are an *engine.InvalidError.
type Service struct {
	// Static after New.
	cfg     Config
	store   *store
	metrics *instruments
	wake    chan struct{} // has room for one: somebody has changed a job
	adding  chan struct{} // has room for one: a job is being made
	stop    chan struct{} // closed by Close
	stopped sync.Once
	wg      sync.WaitGroup
	inquiry inquiries // of users of nodes

	mu sync.Mutex
	// Guarded by mu.
	table   map[key]*stored // by the last look
	looked  time.Time       // when that was
	changes chan struct{}   // closed when the table has changed, and made anew
	running map[key]bool
	cut     context.CancelFunc // of all runs; nil before Start

	// Owned by loop.
	rev    int64 // up to which the table is whole
	absent bool  // etcd has not answered
}

// New makes a Service. Nothing runs before Start.
func New(cfg Config) (*Service, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	return &Service{
		cfg: cfg, store: &store{client: cfg.Client, prefix: Prefix, timeout: cfg.RequestTimeout}, metrics: newInstruments(cfg.Metrics),
		wake: make(chan struct{}, 1), adding: make(chan struct{}, 1), stop: make(chan struct{}), table: map[key]*stored{}, changes: make(chan struct{}), running: map[key]bool{},
	}, nil
}

// Start begins to look for jobs that are to be run.
func (s *Service) Start() {
	ctx, cancel := context.WithCancel(context.Background())
	s.mu.Lock()
	s.cut = cancel
	s.mu.Unlock()
	s.wg.Go(func() { s.loop(ctx) })
}

// Close ends no more turns, waits for what is under way, and leaves the jobs to others. When ctx ends before, the rest is cut
// off: others count it as unknown.
func (s *Service) Close(ctx context.Context) error {
	s.stopped.Do(func() { close(s.stop) })
	s.mu.Lock()
	cut := s.cut
	s.mu.Unlock()
	if cut == nil {
		return nil
	}
	defer cut()
	over := make(chan struct{})
	go func() {
		defer close(over)
		s.wg.Wait()
	}()
	select {
	case <-over:
		return nil
	case <-ctx.Done():
		cut()
		<-over
		return fmt.Errorf("close the jobs: %w", ctx.Err())
	}
}

// loop looks at the jobs until Close.
func (s *Service) loop(ctx context.Context) {
	for n := 0; ; n++ {
		s.look(ctx, n%lookAll == 0)
		wait := time.NewTimer(pause.Jitter(lookEvery))
		select {
		case <-wait.C:
		case <-s.wake:
		case <-s.stop:
			wait.Stop()
			return
		}
		wait.Stop()
	}
}

// look reads what has changed, forgets what was kept long enough, and runs what is due.
func (s *Service) look(ctx context.Context, all bool) {
	defer func() {
		if v := recover(); v != nil {
			s.metrics.panics.Inc()
			s.cfg.Logger.Error("panic in the jobs", "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
		}
	}()
	due, err := s.refresh(ctx, all)
	if err == nil && len(due) > 0 && s.cfg.Ready() {
		err = s.runSome(ctx, due)
	}
	if err != nil {
		s.metrics.etcdErrors.Inc()
	}
	if (err != nil) != s.absent && ctx.Err() == nil {
		if s.absent = err != nil; s.absent {
			s.cfg.Logger.Warn("jobs wait for etcd", "error", err)
		} else {
			s.cfg.Logger.Info("jobs go on, etcd answers again")
		}
	}
}

// refresh brings the table up to date, and tells which jobs are due that do not run here.
func (s *Service) refresh(ctx context.Context, all bool) (due []key, err error) {
	after := s.rev
	if all {
		after = 0
	}
	changed, now, err := s.store.changed(ctx, after)
	if err != nil {
		return nil, err
	}
	if now < s.rev { // an etcd that went back
		all = true
		if changed, now, err = s.store.changed(ctx, 0); err != nil {
			return nil, err
		}
	}
	s.rev = now
	clock := time.Now()
	forget := map[key]int64{}
	s.mu.Lock()
	before := s.table
	if all {
		s.table = make(map[key]*stored, len(changed))
	}
	for k, r := range changed {
		if r.since = clock; before[k] != nil && before[k].rev == r.rev {
			r.since = before[k].since
		}
		s.table[k] = r
	}
	s.looked = clock
	if len(changed) > 0 {
		close(s.changes)
		s.changes = make(chan struct{})
	}
	n, waiting := map[string]int64{}, int64(0)
	for k, r := range s.table {
		n[r.State]++
		if r.waits(clock) {
			waiting++
		}
		switch {
		case r.over() && clock.Sub(r.Ended) > s.cfg.Keep:
			if len(forget) < forgetMost {
				forget[k] = r.rev
			}
		case r.due(clock) && !s.running[k]:
			due = append(due, k)
		}
	}
	slices.SortFunc(due, func(a, b key) int { return s.table[a].Created.Compare(s.table[b].Created) })
	for k := range forget {
		delete(s.table, k)
	}
	s.mu.Unlock()
	for _, state := range states {
		s.metrics.states[state].Store(n[state])
	}
	s.metrics.waiting.Store(waiting)
	for k, rev := range forget {
		if err := s.store.remove(ctx, k, rev); err != nil && !errors.Is(err, errConflict) {
			return due, err
		}
	}
	return due, nil
}

// runSome runs jobs that nobody runs, as far as there is room.
func (s *Service) runSome(ctx context.Context, due []key) error {
	owned, err := s.store.owned(ctx)
	if err != nil {
		return err
	}
	for _, k := range due {
		select {
		case <-s.stop:
			return nil
		default:
		}
		s.mu.Lock()
		all, own := len(s.running), 0
		for r := range s.running {
			if r.tenant == k.tenant {
				own++
			}
		}
		s.mu.Unlock()
		if all >= s.cfg.Running {
			return nil
		}
		if owned[k] || k.tenant != "" && own >= ids.TenantShare(s.cfg.Running, all) { // slow jobs of one tenant do not keep others waiting
			continue
		}
		ours, err := s.store.own(ctx, k, s.cfg.ManagerID, s.cfg.TTL)
		if err != nil {
			return err
		}
		if ours != nil {
			s.run(ctx, k, ours)
		}
	}
	return nil
}

// run runs a job that is ours.
func (s *Service) run(ctx context.Context, k key, own *ownership) {
	s.mu.Lock()
	s.running[k] = true
	s.mu.Unlock()
	s.metrics.running.Add(1)
	s.wg.Go(func() {
		ran := false
		defer func() {
			if ran { // what fails at once is not tried again at once
				s.lookSoon()
			}
		}()
		defer s.metrics.running.Add(-1)
		defer func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.running, k)
		}()
		defer own.release(ctx)
		r := &run{svc: s, key: k, scope: ids.Scope(k.tenant), own: own}
		defer r.recovered("run", func() {})
		err := r.begin(ctx)
		if err == nil {
			s.cfg.Logger.Info("job runs here", "tenant", k.tenant, "job", k.id, "state", r.base.State)
			err = r.loop(ctx, s.stop)
			s.cfg.Logger.Info("job does not run here any more", "tenant", k.tenant, "job", k.id, "state", r.base.State, "targets", r.base.targets())
			ran = err == nil
		}
		if err != nil && !errors.Is(err, errLost) && !errors.Is(err, ErrUnknown) && ctx.Err() == nil {
			s.cfg.Logger.Warn("job is left to others", "tenant", k.tenant, "job", k.id, "error", err)
		}
	})
}

// lookSoon has the loop look at once.
func (s *Service) lookSoon() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// CheckID says what is wrong with the id of a job. The error is an *engine.InvalidError.
func CheckID(id string) error {
	invalid := func(code, text string) error {
		return &engine.InvalidError{Field: "job_id", Code: code, Description: text}
	}
	switch {
	case id == "":
		return invalid(engine.CodeRequired, "must not be empty")
	case len(id) > idBytes:
		return invalid(engine.CodeIDTooLong, fmt.Sprintf("%d bytes, more than %d", len(id), idBytes))
	}
	for i := range len(id) {
		c := id[i]
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && (i == 0 || c != '.' && c != '_' && c != '-') {
			return invalid(engine.CodeIDMalformed, "must be letters, digits, and . _ - behind the first of them")
		}
	}
	return nil
}

// Create makes a job of a tenant, or answers the one that there is with the same id and spec: created tells which. ids and content of the spec have been checked.
func (s *Service) Create(ctx context.Context, tenant, caller, id string, priority engine.Priority, spec *pubsub.BroadcastJobSpec) (job *pubsub.BroadcastJob, created bool, err error) {
	if err := CheckID(id); err != nil {
		return nil, false, err
	}
	k := key{tenant, id}
	for {
		cur, has, err := s.store.get(ctx, k)
		switch {
		case err == nil && !proto.Equal(has, spec):
			return nil, false, ErrExists
		case err == nil:
			return cur.show(id, has, time.Now()), false, nil
		case !errors.Is(err, ErrUnknown):
			return nil, false, err
		}
		r, err := newRecord(spec, s.cfg.MaxRate, time.Now())
		if err != nil {
			return nil, false, err
		}
		r.CreatedBy, r.Priority = caller, priority
		bytes, err := proto.MarshalOptions{Deterministic: true}.Marshal(spec)
		if err != nil {
			return nil, false, fmt.Errorf("encode the spec of a job: %w", err)
		}
		made, err := s.add(ctx, k, bytes, &r)
		if err != nil {
			return nil, false, err
		}
		if made {
			s.lookSoon()
			return r.show(id, spec, time.Now()), true, nil
		}
	}
}

// add writes a new job if so many may be kept: one after the other, so that calls at the same moment are not too many together.
func (s *Service) add(ctx context.Context, k key, spec []byte, r *record) (made bool, err error) {
	select {
	case s.adding <- struct{}{}:
		defer func() { <-s.adding }()
	case <-ctx.Done():
		return false, unavailable(ctx.Err())
	}
	own, all, err := s.store.count(ctx, k.tenant)
	switch {
	case err != nil:
		return false, err
	case all >= int64(s.cfg.Most):
		return false, ErrFull
	case k.tenant != "" && own >= int64(ids.TenantShare(s.cfg.Most, int(all))):
		return false, ErrFullTenant
	}
	return s.store.create(context.WithoutCancel(ctx), k, spec, r) // a caller who leaves now would have made it, and nobody would write that down
}

// Get answers a job.
func (s *Service) Get(ctx context.Context, tenant, id string) (*pubsub.BroadcastJob, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	cur, spec, err := s.store.get(ctx, key{tenant, id})
	if err != nil {
		return nil, err
	}
	return cur.show(id, spec, time.Now()), nil
}

// List answers jobs of a tenant behind an id, size of them at most, without their specs. next is the id to go on behind, "" for the end.
// Those that have not ended are as the last look has seen them.
func (s *Service) List(ctx context.Context, tenant, after string, size int, notEnded bool) (jobs []*pubsub.BroadcastJob, next string, err error) {
	if size < 0 || size > PageMost {
		return nil, "", &engine.InvalidError{Field: "page_size", Code: engine.CodeOutOfRange, Description: fmt.Sprintf("must be between 0 and %d", PageMost)}
	}
	if after != "" && CheckID(after) != nil {
		return nil, "", &engine.InvalidError{Field: "page_token", Code: engine.CodeMalformed, Description: "must be the next_page_token of a page, or empty"}
	}
	list := s.store.page
	if notEnded {
		list = s.openJobs
	}
	names, records, more, err := list(ctx, tenant, after, cmp.Or(size, PageDefault))
	if err != nil {
		return nil, "", err
	}
	bytes := 0
	for i, r := range records {
		job := r.show(names[i], nil, time.Now())
		if bytes += job.SizeVT(); bytes > pageBytes && i > 0 {
			more = true
			break
		}
		jobs = append(jobs, job)
	}
	if more && len(jobs) > 0 {
		next = names[len(jobs)-1]
	}
	return jobs, next, nil
}

// openJobs lists jobs as store.page does, out of the table, without those that have ended.
func (s *Service) openJobs(_ context.Context, tenant, after string, most int) (names []string, records []*stored, more bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.looked) > staleAfter {
		return nil, nil, false, ErrUnavailable
	}
	for k, r := range s.table {
		if k.tenant == tenant && k.id > after && !r.over() {
			names = append(names, k.id)
		}
	}
	slices.Sort(names)
	if more = len(names) > most; more {
		names = names[:most]
	}
	for _, id := range names {
		records = append(records, s.table[key{tenant, id}])
	}
	return names, records, more, nil
}

// Delete forgets a job that has ended.
func (s *Service) Delete(ctx context.Context, tenant, id string) (*pubsub.BroadcastJob, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	k := key{tenant, id}
	cur, spec, err := s.store.get(ctx, k)
	if err != nil {
		return nil, err
	}
	if !cur.over() {
		return nil, ErrNotEnded
	}
	switch err := s.store.remove(context.WithoutCancel(ctx), k, cur.rev); { // as in add
	case errors.Is(err, errConflict): // of what has ended nothing changes: somebody else was faster
		return nil, ErrUnknown
	case err != nil:
		return nil, err
	}
	s.mu.Lock()
	if has := s.table[k]; has != nil && has.rev == cur.rev {
		delete(s.table, k)
	}
	s.mu.Unlock()
	return cur.show(id, spec, time.Now()), nil
}

// Pause has nobody's turn come any more, a second later at the latest.
func (s *Service) Pause(ctx context.Context, tenant, id string) (*pubsub.BroadcastJob, error) {
	return s.change(ctx, tenant, id, func(r *record) (bool, error) { return r.pause() })
}

// Resume goes on.
func (s *Service) Resume(ctx context.Context, tenant, id string) (*pubsub.BroadcastJob, error) {
	return s.change(ctx, tenant, id, func(r *record) (bool, error) { return r.resume(time.Now()) })
}

// Cancel ends a job.
func (s *Service) Cancel(ctx context.Context, tenant, id string) (*pubsub.BroadcastJob, error) {
	return s.change(ctx, tenant, id, func(r *record) (bool, error) { return r.cancel(time.Now()) })
}

// SetRate changes the speed of a job.
func (s *Service) SetRate(ctx context.Context, tenant, id string, rate int) (*pubsub.BroadcastJob, error) {
	if err := checkRate("", rate, s.cfg.MaxRate); err != nil {
		return nil, err
	}
	return s.change(ctx, tenant, id, func(r *record) (bool, error) { return r.setRate(rate) })
}

// change changes a record. Whoever runs the job notices with its next write.
func (s *Service) change(ctx context.Context, tenant, id string, f func(*record) (bool, error)) (*pubsub.BroadcastJob, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	k := key{tenant, id}
	for {
		cur, spec, err := s.store.get(ctx, k)
		if err != nil {
			return nil, err
		}
		next := cur.record
		changed, err := f(&next)
		if err != nil {
			return nil, err
		}
		if changed {
			_, err = s.store.write(context.WithoutCancel(ctx), k, &next, cur.rev) // as in add
		}
		switch {
		case err == nil:
			s.lookSoon()
			return next.show(id, spec, time.Now()), nil
		case !errors.Is(err, errConflict):
			return nil, err
		case !pause.For(ctx, pause.Jitter(10*time.Millisecond)): // whoever runs the job has written
			return nil, unavailable(ctx.Err())
		}
	}
}

// Watch calls send with a job at once, and then when it has changed, until it is over or ctx ends. Its errors are those of send, too.
func (s *Service) Watch(ctx context.Context, tenant, id string, send func(*pubsub.BroadcastJob) error) error {
	if err := CheckID(id); err != nil {
		return err
	}
	k := key{tenant, id}
	cur, err := s.store.getRecord(ctx, k)
	for err == nil {
		if err := send(cur.show(id, nil, time.Now())); err != nil || cur.over() {
			return err
		}
		cur, err = s.newer(ctx, k, cur.rev)
	}
	return err
}

// newer waits for a record that was written after a revision.
func (s *Service) newer(ctx context.Context, k key, rev int64) (*stored, error) {
	for missing := 0; ; {
		s.mu.Lock()
		cur, changes := s.table[k], s.changes
		s.mu.Unlock()
		switch {
		case cur != nil && cur.rev > rev:
			return cur, nil
		case cur == nil: // it may be younger than the last look
			if missing++; missing > 2 {
				return nil, ErrUnknown
			}
		}
		select {
		case <-changes:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
